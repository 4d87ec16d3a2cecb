/* IQ1_M: 256 values in 16 sub-blocks of 16: (d / 8 * (2 scale + 1)) * (-8, 0 or 8, and 1 more or 1
 * less in all of 8 values), eight values by a grid of 2048 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t low[32];  /* of entries */
    uint8_t high[16]; /* nibble i: the top three bits of entry i, and 1 for less */
    uint8_t scales[4][2]; /* 3 bits for each of 4 sub-blocks, then 4 bits of d, the lowest first */
};
_Static_assert(sizeof(struct block) == 56, "as in quants.def");

static inline uint16_t d_of(const struct block *b) { /* float16 */
    int d = 0;
    for (int i = 0; i < 4; i++) d |= sm_u16_at(b->scales[i]) >> 12 << 4 * i;
    return (uint16_t)d;
}

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = d_of(b);
    p->m = 0;
    for (int s = 0; s < 16; s++)
        p->scale[s] = (uint8_t)(2 * (sm_u16_at(b->scales[s / 4]) >> s % 4 * 3 & 7) + 1);
    for (int i = 0; i < 32; i++) {
        int high = b->high[i / 2] >> i % 2 * 4 & 15;
        int entry = b->low[i] | (high & 7) << 8;
        sm_grid_codes(sm_grid_iq1[entry], 2, high >> 3 ? 255 : 0, 8, code + 8 * i);
    }
    sm_place_codes(code, 2, 1, p->plane);
}
SM_DEFINE_PARTS(iq1_m)

size_t sm_find_nonfinite_iq1_m(const void *blocks, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++)
        if ((d_of(&b[i]) & 0x7C00) == 0x7C00) return i;
    return n_blocks;
}
