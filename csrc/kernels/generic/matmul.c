/* Matrix products in plain C: the definition of every format's answer (contract in kernels.h).
 *
 * Integer formats take one block of one row at a time apart and use it for all tokens; partial sums
 * wait in `out`: a float stored and loaded is the same float. */
#include "../../f16.h"
#include "../../fma.h"
#include "../panels.h"
#include "../tier.h"

#define ROWS SM_PANEL_ROWS
#define INLINE static inline __attribute__((always_inline))

/* ---- floats: acc = fma(w, x, acc), k ascending --------------------------------------------------- */

typedef float load_fn(const uint8_t *p);

INLINE float load_f32(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}
INLINE float load_f16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return sm_f16_to_f32(h);
}
INLINE float load_bf16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return sm_bf16_to_f32(h);
}

INLINE void float_panels(const struct sm_matmul *m, load_fn *load, size_t size) {
    size_t k_pad = m->acts->k_pad;
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t t = 0; t < m->n_tokens; t++) {
            const uint8_t *w = m->panels + p * m->panel_bytes;        /* [k_pad][16] */
            const float *x = m->acts->f + (m->first + t) * m->acts->stride; /* [k_pad] */
            float acc[ROWS] = {0};
            for (size_t c = 0; c < k_pad; c++)
                for (size_t r = 0; r < ROWS; r++)
                    acc[r] = sm_fma(load(w + (c * ROWS + r) * size), x[c], acc[r]);
            memcpy(m->out + t * m->ld + p * ROWS, acc, sizeof acc);
        }
}

static void matmul_f32(const struct sm_matmul *m) { float_panels(m, load_f32, 4); }
static void matmul_f16(const struct sm_matmul *m) { float_panels(m, load_f16, 2); }
static void matmul_bf16(const struct sm_matmul *m) { float_panels(m, load_bf16, 2); }

/* ---- integers ------------------------------------------------------------------------------------------ */

/* The group rule: see the contract. */
INLINE void integer_panels(const struct sm_matmul *m, struct sm_layout f) {
    const struct sm_acts *a = m->acts;
    size_t block = (size_t)f.block, n_blocks = a->k / block, n_sums = block == 32 ? 1 : 16;
    bool plain = f.scales == SM_SCALES_NONE;
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t r = 0; r < ROWS; r++) {
            const uint8_t *w = m->panels + p * m->panel_bytes; /* [n_blocks] */
            float *out = m->out + p * ROWS + r;                /* [n_tokens], ld apart */
            for (size_t t = 0; t < m->n_tokens; t++) out[t * m->ld] = 0;
            for (size_t b = 0; b < n_blocks; b++, w += sm_layout_bytes(f)) {
                struct sm_codes c;
                sm_panel_block(f, w, r, &c);
                for (size_t t = 0; t < m->n_tokens; t++) {
                    size_t at = (m->first + t) * n_blocks + b; /* this block of this token */
                    const int8_t *q = a->q + (m->first + t) * a->stride + b * block; /* [block] */
                    float acc = out[t * m->ld], d = a->d[at];
                    int32_t isum = 0, msum = 0;
                    for (int s = 0; s < f.block / f.sub; s++) {
                        int32_t dot = 0;
                        for (int j = s * f.sub; j < (s + 1) * f.sub; j++)
                            dot += (c.code[j] - f.bias) * q[j];
                        isum += c.scale[s] * dot;
                        if ((s + 1) * f.sub % f.group != 0) continue;
                        acc = sm_fma((float)isum, c.d * d, acc);
                        isum = 0;
                    }
                    if (f.mins && plain) acc = sm_fma(-c.m, a->s[at], acc);
                    if (f.mins && !plain) {
                        const int16_t *sum = a->sum + at * n_sums; /* [16] */
                        for (int i = 0; i < 16; i++) msum += c.min[i * 16 / f.sub] * sum[i];
                        acc = sm_fma((float)msum, -(c.m * d), acc);
                    }
                    out[t * m->ld] = acc;
                }
            }
        }
}

#define SM_CODES(NAME, name, ...)                              \
    static void matmul_##name(const struct sm_matmul *m) {     \
        integer_panels(m, SM_LAYOUT(__VA_ARGS__));             \
    }
#include "../../quants/codes.def"
#undef SM_CODES

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
    k->matmul[SM_TYPE_F32] = matmul_f32;
    k->matmul[SM_TYPE_F16] = matmul_f16;
    k->matmul[SM_TYPE_BF16] = k->matmul[SM_TYPE_NVFP4] = matmul_bf16;
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#define SM_SAME(NAME, name, AS, as) k->matmul[SM_TYPE_##NAME] = matmul_##as;
#include "../../quants/codes.def"
#undef SM_CODES
}
