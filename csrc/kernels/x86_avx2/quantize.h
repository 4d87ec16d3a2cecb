/* Quantizing blocks of floats on vectors of 8.
 *
 * |x| <= amax makes |x * (127 / amax)| at most 127 (1 + 2^-24)^2, which rounds to 127: the
 * contract's clamp has nothing to do. */
#ifndef SM_AVX2_QUANTIZE_H
#define SM_AVX2_QUANTIZE_H

#include <immintrin.h>

#include "../kernels.h"

/* x[i .. i + 8), zeros from n on. */
static inline __m256 load_row(const float *x, size_t i, size_t n) {
    if (i + 8 <= n) return _mm256_loadu_ps(x + i);
    float tail[8] = {0};
    if (i < n) memcpy(tail, x + i, (n - i) * sizeof *x);
    return _mm256_loadu_ps(tail);
}

/* |x| as bits, which order like the values. */
static inline __m256i abs_bits(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

static inline int32_t largest_lane(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}

/* The scale from the bits of amax; *id is what values are multiplied by. */
static inline float block_scale(int32_t bits, float *id) {
    float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    bool tiny = amax < 0x1p-100f;
    *id = tiny ? 0.0f : 127.0f / amax;
    return tiny ? 0.0f : amax / 127.0f;
}

/* Codes of x[i .. i + 32). */
static inline __m256i quantize32(const float *x, size_t i, size_t n, float id) {
    __m256i v[4];
    for (size_t j = 0; j < 4; j++)
        v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(load_row(x, i + 8 * j, n), _mm256_set1_ps(id)));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]),
                                        _mm256_packs_epi32(v[2], v[3]));
    /* The packs work within halves: 0 2 4 6 | 1 3 5 7 in fours. */
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#endif
