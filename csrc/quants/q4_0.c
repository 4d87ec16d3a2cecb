/* Q4_0: 32 values d * (code - 8), codes of 4 bits. */
#include "fit.h"

struct block {
    uint8_t d[2];     /* float16 */
    uint8_t codes[16]; /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 18, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
}
SM_DEFINE_PARTS(q4_0)

size_t sm_find_nonfinite_q4_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

void sm_quantize_q4_0(const float *x, const float *w, void *blocks, size_t n_blocks) {
    static const float peaks[] = {-8, -7.5f, -7, -6.5f, -8.5f, -6, 7, 7.5f, 6.5f, 6};
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += 32, w = w ? w + 32 : NULL) {
        float d = sm_fit_scale(x, w, 32, -8, 7, peaks, SM_COUNT(peaks));
        uint8_t code[32];
        sm_put_f16(b->d, d);
        sm_codes_of(x, 32, sm_inverse(sm_f16_at(b->d)), 0, -8, 7, 8, code);
        for (int j = 0; j < 16; j++) b->codes[j] = (uint8_t)(code[j] | code[j + 16] << 4);
    }
}
