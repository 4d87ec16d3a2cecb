/* Q8_0: 32 values d * code, signed codes of 8 bits. */
#include "block.h"

struct block {
    uint8_t d[2]; /* float16 */
    int8_t codes[32];
};
_Static_assert(sizeof(struct block) == 34, "as in quants.def");

void sm_dequantize_q8_0(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, out += 32) {
        float d = sm_f16_at(b->d);
        for (int j = 0; j < 32; j++) out[j] = d * (float)b->codes[j];
    }
}

size_t sm_find_nonfinite_q8_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
