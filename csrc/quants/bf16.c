/* BF16: the upper half of a float32. */
#include "block.h"

void sm_dequantize_bf16(const void *blocks, float *out, size_t n_blocks) {
    const uint8_t *p = blocks;
    for (size_t i = 0; i < n_blocks; i++) out[i] = sm_bf16_to_f32(sm_u16_at(p + 2 * i));
}

size_t sm_find_nonfinite_bf16(const void *blocks, size_t n_blocks) {
    const uint8_t *p = blocks;
    for (size_t i = 0; i < n_blocks; i++) {
        if ((sm_u16_at(p + 2 * i) & 0x7F80u) == 0x7F80u) return i;
    }
    return n_blocks;
}

void sm_store_bf16(const float *x, void *out, size_t n) {
    uint8_t *p = out;
    for (size_t i = 0; i < n; i++, p += 2) {
        uint16_t h = sm_f32_to_bf16(x[i]);
        p[0] = (uint8_t)h;
        p[1] = (uint8_t)(h >> 8);
    }
}
