/* TQ2_0: 256 values d * (code - 1), codes of 2 bits: ternary weights have no code 3. */
#include "fit.h"

struct block {
    uint8_t codes[64]; /* byte 32 h + j holds values 128 h + 32 s + j in bits 2 s */
    uint8_t d[2];      /* float16 */
};
_Static_assert(sizeof(struct block) == 66, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    for (int h = 0; h < 2; h++) sm_transpose(b->codes + 32 * h, 2, p->plane + 8 * h, 2);
}
SM_DEFINE_PARTS(tq2_0)

size_t sm_find_nonfinite_tq2_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

void sm_quantize_tq2_0(const float *x, const float *w, void *blocks, size_t n_blocks) {
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += SM_SUPER, w = w ? w + SM_SUPER : NULL) {
        uint8_t code[SM_SUPER];
        sm_put_f16(b->d, sm_fit_ternary(x, w));
        sm_codes_of(x, SM_SUPER, sm_inverse(sm_f16_at(b->d)), 0, -1, 1, 1, code);
        sm_put_planes(code, 2, 0, b->codes);
    }
}
