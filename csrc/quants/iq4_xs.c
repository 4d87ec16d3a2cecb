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

static inline void put(struct block *b, const struct sm_codes *c) {
    uint8_t stored[256], code[32];
    uint16_t top = 0;
    sm_table_places(SM_TABLE_IQ4, stored);
    sm_put_f16(b->d, c->d);
    memset(b->scales_low, 0, sizeof b->scales_low);
    for (int s = 0; s < 8; s++) {
        int scale = c->scale[2 * s] + 32;
        b->scales_low[s / 2] |= (uint8_t)((scale & 15) << s % 2 * 4);
        top |= (uint16_t)(scale >> 4 << 2 * s);
        for (int j = 0; j < 32; j++) code[j] = stored[c->code[32 * s + j]];
        sm_put_nibbles(code, b->codes + 16 * s);
    }
    b->scales_high[0] = (uint8_t)top;
    b->scales_high[1] = (uint8_t)(top >> 8);
}
SM_DEFINE_PUT(iq4_xs)
