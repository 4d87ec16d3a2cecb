/* Q4_0: 32 values d * (code - 8), codes of 4 bits. */
#include "block.h"

struct block {
    uint8_t d[2];     /* float16 */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 18, "as in quants.def");

void sm_codes_q4_0(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    sm_codes_begin(c, sm_f16_at(b->d), 0);
    for (int j = 0; j < 16; j++) {
        c->code[j] = b->codes[j] & 15;
        c->code[j + 16] = b->codes[j] >> 4;
    }
}

size_t sm_find_nonfinite_q4_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
