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

/* A block of 32 values: one scale, one min. */
static inline void sm_codes_begin(struct sm_codes *c, float d, float m) {
    c->d = d;
    c->m = m;
    c->scale[0] = c->min[0] = 1;
}

/* The 6-bit scales and mins of the 8 sub-blocks of Q4_K and Q5_K, from 12 bytes: the low six bits
 * of bytes 0-3 are scales 0-3, of bytes 4-7 mins 0-3; bytes 8-11 hold the low nibbles of scales
 * (low) and mins (high) 4-7, whose top two bits are those of bytes 0-3 and 4-7. */
static inline void sm_scales_mins(const uint8_t packed[12], struct sm_codes *c) {
    for (int s = 0; s < 4; s++) {
        c->scale[s] = packed[s] & 63;
        c->min[s] = packed[s + 4] & 63;
        c->scale[s + 4] = (int16_t)((packed[s + 8] & 15) | (packed[s] >> 6) << 4);
        c->min[s + 4] = (int16_t)(packed[s + 8] >> 4 | (packed[s + 4] >> 6) << 4);
    }
}

#endif
