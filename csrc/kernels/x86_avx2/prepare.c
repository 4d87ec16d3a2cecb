/* Quantizing activations on vectors of 8.
 *
 * |x| <= amax makes |x * (127 / amax)| at most 127 (1 + 2^-24)^2, which rounds to 127: the
 * contract's clamp has nothing to do. */
#include <immintrin.h>

#include "../tier.h"

#define INLINE static inline __attribute__((always_inline))

/* x[i .. i + 8), zeros from n on. */
INLINE __m256 load(const float *x, size_t i, size_t n) {
    if (i + 8 <= n) return _mm256_loadu_ps(x + i);
    float tail[8] = {0};
    if (i < n) memcpy(tail, x + i, (n - i) * sizeof *x);
    return _mm256_loadu_ps(tail);
}

/* |x| as bits, which order like the values. */
INLINE __m256i abs_bits(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

INLINE int32_t largest_lane(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}

/* The scale from the bits of amax; *id is what values are multiplied by. */
INLINE float scale(int32_t bits, float *id) {
    float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    bool tiny = amax < 0x1p-100f;
    *id = tiny ? 0.0f : 127.0f / amax;
    return tiny ? 0.0f : amax / 127.0f;
}

/* Codes of x[i .. i + 32). */
INLINE __m256i quantize32(const float *x, size_t i, size_t n, float id) {
    __m256i v[4];
    for (size_t j = 0; j < 4; j++)
        v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(load(x, i + 8 * j, n), _mm256_set1_ps(id)));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]),
                                        _mm256_packs_epi32(v[2], v[3]));
    /* The packs work within halves: 0 2 4 6 | 1 3 5 7 in fours. */
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* Sums of 8 codes each, as four 64-bit lanes. */
INLINE __m256i sums8(__m256i codes) {
    __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(-128)),
                                   _mm256_setzero_si256());
    return _mm256_sub_epi64(sums, _mm256_set1_epi64x(8 * 128));
}

bool SM_NAME(sm_prepare_q8_32)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 32, at = row * n_blocks;
    int8_t *q = a->q + row * a->stride;
    int32_t largest = 0;
    for (size_t b = 0; b < n_blocks; b++) {
        __m256i max = _mm256_setzero_si256();
        for (size_t i = 32 * b; i < 32 * b + 32; i += 8)
            max = _mm256_max_epi32(max, abs_bits(load(x, i, a->k)));
        int32_t bits = largest_lane(max);
        largest = SM_MAX(largest, bits);
        float id, d = scale(bits, &id);
        __m256i codes = quantize32(x, 32 * b, a->k, id);
        _mm256_storeu_si256((__m256i *)(q + 32 * b), codes);
        __m256i four = sums8(codes);
        __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four),
                                    _mm256_extracti128_si256(four, 1));
        int32_t sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2);
        a->d[at + b] = d;
        a->sum[at + b] = (int16_t)sum;
        a->s[at + b] = d * (float)sum;
    }
    return largest < 0x7f800000;
}

bool SM_NAME(sm_prepare_q8_256)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 256;
    int32_t largest = 0;
    int16_t *sum = a->sum + row * (a->k_pad / 16);
    for (size_t b = 0; b < n_blocks; b++) {
        __m256i max = _mm256_setzero_si256();
        for (size_t i = 256 * b; i < 256 * b + 256; i += 8)
            max = _mm256_max_epi32(max, abs_bits(load(x, i, a->k)));
        int32_t bits = largest_lane(max);
        largest = SM_MAX(largest, bits);
        float id;
        a->d[row * n_blocks + b] = scale(bits, &id);
        for (size_t i = 256 * b; i < 256 * b + 256; i += 32) {
            __m256i codes = quantize32(x, i, a->k, id), four = sums8(codes);
            _mm256_storeu_si256((__m256i *)(a->q + row * a->stride + i), codes);
            __m256i two = _mm256_add_epi64(four, _mm256_shuffle_epi32(four, 0x4e));
            sum[i / 16] = (int16_t)_mm256_extract_epi16(two, 0);
            sum[i / 16 + 1] = (int16_t)_mm256_extract_epi16(two, 8);
        }
    }
    return largest < 0x7f800000;
}
