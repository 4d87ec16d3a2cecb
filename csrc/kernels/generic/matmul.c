/* Matrix products in plain C: the definition of every format's answer (contract in kernels.h).
 *
 * Formats with interleaved panels (Q4_0, Q4_1, Q8_0 and the floats) run lane by lane over the panel;
 * the others decode one block of one row at a time into integer codes and use it for all tokens.
 * Partial sums wait in `out`: a float stored and loaded is the same float. */
#include "../../f16.h"
#include "../../fma.h"
#include "../kernels.h"
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
            const float *x = m->acts->f + (m->first + t) * k_pad; /* [k_pad] */
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

/* ---- interleaved panels of 32 columns -------------------------------------------------------------- */

/* isum[r] = sum over the block's 32 columns of (code - offset) * q */
INLINE void block_sums(const uint8_t *w, bool nibbles, int offset, const int8_t *q,
                       int32_t isum[ROWS]) {
    for (size_t r = 0; r < ROWS; r++) isum[r] = 0;
    for (size_t g = 0; g < (nibbles ? 4u : 8u); g++)
        for (size_t r = 0; r < ROWS; r++)
            for (size_t j = 0; j < 4; j++) {
                int code = w[(g * ROWS + r) * 4 + j];
                if (nibbles) {
                    isum[r] += ((code & 15) - offset) * q[4 * g + j];
                    isum[r] += ((code >> 4) - offset) * q[16 + 4 * g + j];
                } else {
                    isum[r] += (code - offset) * q[4 * g + j];
                }
            }
}

INLINE void block32_panels(const struct sm_matmul *m, bool nibbles, bool mins, int offset) {
    size_t k_pad = m->acts->k_pad, n_blocks = k_pad / 32;
    size_t scale_bytes = mins ? 4 * ROWS : 2 * ROWS;
    size_t block_bytes = scale_bytes + (nibbles ? 16 * ROWS : 32 * ROWS);
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t t = 0; t < m->n_tokens; t++) {
            const uint8_t *w = m->panels + p * m->panel_bytes;          /* [n_blocks] */
            const int8_t *q = m->acts->q + (m->first + t) * k_pad;  /* [k_pad] */
            const float *d = m->acts->d + (m->first + t) * n_blocks; /* [n_blocks] */
            const float *s = m->acts->s + (m->first + t) * n_blocks; /* [n_blocks] */
            float acc[ROWS] = {0};
            for (size_t b = 0; b < n_blocks; b++, w += block_bytes) {
                int32_t isum[ROWS];
                block_sums(w + scale_bytes, nibbles, offset, q + 32 * b, isum);
                for (size_t r = 0; r < ROWS; r++) {
                    acc[r] = sm_fma((float)isum[r], load_f16(w + 2 * r) * d[b], acc[r]);
                    if (mins) acc[r] = sm_fma(load_f16(w + 2 * (ROWS + r)), s[b], acc[r]);
                }
            }
            memcpy(m->out + t * m->ld + p * ROWS, acc, sizeof acc);
        }
}

static void matmul_q4_0(const struct sm_matmul *m) { block32_panels(m, true, false, 8); }
static void matmul_q4_1(const struct sm_matmul *m) { block32_panels(m, true, true, 0); }
static void matmul_q8_0(const struct sm_matmul *m) { block32_panels(m, false, false, 128); }

/* ---- rows of file blocks ---------------------------------------------------------------------------- */

/* One block of one row in integers: weight c of sub-block i is
 * d * scale[i] * code[c] - dmin * min[i] (Q5_1: d * code[c] + dmin). */
struct codes {
    float d, dmin;
    int32_t scale[16], min[16];
    int8_t code[256];
};

typedef void decode_fn(const uint8_t *block, struct codes *c);

/* What a format's integers look like. */
struct rows {
    size_t block;      /* columns of a block */
    size_t bytes;      /* of a block */
    size_t sub;        /* columns that share a scale */
    size_t group;      /* columns summed in integers before one fma */
    bool mins;         /* K-quants with mins */
    bool float_min;    /* Q5_1 */
};

INLINE void row_panels(const struct sm_matmul *m, struct rows f, decode_fn *decode) {
    const struct sm_acts *a = m->acts;
    size_t n_blocks = a->k / f.block;
    size_t n_sums = f.block == 32 ? 1 : 16; /* activation sums in a block: per 32, or per 16 */
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t r = 0; r < ROWS; r++) {
            const uint8_t *row = m->panels + p * m->panel_bytes + r * n_blocks * f.bytes;
            float *out = m->out + p * ROWS + r; /* [n_tokens], ld apart */
            for (size_t t = 0; t < m->n_tokens; t++) out[t * m->ld] = 0;
            for (size_t b = 0; b < n_blocks; b++) {
                struct codes c;
                decode(row + b * f.bytes, &c);
                for (size_t t = 0; t < m->n_tokens; t++) {
                    size_t at = (m->first + t) * n_blocks + b; /* this block of this token */
                    const int8_t *q = a->q + at * f.block;
                    const int32_t *sum = a->sum + at * n_sums;
                    float acc = out[t * m->ld];
                    for (size_t g = 0; g < f.block; g += f.group) {
                        int32_t isum = 0;
                        for (size_t i = g; i < g + f.group; i += f.sub) {
                            int32_t dot = 0;
                            for (size_t j = i; j < i + f.sub; j++) dot += c.code[j] * q[j];
                            isum += c.scale[i / f.sub] * dot;
                        }
                        acc = sm_fma((float)isum, c.d * a->d[at], acc);
                    }
                    if (f.float_min) acc = sm_fma(c.dmin, a->s[at], acc);
                    if (f.mins) {
                        int32_t msum = 0;
                        for (size_t i = 0; i < f.block / 16; i++)
                            msum += c.min[i * 16 / f.sub] * sum[i];
                        acc = sm_fma((float)msum, -(c.dmin * a->d[at]), acc);
                    }
                    out[t * m->ld] = acc;
                }
            }
        }
}

