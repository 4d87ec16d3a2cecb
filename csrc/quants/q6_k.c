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

void sm_dequantize_q6_k(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, out += 256) {
        float d = sm_f16_at(b->d);
        for (int j = 0; j < 256; j++) {
            int code = b->low[j / 128 * 64 + j % 64] >> (j / 64 % 2 * 4) & 15;
            code |= (b->high[j / 128 * 32 + j % 32] >> (j / 32 % 4 * 2) & 3) << 4;
            out[j] = d * (float)b->scales[j / 16] * (float)(code - 32);
        }
    }
}

size_t sm_find_nonfinite_q6_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
