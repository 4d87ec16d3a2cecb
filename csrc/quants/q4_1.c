/* Q4_1: 32 values d * code + m, codes of 4 bits. */
#include "fit.h"

struct block {
    uint8_t d[2], m[2]; /* float16 */
    uint8_t codes[16];  /* values 0-15 in the low nibbles, 16-31 in the high ones */
};
_Static_assert(sizeof(struct block) == 20, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = sm_u16_at(b->m);
    memcpy(p->plane, b->codes, sizeof b->codes); /* groups i and i + 4, as in a plane */
}
SM_DEFINE_PARTS(q4_1)

size_t sm_find_nonfinite_q4_1(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 2);
}

void sm_quantize_q4_1(const float *x, const float *w, void *blocks, size_t n_blocks) {
    static const float tops[] = {15, 14.5f, 14, 13.5f, 13, 15.5f, 12.5f, 12};
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += 32, w = w ? w + 32 : NULL) {
        struct sm_line line = sm_fit_line(x, w, 32, 15, false, tops, SM_COUNT(tops));
        uint8_t code[32];
        sm_put_f16(b->d, line.d);
        sm_put_f16(b->m, line.m);
        float id = sm_inverse(sm_f16_at(b->d));
        sm_codes_of(x, 32, id, -sm_f16_at(b->m) * id, 0, 15, 0, code);
        for (int j = 0; j < 16; j++) b->codes[j] = (uint8_t)(code[j] | code[j + 16] << 4);
    }
}
