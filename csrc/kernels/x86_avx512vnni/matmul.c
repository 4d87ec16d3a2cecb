/* Matrix products on AVX-512 VNNI: one panel row per 32-bit lane, weights as dpbusd's unsigned
 * operand, activations broadcast four signed bytes at a time.
 *
 * A tile holds n_p panels x n_t tokens in registers.  One token runs four panels wide, so that
 * several memory streams are in flight; few tokens run on the packed bytes; from UNPACK_TOKENS on,
 * two panels are unpacked once into scratch and used for all tokens.  Scratch holds at most
 * UNPACK_COLUMNS columns (64 KB, well inside L2); longer rows carry their sums in `out`. */
#include <immintrin.h>

#include "../kernels.h"
#include "../tier.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define TILE_TOKENS 6
#define UNPACK_TOKENS 18
#define UNPACK_COLUMNS 2048
#define PREFETCH_BYTES 1536 /* ahead of each of the four streams of a single token */

/* ---- formats of 32 columns a block ----------------------------------------------------------------- */

struct format {
    bool nibbles; /* two codes a byte, else one */
    bool mins;
    int shift;    /* the codes' offset is 1 << shift; 0: none */
};

INLINE size_t scale_bytes(struct format f) { return f.mins ? 4 * ROWS : 2 * ROWS; }
INLINE size_t block_bytes(struct format f) {
    return scale_bytes(f) + (f.nibbles ? 16 * ROWS : 32 * ROWS);
}

/* Where a tile finds one panel's blocks: scales always in the panel, codes there or unpacked. */
struct stream {
    const uint8_t *scales; /* [n_blocks] block_bytes apart */
    const uint8_t *codes;  /* [n_blocks] code_step apart */
};

struct tile {
    const int8_t *q;       /* [n_t][k_pad] */
    const float *d, *s;    /* [n_t][n_blocks] */
    const int32_t *sum;    /* [n_t][n_blocks] */
    size_t k_pad, row_blocks; /* distances between tokens */
    size_t n_blocks;       /* to do */
    float *out;            /* [n_t][ld], ROWS * n_p columns */
    size_t ld;
    bool carry;            /* starts from out instead of zero */
};

INLINE __m512i broadcast4(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

INLINE void run_tile(struct format f, bool unpacked, int n_p, int n_t, const struct stream *w,
                     const struct tile *a) {
    const __m512i low = _mm512_set1_epi8(15);
    const size_t step = block_bytes(f), code_step = unpacked ? 32 * ROWS : step;
    __m512 acc[4][TILE_TOKENS];
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++)
            acc[p][t] = a->carry ? _mm512_loadu_ps(a->out + t * a->ld + p * ROWS)
                                 : _mm512_setzero_ps();
    for (size_t b = 0; b < a->n_blocks; b++) {
        __m512i isum[4][TILE_TOKENS];
        for (int t = 0; t < n_t; t++) {
            __m512i seed = _mm512_setzero_si512();
            if (f.shift != 0) {
                __m512i sum = _mm512_set1_epi32(a->sum[t * a->row_blocks + b]);
                seed = _mm512_sub_epi32(seed, _mm512_slli_epi32(sum, (unsigned)f.shift));
            }
            for (int p = 0; p < n_p; p++) isum[p][t] = seed;
        }
        const int8_t *q = a->q + 32 * b;
        const bool packed_nibbles = f.nibbles && !unpacked;
        for (int g = 0; g < (packed_nibbles ? 4 : 8); g++)
            for (int p = 0; p < n_p; p++) {
                const uint8_t *codes = w[p].codes + b * code_step + (size_t)g * 64;
                if (n_t == 1 && !unpacked) _mm_prefetch(codes + PREFETCH_BYTES, _MM_HINT_T0);
                __m512i bytes = _mm512_loadu_si512(codes);
                if (packed_nibbles) {
                    __m512i lo = _mm512_and_si512(bytes, low);
                    __m512i hi = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
                    for (int t = 0; t < n_t; t++) {
                        const int8_t *x = q + t * a->k_pad + 4 * g;
                        isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], lo, broadcast4(x));
                        isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], hi, broadcast4(x + 16));
                    }
                } else {
                    for (int t = 0; t < n_t; t++)
                        isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], bytes,
                                                         broadcast4(q + t * a->k_pad + 4 * g));
                }
            }
        for (int p = 0; p < n_p; p++) {
            const uint8_t *scales = w[p].scales + b * step;
            __m512 dw = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
            __m512 mw = _mm512_setzero_ps();
            if (f.mins)
                mw = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + 2 * ROWS)));
            for (int t = 0; t < n_t; t++) {
                size_t at = t * a->row_blocks + b;
                __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[at]));
                acc[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum[p][t]), scale, acc[p][t]);
                if (f.mins) acc[p][t] = _mm512_fmadd_ps(mw, _mm512_set1_ps(a->s[at]), acc[p][t]);
            }
        }
    }
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++) _mm512_storeu_ps(a->out + t * a->ld + p * ROWS, acc[p][t]);
}

