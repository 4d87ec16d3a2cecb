/* IQ2_XS: 256 values in 16 sub-blocks of 16: (d / 8 * (2 scale + 1)) * (+-8, +-25 or +-43), eight
 * values' magnitudes by a grid of 512 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t d[2];       /* float16 */
    uint8_t entry[32][2]; /* 9 bits, then 7 of signs (sm_even_signs) */
    uint8_t scales[8];  /* of sub-block 2 i in byte i's low nibble, of 2 i + 1 above */
};
_Static_assert(sizeof(struct block) == 74, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 16; s++) p->scale[s] = (uint8_t)(2 * (b->scales[s / 2] >> s % 2 * 4 & 15) + 1);
    for (int i = 0; i < 32; i++) {
        uint16_t entry = sm_u16_at(b->entry[i]);
        sm_grid_codes(sm_grid_iq2_xs[entry & 511], 2, sm_even_signs(entry >> 9), 8, code + 8 * i);
    }
    sm_place_codes(code, 2, 1, p->plane);
}
SM_DEFINE_PARTS(iq2_xs)

size_t sm_find_nonfinite_iq2_xs(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
