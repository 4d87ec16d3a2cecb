/* Q4_0: 32 values d * (code - 8), codes of 4 bits. */
#include "block.h"

struct block {
    uint8_t d[2];     /* float16 */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 18, "as in quants.def");

void sm_dequantize_q4_0(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, out += 32) {
        float d = sm_f16_at(b->d);
        for (int j = 0; j < 16; j++) {
            out[j] = d * (float)((b->codes[j] & 15) - 8);
            out[j + 16] = d * (float)((b->codes[j] >> 4) - 8);
        }
    }
}

size_t sm_find_nonfinite_q4_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