/* All tokens of m against n_p panels, in tiles of constant size. */
INLINE void run_tokens(struct format f, bool unpacked, int n_p, const struct stream *w,
                       const struct sm_matmul *m, size_t panel, size_t first_block,
                       size_t n_blocks) {
    const struct sm_acts *acts = m->acts;
    struct tile a = {.k_pad = acts->k_pad, .row_blocks = acts->k_pad / 32, .n_blocks = n_blocks,
                     .ld = m->ld, .carry = first_block != 0};
    for (size_t t = 0; t < m->n_tokens; t += TILE_TOKENS) {
        size_t row = m->first + t, at = row * a.row_blocks + first_block;
        a.q = acts->q + row * a.k_pad + 32 * first_block;
        a.d = acts->d + at;
        a.s = acts->s + at;
        a.sum = acts->sum + at;
        a.out = m->out + t * m->ld + panel * ROWS;
        switch (SM_MIN(m->n_tokens - t, TILE_TOKENS)) {
        case 1: run_tile(f, unpacked, n_p, 1, w, &a); break;
        case 2: run_tile(f, unpacked, n_p, 2, w, &a); break;
        case 3: run_tile(f, unpacked, n_p, 3, w, &a); break;
        case 4: run_tile(f, unpacked, n_p, 4, w, &a); break;
        case 5: run_tile(f, unpacked, n_p, 5, w, &a); break;
        default: run_tile(f, unpacked, n_p, 6, w, &a); break;
        }
    }
}

/* One token against n_p panels. */
INLINE void run_one(struct format f, int n_p, const struct stream *w, const struct sm_matmul *m,
                    size_t panel) {
    const struct sm_acts *acts = m->acts;
    size_t row_blocks = acts->k_pad / 32, at = m->first * row_blocks;
    struct tile a = {.q = acts->q + m->first * acts->k_pad, .d = acts->d + at, .s = acts->s + at,
                     .sum = acts->sum + at, .k_pad = acts->k_pad, .row_blocks = row_blocks,
                     .n_blocks = row_blocks, .out = m->out + panel * ROWS, .ld = m->ld};
    run_tile(f, false, n_p, 1, w, &a);
}

