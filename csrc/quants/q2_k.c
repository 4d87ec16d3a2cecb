/* Q2_K: 256 values in 16 sub-blocks of 16: (d * scale) * code - (dmin * min), codes of 2 bits,
 * scales and mins of 4. */
#include "block.h"

struct block {
    uint8_t scales[16]; /* sub-block's scale in the low nibble, min in the high one */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t d[2], dmin[2]; /* float16 */
};
_Static_assert(sizeof(struct block) == 84, "as in quants.def");

void sm_codes_q2_k(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    c->d = sm_f16_at(b->d);
    c->m = sm_f16_at(b->dmin);
    for (int s = 0; s < 16; s++) {
        c->scale[s] = b->scales[s] & 15;
        c->min[s] = b->scales[s] >> 4;
    }
    for (int j = 0; j < 256; j++)
        c->code[j] = b->codes[j / 128 * 32 + j % 32] >> (j / 32 % 4 * 2) & 3;
}

size_t sm_find_nonfinite_q2_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}
