/* MXFP4: 32 values 2^(e - 128) * FP4[code] (SM_TABLE_FP4: twice the values of E2M1), codes of 4
 * bits.  The power of two has no float16, but a bfloat16, subnormal for e = 0. */
#include "block.h"

struct block {
    uint8_t e;
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 17, "as in quants.def");

#define LARGEST_E 252 /* 12 * 2^(253 - 128) is no float any more; 255 is the standard's NaN */

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = (uint16_t)(b->e < 2 ? 0x20 << b->e : (b->e - 1) << 7);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
}
SM_DEFINE_PARTS(mxfp4)

size_t sm_find_nonfinite_mxfp4(const void *blocks, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++)
        if (b[i].e > LARGEST_E) return i;
    return n_blocks;
}

static inline void put(struct block *b, const struct sm_codes *c) {
    uint8_t stored[256], code[32];
    uint32_t bits; /* of a power of two: 2^(e - 128) has the exponent e - 1 */
    sm_table_places(SM_TABLE_FP4, stored);
    for (int j = 0; j < 32; j++) code[j] = stored[c->code[j]];
    memcpy(&bits, &c->d, sizeof bits);
    b->e = (uint8_t)(bits == 0 ? 0 : (bits >> 23) + 1);
    sm_put_nibbles(code, b->codes);
}
SM_DEFINE_PUT(mxfp4)