/* codes [n_blocks][8][64] of one panel's 4-bit blocks. */
INLINE void unpack(struct format f, uint8_t *codes, const uint8_t *blocks, size_t n_blocks) {
    const __m512i low = _mm512_set1_epi8(15);
    for (size_t b = 0; b < n_blocks; b++, codes += 32 * ROWS)
        for (int g = 0; g < 4; g++) {
            __m512i bytes = _mm512_loadu_si512(blocks + b * block_bytes(f) + scale_bytes(f) + g * 64);
            _mm512_store_si512(codes + g * 64, _mm512_and_si512(bytes, low));
            _mm512_store_si512(codes + (g + 4) * 64,
                               _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
        }
}

/* Two panels (one at the end) of m against all its tokens. */
INLINE void run_pair(struct format f, int n_p, const struct sm_matmul *m, size_t panel) {
    size_t all = m->acts->k_pad / 32;
    if (!f.nibbles || m->n_tokens < UNPACK_TOKENS) {
        struct stream w[2];
        for (int p = 0; p < n_p; p++) {
            w[p].scales = m->panels + (panel + p) * m->panel_bytes;
            w[p].codes = w[p].scales + scale_bytes(f);
        }
        run_tokens(f, false, n_p, w, m, panel, 0, all);
        return;
    }
    for (size_t b = 0; b < all; b += UNPACK_COLUMNS / 32) {
        size_t n = SM_MIN(all - b, UNPACK_COLUMNS / 32);
        struct stream w[2];
        for (int p = 0; p < n_p; p++) {
            uint8_t *codes = (uint8_t *)m->scratch + (size_t)p * UNPACK_COLUMNS * ROWS;
            w[p].scales = m->panels + (panel + p) * m->panel_bytes + b * block_bytes(f);
            w[p].codes = codes;
            unpack(f, codes, w[p].scales, n);
        }
        run_tokens(f, true, n_p, w, m, panel, b, n);
    }
}

INLINE void block32(struct format f, const struct sm_matmul *m) {
    size_t p = 0;
    if (m->n_tokens == 1) {
        for (; p < m->n_panels; p += 4) {
            struct stream w[4];
            size_t n_p = SM_MIN(m->n_panels - p, 4);
            for (size_t i = 0; i < n_p; i++) {
                w[i].scales = m->panels + (p + i) * m->panel_bytes;
                w[i].codes = w[i].scales + scale_bytes(f);
            }
            switch (n_p) {
            case 1: run_one(f, 1, w, m, p); break;
            case 2: run_one(f, 2, w, m, p); break;
            case 3: run_one(f, 3, w, m, p); break;
            default: run_one(f, 4, w, m, p); break;
            }
        }
        return;
    }
    for (; p + 2 <= m->n_panels; p += 2) run_pair(f, 2, m, p);
    if (p < m->n_panels) run_pair(f, 1, m, p);
}

static void matmul_q4_0(const struct sm_matmul *m) {
    block32((struct format){.nibbles = true, .shift = 3}, m);
}
static void matmul_q4_1(const struct sm_matmul *m) {
    block32((struct format){.nibbles = true, .mins = true}, m);
}
static void matmul_q8_0(const struct sm_matmul *m) { block32((struct format){.shift = 7}, m); }

/* ---- floats ---------------------------------------------------------------------------------------- */

typedef __m512 load_fn(const uint8_t *p);

INLINE __m512 load_f32(const uint8_t *p) { return _mm512_loadu_ps(p); }
INLINE __m512 load_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE __m512 load_bf16(const uint8_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* n_t tokens from row `row` on against n_p panels from `panel` on. */
INLINE void float_tile(load_fn *load, size_t size, int n_p, int n_t, const struct sm_matmul *m,
                       size_t panel, size_t row, float *out) {
    size_t k_pad = m->acts->k_pad;
    const uint8_t *w = m->panels + panel * m->panel_bytes; /* [n_p][k_pad][16] */
    const float *x = m->acts->f + row * k_pad;             /* [n_t][k_pad] */
    __m512 acc[4][TILE_TOKENS];
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++) acc[p][t] = _mm512_setzero_ps();
    for (size_t c = 0; c < k_pad; c++)
        for (int p = 0; p < n_p; p++) {
            __m512 column = load(w + p * m->panel_bytes + c * ROWS * size);
            for (int t = 0; t < n_t; t++)
                acc[p][t] = _mm512_fmadd_ps(column, _mm512_set1_ps(x[t * k_pad + c]), acc[p][t]);
        }
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++) _mm512_storeu_ps(out + t * m->ld + p * ROWS, acc[p][t]);
}

INLINE void float_panels(load_fn *load, size_t size, int n_p, const struct sm_matmul *m,
                         size_t panel) {
    for (size_t t = 0; t < m->n_tokens; t += TILE_TOKENS) {
        float *out = m->out + t * m->ld + panel * ROWS;
        size_t row = m->first + t;
        switch (SM_MIN(m->n_tokens - t, TILE_TOKENS)) {
        case 1: float_tile(load, size, n_p, 1, m, panel, row, out); break;
        case 2: float_tile(load, size, n_p, 2, m, panel, row, out); break;
        case 3: float_tile(load, size, n_p, 3, m, panel, row, out); break;
        case 4: float_tile(load, size, n_p, 4, m, panel, row, out); break;
        case 5: float_tile(load, size, n_p, 5, m, panel, row, out); break;
        default: float_tile(load, size, n_p, 6, m, panel, row, out); break;
        }
    }
}

INLINE void floats(load_fn *load, size_t size, const struct sm_matmul *m) {
    size_t p = 0;
    for (; p + 4 <= m->n_panels; p += 4) float_panels(load, size, 4, m, p);
    for (; p < m->n_panels; p++) float_panels(load, size, 1, m, p);
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
