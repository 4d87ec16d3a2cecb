/* Matrix products on AMX.
 *
 * The tile unit multiplies TOKENS rows of activations with one panel's 16 rows of codes and leaves
 * exact int32 sums, which AVX-512 then scales and adds up as the contract says, some blocks later.
 * A panel's unpacked group of 4 columns, [16 rows][4], is a row of the tile unit's second operand as
 * it stands.  Storing a tile costs as much as multiplying it, however few its rows, so tiles have
 * all 16: 16 tokens in one block of 32 columns, or 8 tokens in two neighbouring blocks, with
 * activations that are zero outside a row's own block.
 *
 * A panel is unpacked to signed codes, COLUMNS columns at once (in L1), and used for all tokens;
 * longer rows carry their sums in `out`.  Fewer than 8 tokens, and the last ones that do not fill
 * a tile, go to AVX-512 VNNI.
 *
 * Formats with integer scales have them multiplied into the codes as they are unpacked: then a whole
 * group sums up inside the tile unit.  A product needs up to 13 bits, so there are two planes,
 * code * scale = low + 128 * high, low 0 .. 127, and two sums.  The shorter the groups, the more tokens
 * that takes to pay. */
#include <immintrin.h>
#include <stdatomic.h>

#include "../panels.h"
#include "../tier.h"
#include "../x86_avx512vnni/matmul.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define TOKENS 16
#define HALF (TOKENS / 2)
#define COLUMNS 1024
#define RING 4 /* blocks whose sums are on their way or waiting */

/* Where things lie in a call's scratch: codes, the ring, activations of a half tile. */
#define CODES_BYTES ((size_t)COLUMNS * ROWS)
#define RING_BYTES ((size_t)RING * TOKENS * ROWS * 4)

/* ---- codes ------------------------------------------------------------------------------------------------- */

/* Codes less their bias of one slab: [8][64], byte 4 r + j of a group is column j of row r. */
INLINE void unpack_slab(struct sm_layout f, uint8_t *codes, const uint8_t *slab) {
    const __m512i low_mask = _mm512_set1_epi8((char)((1 << f.low) - 1));
    const __m512i high_mask = _mm512_set1_epi8((char)(((1 << f.high) - 1) << f.low));
    const __m512i bias = _mm512_set1_epi8((char)f.bias);
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
        x = sm_look_up(f, x);
        if (f.bias != 0) x = _mm512_sub_epi8(x, bias);
        _mm512_storeu_si512(codes + 64 * g, x);
    }
}

/* Blocks first .. first + n_blocks - 1 of one panel: codes [n_blocks][8][64]. */
INLINE void unpack(struct sm_layout f, uint8_t *codes, const uint8_t *panel, size_t first,
                   size_t n_blocks) {
    for (size_t i = first; i < first + n_blocks; i++, codes += 8 * 64)
        unpack_slab(f, codes, panel + i * sm_layout_bytes(f) + sm_layout_codes(f));
    atomic_signal_fence(memory_order_seq_cst); /* tile loads are no loads to the compiler */
}

/* ---- tiles ------------------------------------------------------------------------------------------------- */

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tile registers: 0 .. 3 sums, 4 and 5 activations, 6 and 7 codes of n_blocks blocks. */
INLINE void configure(int n_blocks) {
    struct tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? n_blocks * SM_SLAB : 64);
        c.rows[i] = (uint8_t)(i < 6 ? TOKENS : n_blocks * SM_SLAB / 4);
    }
    _tile_loadconfig(&c);
}

/* Some blocks of TOKENS tokens (of HALF, where halved) against one panel. */
struct tile {
    const uint8_t *panel;    /* at the first block */
    const uint8_t *next;     /* blocks to come, which the first tokens ask for; or NULL */
    const uint8_t *codes;    /* [columns / 4][64] */
    const int8_t *q;         /* [TOKENS][stride]; halved: [pairs of blocks][TOKENS][64], see spread */
    const float *d, *s;      /* [tokens][row_blocks] */
    size_t stride, row_blocks, n_blocks;
    float *out;              /* [tokens][ld] */
    size_t ld;
    bool carry;              /* starts from out instead of zero */
    int32_t *sums;           /* scratch: [RING][TOKENS][ROWS] */
};

