/* Matrix products of integer formats on AMX.
 *
 * The tile unit multiplies TOKENS rows of activations with one panel's 16 rows of codes and leaves
 * exact int32 sums, which AVX-512 then scales and adds up as the contract says; the two work at the
 * same time, the tile unit some sub-blocks ahead.  A panel's unpacked group of 4 columns, [16 rows][4],
 * is a row of the tile unit's second operand as it stands.  Storing a tile costs as much as
 * multiplying it, however few its rows, so tiles have all 16.
 *
 * A panel is unpacked to signed codes, COLUMNS columns at once (in L1 or near), and used for all
 * tokens; longer rows carry their sums in `out`.  Fewer than TOKENS tokens, and the last ones that do
 * not fill a tile, go to AVX-512 VNNI. */
#include <immintrin.h>
#include <stdatomic.h>

#include "../panels.h"
#include "../tier.h"
#include "../x86_avx512vnni/matmul.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define TOKENS 16
#define COLUMNS 1024
#define RING 4 /* sub-blocks whose sums are on their way or waiting */

/* Where things lie in a call's scratch. */
#define CODES_BYTES ((size_t)COLUMNS * ROWS)

/* ---- codes ------------------------------------------------------------------------------------------------- */

/* Codes less their bias of n_slabs slabs of one panel, beginning with slab `first`: codes
 * [n_slabs][8][64], byte 4 r + j of a group is column j of row r. */
INLINE void unpack(struct sm_layout f, uint8_t *codes, const uint8_t *panel, size_t first,
                   size_t n_slabs) {
    const size_t per_block = (size_t)(f.block / SM_SLAB);
    const __m512i low_mask = _mm512_set1_epi8((char)((1 << f.low) - 1));
    const __m512i high_mask = _mm512_set1_epi8((char)(((1 << f.high) - 1) << f.low));
    const __m512i bias = _mm512_set1_epi8((char)f.bias);
    for (size_t i = first; i < first + n_slabs; i++, codes += 8 * 64) {
        const uint8_t *slab = panel + i / per_block * sm_layout_bytes(f) + sm_layout_codes(f) +
                              i % per_block * sm_layout_slab(f);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            __m512i x = _mm512_loadu_si512(slab + 64 * (g % f.low));
            if (f.low < 8)
                x = _mm512_and_si512(_mm512_srli_epi16(x, (unsigned)(g / f.low * f.low)), low_mask);
            if (f.high > 0) {
                int shift = g / f.high * f.high - f.low; /* bits down to the code's top */
                __m512i y = _mm512_loadu_si512(slab + 64 * (f.low + g % f.high));
                y = shift > 0 ? _mm512_srli_epi16(y, (unsigned)shift)
                              : _mm512_slli_epi16(y, (unsigned)-shift);
                x = _mm512_ternarylogic_epi32(x, y, high_mask, 0xf8); /* x | (y & mask) */
            }
            if (f.bias != 0) x = _mm512_sub_epi8(x, bias);
            _mm512_store_si512(codes + 64 * g, x);
        }
    }
    atomic_signal_fence(memory_order_seq_cst); /* tile loads are no loads to the compiler */
}

/* ---- tiles ------------------------------------------------------------------------------------------------- */

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tile registers: 0 .. 3 sums, 4 and 5 activations, 6 and 7 codes of `columns` columns. */
INLINE void configure(int columns) {
    struct tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? columns : 64);
        c.rows[i] = (uint8_t)(i < 6 ? TOKENS : columns / 4);
    }
    _tile_loadconfig(&c);
}

/* Some blocks of TOKENS tokens against one panel. */
struct tile {
    const uint8_t *panel;    /* at the first block */
    const uint8_t *codes;    /* [columns / 4][64] */
    const int8_t *q;         /* [TOKENS][k_pad] */
    const float *d, *s;      /* [TOKENS][row_blocks] */
    const int32_t *sum;      /* [TOKENS][16 row_blocks], formats with integer scales */
    size_t k_pad, row_blocks, n_blocks;
    float *out;              /* [TOKENS][ld] */
    size_t ld;
    bool carry;              /* starts from out instead of zero */
    int32_t *sums;           /* scratch: [RING][TOKENS][ROWS] */
};

