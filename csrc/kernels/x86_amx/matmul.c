/* Matrix products on AMX, of formats with one scale per 32 columns.
 *
 * The tile unit multiplies TOKENS rows of activations with one panel's 16 rows of codes and leaves
 * exact int32 sums, which AVX-512 then scales and adds up as the contract says, some blocks later.
 * A panel's unpacked group of 4 columns, [16 rows][4], is a row of the tile unit's second operand as
 * it stands.  Storing a tile costs as much as multiplying it, however few its rows, so tiles have
 * all 16.
 *
 * A panel is unpacked to signed codes, COLUMNS columns at once (in L1), and used for all tokens;
 * longer rows carry their sums in `out`.  Fewer than TOKENS tokens, and the last ones that do not fill
 * a tile, go to AVX-512 VNNI.  So do formats with integer scales: each of their sub-blocks would
 * cost a whole tile's store, and then the scaling besides. */
#include <immintrin.h>
#include <stdatomic.h>

#include "../panels.h"
#include "../tier.h"
#include "../x86_avx512vnni/matmul.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define TOKENS 16
#define COLUMNS 1024
#define PREFETCH_BYTES 2048 /* ahead, where the next panel follows */
#define RING 4 /* blocks whose sums are on their way or waiting */

/* Where things lie in a call's scratch. */
#define CODES_BYTES ((size_t)COLUMNS * ROWS)

/* ---- codes ------------------------------------------------------------------------------------------------- */

/* Codes less their bias of blocks first .. first + n_blocks - 1 of one panel: codes
 * [n_blocks][8][64], byte 4 r + j of a group is column j of row r. */
INLINE void unpack(struct sm_layout f, uint8_t *codes, const uint8_t *panel, size_t first,
                   size_t n_blocks) {
    const __m512i low_mask = _mm512_set1_epi8((char)((1 << f.low) - 1));
    const __m512i high_mask = _mm512_set1_epi8((char)(((1 << f.high) - 1) << f.low));
    const __m512i bias = _mm512_set1_epi8((char)f.bias);
    for (size_t i = first; i < first + n_blocks; i++, codes += 8 * 64) {
        const uint8_t *slab = panel + i * sm_layout_bytes(f) + sm_layout_codes(f);
        for (size_t j = 0; j < sm_layout_slab(f); j += 64)
            _mm_prefetch(slab + PREFETCH_BYTES + j, _MM_HINT_T0);
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

/* Tile registers: 0 .. 3 sums, 4 and 5 activations, 6 and 7 codes of a block. */
INLINE void configure(void) {
    struct tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = i == 4 || i == 5 ? SM_SLAB : 64;
        c.rows[i] = i < 6 ? TOKENS : SM_SLAB / 4;
    }
    _tile_loadconfig(&c);
}

/* Some blocks of TOKENS tokens against one panel. */
struct tile {
    const uint8_t *panel;    /* at the first block */
    const uint8_t *codes;    /* [columns / 4][64] */
    const int8_t *q;         /* [TOKENS][stride] */
    const float *d, *s;      /* [TOKENS][row_blocks] */
    size_t stride, row_blocks, n_blocks;
    float *out;              /* [TOKENS][ld] */
    size_t ld;
    bool carry;              /* starts from out instead of zero */
    int32_t *sums;           /* scratch: [RING][TOKENS][ROWS] */
};

#define START(sum, x, w)                                                    \
    _tile_zero(sum);                                                        \
    _tile_loadd(x, a->q + b * SM_SLAB, a->stride);                          \
    _tile_loadd(w, a->codes + b * SM_SLAB * ROWS, 64);                      \
    _tile_dpbssd(sum, x, w);                                                \
    _tile_stored(sum, a->sums + (size_t)sum * TOKENS * ROWS, 64)

/* Sums over block b into their place in the ring. */
INLINE void start(const struct tile *a, size_t b) {
    switch (b % RING) {
    case 0: START(0, 4, 6); break;
    case 1: START(1, 5, 7); break;
    case 2: START(2, 4, 6); break;
    case 3: START(3, 5, 7); break;
    }
}

INLINE __m512 sum_of(const struct tile *a, size_t b, int t) {
    const int32_t *sums = a->sums + (b % RING * TOKENS + (size_t)t) * ROWS;
    return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
}
INLINE __m512 load_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE void run_tile(struct sm_layout f, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    __m512 acc[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        acc[t] = a->carry ? _mm512_loadu_ps(a->out + (size_t)t * a->ld) : _mm512_setzero_ps();
    for (size_t b = 0; b < SM_MIN(a->n_blocks, RING - 1); b++) start(a, b);
#pragma GCC unroll 4
    for (size_t b = 0; b < a->n_blocks; b++) {
        if (b + RING - 1 < a->n_blocks) start(a, b + RING - 1);
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

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* n_b blocks from b on of one panel, for n_tokens tokens, a multiple of TOKENS. */
INLINE void run_panel(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t n_tokens,
                      size_t b, size_t n_b) {
    const struct sm_acts *acts = m->acts;
    const size_t all = acts->k_pad / SM_SLAB;
    const uint8_t *from = m->panels + panel * m->panel_bytes;
    uint8_t *codes = m->scratch;
    struct tile a = {.panel = from + b * sm_layout_bytes(f), .codes = codes, .n_blocks = n_b,
                     .stride = acts->stride, .row_blocks = all, .ld = m->ld, .carry = b != 0,
                     .sums = (int32_t *)(void *)(codes + CODES_BYTES)};
    unpack(f, codes, from, b, n_b);
    for (size_t t = 0; t < n_tokens; t += TOKENS) {
        size_t row = m->first + t;
        a.q = acts->q + row * acts->stride + b * SM_SLAB;
        a.d = acts->d + row * all + b;
        a.s = acts->s + row * all + b;
        a.out = m->out + t * m->ld + panel * ROWS;
        run_tile(f, &a);
    }
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m, sm_matmul_fn *few) {
    const size_t n_tiled = m->n_tokens / TOKENS * TOKENS;
    if (f.scales != SM_SCALES_NONE || n_tiled == 0) {
        few(m);
        return;
    }
    configure();
    /* Columns outside, panels inside: so much of the activations stays in L2. */
    const size_t all = m->acts->k_pad / SM_SLAB, most = COLUMNS / SM_SLAB;
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
