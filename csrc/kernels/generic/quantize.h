/* Blocks of float values as int8 codes and a scale (kernels.h): activations, and the Q8 cache. */
#ifndef SM_GENERIC_QUANTIZE_H
#define SM_GENERIC_QUANTIZE_H

#include "../kernels.h"

/* Largest |x| as bits, which order like the values, NaN above infinity. */
static inline uint32_t max_abs_bits(const float *x, size_t n) {
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        max = bits > max ? bits : max;
    }
    return max;
}

/* Codes of x[n] into q[size] (n <= size, zeros after) and the scale into *d; false, and nothing is
 * written, where a value is infinite or NaN. */
static inline bool quantize(int8_t *q, float *d, const float *x, size_t n, size_t size) {
    uint32_t bits = max_abs_bits(x, n);
    if (bits >= 0x7f800000u) return false;
    float amax;
    memcpy(&amax, &bits, sizeof amax);
    if (amax < 0x1p-100f) n = 0;
    *d = n == 0 ? 0.0f : amax / 127.0f;
    float id = n == 0 ? 0.0f : 127.0f / amax;
    for (size_t i = 0; i < n; i++) {
        float code = (x[i] * id + 0x1.8p+23f) - 0x1.8p+23f; /* rounds to even: |x| < 2^22 */
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        q[i] = (int8_t)code;
    }
    memset(q + n, 0, size - n);
    return true;
}

#endif
