/* What the formats' files share.  Only static inline functions. */
#ifndef SM_QUANTS_BLOCK_H
#define SM_QUANTS_BLOCK_H

#include "../f16.h"
#include "quants.h"

/* Index of the first of n_blocks blocks of `bytes` bytes that has an infinite or NaN value among
 * the n float16 at offset `at`, or n_blocks. */
static inline size_t sm_find_bad_f16(const void *blocks, size_t n_blocks, size_t bytes, size_t at,
                                     size_t n) {
    const uint8_t *p = (const uint8_t *)blocks + at;
    for (size_t i = 0; i < n_blocks; i++, p += bytes) {
        for (size_t j = 0; j < n; j++) {
            if (!sm_f16_is_finite_at(p + 2 * j)) return i;
        }
    }
    return n_blocks;
}

/* Exchanges the bits mask << shift of *a with the bits mask of *b. */
static inline void sm_exchange(uint64_t *a, uint64_t *b, int shift, uint64_t mask) {
    uint64_t t = ((*a >> shift) ^ *b) & mask;
    *a ^= t << shift;
    *b ^= t;
}

/* The K-quants' planes: byte j of 32 holds column j of 8 / bits slabs, of slab s in bits
 * bits s .. bits s + bits - 1.  Into words[bits] of each slab, which are `step` words apart: a
 * transposition of slabs and groups, by halves. */
static inline void sm_transpose(const uint8_t codes[SM_SLAB], int bits, uint32_t *words,
                                size_t step) {
    uint64_t x[4]; /* two groups each */
    memcpy(x, codes, sizeof x);
    sm_exchange(&x[0], &x[2], 4, 0x0F0F0F0F0F0F0F0Fu);
    sm_exchange(&x[1], &x[3], 4, 0x0F0F0F0F0F0F0F0Fu);
    if (bits <= 2) {
        sm_exchange(&x[0], &x[1], 2, 0x3333333333333333u);
        sm_exchange(&x[2], &x[3], 2, 0x3333333333333333u);
    }
    for (int i = 0; i < 4 && bits == 1; i++) { /* within a pair of groups */
        uint64_t t = (x[i] >> 1 ^ x[i] >> 32) & 0x55555555u;
        x[i] ^= t << 1 ^ t << 32;
    }
    size_t bytes = 4 * (size_t)bits;
    for (size_t s = 0; s < 8 / (size_t)bits; s++)
        memcpy(words + s * step, (const uint8_t *)x + s * bytes, bytes);
}

/* Exchanges the bits `mask` of x with those `distance` above them. */
static inline uint32_t sm_exchange_within(uint32_t x, int distance, uint32_t mask) {
    uint32_t t = (x >> distance ^ x) & mask;
    return x ^ t ^ t << distance;
}

/* The word of a high plane of one bit, of 32 columns whose bits lie in order: bit 4 g + j goes to
 * 8 j + g, by four exchanges of two binary digits of a bit's number (4 and 1, 3 and 0, 2 and 1,
 * 1 and 0). */
static inline uint32_t sm_high_plane(const uint8_t bits[4]) {
    uint32_t x;
    memcpy(&x, bits, 4);
    x = sm_exchange_within(x, 14, 0x0000CCCCu);
    x = sm_exchange_within(x, 7, 0x00AA00AAu);
    x = sm_exchange_within(x, 2, 0x0C0C0C0Cu);
    return sm_exchange_within(x, 1, 0x22222222u);
}

/* The 6-bit scales and mins of the 8 sub-blocks of Q4_K and Q5_K, from 12 bytes: the low six bits
 * of bytes 0-3 are scales 0-3, of bytes 4-7 mins 0-3; bytes 8-11 hold the low nibbles of scales
 * (low) and mins (high) 4-7, whose top two bits are those of bytes 0-3 and 4-7. */
static inline void sm_scales_mins(const uint8_t packed[12], struct sm_parts *p) {
    for (int s = 0; s < 4; s++) {
        p->scale[s] = packed[s] & 63;
        p->min[s] = packed[s + 4] & 63;
        p->scale[s + 4] = (uint8_t)((packed[s + 8] & 15) | (packed[s] >> 6) << 4);
        p->min[s + 4] = (uint8_t)(packed[s + 8] >> 4 | (packed[s + 4] >> 6) << 4);
    }
}

/* The other way round. */
static inline void sm_put_scales_mins(const int16_t scale[8], const int16_t min[8], uint8_t packed[12]) {
    for (int s = 0; s < 4; s++) {
        packed[s] = (uint8_t)(scale[s] | scale[s + 4] >> 4 << 6);
        packed[s + 4] = (uint8_t)(min[s] | min[s + 4] >> 4 << 6);
        packed[s + 8] = (uint8_t)((scale[s + 4] & 15) | (min[s + 4] & 15) << 4);
    }
}

