/* Q8_0: 32 values d * (code - 128): the file's signed bytes with the sign bit turned. */
#include "fit.h"

struct block {
    uint8_t d[2]; /* float16 */
    uint8_t codes[32];
};
_Static_assert(sizeof(struct block) == 34, "as in quants.def");

static inline void take(const struct block *b, struct sm_parts *p) {
    p->d = sm_u16_at(b->d);
    p->m = 0;
    memcpy(p->plane, b->codes, sizeof b->codes);
    for (int i = 0; i < 8; i++) p->plane[i] ^= 0x80808080u;
}
SM_DEFINE_PARTS(q8_0)

size_t sm_find_nonfinite_q8_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

void sm_quantize_q8_0(const float *x, const float *w, void *blocks, size_t n_blocks) {
    (void)w; /* 8 bits leave nothing to choose */
    struct block *b = blocks;
    for (size_t i = 0; i < n_blocks; i++, b++, x += 32) {
        float peak = sm_peak(x, 32);
        sm_put_f16(b->d, (peak < 0 ? -peak : peak) / 127);
        sm_codes_of(x, 32, sm_inverse(sm_f16_at(b->d)), 0, -127, 127, 0, b->codes);
    }
}
