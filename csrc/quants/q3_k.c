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

void sm_dequantize_q3_k(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, out += 256) {
        float d = sm_f16_at(b->d), scaled[16];
        for (int j = 0; j < 16; j++) {
            int low = b->scales[j % 8] >> (j / 8 * 4) & 15;
            int top = b->scales[8 + j % 4] >> (j / 4 * 2) & 3;
            scaled[j] = d * (float)((low | top << 4) - 32);
        }
        for (int j = 0; j < 256; j++) {
            int code = b->codes[j / 128 * 32 + j % 32] >> (j / 32 % 4 * 2) & 3;
            code |= (b->high[j % 32] >> (j / 32) & 1) << 2;
            out[j] = scaled[j / 16] * (float)(code - 4);
        }
    }
}

size_t sm_find_nonfinite_q3_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}
