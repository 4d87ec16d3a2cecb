/* Q3_K: 256 values in 16 sub-blocks of 16: (d * (scale - 32)) * (code - 4), codes of 3 bits,
 * scales of 6. */
#include "block.h"

struct block {
    uint8_t high[32];   /* bit i of byte j: the top bit of the code of value 32 i + j */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t scales[12]; /* bytes 0-7: low bits of 0-7, of 8-15 above; 8-11: top bits */
    uint8_t d[2];       /* float16 */
};
_Static_assert(sizeof(struct block) == 110, "as in quants.def");

void sm_codes_q3_k(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    c->d = sm_f16_at(b->d);
    c->m = 0;
    for (int s = 0; s < 16; s++) {
        int low = b->scales[s % 8] >> (s / 8 * 4) & 15;
        int top = b->scales[8 + s % 4] >> (s / 4 * 2) & 3;
        c->scale[s] = (int16_t)((low | top << 4) - 32);
        c->min[s] = 0;
    }
    for (int j = 0; j < 256; j++) {
        int low = b->codes[j / 128 * 32 + j % 32] >> (j / 32 % 4 * 2) & 3;
        c->code[j] = (uint8_t)(low | (b->high[j % 32] >> (j / 32) & 1) << 2);
    }
}

size_t sm_find_nonfinite_q3_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
