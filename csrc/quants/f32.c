/* F32: the values themselves. */
#include "block.h"

void sm_dequantize_f32(const void *blocks, float *out, size_t n_blocks) {
    memcpy(out, blocks, n_blocks * sizeof *out);
}

size_t sm_find_nonfinite_f32(const void *blocks, size_t n_blocks) {
    const uint8_t *p = blocks;
    for (size_t i = 0; i < n_blocks; i++) {
        uint32_t u;
        memcpy(&u, p + 4 * i, 4);
        if ((u & 0x7F800000u) == 0x7F800000u) return i;
    }
    return n_blocks;
}

void sm_store_f32(const float *x, void *out, size_t n) { memcpy(out, x, n * sizeof *x); }
