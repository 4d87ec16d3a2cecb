/* Q3_K: 256 values in 16 sub-blocks of 16: (d * (scale - 32)) * (code - 4), codes of 3 bits,
 * scales of 6. */
#include "block.h"

struct block {
    uint8_t high[32];   /* bit i of byte j: the top bit of the code of value 32 i + j */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t scales[12]; /* bytes 0-7: low bits of 0-7, of 8-15 above; 8-11: top bits */
    uint8_t d[2];       /* float16 */
};
_Static_assert(sizeof(struct block) == 110, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 16; s++) {
        int low = b->scales[s % 8] >> (s / 8 * 4) & 15;
        int top = b->scales[8 + s % 4] >> (s / 4 * 2) & 3;
        p->scale[s] = (uint8_t)((low | top << 4) - 32);
    }
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 12 * h, 3);
    sm_transpose(b->high, 1, p->plane + 2, 3);
}
SM_DEFINE_PARTS(q3_k)

size_t sm_find_nonfinite_q3_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    memset(b->scales, 0, sizeof b->scales);
    for (int s = 0; s < 16; s++) {
        int scale = c->scale[s] + 32;
        b->scales[s % 8] |= (uint8_t)((scale & 15) << (s / 8 * 4));
        b->scales[8 + s % 4] |= (uint8_t)(scale >> 4 << (s / 4 * 2));
    }
    sm_put_planes(c->code, 2, 0, b->codes);
    sm_put_planes(c->code, 1, 2, b->high);
}
SM_DEFINE_PUT(q3_k)
