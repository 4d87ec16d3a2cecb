/* Q8_0: 32 values d * (code - 128): the file's signed bytes with the sign bit turned. */
#include "block.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t codes[32];
};
_Static_assert(sizeof(struct block) == 34, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes);
    for (int i = 0; i < 8; i++) p->plane[i] ^= 0x80808080u;
}
SM_DEFINE_PARTS(q8_0)

size_t sm_find_nonfinite_q8_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    for (int j = 0; j < 32; j++) b->codes[j] = c->code[j] ^ 0x80;
}
SM_DEFINE_PUT(q8_0)
