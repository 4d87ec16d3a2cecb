/* Activations as int8 codes, scales and sums (kernels.h). */
#include "../tier.h"
#include "quantize.h"

#define INLINE static inline __attribute__((always_inline))

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
            max = _mm256_max_epi32(max, abs_bits(load_row(x, i, a->k)));
        int32_t bits = largest_lane(max);
        largest = SM_MAX(largest, bits);
        float id, d = block_scale(bits, &id);
        __m256i codes = quantize32(x, 32 * b, a->k, id);
        _mm256_storeu_si256((__m256i *)(q + 32 * b), codes);
        __m256i four = sums8(codes);
        __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four),
                                    _mm256_extracti128_si256(four, 1));
        int32_t sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2);
        a->d[at + b] = d;
        a->sum[at + b] = sum;
        a->s[at + b] = d * (float)sum;
    }
    return largest < 0x7f800000;
}

bool SM_NAME(sm_prepare_q8_256)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 256;
    int32_t largest = 0, *sum = a->sum + row * (a->k_pad / 16);
    for (size_t b = 0; b < n_blocks; b++) {
        __m256i max = _mm256_setzero_si256();
        for (size_t i = 256 * b; i < 256 * b + 256; i += 8)
            max = _mm256_max_epi32(max, abs_bits(load_row(x, i, a->k)));
        int32_t bits = largest_lane(max);
        largest = SM_MAX(largest, bits);
        float id;
        a->d[row * n_blocks + b] = block_scale(bits, &id);
        for (size_t i = 256 * b; i < 256 * b + 256; i += 32) {
            __m256i codes = quantize32(x, i, a->k, id), four = sums8(codes);
            _mm256_storeu_si256((__m256i *)(a->q + row * a->stride + i), codes);
            __m256i two = _mm256_add_epi64(four, _mm256_shuffle_epi32(four, 0x4e));
            sum[i / 16] = _mm256_extract_epi32(two, 0);
            sum[i / 16 + 1] = _mm256_extract_epi32(two, 4);
        }
    }
    return largest < 0x7f800000;
}
