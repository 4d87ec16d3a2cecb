/* Matrix products on AVX2 without VNNI: eight panel rows per register, so a panel is two halves.
 *
 * 4-bit codes are at most 15, so eight maddubs sums (2 * 15 * 127 each) fit 16 bits: a block of 32
 * columns adds in int16 and widens once.  8-bit codes take the sign trick: |w| as the unsigned
 * operand and the activation with w's sign; 2 * 128 * 127 still fits, and each pair widens at once.
 * A tile is one half panel x 4 tokens; a single token runs two halves of two panels. */
#include <immintrin.h>

#include "../kernels.h"
#include "../tier.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define HALF 8           /* rows of a register */
#define TILE_TOKENS 4
#define MAX_HALVES 4

struct format {
    bool nibbles;
    bool mins;
    int offset; /* of the codes as stored */
};

INLINE size_t scale_bytes(struct format f) { return f.mins ? 4 * ROWS : 2 * ROWS; }
INLINE size_t block_bytes(struct format f) {
    return scale_bytes(f) + (f.nibbles ? 16 * ROWS : 32 * ROWS);
}

INLINE __m256i broadcast4(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
INLINE __m256 load_scales(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* isum [n_h][n_t] of one block: half h's codes at codes[h], token t's activations at q + t * k_pad.
 * 4-bit sums are of the raw codes; the caller takes the offset off. */
INLINE void block_sums(struct format f, int n_h, int n_t, const uint8_t *const *codes,
                       const int8_t *q, size_t k_pad, __m256i isum[MAX_HALVES][TILE_TOKENS]) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i flip = _mm256_set1_epi8((char)0x80);
    for (int h = 0; h < n_h; h++)
        for (int t = 0; t < n_t; t++) isum[h][t] = _mm256_setzero_si256();
    for (int g = 0; g < (f.nibbles ? 4 : 8); g++)
        for (int h = 0; h < n_h; h++) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)(codes[h] + g * 64));
            if (f.nibbles) {
                __m256i lo = _mm256_and_si256(bytes, low);
                __m256i hi = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
                for (int t = 0; t < n_t; t++) {
                    const int8_t *x = q + t * k_pad + 4 * g;
                    __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(lo, broadcast4(x)),
                                                    _mm256_maddubs_epi16(hi, broadcast4(x + 16)));
                    isum[h][t] = _mm256_add_epi16(isum[h][t], pair);
                }
            } else {
                __m256i w = _mm256_xor_si256(bytes, flip), size = _mm256_abs_epi8(w);
                for (int t = 0; t < n_t; t++) {
                    __m256i x = _mm256_sign_epi8(broadcast4(q + t * k_pad + 4 * g), w);
                    __m256i pair = _mm256_maddubs_epi16(size, x);
                    isum[h][t] = _mm256_add_epi32(isum[h][t], _mm256_madd_epi16(pair, ones));
                }
            }
        }
    if (f.nibbles)
        for (int h = 0; h < n_h; h++)
            for (int t = 0; t < n_t; t++) isum[h][t] = _mm256_madd_epi16(isum[h][t], ones);
}

/* n_h halves from half `half` of the panels on x n_t tokens from row `row` on. */
INLINE void run_tile(struct format f, int n_h, int n_t, const struct sm_matmul *m, size_t half,
                     size_t row, float *out) {
    const struct sm_acts *a = m->acts;
    const size_t n_blocks = a->k_pad / 32, step = block_bytes(f);
    const uint8_t *w[MAX_HALVES]; /* this half's part of its panel's blocks */
    for (int h = 0; h < n_h; h++) w[h] = m->panels + (half + h) / 2 * m->panel_bytes;
    __m256 acc[MAX_HALVES][TILE_TOKENS];
    for (int h = 0; h < n_h; h++)
        for (int t = 0; t < n_t; t++) acc[h][t] = _mm256_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        const uint8_t *codes[MAX_HALVES];
        for (int h = 0; h < n_h; h++)
            codes[h] = w[h] + b * step + scale_bytes(f) + (half + h) % 2 * 32;
        __m256i isum[MAX_HALVES][TILE_TOKENS];
        block_sums(f, n_h, n_t, codes, a->q + row * a->k_pad + 32 * b, a->k_pad, isum);
        for (int h = 0; h < n_h; h++) {
            const uint8_t *scales = w[h] + b * step + (half + h) % 2 * 2 * HALF;
            __m256 dw = load_scales(scales);
            for (int t = 0; t < n_t; t++) {
                size_t at = (row + t) * n_blocks + b;
                __m256i sum = isum[h][t];
                if (f.nibbles && f.offset != 0)
                    sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(f.offset * a->sum[at]));
                __m256 scale = _mm256_mul_ps(dw, _mm256_set1_ps(a->d[at]));
                acc[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[h][t]);
                if (f.mins)
                    acc[h][t] = _mm256_fmadd_ps(load_scales(scales + 2 * ROWS),
                                                _mm256_set1_ps(a->s[at]), acc[h][t]);
            }
        }
    }
    for (int h = 0; h < n_h; h++)
        for (int t = 0; t < n_t; t++) _mm256_storeu_ps(out + t * m->ld + h * HALF, acc[h][t]);
}

