/* IQ3_XXS: 256 values in 8 sub-blocks of 32: (d / 2 * (2 scale + 1)) * (+-2, 6, 10, 14, 18, 22, 26
 * or 31), four values' magnitudes by a grid of 256 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t entry[64];
    uint8_t signs[8][4]; /* seven bits for each 8 values (sm_even_signs), then 4 of scale */
};
_Static_assert(sizeof(struct block) == 98, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 8; s++) {
        uint32_t signs = sm_u32_at(b->signs[s]);
        p->scale[2 * s] = p->scale[2 * s + 1] = (uint8_t)(2 * (signs >> 28) + 1);
        for (int i = 0; i < 8; i++)
            sm_grid_codes(sm_grid_iq3_xxs[b->entry[8 * s + i]], 3,
                          sm_even_signs(signs >> i / 2 * 7) >> i % 2 * 4, 4, code + 32 * s + 4 * i);
    }
    sm_place_codes(code, 4, 0, p->plane);
}
SM_DEFINE_PARTS(iq3_xxs)

size_t sm_find_nonfinite_iq3_xxs(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
