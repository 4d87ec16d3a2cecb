/* What the products of integer formats on AVX2 and AVX-VNNI share: static inline only.  A register
 * holds eight panel rows, so a panel is two halves. */
#ifndef SM_AVX2_MATMUL_H
#define SM_AVX2_MATMUL_H

#include <immintrin.h>

#include "../panels.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define HALF 8           /* rows of a register */
#define COLUMNS 2048     /* unpacked at a time: 32 KB */
#define PREFETCH_BYTES 2048 /* ahead of a stream of packed panels */

/* Stored codes of group g, from the vectors of its planes. */
INLINE __m256i stored_of(struct sm_layout f, __m256i low, __m256i high, int g) {
    const __m256i low_mask = _mm256_set1_epi8((char)((1 << f.low) - 1));
    const __m256i high_mask = _mm256_set1_epi8((char)(((1 << f.high) - 1) << f.low));
    if (f.low < 8) low = _mm256_and_si256(_mm256_srli_epi16(low, g / f.low * f.low), low_mask);
    if (f.high == 0) return low;
    int shift = g / f.high * f.high - f.low; /* bits down to the code's top */
    high = shift > 0 ? _mm256_srli_epi16(high, shift) : _mm256_slli_epi16(high, -shift);
    return _mm256_or_si256(low, _mm256_and_si256(high, high_mask));
}

/* Its codes: bytes 0 .. 2^bits - 1. */
INLINE __m256i group_of(struct sm_layout f, __m256i low, __m256i high, int g) {
    __m256i stored = stored_of(f, low, high, g);
    if (f.table == SM_TABLE_NONE) return stored;
    __m128i table = _mm_loadu_si128((const __m128i *)sm_table(f.table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), stored);
}

INLINE __m256i load_plane(const uint8_t *slab, int i) {
    return _mm256_loadu_si256((const __m256i *)(slab + SM_GROUP_BYTES * i));
}

/* One half of a slab's 8 groups. */
INLINE void load_slab(struct sm_layout f, const uint8_t *slab, __m256i group[8]) {
    __m256i low[8], high[2];
#pragma GCC unroll 8
    for (int i = 0; i < f.low; i++) low[i] = load_plane(slab, i);
#pragma GCC unroll 2
    for (int i = 0; i < f.high; i++) high[i] = load_plane(slab, f.low + i);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
        group[g] = group_of(f, low[g % f.low], f.high > 0 ? high[g % f.high] : low[0], g);
}
/* One of them. */
INLINE __m256i load_group(struct sm_layout f, const uint8_t *slab, int g) {
    __m256i low = load_plane(slab, g % f.low);
    return group_of(f, low, f.high > 0 ? load_plane(slab, f.low + g % f.high) : low, g);
}

/* Prefetches what follows PREFETCH_BYTES after p, n bytes of it. */
INLINE void prefetch(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i += 64) _mm_prefetch((const char *)p + PREFETCH_BYTES + i, _MM_HINT_T0);
}

/* Codes of n_slabs slabs of one panel, beginning with slab `first`: codes [n_slabs][8][64].  The
 * panel that follows in memory is the next to be unpacked. */
INLINE void unpack(struct sm_layout f, uint8_t *codes, const uint8_t *panel, size_t first,
                   size_t n_slabs) {
    const size_t per_block = (size_t)(f.block / SM_SLAB);
    for (size_t i = first; i < first + n_slabs; i++, codes += 8 * SM_GROUP_BYTES) {
        const uint8_t *slab = panel + i / per_block * sm_layout_bytes(f) + sm_layout_codes(f) +
                              i % per_block * sm_layout_slab(f);
        prefetch(slab, sm_layout_bytes(f) / per_block);
        for (int half = 0; half < 64; half += 32) {
            __m256i group[8];
            load_slab(f, slab + half, group);
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++)
                _mm256_store_si256((__m256i *)(codes + SM_GROUP_BYTES * g + half), group[g]);
        }
    }
}

INLINE __m256i broadcast4(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
INLINE __m256 load_f16(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* The d of eight rows. */
INLINE __m256 load_d(struct sm_layout f, const uint8_t *p) {
    if (f.d == SM_D_BF16) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    __m256 d = load_f16(p);
    if (f.d == SM_D_HALVES) return _mm256_mul_ps(d, _mm256_set1_ps(0.5f));
    return f.d == SM_D_EIGHTHS ? _mm256_mul_ps(d, _mm256_set1_ps(0.125f)) : d;
}

/* Scale and min of sub-block s for this half's rows of a block, as int32. */
INLINE __m256i load_scales(struct sm_layout f, const uint8_t *block, int half, int s) {
    if (f.scales == SM_SCALES_ONES) return _mm256_set1_epi32(1);
    const uint8_t *p = block + sm_layout_scales(f) + s * ROWS + half * HALF;
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    if (f.scales == SM_SCALES_NIBBLES) bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
    return _mm256_cvtepi8_epi32(bytes);
}
INLINE __m256i load_mins(struct sm_layout f, const uint8_t *block, int half, int s) {
    bool nibbles = f.scales == SM_SCALES_NIBBLES;
    const uint8_t *p = block + (nibbles ? sm_layout_scales(f) : sm_layout_mins(f)) + s * ROWS + half * HALF;
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    if (nibbles) bytes = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm256_cvtepu8_epi32(bytes);
}
/* Two int32 vectors of 16-bit numbers as pairs of int16. */
INLINE __m256i pair_up(__m256i low, __m256i high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA);
}
/* The activation sums of 16 columns i and i + 1 as a pair. */
INLINE __m256i sum_pair(const int16_t *sum, int i) {
    int32_t two;
    memcpy(&two, sum + i, 4);
    return _mm256_set1_epi32(two);
}

#endif
