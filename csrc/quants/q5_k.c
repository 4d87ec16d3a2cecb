/* Q5_K: 256 values in 8 sub-blocks of 32: (d * scale) * code - (dmin * min), codes of 5 bits,
 * scales and mins of 6. */
#include "block.h"

struct block {
    uint8_t d[2], dmin[2]; /* float16 */
    uint8_t scales[12];    /* see sm_scales_mins */
    uint8_t high[32];      /* bit s of byte j: the top bit of code j of sub-block s */
    uint8_t codes[128];    /* byte 32 s + j: code j of sub-block 2 s, and of 2 s + 1 above */
};
_Static_assert(sizeof(struct block) == 176, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->dmin);
    sm_scales_mins(b->scales, p);
    for (int s = 0; s < 4; s++) sm_transpose(b->codes + 32 * s, 4, p->plane + 10 * s, 5);
    sm_transpose(b->high, 1, p->plane + 4, 5);
}
SM_DEFINE_PARTS(q5_k)

size_t sm_find_nonfinite_q5_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    sm_put_f16(b->dmin, c->m);
    sm_put_scales_mins(c->scale, c->min, b->scales);
    sm_put_planes(c->code, 4, 0, b->codes);
    sm_put_planes(c->code, 1, 4, b->high);
}
SM_DEFINE_PUT(q5_k)
