/* Q4_K: 256 values in 8 sub-blocks of 32: (d * scale) * code - (dmin * min), codes of 4 bits,
 * scales and mins of 6. */
#include "block.h"

struct block {
    uint8_t d[2], dmin[2]; /* float16 */
    uint8_t scales[12];    /* see sm_scales_mins */
    uint8_t codes[128];    /* byte 32 s + j: code j of sub-block 2 s, and of 2 s + 1 above */
};
_Static_assert(sizeof(struct block) == 144, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->dmin);
    sm_scales_mins(b->scales, p);
    for (int s = 0; s < 4; s++) sm_transpose(b->codes + 32 * s, 4, p->plane + 8 * s, 4);
}
SM_DEFINE_PARTS(q4_k)

size_t sm_find_nonfinite_q4_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    sm_put_f16(b->dmin, c->m);
    sm_put_scales_mins(c->scale, c->min, b->scales);
    sm_put_planes(c->code, 4, 0, b->codes);
}
SM_DEFINE_PUT(q4_k)
