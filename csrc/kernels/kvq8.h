/* One position of one head as int8 with a scale, for kv_store: the rule of activations (kernels.h). */
#ifndef SM_KVQ8_H
#define SM_KVQ8_H

#include <math.h>

#include "kernels.h"

/* Codes of x [n] to codes[i * stride]; returns their scale, NaN where a value is infinite or NaN. */
static inline float sm_kv_quantize(int8_t *codes, size_t stride, const float *x, size_t n) {
    uint32_t max = 0; /* of |x| as bits, which order like the values, NaN above infinity */
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        max = bits > max ? bits : max;
    }
    float amax;
    memcpy(&amax, &max, sizeof amax);
    const bool finite = max < 0x7f800000u;
    if (!finite || amax < 0x1p-100f) {
        for (size_t i = 0; i < n; i++) codes[i * stride] = 0;
        return finite ? 0.0f : NAN;
    }
    const float id = 127.0f / amax;
    for (size_t i = 0; i < n; i++) {
        float code = (x[i] * id + 0x1.8p+23f) - 0x1.8p+23f; /* rounds to even: |x| < 2^22 */
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        codes[i * stride] = (int8_t)code;
    }
    return amax / 127.0f;
}

static inline void sm_kv_store_q8(void *k_page, void *v_page, size_t slot, const float *k,
                                  const float *v, size_t head) {
    int8_t *kq = (int8_t *)k_page + slot / 16 * 16 * head + slot % 16;
    int8_t *vq = (int8_t *)v_page + slot * head;
    sm_kv_scales(k_page, head)[slot] = sm_kv_quantize(kq, 16, k, head);
    sm_kv_scales(v_page, head)[slot] = sm_kv_quantize(vq, 1, v, head);
}

#endif
