/* Q3_K: 256 values in 16 sub-blocks of 16: (d * (scale - 32)) * (code - 4), codes of 3 bits,
 * scales of 6. */
#include "fit.h"

struct block {
    uint8_t high[32];   /* bit i of byte j: the top bit of the code of value 32 i + j */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t scales[12]; /* bytes 0-7: low bits of 0-7, of 8-15 above; 8-11: top bits */
    uint8_t d[2];       /* float16 */
};
_Static_assert(sizeof(struct block) == 110, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int s = 0; s < 16; s++) {
        int low = b->scales[s % 8] >> (s / 8 * 4) & 15;
        int top = b->scales[8 + s % 4] >> (s / 4 * 2) & 3;
        p->scale[s] = (uint8_t)((low | top << 4) - 32);
    }
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 12 * h, 3);
    sm_transpose(b->high, 1, p->plane + 2, 3);
}
SM_DEFINE_PARTS(q3_k)

size_t sm_find_nonfinite_q3_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

void sm_quantize_q3_k(const float *x, const float *w, void *blocks, size_t n_blocks) {
    static const float peaks[] = {-4, -3.6f, -3.2f, -2.8f, -4.4f, 3, 3.4f, 2.6f, 2.2f, -2.4f};
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += SM_SUPER, w = w ? w + SM_SUPER : NULL) {
        struct sm_scaled f = sm_fit_scaled(x, w, 16, -4, 3, -32, 31, peaks, SM_COUNT(peaks));
        uint8_t code[SM_SUPER];
        sm_scaled_codes(&f, x, 16, -4, 3, code);
        sm_put_f16(b->d, f.d);
        memset(b->scales, 0, sizeof b->scales);
        for (int s = 0; s < 16; s++) {
            int scale = f.scale[s] + 32;
            b->scales[s % 8] |= (uint8_t)((scale & 15) << (s / 8 * 4));
            b->scales[8 + s % 4] |= (uint8_t)(scale >> 4 << (s / 4 * 2));
        }
        sm_put_planes(code, 2, 0, b->codes);
        sm_put_planes(code, 1, 2, b->high);
    }
}
