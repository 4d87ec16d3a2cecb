/* Q2_K: 256 values in 16 sub-blocks of 16: (d * scale) * code - (dmin * min), codes of 2 bits,
 * scales and mins of 4. */
#include "fit.h"

struct block {
    uint8_t scales[16]; /* sub-block's scale in the low nibble, min in the high one */
    uint8_t codes[64];  /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t d[2], dmin[2]; /* float16 */
};
_Static_assert(sizeof(struct block) == 84, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->dmin);
    memcpy(p->scale, b->scales, sizeof b->scales);
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 8 * h, 2);
}
SM_DEFINE_PARTS(q2_k)

size_t sm_find_nonfinite_q2_k(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

void sm_quantize_q2_k(const float *x, const float *w, void *blocks, size_t n_blocks) {
    static const float tops[] = {3, 3.4f, 2.7f, 2.4f, 2.1f, 1.8f, 1.5f, 1.2f};
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += SM_SUPER, w = w ? w + SM_SUPER : NULL) {
        struct sm_lined f = sm_fit_lined(x, w, 16, 3, 15, tops, SM_COUNT(tops));
        uint8_t code[SM_SUPER];
        sm_lined_codes(&f, x, 16, 3, code);
        sm_put_f16(b->d, f.d);
        sm_put_f16(b->dmin, f.m);
        for (int s = 0; s < 16; s++) b->scales[s] = (uint8_t)(f.scale[s] | f.min[s] << 4);
        sm_put_planes(code, 2, 0, b->codes);
    }
}