#define START(sum, x, w)                                                    \
    _tile_zero(sum);                                                        \
    _tile_loadd(x, a->q + i * (size_t)columns, a->k_pad);                   \
    _tile_loadd(w, a->codes + i * (size_t)columns * ROWS, 64);              \
    _tile_dpbssd(sum, x, w);                                                \
    _tile_stored(sum, a->sums + (size_t)sum * TOKENS * ROWS, 64)

/* Sums over sub-block i of `columns` columns into their place in the ring. */
INLINE void start(const struct tile *a, int columns, size_t i) {
    switch (i % RING) {
    case 0: START(0, 4, 6); break;
    case 1: START(1, 5, 7); break;
    case 2: START(2, 4, 6); break;
    case 3: START(3, 5, 7); break;
    }
}

INLINE __m512 sum_of(const struct tile *a, size_t i, int t) {
    const int32_t *sums = a->sums + (i % RING * TOKENS + (size_t)t) * ROWS;
    return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
}
INLINE __m512 load_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* Formats of one scale per 32 columns. */
INLINE void plain_tile(struct sm_layout f, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    __m512 acc[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        acc[t] = a->carry ? _mm512_loadu_ps(a->out + (size_t)t * a->ld) : _mm512_setzero_ps();
    for (size_t b = 0; b < SM_MIN(a->n_blocks, RING - 1); b++) start(a, SM_SLAB, b);
#pragma GCC unroll 4
    for (size_t b = 0; b < a->n_blocks; b++) {
        if (b + RING - 1 < a->n_blocks) start(a, SM_SLAB, b + RING - 1);
        const uint8_t *block = a->panel + b * step;
        __m512 dw = load_f16(block), mw = _mm512_setzero_ps();
        if (f.mins) mw = load_f16(block + 2 * ROWS);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            size_t at = (size_t)t * a->row_blocks + b;
            __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[at]));
            acc[t] = _mm512_fmadd_ps(sum_of(a, b, t), scale, acc[t]);
            if (f.mins) acc[t] = _mm512_fmadd_ps(mw, _mm512_set1_ps(a->s[at]), acc[t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) _mm512_storeu_ps(a->out + (size_t)t * a->ld, acc[t]);
}

/* Scale (below) and min of sub-block s for the 16 rows of a block, as int32. */
INLINE __m512i load_scales(struct sm_layout f, const uint8_t *block, int s) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(block + sm_layout_scales(f) + s * ROWS));
    if (f.scales == SM_SCALES_NIBBLES) bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
    return _mm512_cvtepi8_epi32(bytes);
}
INLINE __m512i load_mins(struct sm_layout f, const uint8_t *block, int s) {
    if (f.scales == SM_SCALES_NIBBLES) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(block + sm_layout_scales(f) + s * ROWS));
        return _mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15)));
    }
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(block + sm_layout_mins(f) + s * ROWS)));
}

/* Takes the mins of block b off out.  Sums of 16 columns, in pairs of int16. */
INLINE void subtract_mins(struct sm_layout f, const struct tile *a, size_t b) {
    const uint8_t *block = a->panel + b * sm_layout_bytes(f);
    __m512i msum[TOKENS];
    for (int t = 0; t < TOKENS; t++) msum[t] = _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        __m512i even = load_mins(f, block, 2 * i * 16 / f.sub);
        __m512i odd = load_mins(f, block, (2 * i + 1) * 16 / f.sub);
        __m512i pair = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        for (int t = 0; t < TOKENS; t++) {
            const int32_t *two = a->sum + ((size_t)t * a->row_blocks + b) * 16 + 2 * i;
            uint32_t sums = (uint16_t)two[0] | (uint32_t)two[1] << 16;
            msum[t] = _mm512_dpwssd_epi32(msum[t], pair, _mm512_set1_epi32((int)sums));
        }
    }
    __m512 dmin = load_f16(block + 2 * ROWS);
    for (int t = 0; t < TOKENS; t++) {
        float *out = a->out + (size_t)t * a->ld;
        __m512 scale = _mm512_mul_ps(dmin, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
        __m512 msums = _mm512_cvtepi32_ps(msum[t]);
        _mm512_storeu_ps(out, _mm512_fnmadd_ps(msums, scale, _mm512_loadu_ps(out)));
    }
}

/* Formats of 256 columns with integer scales.  Sums of scale * dot stay below 2^24 within a group,
 * so they are exact as floats. */
