/* TQ2_0: 256 values d * (code - 1), codes of 2 bits: ternary weights have no code 3. */
#include "block.h"

struct block {
    uint8_t codes[64]; /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t d[2];      /* float16 */
};
_Static_assert(sizeof(struct block) == 66, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 8 * h, 2);
}
SM_DEFINE_PARTS(tq2_0)

size_t sm_find_nonfinite_tq2_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    sm_put_planes(c->code, 2, 0, b->codes);
}
SM_DEFINE_PUT(tq2_0)