#define START(sum, x, w)                                                    \
    _tile_zero(sum);                                                        \
    _tile_loadd(x, q, stride);                                              \
    _tile_loadd(w, codes, 64);                                              \
    _tile_dpbssd(sum, x, w);                                                \
    _tile_stored(sum, a->sums + (size_t)sum * TOKENS * ROWS, 64)

/* Sums number i (over block i, or pair i of blocks) into their place in the ring. */
INLINE void start(bool halved, const struct tile *a, size_t i) {
    const int8_t *q = a->q + i * (halved ? TOKENS * 64 : SM_SLAB);
    const uint8_t *codes = a->codes + i * (halved ? 2 : 1) * SM_SLAB * ROWS;
    const size_t stride = halved ? 64 : a->stride;
    switch (i % RING) {
    case 0: START(0, 4, 6); break;
    case 1: START(1, 5, 7); break;
    case 2: START(2, 4, 6); break;
    case 3: START(3, 5, 7); break;
    }
}

/* Row `row` of sums number i. */
INLINE __m512 sum_of(const struct tile *a, size_t i, size_t row) {
    const int32_t *sums = a->sums + (i % RING * TOKENS + row) * ROWS;
    return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
}

/* acc += sums number i, of n_t tokens whose rows begin at `first`, scaled as block b. */
INLINE void add_block(struct sm_layout f, int n_t, const struct tile *a, size_t i, size_t first, size_t b,
                      __m512 acc[TOKENS]) {
    const uint8_t *block = a->panel + b * sm_layout_bytes(f);
    __m512 dw = sm_load_d(f, block), mw = _mm512_setzero_ps();
    if (f.mins) mw = sm_load_f16(block + 2 * ROWS);
#pragma GCC unroll 16
    for (int t = 0; t < n_t; t++) {
        size_t at = (size_t)t * a->row_blocks + b;
        __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[at]));
        acc[t] = _mm512_fmadd_ps(sum_of(a, i, first + (size_t)t), scale, acc[t]);
        if (f.mins) acc[t] = _mm512_fmadd_ps(mw, _mm512_set1_ps(a->s[at]), acc[t]);
    }
}

