/* Activations: float rows and int8 rows with scales (kernels.h). */
#include "../quantize.h"
#include "../tier.h"

bool SM_NAME(sm_prepare_f32)(struct sm_acts *a, size_t row, const float *x) {
    float *out = a->f + row * a->stride;
    memcpy(out, x, a->k * sizeof *x);
    memset(out + a->k, 0, (a->k_pad - a->k) * sizeof *x);
    return sm_max_abs_bits(x, a->k) < 0x7f800000u;
}

/* Codes of x[n] into q[size] (n <= size, zeros after) and the scale into *d. */
static bool quantize(int8_t *q, float *d, const float *x, size_t n, size_t size) {
    memset(q + n, 0, size - n);
    return sm_quantize(q, 1, d, x, n);
}

static int16_t sum_codes(const int8_t *q, size_t n) {
    int sum = 0;
    for (size_t i = 0; i < n; i++) sum += q[i];
    return (int16_t)sum;
}

bool SM_NAME(sm_prepare_q8_32)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 32;
    int8_t *q = a->q + row * a->stride;
    for (size_t b = 0; b < n_blocks; b++) {
        size_t i = row * n_blocks + b;
        if (!quantize(q + 32 * b, a->d + i, x + 32 * b, SM_MIN(32, a->k - 32 * b), 32))
            return false;
        a->sum[i] = sum_codes(q + 32 * b, 32);
        a->s[i] = a->d[i] * (float)a->sum[i];
    }
    return true;
}

bool SM_NAME(sm_prepare_q8_256)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 256;
    int8_t *q = a->q + row * a->stride;
    int16_t *sum = a->sum + row * (a->k_pad / 16);
    for (size_t b = 0; b < n_blocks; b++) {
        if (!quantize(q + 256 * b, a->d + row * n_blocks + b, x + 256 * b,
                      SM_MIN(256, a->k - 256 * b), 256))
            return false;
    }
    for (size_t i = 0; i < a->k_pad / 16; i++) sum[i] = sum_codes(q + 16 * i, 16);
    return true;
}