INLINE void scaled_tile(struct sm_layout f, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    const size_t n_sub = (size_t)(f.block / f.sub), group_subs = (size_t)(f.group / f.sub);
    const size_t n_subs = a->n_blocks * n_sub;
    for (int t = 0; !a->carry && t < TOKENS; t++)
        _mm512_storeu_ps(a->out + (size_t)t * a->ld, _mm512_setzero_ps());
    for (size_t i = 0; i < RING - 1; i++) start(a, f.sub, i);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel + b * step;
        __m512 dw = load_f16(block);
#pragma GCC unroll 1
        for (size_t first = 0; first < n_sub; first += group_subs) {
            __m512 scaled[TOKENS];
            for (int t = 0; t < TOKENS; t++) scaled[t] = _mm512_setzero_ps();
            for (size_t s = first; s < first + group_subs; s++) {
                size_t i = b * n_sub + s;
                if (i + RING - 1 < n_subs) start(a, f.sub, i + RING - 1);
                __m512 scale = _mm512_cvtepi32_ps(load_scales(f, block, (int)s));
#pragma GCC unroll 16
                for (int t = 0; t < TOKENS; t++)
                    scaled[t] = _mm512_fmadd_ps(sum_of(a, i, t), scale, scaled[t]);
            }
            for (int t = 0; t < TOKENS; t++) {
                float *out = a->out + (size_t)t * a->ld;
                __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
                _mm512_storeu_ps(out, _mm512_fmadd_ps(scaled[t], scale, _mm512_loadu_ps(out)));
            }
        }
        if (f.mins) subtract_mins(f, a, b);
    }
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* n_b blocks from b on of one panel, for n_tokens tokens, a multiple of TOKENS. */
INLINE void run_panel(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t n_tokens,
                      size_t b, size_t n_b) {
    const struct sm_acts *acts = m->acts;
    const size_t block = (size_t)f.block, all = acts->k_pad / block;
    const uint8_t *from = m->panels + panel * m->panel_bytes;
    uint8_t *codes = m->scratch;
    struct tile a = {.panel = from + b * sm_layout_bytes(f), .codes = codes, .n_blocks = n_b,
                     .k_pad = acts->k_pad, .row_blocks = all, .ld = m->ld, .carry = b != 0,
                     .sums = (int32_t *)(void *)(codes + CODES_BYTES)};
    unpack(f, codes, from, b * block / SM_SLAB, n_b * block / SM_SLAB);
    for (size_t t = 0; t < n_tokens; t += TOKENS) {
        size_t row = m->first + t;
        a.q = acts->q + row * acts->k_pad + b * block;
        a.d = acts->d + row * all + b;
        a.s = f.block == 32 ? acts->s + row * all + b : NULL;
        a.sum = f.block == 32 ? NULL : acts->sum + (row * all + b) * 16;
        a.out = m->out + t * m->ld + panel * ROWS;
        if (f.scales == SM_SCALES_NONE)
            plain_tile(f, &a);
        else
            scaled_tile(f, &a);
    }
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m, sm_matmul_fn *few) {
    const size_t n_tiled = m->n_tokens / TOKENS * TOKENS;
    if (n_tiled == 0) {
        few(m);
        return;
    }
    configure(f.sub);
    /* Columns outside, panels inside: so much of the activations stays in L2. */
    const size_t all = m->acts->k_pad / (size_t)f.block, most = COLUMNS / (size_t)f.block;
    for (size_t b = 0; b < all; b += most)
        for (size_t p = 0; p < m->n_panels; p++)
            run_panel(f, m, p, n_tiled, b, SM_MIN(all - b, most));
    _tile_release();
    if (n_tiled == m->n_tokens) return;
    struct sm_matmul rest = *m;
    rest.out += n_tiled * m->ld;
    rest.first += n_tiled;
    rest.n_tokens -= n_tiled;
    few(&rest);
}

#define SM_CODES(NAME, name, ...)                                               \
    static void matmul_##name(const struct sm_matmul *m) {                      \
        integers(SM_LAYOUT(__VA_ARGS__), m, sm_matmul_##name##__avx512vnni);    \
    }
#include "../../quants/codes.def"
#undef SM_CODES

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#include "../../quants/codes.def"
#undef SM_CODES
}
