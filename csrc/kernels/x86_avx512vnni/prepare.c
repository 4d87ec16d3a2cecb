/* Quantizing activations on vectors of 16.
 *
 * |x| <= amax makes |x * (127 / amax)| at most 127 (1 + 2^-24)^2, which rounds to 127: the
 * contract's clamp has nothing to do. */
#include <immintrin.h>

#include "../tier.h"

#define INLINE static inline __attribute__((always_inline))

/* x[i .. i + 16), zeros from n on. */
INLINE __m512 load(const float *x, size_t i, size_t n) {
    if (i + 16 <= n) return _mm512_loadu_ps(x + i);
    if (i >= n) return _mm512_setzero_ps();
    return _mm512_maskz_loadu_ps((__mmask16)((1u << (n - i)) - 1), x + i);
}

/* |x| as bits, which order like the values. */
INLINE __m512i abs_bits(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/* The scale from the bits of amax; *id is what values are multiplied by. */
INLINE float scale(int32_t bits, float *id) {
    float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    bool tiny = amax < 0x1p-100f;
    *id = tiny ? 0.0f : 127.0f / amax;
    return tiny ? 0.0f : amax / 127.0f;
}

INLINE __m128i quantize(__m512 x, __m512 id) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, id)));
}

/* v [8][16] -> [8]: what `op` makes of each vector's 16 values. */
#define DEFINE_FOLD(name, op)                                                                          \
    INLINE __m256i name(const __m512i v[8]) {                                                          \
        __m512i half[4], fours[2]; /* fours [2][4 parts][4 vectors] */                                 \
        for (int i = 0; i < 4; i++)                                                                    \
            half[i] = op(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),                                \
                         _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));                               \
        for (int i = 0; i < 2; i++)                                                                    \
            fours[i] = op(_mm512_unpacklo_epi64(half[2 * i], half[2 * i + 1]),                         \
                          _mm512_unpackhi_epi64(half[2 * i], half[2 * i + 1]));                        \
        __m512i both = op(_mm512_shuffle_i32x4(fours[0], fours[1], 0x44),                              \
                          _mm512_shuffle_i32x4(fours[0], fours[1], 0xee));                             \
        both = op(both, _mm512_shuffle_i32x4(both, both, 0xb1));                                       \
        return _mm512_castsi512_si256(_mm512_shuffle_i32x4(both, both, 0x08));                         \
    }
DEFINE_FOLD(fold_max, _mm512_max_epi32)
DEFINE_FOLD(fold_sum, _mm512_add_epi32)
#undef DEFINE_FOLD

/* Eight blocks at once, whose maxima and sums are then one vector each: blocks at + 0 .. at + 7 of the
 * scales from x [256] into q [256].  Raises *largest to the bits of the largest |x|. */
INLINE void prepare_eight(struct sm_acts *a, size_t at, int8_t *q, const float *x, __m256i *largest) {
    __m512i v[8];
    for (int b = 0; b < 8; b++)
        v[b] = _mm512_max_epi32(abs_bits(_mm512_loadu_ps(x + 32 * b)),
                                abs_bits(_mm512_loadu_ps(x + 32 * b + 16)));
    __m256i bits = fold_max(v);
    *largest = _mm256_max_epi32(*largest, bits);
    __m256 amax = _mm256_castsi256_ps(bits);
    __mmask8 whole = _mm256_cmp_ps_mask(amax, _mm256_set1_ps(0x1p-100f), _CMP_NLT_UQ);
    __m256 d = _mm256_maskz_div_ps(whole, amax, _mm256_set1_ps(127.0f));
    float ids[8];
    _mm256_storeu_ps(ids, _mm256_maskz_div_ps(whole, _mm256_set1_ps(127.0f), amax));
    for (int b = 0; b < 8; b += 2) {
        __m512i codes[4];
        for (int i = 0; i < 4; i++) {
            __m512 id = _mm512_set1_ps(ids[b + i / 2]);
            codes[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 32 * b + 16 * i), id));
        }
        v[b] = _mm512_add_epi32(codes[0], codes[1]);
        v[b + 1] = _mm512_add_epi32(codes[2], codes[3]);
        __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), /* [4 parts][4 codes] */
                                           _mm512_packs_epi32(codes[2], codes[3]));
        bytes = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
        _mm512_storeu_si512(q + 32 * b, bytes);
    }
    __m256i sum = fold_sum(v);
    _mm256_storeu_ps(a->d + at, d);
    _mm_storeu_si128((__m128i *)(void *)(a->sum + at), _mm256_cvtepi32_epi16(sum));
    _mm256_storeu_ps(a->s + at, _mm256_mul_ps(d, _mm256_cvtepi32_ps(sum)));
}

