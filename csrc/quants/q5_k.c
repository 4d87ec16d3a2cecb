/* Q5_K: 256 values in 8 sub-blocks of 32: (d * scale) * code - (dmin * min), codes of 5 bits,
 * scales and mins of 6. */
#include "block.h"

struct block {
    uint8_t d[2], dmin[2]; /* float16 */
    uint8_t scales[12];    /* see sm_scale_min */
    uint8_t high[32];      /* bit s of byte j: the top bit of code j of sub-block s */
    uint8_t codes[128];    /* byte 32 s + j: code j of sub-block 2 s, and of 2 s + 1 above */
};
_Static_assert(sizeof(struct block) == 176, "as in quants.def");

void sm_dequantize_q5_k(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, out += 256) {
        float d = sm_f16_at(b->d), dmin = sm_f16_at(b->dmin);
        for (int s = 0; s < 8; s++) {
            int scale, min;
            sm_scale_min(b->scales, s, &scale, &min);
            float scaled = d * (float)scale, least = dmin * (float)min;
            for (int j = 0; j < 32; j++) {
                int code = b->codes[s / 2 * 32 + j] >> (s % 2 * 4) & 15;
                code |= (b->high[j] >> s & 1) << 4;
                out[32 * s + j] = scaled * (float)code - least;
            }
        }
    }
}

size_t sm_find_nonfinite_q5_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}
