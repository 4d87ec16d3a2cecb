/* Q5_0: 32 values d * (code - 16), codes of 5 bits. */
#include "block.h"

struct block {
    uint8_t d[2];      /* float16 */
    uint8_t high[4];   /* bit i: the top bit of code i */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 22, "as in quants.def");

void sm_codes_q5_0(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    sm_codes_begin(c, sm_f16_at(b->d), 0);
    uint32_t high = (uint32_t)sm_u16_at(b->high) | (uint32_t)sm_u16_at(b->high + 2) << 16;
    for (int j = 0; j < 16; j++) {
        c->code[j] = (uint8_t)((b->codes[j] & 15) | (high >> j & 1) << 4);
        c->code[j + 16] = (uint8_t)(b->codes[j] >> 4 | (high >> (j + 16) & 1) << 4);
    }
}

size_t sm_find_nonfinite_q5_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
