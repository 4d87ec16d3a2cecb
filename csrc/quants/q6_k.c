/* Q6_K: 256 values in 16 sub-blocks of 16: (d * scale) * (code - 32), codes of 6 bits, signed
 * scales of 8. */
#include "block.h"

struct block {
    uint8_t low[128];  /* byte 64 h + j: low bits of value 128 h + j, and of 128 h + 64 + j above */
    uint8_t high[64];  /* byte 32 h + j: top bits of value 128 h + 32 s + j in bits 2 s */
    int8_t scales[16];
    uint8_t d[2];      /* float16 */
};
_Static_assert(sizeof(struct block) == 210, "as in quants.def");

void sm_codes_q6_k(const void *block, struct sm_codes *c) {
    const struct block *b = block;
    c->d = sm_f16_at(b->d);
    c->m = 0;
    for (int s = 0; s < 16; s++) {
        c->scale[s] = b->scales[s];
        c->min[s] = 0;
    }
    for (int j = 0; j < 256; j++) {
        int low = b->low[j / 128 * 64 + j % 64] >> (j / 64 % 2 * 4) & 15;
        int top = b->high[j / 128 * 32 + j % 32] >> (j / 32 % 4 * 2) & 3;
        c->code[j] = (uint8_t)(low | top << 4);
    }
}

size_t sm_find_nonfinite_q6_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
