/* For the tier above this one: its products of integer formats by name, and what both need of panels. */
#ifndef SM_AVX512VNNI_MATMUL_H
#define SM_AVX512VNNI_MATMUL_H

#include <immintrin.h>

#include "../panels.h"

#define SM_CODES(NAME, name, ...) sm_matmul_fn sm_matmul_##name##__avx512vnni;
#include "../../quants/codes.def"
#undef SM_CODES

/* Codes for the stored ones. */
static inline __attribute__((always_inline)) __m512i sm_look_up(struct sm_layout f, __m512i stored) {
    if (f.table == SM_TABLE_NONE) return stored;
    __m128i table = _mm_loadu_si128((const __m128i *)(const void *)sm_table(f.table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), stored);
}

static inline __attribute__((always_inline)) __m512 sm_load_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

/* The d of a panel's rows. */
static inline __attribute__((always_inline)) __m512 sm_load_d(struct sm_layout f, const uint8_t *p) {
    if (f.d == SM_D_BF16) {
        __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    __m512 d = sm_load_f16(p);
    if (f.d == SM_D_HALVES) return _mm512_mul_ps(d, _mm512_set1_ps(0.5f));
    return f.d == SM_D_EIGHTHS ? _mm512_mul_ps(d, _mm512_set1_ps(0.125f)) : d;
}

#endif
