/* Norm, rotation and SwiGLU on vectors of 16; the last vector is masked. */
#include <math.h>

#include "../tier.h"
#include "expf.h"

/* Lanes of the vector at i that lie below n. */
static inline __mmask16 lanes(size_t i, size_t n) {
    return n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
}

void SM_NAME(sm_rms_norm)(float *out, const float *x, const float *w, size_t n, float eps) {
    __m512 lane = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(i, n), x + i);
        lane = _mm512_fmadd_ps(v, v, lane);
    }
    __m512 r = _mm512_set1_ps(1.0f / sqrtf(tree16(lane) / (float)n + eps));
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), r);
        v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, w + i));
        _mm512_mask_storeu_ps(out + i, mask, v);
    }
}

void SM_NAME(sm_rope_pairs)(float *x, const float *cos, const float *sin, size_t n_pairs) {
    const __m512i interleave =
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    for (size_t i = 0; i < n_pairs; i += 8) {
        __mmask16 mask = lanes(2 * i, 2 * n_pairs);
        __mmask8 half = (__mmask8)(n_pairs - i >= 8 ? 0xff : (1u << (n_pairs - i)) - 1);
        __m512 c = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(half, cos + i));
        __m512 s = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(half, sin + i));
        __m512 cs = _mm512_permutex2var_ps(c, interleave, s);
        __m512 sc = _mm512_permutex2var_ps(s, interleave, c);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + 2 * i);
        /* Even lanes x0 c - x1 s, odd lanes x0 s + x1 c. */
        v = _mm512_fmaddsub_ps(_mm512_moveldup_ps(v), cs,
                               _mm512_mul_ps(_mm512_movehdup_ps(v), sc));
        _mm512_mask_storeu_ps(x + 2 * i, mask, v);
    }
}

void SM_NAME(sm_swiglu)(float *out, const float *gate, const float *up, size_t n) {
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, expf16(_mm512_xor_ps(g, sign))));
        _mm512_mask_storeu_ps(out + i, mask,
                              _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}
