/* Convolution, SiLU and the state space's step on vectors of 8. */
#include "../tier.h"
#include "expf.h"

/* x[0 .. 8), zeros from n on. */
static inline __m256 load(const float *x, size_t n) {
    return n >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lanes_below(n));
}
static inline void store(float *x, size_t n, __m256 v) {
    if (n >= 8)
        _mm256_storeu_ps(x, v);
    else
        _mm256_maskstore_ps(x, lanes_below(n), v);
}

void SM_NAME(sm_conv)(float *out, const float *const *x, const float *w, size_t stride,
                      const float *bias, size_t k, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 acc = bias != NULL ? load(bias + i, n - i) : _mm256_setzero_ps();
        for (size_t j = 0; j < k; j++)
            acc = _mm256_fmadd_ps(load(w + j * stride + i, n - i), load(x[j] + i, n - i), acc);
        store(out + i, n - i, acc);
    }
}

void SM_NAME(sm_silu)(float *out, const float *x, size_t n) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 8) {
        __m256 v = load(x + i, n - i);
        __m256 e = expf8(_mm256_xor_ps(v, sign));
        store(out + i, n - i, _mm256_div_ps(v, _mm256_add_ps(one, e)));
    }
}

#define COLUMNS 4 /* vectors of a head that are in registers together */

void SM_NAME(sm_ssm_step)(const struct sm_ssm_step *a) {
    const __m256 dt = _mm256_set1_ps(a->dt), decay = _mm256_set1_ps(a->decay);
    for (size_t i = 0; i < a->head; i += 8 * COLUMNS) {
        size_t n = a->head - i;
        __m256 u[COLUMNS], y[COLUMNS];
        size_t columns = SM_MIN((n + 7) / 8, COLUMNS);
        for (size_t v = 0; v < columns; v++) {
            __m256 x = load(a->x + i + 8 * v, n - 8 * v);
            u[v] = _mm256_mul_ps(x, dt);
            y[v] = _mm256_mul_ps(x, _mm256_set1_ps(a->skip));
        }
        for (size_t s = 0; s < a->n_state; s++) {
            const float *from = a->from + s * a->head + i;
            float *to = a->to + s * a->head + i;
            const __m256 b = _mm256_set1_ps(a->b[s]), c = _mm256_set1_ps(a->c[s]);
            for (size_t v = 0; v < columns; v++) {
                __m256 h = _mm256_fmadd_ps(load(from + 8 * v, n - 8 * v), decay,
                                           _mm256_mul_ps(u[v], b));
                store(to + 8 * v, n - 8 * v, h);
                y[v] = _mm256_fmadd_ps(h, c, y[v]);
            }
        }
        for (size_t v = 0; v < columns; v++) store(a->y + i + 8 * v, n - 8 * v, y[v]);
    }
}
