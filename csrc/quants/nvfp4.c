/* NVFP4: 64 values in 4 sub-blocks of 16: scale * FP4[code], codes of 4 bits (SM_TABLE_FP4: twice the
 * values of E2M1), scales half of what unsigned E4M3 says.
 *
 * A scale has 4 significant bits and spans 18 binary digits: too much for integers.  A value has at
 * most 6 bits, so panels keep it as a bfloat16, exactly. */
#include "block.h"

struct block {
    uint8_t scales[4];
    uint8_t codes[32]; /* byte 8 s + j: value j of sub-block s, and j + 8 above */
};
_Static_assert(sizeof(struct block) == 36, "as in quants.def");

static float scale_of(uint8_t e4m3) {
    int exponent = e4m3 >> 3 & 15, digits = e4m3 & 7;
    if (e4m3 == 0x7F) return 0; /* by this format's rule */
    return (float)(exponent == 0 ? digits * 2 : (8 + digits) << exponent) * 0x1p-11f;
}

void sm_dequantize_nvfp4(const void *blocks, float *out, size_t n_blocks) {
    const struct block *b = blocks;
    const uint8_t *table = sm_table(SM_TABLE_FP4);
    for (size_t i = 0; i < n_blocks; i++, out += 64)
        for (int c = 0; c < 64; c++) {
            int code = b[i].codes[c / 16 * 8 + c % 8] >> (c / 8 % 2 * 4) & 15;
            out[c] = scale_of(b[i].scales[c / 16]) * (float)(table[code] - SM_TABLE_FP4_BIAS);
        }
}

size_t sm_find_nonfinite_nvfp4(const void *blocks, size_t n_blocks) {
    const struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++)
        for (int s = 0; s < 4; s++)
            if (b[i].scales[s] == 0xFF) return i; /* E4M3's other NaN */
    return n_blocks;
}