/* Q5_0, Q5_1: fifth bits of all 32 columns in one word. */
INLINE void decode_5bit(const uint8_t *high, const uint8_t *low, int offset, struct codes *c) {
    uint32_t bits;
    memcpy(&bits, high, 4);
    for (int j = 0; j < 16; j++) {
        c->code[j] = (int8_t)(((low[j] & 15) | ((bits >> j & 1) << 4)) - (uint32_t)offset);
        c->code[j + 16] = (int8_t)(((low[j] >> 4) | ((bits >> (j + 16) & 1) << 4)) - (uint32_t)offset);
    }
    c->scale[0] = 1;
}
INLINE void decode_q5_0(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b);
    decode_5bit(b + 2, b + 6, 16, c);
}
INLINE void decode_q5_1(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b);
    c->dmin = load_f16(b + 2);
    decode_5bit(b + 4, b + 8, 0, c);
}

/* Q2_K: 16 bytes of (scale | min << 4), 64 bytes of 2-bit codes, d, dmin. */
INLINE void decode_q2_k(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b + 80);
    c->dmin = load_f16(b + 82);
    for (int i = 0; i < 16; i++) {
        c->scale[i] = b[i] & 15;
        c->min[i] = b[i] >> 4;
    }
    for (int j = 0; j < 256; j++) /* 128 columns share 32 bytes, 2 bits each */
        c->code[j] = b[16 + j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3;
}

/* Q3_K: 32 bytes of high bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, d. */
INLINE void decode_q3_k(const uint8_t *b, struct codes *c) {
    const uint8_t *high = b, *low = b + 32, *scales = b + 96;
    c->d = load_f16(b + 108);
    for (int i = 0; i < 16; i++) { /* low four bits in bytes 0-7, high two in bytes 8-11 */
        int four = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
        int two = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        c->scale[i] = (four | two << 4) - 32;
    }
    for (int j = 0; j < 256; j++) {
        int two = low[j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3;
        int bit = high[j % 32] >> (j / 32) & 1;
        c->code[j] = (int8_t)(two - (bit ? 0 : 4));
    }
}

/* Q4_K, Q5_K: eight 6-bit scales and mins in 12 bytes. */
INLINE void decode_scales_k4(const uint8_t *s, struct codes *c) {
    for (int i = 0; i < 4; i++) {
        c->scale[i] = s[i] & 63;
        c->min[i] = s[4 + i] & 63;
        c->scale[4 + i] = (s[8 + i] & 15) | (s[i] >> 6) << 4;
        c->min[4 + i] = (s[8 + i] >> 4) | (s[4 + i] >> 6) << 4;
    }
}
INLINE void decode_q4_k(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b);
    c->dmin = load_f16(b + 2);
    decode_scales_k4(b + 4, c);
    for (int j = 0; j < 256; j++) /* 64 columns share 32 bytes */
        c->code[j] = b[16 + j / 64 * 32 + j % 32] >> (j % 64 / 32 * 4) & 15;
}
INLINE void decode_q5_k(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b);
    c->dmin = load_f16(b + 2);
    decode_scales_k4(b + 4, c);
    for (int j = 0; j < 256; j++) {
        int four = b[48 + j / 64 * 32 + j % 32] >> (j % 64 / 32 * 4) & 15;
        c->code[j] = (int8_t)(four | (b[16 + j % 32] >> (j / 32) & 1) << 4);
    }
}

/* Q6_K: 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d. */
INLINE void decode_q6_k(const uint8_t *b, struct codes *c) {
    c->d = load_f16(b + 208);
    for (int i = 0; i < 16; i++) c->scale[i] = (int8_t)b[192 + i];
    for (int j = 0; j < 256; j++) {
        int four = b[j / 128 * 64 + j % 64] >> (j % 128 / 64 * 4) & 15;
        int two = b[128 + j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3;
        c->code[j] = (int8_t)((four | two << 4) - 32);
    }
}

#define ROWS_FORMAT(name, ...) \
    static void matmul_##name(const struct sm_matmul *m) { \
        row_panels(m, (struct rows){__VA_ARGS__}, decode_##name); \
    }
ROWS_FORMAT(q5_0, .block = 32, .bytes = 22, .sub = 32, .group = 32)
ROWS_FORMAT(q5_1, .block = 32, .bytes = 24, .sub = 32, .group = 32, .float_min = true)
ROWS_FORMAT(q2_k, .block = 256, .bytes = 84, .sub = 16, .group = 256, .mins = true)
ROWS_FORMAT(q3_k, .block = 256, .bytes = 110, .sub = 16, .group = 256)
ROWS_FORMAT(q4_k, .block = 256, .bytes = 144, .sub = 32, .group = 128, .mins = true)
ROWS_FORMAT(q5_k, .block = 256, .bytes = 176, .sub = 32, .group = 64, .mins = true)
ROWS_FORMAT(q6_k, .block = 256, .bytes = 210, .sub = 16, .group = 32)

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
#define SM_QUANT(NAME, id, name, n, bytes, act) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#include "../../quants/quants.def"
#undef SM_QUANT
}
