/* IQ1_S: 256 values in 8 sub-blocks of 32: (d / 8 * (2 scale + 1)) * (-8, 0 or 8, and 1 more or 1
 * less in all of a sub-block), eight values by a grid of 2048 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t low[32]; /* of entries */
    uint8_t high[8][2]; /* the top three bits of 4 entries, 3 bits of scale, and 1 for less */
};
_Static_assert(sizeof(struct block) == 50, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 8; s++) {
        int high = sm_u16_at(b->high[s]);
        p->scale[2 * s] = p->scale[2 * s + 1] = (uint8_t)(2 * (high >> 12 & 7) + 1);
        for (int i = 4 * s; i < 4 * s + 4; i++) {
            int entry = b->low[i] | (high >> i % 4 * 3 & 7) << 8;
            sm_grid_codes(sm_grid_iq1[entry], 2, high >> 15 ? 255 : 0, 8, code + 8 * i);
        }
    }
    sm_place_codes(code, 2, 1, p->plane);
}
SM_DEFINE_PARTS(iq1_s)

size_t sm_find_nonfinite_iq1_s(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
