/* Q2_K: 256 values in 16 sub-blocks of 16: (d * scale) * code - (dmin * min), codes of 2 bits,
 * scales and mins of 4. */
#include "block.h"

struct block {
    uint8_t scales[16]; /* sub-block's scale in the low nibble, min in the high one */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t d[2], dmin[2]; /* float16 */
};
_Static_assert(sizeof(struct block) == 84, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->dmin);
    memcpy(p->scale, b->scales, sizeof b->scales);
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 8 * h, 2);
}
SM_DEFINE_PARTS(q2_k)

size_t sm_find_nonfinite_q2_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    sm_put_f16(b->dmin, c->m);
    for (int s = 0; s < 16; s++) b->scales[s] = (uint8_t)(c->scale[s] | c->min[s] << 4);
    sm_put_planes(c->code, 2, 0, b->codes);
}
SM_DEFINE_PUT(q2_k)