/* Bits first .. first + bits - 1 of the codes of a block of 256 into the K-quants' plane of these:
 * sets of 32 bytes, which hold 8 / bits slabs each, as sm_transpose reads them. */
static inline void sm_put_planes(const uint8_t code[256], int bits, int first, uint8_t *plane) {
    int n_slabs = 8 / bits, mask = (1 << bits) - 1;
    for (int set = 0; set < bits; set++, plane += SM_SLAB)
        for (int j = 0; j < SM_SLAB; j++) {
            int byte = 0;
            for (int s = 0; s < n_slabs; s++)
                byte |= (code[(set * n_slabs + s) * SM_SLAB + j] >> first & mask) << bits * s;
            plane[j] = (uint8_t)byte;
        }
}

static inline void sm_put_f16(uint8_t at[2], float x) {
    uint16_t h = sm_f32_to_f16(x);
    at[0] = (uint8_t)h;
    at[1] = (uint8_t)(h >> 8);
}

/* 32 codes of four bits: nibbles of j and j + 16. */
static inline void sm_put_nibbles(const uint8_t code[32], uint8_t at[16]) {
    uint8_t packed[16];
    for (int j = 0; j < 16; j++) packed[j] = (uint8_t)((code[j] & 15) | code[j + 16] << 4);
    memcpy(at, packed, sizeof packed);
}

/* stored[code] = the stored code of each code that a table lists, the first of those alike. */
static inline void sm_table_places(enum sm_table_id table, uint8_t stored[256]) {
    for (int i = 15; i >= 0; i--) stored[sm_table(table)[i]] = (uint8_t)i;
}

/* 32 codes of five bits: the top bits in order, and the low ones as nibbles of j and j + 16. */
static inline void sm_put_five(const uint8_t code[32], uint8_t high[4], uint8_t low[16]) {
    for (int i = 0; i < 4; i++) { /* the product's top byte has bit 0 of each of eight bytes */
        uint64_t eight;
        memcpy(&eight, code + 8 * i, sizeof eight);
        high[i] = (uint8_t)((eight >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
    sm_put_nibbles(code, low);
}

/* The planes of a block of 256 from its codes in order, of low + high bits. */
static inline void sm_place_codes(const uint8_t codes[256], int low, int high, uint32_t *plane) {
    const uint32_t low_mask = 0x01010101u * ((1u << low) - 1), high_mask = 0x01010101u * ((1u << high) - 1);
    for (int slab = 0; slab < 8; slab++, codes += SM_SLAB) {
        for (int i = 0; i < low + high; i++) {
            const int bits = i < low ? low : high, first = i < low ? i : i - low;
            uint32_t word = 0, four;
            for (int n = 0; n < 8 / bits; n++) { /* group first + bits n */
                memcpy(&four, codes + 4 * (first + bits * n), 4);
                word |= (i < low ? four & low_mask : four >> low & high_mask) << bits * n;
            }
            *plane++ = word;
        }
    }
}

/* The codes of n neighbouring columns: their places in a grid's entry, `bits` each, and above them
 * their signs. */
static inline void sm_grid_codes(unsigned entry, int bits, unsigned signs, int n, uint8_t *codes) {
    for (int j = 0; j < n; j++)
        codes[j] = (uint8_t)((entry >> bits * j & ((1u << bits) - 1)) | (signs >> j & 1) << bits);
}

/* Eight signs from the low seven bits: an even number of them are set. */
static inline unsigned sm_even_signs(uint32_t seven) {
    seven &= 127;
    return seven | (unsigned)__builtin_parity(seven) << 7;
}

/* Defines sm_parts_<name> from a static inline `take`, which takes one struct block apart. */
#define SM_DEFINE_PARTS(name)                                                                     \
    void sm_parts_##name(const void *blocks, size_t stride, size_t n, struct sm_parts *parts) {   \
        for (size_t i = 0; i < n; i++)                                                            \
            take((const struct block *)((const uint8_t *)blocks + i * stride), &parts[i]);        \
    }

/* Defines sm_put_<name> from a static inline `put`, which writes one struct block. */
#define SM_DEFINE_PUT(name)                                                                       \
    void sm_put_##name(const struct sm_codes *codes, void *blocks, size_t n) {                    \
        for (size_t i = 0; i < n; i++) put((struct block *)blocks + i, &codes[i]);                \
    }

#endif
