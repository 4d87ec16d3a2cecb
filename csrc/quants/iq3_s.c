/* IQ3_S: 256 values in 8 sub-blocks of 32: (d * (2 scale + 1)) * (an odd number from -15 to 15), four
 * values' magnitudes by a grid of 512 entries. */
#include "block.h"
#include "grids.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t low[64]; /* of entries */
    uint8_t high[8]; /* bit n of byte i: the top bit of entry 8 i + n */
    uint8_t signs[32];
    uint8_t scales[4]; /* of sub-block 2 i in byte i's low nibble, of 2 i + 1 above */
};
_Static_assert(sizeof(struct block) == 110, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 16; s++)
        p->scale[s] = (uint8_t)(2 * (b->scales[s / 4] >> s / 2 % 2 * 4 & 15) + 1);
    for (int i = 0; i < 64; i++) {
        int entry = b->low[i] | (b->high[i / 8] >> i % 8 & 1) << 8;
        sm_grid_codes(sm_grid_iq3_s[entry], 3, b->signs[i / 2] >> i % 2 * 4, 4, code + 4 * i);
    }
    sm_place_codes(code, 4, 0, p->plane);
}
SM_DEFINE_PARTS(iq3_s)

size_t sm_find_nonfinite_iq3_s(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
