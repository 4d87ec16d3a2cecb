/* IQ4_NL: 32 values d * IQ4[code], codes of 4 bits (SM_TABLE_IQ4). */
#include "block.h"

struct block {
    uint8_t d[2];      /* float16 */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 18, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
}
SM_DEFINE_PARTS(iq4_nl)

size_t sm_find_nonfinite_iq4_nl(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

static inline void put(struct block *b, const struct sm_codes *c) {
    uint8_t stored[256], code[32];
    sm_table_places(SM_TABLE_IQ4, stored);
    for (int j = 0; j < 32; j++) code[j] = stored[c->code[j]];
    sm_put_f16(b->d, c->d);
    sm_put_nibbles(code, b->codes);
}
SM_DEFINE_PUT(iq4_nl)
