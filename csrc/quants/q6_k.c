/* Q6_K: 256 values in 16 sub-blocks of 16: (d * scale) * (code - 32), codes of 6 bits, signed
 * scales of 8. */
#include "block.h"

struct block {
    uint8_t low[128];  /* byte 64 h + j: low bits of value 128 h + j, and of 128 h + 64 + j above */
    uint8_t high[64];  /* byte 32 h + j: top bits of value 128 h + 32 s + j in bits 2 s */
    int8_t scales[16];
    uint8_t d[2];      /* float16 */
};
_Static_assert(sizeof(struct block) == 210, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->scale, b->scales, sizeof b->scales);
    for (int i = 0; i < 4; i++) /* slabs i, i + 2 of the first half, i + 2, i + 4 of the second */
        sm_transpose(b->low + 32 * i, 4, p->plane + 6 * (i + i / 2 * 2), 12);
    for (int h = 0; h < 2; h++) sm_transpose(b->high + 32 * h, 2, p->plane + 24 * h + 4, 6);
}
SM_DEFINE_PARTS(q6_k)

size_t sm_find_nonfinite_q6_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    for (int s = 0; s < 16; s++) b->scales[s] = (int8_t)c->scale[s];
    for (int j = 0; j < 128; j++) {
        const uint8_t *code = c->code + j / 64 * 128 + j % 64;
        b->low[j] = (uint8_t)((code[0] & 15) | (code[64] & 15) << 4);
    }
    sm_put_planes(c->code, 2, 4, b->high);
}
SM_DEFINE_PUT(q6_k)