bool SM_NAME(sm_prepare_q8_32)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 32, at = row * n_blocks, b = 0;
    int8_t *q = a->q + row * a->stride;
    __m256i eight = _mm256_setzero_si256();
    for (; 32 * (b + 8) <= a->k; b += 8) prepare_eight(a, at + b, q + 32 * b, x + 32 * b, &eight);
    int32_t largest = _mm512_reduce_max_epi32(_mm512_zextsi256_si512(eight));
    for (; b < n_blocks; b++) {
        __m512 lo = load(x, 32 * b, a->k), hi = load(x, 32 * b + 16, a->k);
        int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(abs_bits(lo), abs_bits(hi)));
        largest = SM_MAX(largest, bits);
        float id, d = scale(bits, &id);
        __m512 ids = _mm512_set1_ps(id);
        __m256i codes = _mm256_set_m128i(quantize(hi, ids), quantize(lo, ids));
        _mm256_storeu_si256((__m256i *)(q + 32 * b), codes);
        __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(-128)),
                                       _mm256_setzero_si256());
        __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums),
                                    _mm256_extracti128_si256(sums, 1));
        int32_t sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2) - 32 * 128;
        a->d[at + b] = d;
        a->sum[at + b] = (int16_t)sum;
        a->s[at + b] = d * (float)sum;
    }
    return largest < 0x7f800000;
}

/* Within each 128 bits: a0 + a2, b0 + b2, a1 + a3, b1 + b3. */
INLINE __m512i fold_pairs(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

/* Sums of 16 codes each, of 256. */
INLINE __m512i sums16(const int8_t *q) {
    __m512i v[4]; /* [vector][group in it][4 partial sums] */
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1),
                                   _mm512_loadu_si512(q + 64 * i));
    __m512i v01 = fold_pairs(v[0], v[1]), v23 = fold_pairs(v[2], v[3]);
    __m512i sums = /* [group][vector] */
        _mm512_add_epi32(_mm512_unpacklo_epi64(v01, v23), _mm512_unpackhi_epi64(v01, v23));
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}

bool SM_NAME(sm_prepare_q8_256)(struct sm_acts *a, size_t row, const float *x) {
    size_t n_blocks = a->k_pad / 256;
    int32_t largest = 0;
    for (size_t b = 0; b < n_blocks; b++) {
        int8_t *q = a->q + row * a->stride + 256 * b;
        __m512i max = _mm512_setzero_si512();
        for (size_t i = 0; i < 256; i += 16)
            max = _mm512_max_epi32(max, abs_bits(load(x, 256 * b + i, a->k)));
        int32_t bits = _mm512_reduce_max_epi32(max);
        largest = SM_MAX(largest, bits);
        float id;
        a->d[row * n_blocks + b] = scale(bits, &id);
        __m512 ids = _mm512_set1_ps(id);
        for (size_t i = 0; i < 256; i += 16)
            _mm_storeu_si128((__m128i *)(q + i), quantize(load(x, 256 * b + i, a->k), ids));
        int16_t *sum = a->sum + row * (a->k_pad / 16) + 16 * b;
        _mm256_storeu_si256((__m256i *)(void *)sum, _mm512_cvtepi32_epi16(sums16(q)));
    }
    return largest < 0x7f800000;
}
