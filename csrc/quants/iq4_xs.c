/* IQ4_XS: 256 values in 8 sub-blocks of 32: (d * (scale - 32)) * IQ4[code], codes of 4 bits
 * (SM_TABLE_IQ4), scales of 6. */
#include "block.h"

struct block {
    uint8_t d[2];          /* float16 */
    uint8_t scales_high[2]; /* the top two bits of scale s in bits 2 s */
    uint8_t scales_low[4]; /* the low ones of scale 2 i in byte i's low nibble, of 2 i + 1 above */
    uint8_t codes[128];    /* byte 16 s + j: code j of sub-block s, and j + 16 above */
};
_Static_assert(sizeof(struct block) == 136, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 8; s++) {
        int low = b->scales_low[s / 2] >> s % 2 * 4 & 15;
        int top = sm_u16_at(b->scales_high) >> 2 * s & 3;
        p->scale[2 * s] = p->scale[2 * s + 1] = (uint8_t)((low | top << 4) - 32);
    }
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4 of each slab */
}
SM_DEFINE_PARTS(iq4_xs)

size_t sm_find_nonfinite_iq4_xs(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
