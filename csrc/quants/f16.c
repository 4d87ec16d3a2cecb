/* F16: IEEE binary16. */
#include "block.h"

void sm_dequantize_f16(const void *blocks, float *out, size_t n_blocks) {
    const uint8_t *p = blocks;
    for (size_t i = 0; i < n_blocks; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, sizeof h);
        out[i] = sm_f16_to_f32(h);
    }
}

size_t sm_find_nonfinite_f16(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, 2, 0, 1);
}

void sm_store_f16(const float *x, void *out, size_t n) {
    uint8_t *p = out;
    for (size_t i = 0; i < n; i++, p += 2) {
        uint16_t h = sm_f32_to_f16(x[i]);
        p[0] = (uint8_t)h;
        p[1] = (uint8_t)(h >> 8);
    }
}