INLINE void run_tile(struct sm_layout f, bool halved, const struct tile *a) {
    const int n_t = halved ? HALF : TOKENS;
    const size_t n = halved ? (a->n_blocks + 1) / 2 : a->n_blocks;
    __m512 acc[TOKENS];
    for (int t = 0; t < n_t; t++)
        acc[t] = a->carry ? _mm512_loadu_ps(a->out + (size_t)t * a->ld) : _mm512_setzero_ps();
    for (size_t i = 0; i < SM_MIN(n, RING - 1); i++) start(halved, a, i);
#pragma GCC unroll 4
    for (size_t i = 0; i < n; i++) {
        if (i + RING - 1 < n) start(halved, a, i + RING - 1);
        const size_t bytes = (halved ? 2 : 1) * sm_layout_bytes(f);
        for (size_t j = 0; a->next != NULL && j < bytes; j += 64)
            _mm_prefetch(a->next + i * bytes + j, _MM_HINT_T1);
        if (!halved) {
            add_block(f, n_t, a, i, 0, i, acc);
            continue;
        }
        add_block(f, n_t, a, i, 0, 2 * i, acc);
        if (2 * i + 1 < a->n_blocks) add_block(f, n_t, a, i, HALF, 2 * i + 1, acc);
    }
    for (int t = 0; t < n_t; t++) _mm512_storeu_ps(a->out + (size_t)t * a->ld, acc[t]);
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* n_b blocks from b on of one panel, for n_tokens tokens, a multiple of TOKENS (HALF of them, where
 * halved, and `spread_q` are their activations). */
INLINE void run_panel(struct sm_layout f, bool halved, const struct sm_matmul *m, size_t panel,
                      size_t first, size_t n_tokens, size_t b, size_t n_b, const int8_t *spread_q,
                      const uint8_t *next) {
    const struct sm_acts *acts = m->acts;
    const size_t all = acts->k_pad / SM_SLAB, step = halved ? HALF : TOKENS;
    const uint8_t *from = m->panels + panel * m->panel_bytes;
    uint8_t *codes = m->scratch;
    struct tile a = {.panel = from + b * sm_layout_bytes(f), .codes = codes, .n_blocks = n_b,
                     .stride = acts->stride, .row_blocks = all, .ld = m->ld, .carry = b != 0,
                     .sums = (int32_t *)(void *)(codes + CODES_BYTES)};
    unpack(f, codes, from, b, n_b);
    for (size_t t = first; t < first + n_tokens; t += step) {
        size_t row = m->first + t;
        a.q = halved ? spread_q : acts->q + row * acts->stride + b * SM_SLAB;
        a.d = acts->d + row * all + b;
        a.s = acts->s + row * all + b;
        a.out = m->out + t * m->ld + panel * ROWS;
        a.next = t == first ? next : NULL;
        run_tile(f, halved, &a);
    }
}

/* out [pairs of blocks][TOKENS][64]: row t of a pair is token t's first block and zeros, row HALF + t
 * zeros and its second block.  The missing half of an odd last pair is zero. */
INLINE void spread(const struct sm_matmul *m, size_t first, size_t b, size_t n_b, int8_t *out) {
    const __m256i none = _mm256_setzero_si256();
    for (size_t i = 0; i < n_b; i += 2, out += TOKENS * 64)
        for (size_t t = 0; t < HALF; t++) {
            const int8_t *q = m->acts->q + (m->first + first + t) * m->acts->stride + (b + i) * SM_SLAB;
            __m256i x = _mm256_loadu_si256((const __m256i *)q), y = none;
            if (i + 1 < n_b) y = _mm256_loadu_si256((const __m256i *)(q + SM_SLAB));
            __m256i *low = (__m256i *)(out + t * 64), *high = (__m256i *)(out + (HALF + t) * 64);
            _mm256_store_si256(low, x);
            _mm256_store_si256(low + 1, none);
            _mm256_store_si256(high, none);
            _mm256_store_si256(high + 1, y);
        }
    atomic_signal_fence(memory_order_seq_cst);
}

/* Tokens first .. first + n_tokens - 1, columns outside, panels inside: so much of the activations
 * stays in L2. */
INLINE void run_panels(struct sm_layout f, bool halved, const struct sm_matmul *m, size_t first,
                       size_t n_tokens) {
    const size_t all = m->acts->k_pad / SM_SLAB, most = COLUMNS / SM_SLAB;
    int8_t *spread_q = (int8_t *)m->scratch + CODES_BYTES + RING_BYTES;
    configure(halved ? 2 : 1);
    for (size_t b = 0; b < all; b += most) {
        size_t n_b = SM_MIN(all - b, most);
        if (halved) spread(m, first, b, n_b, spread_q);
        const size_t at = b * sm_layout_bytes(f), after = at + n_b * sm_layout_bytes(f);
        for (size_t p = 0; p < m->n_panels; p++) {
            const uint8_t *next = m->panels + (p + 1) * m->panel_bytes + at;
            if (p + 1 == m->n_panels) next = b + n_b < all ? m->panels + after : m->next;
            run_panel(f, halved, m, p, first, n_tokens, b, n_b, spread_q, next);
        }
    }
    _tile_release();
}

/* ---- integer scales ---------------------------------------------------------------------------------------- */

#define SCALED_COLUMNS 512

/* A panel's SCALED_COLUMNS columns. */
struct scaled_codes {
    int8_t low[SCALED_COLUMNS * ROWS], high[SCALED_COLUMNS * ROWS]; /* [columns / 4][64] */
    int32_t mins[SCALED_COLUMNS / 256][8][ROWS]; /* of neighbouring sub-blocks as two int16 */
};

struct scaled_scratch {
    struct scaled_codes codes;
    int32_t ring[RING][2][TOKENS][ROWS];
    int32_t pairs[]; /* [n_tokens][SCALED_COLUMNS / 32] sums of q, likewise */
};

/* One plane is enough where all products fit 7 bits. */
INLINE bool one_plane(struct sm_layout f) {
    return f.scales == SM_SCALES_ONES || (f.scales == SM_SCALES_NIBBLES && f.low == 2);
}

/* Scale (and min) of sub-block s for the 16 rows of a block, as int32. */
INLINE __m512i load_scales(struct sm_layout f, const uint8_t *block, int s, __m512i *min) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(block + sm_layout_scales(f) + s * ROWS));
    if (f.scales == SM_SCALES_NIBBLES) {
        const __m128i nibble = _mm_set1_epi8(15);
        *min = _mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
        return _mm512_cvtepu8_epi32(_mm_and_si128(bytes, nibble));
    }
    if (f.mins)
        *min = _mm512_cvtepu8_epi32(
            _mm_loadu_si128((const __m128i *)(block + sm_layout_mins(f) + s * ROWS)));
    return _mm512_cvtepi8_epi32(bytes);
}

