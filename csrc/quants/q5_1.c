/* Q5_1: 32 values d * code + m, codes of 5 bits. */
#include "fit.h"

struct block {
    uint8_t d[2], m[2]; /* float16 */
    uint8_t high[4];    /* bit i: the top bit of code i */
    uint8_t codes[16];  /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 24, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->m);
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
    p->plane[4] = sm_high_plane(b->high);
}
SM_DEFINE_PARTS(q5_1)

size_t sm_find_nonfinite_q5_1(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

void sm_quantize_q5_1(const float *x, const float *w, void *blocks, size_t n_blocks) {
    static const float tops[] = {31, 30.5f, 30, 29.5f, 29, 28.5f, 28, 31.5f};
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += 32, w = w ? w + 32 : NULL) {
        struct sm_line line = sm_fit_line(x, w, 32, 31, false, tops, SM_COUNT(tops));
        uint8_t code[32];
        sm_put_f16(b->d, line.d);
        sm_put_f16(b->m, line.m);
        float id = sm_inverse(sm_f16_at(b->d));
        sm_codes_of(x, 32, id, -sm_f16_at(b->m) * id, 0, 31, 0, code);
        sm_put_five(code, b->high, b->codes);
    }
}
