/* Q5_K: 256 values in 8 sub-blocks of 32: (d * scale) * code - (dmin * min), codes of 5 bits,
 * scales and mins of 6. */
#include "block.h"

struct block {
    uint8_t d[2], dmin[2]; /* float16 */
    uint8_t scales[12];    /* see sm_scales_mins */
    uint8_t high[32];      /* bit s of byte j: the top bit of code j of sub-block s */
    uint8_t codes[128];    /* byte 32 s + j: code j of sub-block 2 s, and of 2 s + 1 above */
};
_Static_assert(sizeof(struct block) == 176, "as in quants.def");

void sm_codes_q5_k(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    c->d = sm_f16_at(b->d);
    c->m = sm_f16_at(b->dmin);
    sm_scales_mins(b->scales, c);
    for (int j = 0; j < 256; j++) {
        int low = b->codes[j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15;
        c->code[j] = (uint8_t)(low | (b->high[j % 32] >> (j / 32) & 1) << 4);
    }
}

size_t sm_find_nonfinite_q5_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}