INLINE __m512i two_words(__m512i low, __m512i high) { /* low >= 0 */
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Blocks first .. first + n_blocks - 1 of one panel. */
INLINE void unpack_scaled(struct sm_layout f, struct scaled_codes *to, const uint8_t *panel,
                          size_t first, size_t n_blocks) {
    const int per_slab = SM_SLAB / f.sub;
    for (size_t b = 0; b < n_blocks; b++) {
        const uint8_t *block = panel + (first + b) * sm_layout_bytes(f);
        __m512i min[16] = {_mm512_setzero_si512()};
        for (int slab = 0; slab < 256 / SM_SLAB; slab++) {
            uint8_t codes[8 * 64];
            __m512i scale[2];
            for (int s = 0; s < per_slab; s++) {
                scale[s] = load_scales(f, block, slab * per_slab + s, &min[slab * per_slab + s]);
                scale[s] = _mm512_mullo_epi32(scale[s], _mm512_set1_epi32(0x10001));
                /* A negative scale borrows from the word above. */
                scale[s] = _mm512_mask_blend_epi16(0xaaaaaaaa, scale[s], _mm512_slli_epi32(scale[s], 16));
            }
            unpack_slab(f, codes, block + sm_layout_codes(f) + (size_t)slab * sm_layout_slab(f));
            for (int g = 0; g < 8; g++) {
                const size_t at = (b * 64 + (size_t)slab * 8 + (size_t)g) * 64;
                const __m512i x = _mm512_loadu_si512(codes + 64 * g), by = scale[g * per_slab / 8];
                if (f.scales == SM_SCALES_ONES) {
                    _mm512_store_si512(to->low + at, x);
                    continue;
                }
                __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd = _mm512_srai_epi16(x, 8);
                even = _mm512_mullo_epi16(even, by);
                odd = _mm512_mullo_epi16(odd, by);
                if (one_plane(f)) {
                    _mm512_store_si512(to->low + at, _mm512_or_si512(even, _mm512_slli_epi16(odd, 8)));
                    continue;
                }
                const __m512i seven = _mm512_set1_epi16(127), byte = _mm512_set1_epi16(255);
                __m512i low = _mm512_or_si512(_mm512_and_si512(even, seven),
                                              _mm512_slli_epi16(_mm512_and_si512(odd, seven), 8));
                even = _mm512_and_si512(_mm512_srai_epi16(even, 7), byte);
                odd = _mm512_slli_epi16(_mm512_srai_epi16(odd, 7), 8);
                _mm512_store_si512(to->low + at, low);
                _mm512_store_si512(to->high + at, _mm512_or_si512(even, odd));
            }
        }
        for (int i = 0; f.mins && i < 256 / f.sub / 2; i++)
            _mm512_store_si512(to->mins[b][i], two_words(min[2 * i], min[2 * i + 1]));
    }
}

/* Sums of q over neighbouring sub-blocks of tokens 0 .. n_tokens - 1, blocks from b on, as two int16. */
INLINE void pair_sums(struct sm_layout f, const struct sm_matmul *m, size_t n_tokens, size_t b,
                      size_t n_b, int32_t *pairs) {
    const size_t n = n_b * 256 / 16; /* sums of 16 columns of a token */
    for (size_t t = 0; t < n_tokens; t++, pairs += SCALED_COLUMNS / 32) {
        const int16_t *sum = m->acts->sum + (m->first + t) * (m->acts->k_pad / 16) + b * 16;
        for (size_t i = 0, step = (size_t)f.sub / 8; i < n; i += step) {
            int low = step == 2 ? sum[i] : sum[i] + sum[i + 1];
            int high = step == 2 ? sum[i + 1] : sum[i + 2] + sum[i + 3];
            pairs[i / step] = (int32_t)((uint32_t)high << 16 | ((uint32_t)low & 0xffff));
        }
    }
}

/* Some blocks of TOKENS tokens against one panel. */
struct scaled_tile {
    const uint8_t *panel; /* at the first block */
    const uint8_t *next;  /* blocks to come, which the first tokens ask for; or NULL */
    const struct scaled_codes *codes;
    const int8_t *q;      /* [TOKENS][stride] */
    const float *d;       /* [TOKENS][row_blocks] */
    const int32_t *pairs; /* [TOKENS][SCALED_COLUMNS / 32] */
    size_t stride, row_blocks, n_blocks;
    float *out;           /* [TOKENS][ld] */
    size_t ld;
    bool carry;
    int32_t (*ring)[2][TOKENS][ROWS];
};

#define ADD_UP(sum, sum_high)                                                    \
    _tile_zero(sum);                                                             \
    _tile_zero(sum_high);                                                        \
    for (size_t c = first; c < first + (size_t)f.group; c += step) {             \
        _tile_loadd(4, a->q + c, a->stride);                                     \
        _tile_loadd(6, a->codes->low + c * ROWS, 64);                            \
        _tile_dpbssd(sum, 4, 6);                                                 \
        if (one_plane(f)) continue;                                              \
        _tile_loadd(7, a->codes->high + c * ROWS, 64);                           \
        _tile_dpbssd(sum_high, 4, 7);                                            \
    }                                                                            \
    _tile_stored(sum, a->ring[i % RING][0], 64);                                 \
    if (!one_plane(f)) _tile_stored(sum_high, a->ring[i % RING][1], 64)

/* Sums over group i into their place in the ring. */
INLINE void start_scaled(struct sm_layout f, const struct scaled_tile *a, size_t i) {
    const size_t step = SM_MIN((size_t)f.group, 64), first = i * (size_t)f.group;
    if (i % 2 == 0) {
        ADD_UP(0, 1);
    } else {
        ADD_UP(2, 3);
    }
}

INLINE void run_scaled_tile(struct sm_layout f, const struct scaled_tile *a) {
    const size_t per_block = 256 / (size_t)f.group, n = a->n_blocks * per_block;
    const size_t n_pairs = 256 / (size_t)f.sub / 2;
    __m512 acc[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        acc[t] = a->carry ? _mm512_loadu_ps(a->out + (size_t)t * a->ld) : _mm512_setzero_ps();
    atomic_signal_fence(memory_order_seq_cst);
    for (size_t i = 0; i < SM_MIN(n, RING - 1); i++) start_scaled(f, a, i);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel + b * sm_layout_bytes(f);
        for (size_t j = 0; a->next != NULL && j < sm_layout_bytes(f); j += 64)
            _mm_prefetch(a->next + b * sm_layout_bytes(f) + j, _MM_HINT_T1);
        const __m512 dw = sm_load_d(f, block);
        __m512 scale[TOKENS]; /* in memory: the sums fill the registers */
        for (int t = 0; t < TOKENS; t++)
            scale[t] = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
        for (size_t i = b * per_block; i < (b + 1) * per_block; i++) {
            if (i + RING - 1 < n) start_scaled(f, a, i + RING - 1);
#pragma GCC unroll 16
            for (int t = 0; t < TOKENS; t++) {
                __m512i sum = _mm512_load_si512(a->ring[i % RING][0][t]);
                if (!one_plane(f)) {
                    __m512i high = _mm512_load_si512(a->ring[i % RING][1][t]);
                    sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 7));
                }
                acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[t], acc[t]);
            }
        }
        if (!f.mins) continue;
        const __m512 dmin = sm_load_f16(block + 2 * ROWS);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            const int32_t *pairs = a->pairs + (size_t)t * (SCALED_COLUMNS / 32) + b * n_pairs;
            __m512i msum = _mm512_setzero_si512();
            for (size_t i = 0; i < n_pairs; i++)
                msum = _mm512_dpwssd_epi32(msum, _mm512_load_si512(a->codes->mins[b][i]),
                                           _mm512_set1_epi32(pairs[i]));
            __m512 scale = _mm512_mul_ps(dmin, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
            acc[t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(msum), scale, acc[t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) _mm512_storeu_ps(a->out + (size_t)t * a->ld, acc[t]);
}

/* The first n_tokens tokens, a multiple of TOKENS. */
INLINE void run_scaled(struct sm_layout f, const struct sm_matmul *m, size_t n_tokens) {
    const struct sm_acts *acts = m->acts;
    const size_t all = acts->k_pad / 256, most = SCALED_COLUMNS / 256;
    struct scaled_scratch *s = m->scratch;
    configure(f.group >= 64 ? 2 : 1);
    for (size_t b = 0; b < all; b += most) {
        const size_t n_b = SM_MIN(all - b, most), at = b * sm_layout_bytes(f);
        if (f.mins) pair_sums(f, m, n_tokens, b, n_b, s->pairs);
        for (size_t p = 0; p < m->n_panels; p++) {
            const uint8_t *panel = m->panels + p * m->panel_bytes, *next = panel + m->panel_bytes + at;
            if (p + 1 == m->n_panels)
                next = b + n_b < all ? m->panels + at + n_b * sm_layout_bytes(f) : m->next;
            struct scaled_tile a = {.panel = panel + at, .codes = &s->codes,
                                    .stride = acts->stride, .row_blocks = all, .n_blocks = n_b,
                                    .ld = m->ld, .carry = b != 0, .ring = s->ring};
            unpack_scaled(f, &s->codes, panel, b, n_b);
            for (size_t t = 0; t < n_tokens; t += TOKENS) {
                size_t row = m->first + t;
                a.q = acts->q + row * acts->stride + b * 256;
                a.d = acts->d + row * all + b;
                a.pairs = s->pairs + t * (SCALED_COLUMNS / 32);
                a.out = m->out + t * m->ld + p * ROWS;
                a.next = t == 0 ? next : NULL;
                run_scaled_tile(f, &a);
            }
        }
    }
    _tile_release();
}

/* ---- any format -------------------------------------------------------------------------------------------- */

INLINE void integers(struct sm_layout f, const struct sm_matmul *m, sm_matmul_fn *few) {
    const bool scaled = f.scales != SM_SCALES_NONE;
    size_t done = m->n_tokens / TOKENS * TOKENS;
    const size_t least = !scaled ? HALF : f.group >= 64 ? TOKENS : 2 * TOKENS;
    if (m->n_tokens < least) {
        few(m);
        return;
    }
    if (scaled)
        run_scaled(f, m, done);
    else if (done > 0)
        run_panels(f, false, m, 0, done);
    if (!scaled && m->n_tokens - done >= HALF) {
        run_panels(f, true, m, done, HALF);
        done += HALF;
    }
    if (done == m->n_tokens) return;
    struct sm_matmul rest = *m;
    rest.out += done * m->ld;
    rest.first += done;
    rest.n_tokens -= done;
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
#define SM_SAME(NAME, name, AS, as) k->matmul[SM_TYPE_##NAME] = matmul_##as;
#include "../../quants/codes.def"
#undef SM_CODES
}
