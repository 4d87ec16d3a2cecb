/* Q8_0: 32 values d * (code - 128): the file's signed bytes with the sign bit turned. */
#include "block.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t codes[32];
};
_Static_assert(sizeof(struct block) == 34, "as in quants.def");

void sm_codes_q8_0(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    sm_codes_begin(c, sm_f16_at(b->d), 0);
    for (int j = 0; j < 32; j++) c->code[j] = b->codes[j] ^ 0x80;
}

size_t sm_find_nonfinite_q8_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
