/* IQ2_XXS: 256 values in 8 sub-blocks of 32: (d / 8 * (2 scale + 1)) * (+-8, +-25 or +-43), eight
 * values' magnitudes by a grid of 256 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t d[2]; /* float16 */
    struct {
        uint8_t entry[4];
        uint8_t signs[4]; /* seven bits for each entry (sm_even_signs), then 4 of scale */
    } sub[8];
};
_Static_assert(sizeof(struct block) == 66, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 8; s++) {
        uint32_t signs = sm_u32_at(b->sub[s].signs);
        p->scale[2 * s] = p->scale[2 * s + 1] = (uint8_t)(2 * (signs >> 28) + 1);
        for (int i = 0; i < 4; i++)
            sm_grid_codes(sm_grid_iq2_xxs[b->sub[s].entry[i]], 2, sm_even_signs(signs >> 7 * i), 8,
                          code + 32 * s + 8 * i);
    }
    sm_place_codes(code, 2, 1, p->plane);
}
SM_DEFINE_PARTS(iq2_xxs)

size_t sm_find_nonfinite_iq2_xxs(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
