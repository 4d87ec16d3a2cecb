/* The rule by which activations, keys and values become int8 (kernels.h): static inline only. */
#ifndef SM_QUANTIZE_H
#define SM_QUANTIZE_H

#include <math.h>

#include "kernels.h"

/* Largest |x| as bits, which order like the values, NaN above infinity. */
static inline uint32_t sm_max_abs_bits(const float *x, size_t n) {
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        max = bits > max ? bits : max;
    }
    return max;
}

/* Codes of x [n] to q[i * stride], their scale to *d.  false where a value is infinite or NaN: then
 * the codes are 0 and the scale is NaN. */
static inline bool sm_quantize(int8_t *q, size_t stride, float *d, const float *x, size_t n) {
    uint32_t bits = sm_max_abs_bits(x, n);
    const bool finite = bits < 0x7f800000u;
    float amax;
    memcpy(&amax, &bits, sizeof amax);
    if (!finite || amax < 0x1p-100f) {
        for (size_t i = 0; i < n; i++) q[i * stride] = 0;
        *d = finite ? 0.0f : NAN;
        return finite;
    }
    const float id = 127.0f / amax;
    for (size_t i = 0; i < n; i++) {
        float code = (x[i] * id + 0x1.8p+23f) - 0x1.8p+23f; /* rounds to even: |x| < 2^22 */
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        q[i * stride] = (int8_t)code;
    }
    *d = amax / 127.0f;
    return true;
}

/* kv_store for int8; a scale that is NaN makes the pass fail as non-finite. */
static inline void sm_kv_store_q8(void *k_page, void *v_page, size_t slot, const float *k,
                                  const float *v, size_t head) {
    int8_t *kq = (int8_t *)k_page + slot / 16 * 16 * head + slot % 16;
    int8_t *vq = (int8_t *)v_page + slot * head;
    (void)sm_quantize(kq, 16, sm_kv_scales(k_page, head) + slot, k, head);
    (void)sm_quantize(vq, 1, sm_kv_scales(v_page, head) + slot, v, head);
}

#endif
