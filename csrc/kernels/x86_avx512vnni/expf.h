/* sm_expf on 16 lanes: the same operations in the same order, so the same bits. */
#ifndef SM_AVX512_EXPF_H
#define SM_AVX512_EXPF_H

#include <immintrin.h>

#include "../expf.h"
#include "../kernels.h"

static inline __m512 expf16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(SM_EXPF_MAGIC);
    __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(SM_EXPF_MIN), _CMP_NLE_UQ);
    /* min_ps and max_ps return their second operand where it is NaN. */
    __m512 y = _mm512_min_ps(_mm512_set1_ps(SM_EXPF_MAX), x);
    __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(y, _mm512_set1_ps(SM_EXPF_LOG2E), magic), magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-SM_EXPF_LN2_HI), y);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(SM_EXPF_LN2_LO), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(SM_EXPF_C6), r, _mm512_set1_ps(SM_EXPF_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(SM_EXPF_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(SM_EXPF_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(SM_EXPF_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    /* Below the kept range the lanes are whatever they are; n is small enough in it for exact
     * scaling. */
    return _mm512_maskz_scalef_ps(kept, p, n);
}

/* sm_softcap on 16 lanes; twice: 2 / cap. */
static inline __m512 softcap16(__m512 x, __m512 cap, __m512 twice) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 u = expf16(_mm512_mul_ps(x, twice));
    return _mm512_mul_ps(cap, _mm512_div_ps(_mm512_sub_ps(u, one), _mm512_add_ps(u, one)));
}

/* gelu(x), of kernels.h */
static inline __m512 gelu16(__m512 x) {
    __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(SM_GELU_B), _mm512_mul_ps(x, x),
                               _mm512_set1_ps(SM_GELU_A));
    u = _mm512_xor_ps(_mm512_mul_ps(x, u), _mm512_set1_ps(-0.0f));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), expf16(u)));
}

/* v[i] += v[i + 8], then + 4, + 2, + 1. */
static inline float tree16(__m512 v) {
    __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

#endif
