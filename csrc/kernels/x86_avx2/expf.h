/* sm_expf on 8 lanes: the same operations in the same order, so the same bits. */
#ifndef SM_AVX2_EXPF_H
#define SM_AVX2_EXPF_H

#include <immintrin.h>

#include "../expf.h"
#include "../kernels.h"

static inline __m256 expf8(__m256 x) {
    const __m256 magic = _mm256_set1_ps(SM_EXPF_MAGIC);
    __m256 kept = _mm256_cmp_ps(x, _mm256_set1_ps(SM_EXPF_MIN), _CMP_NLE_UQ);
    /* min_ps and max_ps return their second operand where it is NaN. */
    __m256 y = _mm256_min_ps(_mm256_set1_ps(SM_EXPF_MAX), x);
    y = _mm256_max_ps(_mm256_set1_ps(SM_EXPF_MIN), y);
    __m256 t = _mm256_fmadd_ps(y, _mm256_set1_ps(SM_EXPF_LOG2E), magic);
    __m256 n = _mm256_sub_ps(t, magic);
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-SM_EXPF_LN2_HI), y);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(SM_EXPF_LN2_LO), r);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(SM_EXPF_C6), r, _mm256_set1_ps(SM_EXPF_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(SM_EXPF_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(SM_EXPF_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(SM_EXPF_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i scale = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23),
                                     _mm256_set1_epi32(0x3f800000));
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(scale)), kept);
}

/* sm_softcap on 8 lanes; twice: 2 / cap. */
static inline __m256 softcap8(__m256 x, __m256 cap, __m256 twice) {
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 u = expf8(_mm256_mul_ps(x, twice));
    return _mm256_mul_ps(cap, _mm256_div_ps(_mm256_sub_ps(u, one), _mm256_add_ps(u, one)));
}

/* gelu(x), of kernels.h */
static inline __m256 gelu8(__m256 x) {
    __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(SM_GELU_B), _mm256_mul_ps(x, x),
                               _mm256_set1_ps(SM_GELU_A));
    u = _mm256_xor_ps(_mm256_mul_ps(x, u), _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), expf8(u)));
}

/* v[i] += v[i + 8] (lo and hi), then + 4, + 2, + 1. */
static inline float tree16(__m256 lo, __m256 hi) {
    __m256 v8 = _mm256_add_ps(lo, hi);
    __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

/* The first n lanes, for masked loads and stores. */
static inline __m256i lanes_below(size_t n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : (int)n), index);
}

#endif