INLINE void block32(struct format f, const struct sm_matmul *m) {
    size_t n_halves = 2 * m->n_panels, h = 0;
    if (m->n_tokens == 1) {
        for (; h + 4 <= n_halves; h += 4)
            run_tile(f, 4, 1, m, h, m->first, m->out + h * HALF);
        if (h < n_halves) run_tile(f, 2, 1, m, h, m->first, m->out + h * HALF);
        return;
    }
    for (; h < n_halves; h++)
        for (size_t t = 0; t < m->n_tokens; t += TILE_TOKENS) {
            float *out = m->out + t * m->ld + h * HALF;
            switch (SM_MIN(m->n_tokens - t, TILE_TOKENS)) {
            case 1: run_tile(f, 1, 1, m, h, m->first + t, out); break;
            case 2: run_tile(f, 1, 2, m, h, m->first + t, out); break;
            case 3: run_tile(f, 1, 3, m, h, m->first + t, out); break;
            default: run_tile(f, 1, 4, m, h, m->first + t, out); break;
            }
        }
}

static void matmul_q4_0(const struct sm_matmul *m) {
    block32((struct format){.nibbles = true, .offset = 8}, m);
}
static void matmul_q4_1(const struct sm_matmul *m) {
    block32((struct format){.nibbles = true, .mins = true}, m);
}
static void matmul_q8_0(const struct sm_matmul *m) { block32((struct format){.offset = 128}, m); }

/* ---- floats ---------------------------------------------------------------------------------------- */

typedef __m256 load_fn(const uint8_t *p);

INLINE __m256 load_f32(const uint8_t *p) { return _mm256_loadu_ps((const float *)(const void *)p); }
INLINE __m256 load_f16(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE __m256 load_bf16(const uint8_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* Both halves of n_p panels x n_t tokens. */
INLINE void float_tile(load_fn *load, size_t size, int n_p, int n_t, const struct sm_matmul *m,
                       size_t panel, size_t row, float *out) {
    size_t k_pad = m->acts->k_pad;
    const uint8_t *w = m->panels + panel * m->panel_bytes; /* [n_p][k_pad][16] */
    const float *x = m->acts->f + row * k_pad;             /* [n_t][k_pad] */
    __m256 acc[MAX_HALVES][TILE_TOKENS];
    for (int h = 0; h < 2 * n_p; h++)
        for (int t = 0; t < n_t; t++) acc[h][t] = _mm256_setzero_ps();
    for (size_t c = 0; c < k_pad; c++)
        for (int h = 0; h < 2 * n_p; h++) {
            __m256 column = load(w + h / 2 * m->panel_bytes + (c * ROWS + h % 2 * HALF) * size);
            for (int t = 0; t < n_t; t++)
                acc[h][t] = _mm256_fmadd_ps(column, _mm256_set1_ps(x[t * k_pad + c]), acc[h][t]);
        }
    for (int h = 0; h < 2 * n_p; h++)
        for (int t = 0; t < n_t; t++) _mm256_storeu_ps(out + t * m->ld + h * HALF, acc[h][t]);
}

INLINE void floats(load_fn *load, size_t size, const struct sm_matmul *m) {
    size_t p = 0;
    if (m->n_tokens == 1)
        for (; p + 2 <= m->n_panels; p += 2)
            float_tile(load, size, 2, 1, m, p, m->first, m->out + p * ROWS);
    for (; p < m->n_panels; p++)
        for (size_t t = 0; t < m->n_tokens; t += TILE_TOKENS) {
            float *out = m->out + t * m->ld + p * ROWS;
            switch (SM_MIN(m->n_tokens - t, TILE_TOKENS)) {
            case 1: float_tile(load, size, 1, 1, m, p, m->first + t, out); break;
            case 2: float_tile(load, size, 1, 2, m, p, m->first + t, out); break;
            case 3: float_tile(load, size, 1, 3, m, p, m->first + t, out); break;
            default: float_tile(load, size, 1, 4, m, p, m->first + t, out); break;
            }
        }
}

static void matmul_f32(const struct sm_matmul *m) { floats(load_f32, 4, m); }
static void matmul_f16(const struct sm_matmul *m) { floats(load_f16, 2, m); }
static void matmul_bf16(const struct sm_matmul *m) { floats(load_bf16, 2, m); }

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
    k->matmul[SM_TYPE_F32] = matmul_f32;
    k->matmul[SM_TYPE_F16] = matmul_f16;
    k->matmul[SM_TYPE_BF16] = matmul_bf16;
    k->matmul[SM_TYPE_Q4_0] = matmul_q4_0;
    k->matmul[SM_TYPE_Q4_1] = matmul_q4_1;
    k->matmul[SM_TYPE_Q8_0] = matmul_q8_0;
}
