/* Q5_0: 32 values d * (code - 16), codes of 5 bits. */
#include "block.h"

struct block {
    uint8_t d[2];      /* float16 */
    uint8_t high[4];   /* bit i: the top bit of code i */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 22, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
    p->plane[4] = sm_high_plane(b->high);
}
SM_DEFINE_PARTS(q5_0)

size_t sm_find_nonfinite_q5_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    sm_put_five(c->code, b->high, b->codes);
}
SM_DEFINE_PUT(q5_0)
