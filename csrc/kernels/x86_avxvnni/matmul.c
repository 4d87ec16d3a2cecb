/* Products of integer formats on AVX-VNNI: weights as dpbusd's unsigned operand, activations
 * broadcast four signed bytes at a time.
 *
 * A tile holds n_h halves of panels x n_t tokens.  Few tokens run on the packed bytes, one or two
 * of them two panels wide, so that several memory streams are in flight.  More unpack a panel into
 * scratch, COLUMNS columns at a time, and use it for all of them; longer rows carry their sums in
 * `out`.
 *
 * Integer sums begin at START, whose bits are those of the float 1.5 * 2^23.  Sums of up to 22 bits
 * then are the mantissa of a float that a subtraction turns into the sum itself: like a conversion,
 * but on ports that dpbusd does not want. */
#include "../x86_avx2/matmul.h"
#include "../tier.h"

#define TILE_TOKENS 6
#define MAX_PANELS 2 /* of a packed tile */
#define START 0x4B400000

/* Some blocks (at most COLUMNS columns) of n_t tokens against halves of panels. */
struct tile {
    const uint8_t *panel[MAX_PANELS]; /* at the first block to do */
    const uint8_t *codes;     /* unpacked: [8][64] of each slab, slab_step apart */
    size_t slab_step, n_blocks;
    const int8_t *q;          /* [n_t][stride] */
    const float *d, *s;       /* [n_t][row_blocks] */
    size_t stride, row_blocks;
    float *out;               /* [n_t][ld] */
    size_t ld;
    bool carry;               /* starts from out instead of zero */
    size_t n_within, to_next; /* packed: blocks whose prefetch stays in the panel; from a panel's end
                               * to the panel that follows in this stream */
    /* Of the sums of q over a sub-block (32 columns at most): */
    int32_t seed[TILE_TOKENS][COLUMNS / 16];  /* START - bias * sum */
    int32_t pairs[TILE_TOKENS][COLUMNS / 32]; /* neighbours as two int16, for the mins */
};

/* Fills seed and pairs from sum, [n_t][row_sums] from the first block on: one per 32 columns in
 * formats of one scale, else one per 16. */
INLINE void prepare_sums(struct sm_layout f, int n_t, struct tile *a, const int32_t *sum,
                         size_t row_sums) {
    const bool scaled = f.scales != SM_SCALES_NONE;
    const size_t n = a->n_blocks * (scaled ? 16 : 1);
    for (int t = 0; t < n_t; t++, sum += row_sums) {
        for (size_t i = 0; f.bias != 0 && i < n; i++) a->seed[t][i] = START - f.bias * sum[i];
        for (size_t i = 0; scaled && f.mins && i < n; i += 16) {
            __m256i x = _mm256_packs_epi32(_mm256_loadu_si256((const __m256i *)(sum + i)),
                                           _mm256_loadu_si256((const __m256i *)(sum + i + 8)));
            x = _mm256_permute4x64_epi64(x, 0xD8);
            if (f.sub == 16) {
                _mm256_storeu_si256((__m256i *)(a->pairs[t] + i / 2), x);
            } else { /* sums over 32 columns: |sum| <= 32 * 127 still fits */
                x = _mm256_madd_epi16(x, _mm256_set1_epi16(1));
                x = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xD8);
                _mm_storeu_si128((__m128i *)(a->pairs[t] + i / 4), _mm256_castsi256_si128(x));
            }
        }
    }
}

INLINE __m256i seed_of(struct sm_layout f, const struct tile *a, int t, size_t i) {
    return _mm256_set1_epi32(f.bias == 0 ? START : a->seed[t][i]);
}
INLINE __m256 to_float(__m256i sum) {
    return _mm256_sub_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(_mm256_set1_epi32(START)));
}

INLINE void load_acc(int n_t, const struct tile *a, int h, __m256 acc[TILE_TOKENS]) {
    for (int t = 0; t < n_t; t++)
        acc[t] = a->carry ? _mm256_loadu_ps(a->out + (size_t)t * a->ld + h * HALF)
                          : _mm256_setzero_ps();
}
INLINE void store_acc(int n_t, const struct tile *a, int h, const __m256 acc[TILE_TOKENS]) {
    for (int t = 0; t < n_t; t++) _mm256_storeu_ps(a->out + (size_t)t * a->ld + h * HALF, acc[t]);
}

/* Scales the sums of block b of half h and adds them up. */
INLINE void add_block(struct sm_layout f, int n_t, const struct tile *a, size_t b, int h,
                      const __m256i isum[TILE_TOKENS], __m256 acc[TILE_TOKENS]) {
    const uint8_t *block = a->panel[h / 2] + b * sm_layout_bytes(f) + h % 2 * 2 * HALF;
    __m256 dw = load_f16(block), mw = _mm256_setzero_ps();
    if (f.mins) mw = load_f16(block + 2 * ROWS);
    for (int t = 0; t < n_t; t++) {
        size_t at = (size_t)t * a->row_blocks + b;
        __m256 scale = _mm256_mul_ps(dw, _mm256_set1_ps(a->d[at]));
        acc[t] = _mm256_fmadd_ps(to_float(isum[t]), scale, acc[t]);
        if (f.mins) acc[t] = _mm256_fmadd_ps(mw, _mm256_set1_ps(a->s[at]), acc[t]);
    }
}

/* Formats of one scale per 32 columns: half h of an unpacked panel. */
INLINE void plain_tile(struct sm_layout f, int n_t, int h, const struct tile *a) {
    __m256 acc[TILE_TOKENS];
    load_acc(n_t, a, h, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const int8_t *q = a->q + SM_SLAB * b;
        const uint8_t *codes = a->codes + b * a->slab_step + 32 * h;
        __m256i isum[TILE_TOKENS];
        for (int t = 0; t < n_t; t++) isum[t] = seed_of(f, a, t, b);
        for (int g = 0; g < 8; g++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(codes + SM_GROUP_BYTES * g));
            for (int t = 0; t < n_t; t++)
                isum[t] = _mm256_dpbusd_avx_epi32(isum[t], w,
                                                  broadcast4(q + (size_t)t * a->stride + 4 * g));
        }
        add_block(f, n_t, a, b, h, isum, acc);
    }
    store_acc(n_t, a, h, acc);
}

/* Prefetches bytes from .. to - 1 of what comes PREFETCH_BYTES later in panel p's stream. */
INLINE void prefetch_stream(const struct tile *a, int p, size_t block, size_t from, size_t to) {
    prefetch(a->panel[p] + from + (block < a->n_within ? 0 : a->to_next), to - from);
}

/* The same from the packed bytes, n_h halves. */
INLINE void plain_packed_tile(struct sm_layout f, int n_h, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    __m256 acc[2 * MAX_PANELS][TILE_TOKENS];
    for (int h = 0; h < n_h; h++) load_acc(n_t, a, h, acc[h]);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const int8_t *q = a->q + SM_SLAB * b;
        for (int h = 0; h < n_h; h++) {
            if (h % 2 == 0) prefetch_stream(a, h / 2, b, b * step, (b + 1) * step);
            __m256i w[8], isum[TILE_TOKENS];
            load_slab(f, a->panel[h / 2] + b * step + sm_layout_codes(f) + h % 2 * 32, w);
            for (int t = 0; t < n_t; t++) isum[t] = seed_of(f, a, t, b);
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++)
                for (int t = 0; t < n_t; t++)
                    isum[t] = _mm256_dpbusd_avx_epi32(isum[t], w[g],
                                                      broadcast4(q + (size_t)t * a->stride + 4 * g));
            add_block(f, n_t, a, b, h, isum, acc[h]);
        }
    }
    for (int h = 0; h < n_h; h++) store_acc(n_t, a, h, acc[h]);
}

/* Takes the mins of block b of half h off the accumulators. */
INLINE void subtract_mins(struct sm_layout f, int n_t, const struct tile *a, size_t b, int h,
                          __m256 acc[TILE_TOKENS]) {
    const uint8_t *block = a->panel[h / 2] + b * sm_layout_bytes(f);
    const int n_pairs = f.block / f.sub / 2;
    __m256i msum[TILE_TOKENS];
    for (int t = 0; t < n_t; t++) msum[t] = _mm256_setzero_si256();
    for (int i = 0; i < n_pairs; i++) {
        __m256i pair = pair_up(load_mins(f, block, h % 2, 2 * i), load_mins(f, block, h % 2, 2 * i + 1));
        for (int t = 0; t < n_t; t++)
            msum[t] = _mm256_dpwssd_avx_epi32(
                msum[t], pair, _mm256_set1_epi32(a->pairs[t][b * (size_t)n_pairs + (size_t)i]));
    }
    __m256 dmin = load_f16(block + 2 * ROWS + h % 2 * 2 * HALF);
    for (int t = 0; t < n_t; t++) {
        __m256 scale = _mm256_mul_ps(dmin, _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
        acc[t] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum[t]), scale, acc[t]);
    }
}

/* Formats of 256 columns with integer scales: half h of an unpacked panel.  Sums of scale * dot stay
 * below 2^24 within a group, so they are exact as floats. */
INLINE void scaled_tile(struct sm_layout f, int n_t, int h, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    const int n_sub = f.block / f.sub, sub_groups = f.sub / 4, group_subs = f.group / f.sub;
    __m256 acc[TILE_TOKENS];
    load_acc(n_t, a, h, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel[0] + b * step;
        __m256 dw = load_f16(block + h * 2 * HALF), scale[TILE_TOKENS];
        for (int t = 0; t < n_t; t++)
            scale[t] = _mm256_mul_ps(dw, _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
#pragma GCC unroll 1
        for (int first = 0; first < n_sub; first += group_subs) {
            __m256 scaled[TILE_TOKENS];
            for (int t = 0; t < n_t; t++) scaled[t] = _mm256_setzero_ps();
#pragma GCC unroll 1
            for (int s = first; s < first + group_subs; s++) {
                const uint8_t *codes = a->codes + (64 * b + (size_t)(s * sub_groups)) * SM_GROUP_BYTES;
                const int8_t *q = a->q + 256 * b + (size_t)(s * f.sub);
                __m256i isum[TILE_TOKENS];
                for (int t = 0; t < n_t; t++) /* biased formats have sub == 16 */
                    isum[t] = seed_of(f, a, t, 16 * b + (size_t)s);
#pragma GCC unroll 8
                for (int g = 0; g < sub_groups; g++) {
                    __m256i w = _mm256_loadu_si256((const __m256i *)(codes + SM_GROUP_BYTES * g + 32 * h));
                    for (int t = 0; t < n_t; t++)
                        isum[t] = _mm256_dpbusd_avx_epi32(isum[t], w,
                                                          broadcast4(q + (size_t)t * a->stride + 4 * g));
                }
                __m256 sub_scale = _mm256_cvtepi32_ps(load_scales(f, block, h, s));
                for (int t = 0; t < n_t; t++)
                    scaled[t] = _mm256_fmadd_ps(to_float(isum[t]), sub_scale, scaled[t]);
            }
            for (int t = 0; t < n_t; t++) acc[t] = _mm256_fmadd_ps(scaled[t], scale[t], acc[t]);
        }
        if (f.mins) subtract_mins(f, n_t, a, b, h, acc);
    }
    store_acc(n_t, a, h, acc);
}

/* The same from the packed bytes, n_h halves, a slab of 32 columns at a time. */
INLINE void scaled_packed_tile(struct sm_layout f, int n_h, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f), n_slabs = (size_t)(f.block / SM_SLAB);
    const int slab_subs = SM_SLAB / f.sub, sub_groups = f.sub / 4;
    __m256 acc[2 * MAX_PANELS][TILE_TOKENS];
    for (int h = 0; h < n_h; h++) load_acc(n_t, a, h, acc[h]);
    for (size_t b = 0; b < a->n_blocks; b++) {
        __m256 scale[2 * MAX_PANELS][TILE_TOKENS], scaled[2 * MAX_PANELS][TILE_TOKENS];
        for (int h = 0; h < n_h; h++) {
            __m256 dw = load_f16(a->panel[h / 2] + b * step + h % 2 * 2 * HALF);
            for (int t = 0; t < n_t; t++) {
                scale[h][t] =
                    _mm256_mul_ps(dw, _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
                scaled[h][t] = _mm256_setzero_ps();
            }
        }
#pragma GCC unroll 1
        for (size_t i = 0; i < n_slabs; i++) {
            const size_t line = step / n_slabs, from = b * step + i * line;
            const int8_t *q = a->q + 256 * b + SM_SLAB * i;
            const bool ends = (i + 1) * SM_SLAB % (size_t)f.group == 0; /* a group */
            for (int h = 0; h < n_h; h++) {
                const uint8_t *block = a->panel[h / 2] + b * step;
                if (h % 2 == 0) prefetch_stream(a, h / 2, b, from, from + line);
                __m256i w[8];
                load_slab(f, block + sm_layout_codes(f) + i * sm_layout_slab(f) + h % 2 * 32, w);
#pragma GCC unroll 2
                for (int s = 0; s < slab_subs; s++) {
                    const int sub = (int)i * slab_subs + s;
                    __m256 sub_scale = _mm256_cvtepi32_ps(load_scales(f, block, h % 2, sub));
                    __m256i isum[TILE_TOKENS];
                    for (int t = 0; t < n_t; t++) isum[t] = seed_of(f, a, t, 16 * b + (size_t)sub);
#pragma GCC unroll 8
                    for (int g = 0; g < sub_groups; g++)
                        for (int t = 0; t < n_t; t++)
                            isum[t] = _mm256_dpbusd_avx_epi32(
                                isum[t], w[s * sub_groups + g],
                                broadcast4(q + (size_t)t * a->stride + s * f.sub + 4 * g));
                    for (int t = 0; t < n_t; t++)
                        scaled[h][t] = _mm256_fmadd_ps(to_float(isum[t]), sub_scale, scaled[h][t]);
                }
                for (int t = 0; ends && t < n_t; t++) {
                    acc[h][t] = _mm256_fmadd_ps(scaled[h][t], scale[h][t], acc[h][t]);
                    scaled[h][t] = _mm256_setzero_ps();
                }
            }
        }
        for (int h = 0; f.mins && h < n_h; h++) subtract_mins(f, n_t, a, b, h, acc[h]);
    }
    for (int h = 0; h < n_h; h++) store_acc(n_t, a, h, acc[h]);
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* Tokens t .. t + n_t - 1 of m against n_p panels from `panel` on, n_blocks blocks from `first` on. */
INLINE void run_tile(struct sm_layout f, bool unpacked, int n_p, int n_t, const struct sm_matmul *m,
                     size_t panel, size_t t, size_t first, size_t n_blocks) {
    const struct sm_acts *acts = m->acts;
    const size_t step = sm_layout_bytes(f), sums = f.block == 32 ? 1 : 16; /* of a block */
    struct tile a;
    a.slab_step = f.low == 8 ? step : 8 * SM_GROUP_BYTES;
    a.n_blocks = n_blocks;
    a.stride = acts->stride;
    a.row_blocks = acts->k_pad / (size_t)f.block;
    a.ld = m->ld;
    a.carry = first != 0;
    size_t row = m->first + t, at = row * a.row_blocks + first;
    a.q = acts->q + row * a.stride + first * (size_t)f.block;
    a.d = acts->d + at;
    a.s = f.block == 32 ? acts->s + at : NULL;
    a.out = m->out + t * m->ld + panel * ROWS;
    for (int p = 0; p < n_p; p++)
        a.panel[p] = m->panels + (panel + (size_t)p) * m->panel_bytes + first * step;
    /* 8 bits need no unpacking */
    a.codes = f.low == 8 ? a.panel[0] + sm_layout_codes(f) : (const uint8_t *)m->scratch;
    size_t n_left = a.row_blocks - first, n_ahead = (PREFETCH_BYTES + step - 1) / step;
    a.n_within = n_left > n_ahead ? n_left - n_ahead : 0;
    a.to_next = (size_t)(n_p - 1) * m->panel_bytes;
    prepare_sums(f, n_t, &a, acts->sum + at * sums, a.row_blocks * sums);
    if (!unpacked && f.scales == SM_SCALES_NONE)
        plain_packed_tile(f, 2 * n_p, n_t, &a);
    else if (!unpacked)
        scaled_packed_tile(f, 2 * n_p, n_t, &a);
    for (int h = 0; unpacked && h < 2; h++) {
        if (f.scales == SM_SCALES_NONE)
            plain_tile(f, n_t, h, &a);
        else
            scaled_tile(f, n_t, h, &a);
    }
}

/* One panel over unpacked codes of n_b blocks from b on, in tiles of about equal size. */
INLINE void run_panel(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t b, size_t n_b) {
    const size_t per_block = (size_t)f.block / SM_SLAB, n = m->n_tokens;
    const size_t n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    if (f.low < 8)
        unpack(f, m->scratch, m->panels + panel * m->panel_bytes, b * per_block, n_b * per_block);
    for (size_t i = 0; i < n_tiles; i++) {
        size_t t = n * i / n_tiles, n_t = n * (i + 1) / n_tiles - t;
        switch (n_t) { /* more than TILE_TOKENS make no smaller ones */
        case 3: run_tile(f, true, 1, 3, m, panel, t, b, n_b); break;
        case 4: run_tile(f, true, 1, 4, m, panel, t, b, n_b); break;
        case 5: run_tile(f, true, 1, 5, m, panel, t, b, n_b); break;
        default: run_tile(f, true, 1, TILE_TOKENS, m, panel, t, b, n_b); break;
        }
    }
}

/* All panels straight from the packed bytes, n_p of them to a tile of all n_t tokens. */
INLINE void run_packed(struct sm_layout f, int n_p, int n_t, const struct sm_matmul *m) {
    const size_t all = m->acts->k_pad / (size_t)f.block, most = COLUMNS / (size_t)f.block;
    const size_t wide = m->n_panels / (size_t)n_p * (size_t)n_p;
    for (size_t p = 0; p < m->n_panels; p += p < wide ? (size_t)n_p : 1)
        for (size_t b = 0; b < all; b += most) {
            if (p < wide)
                run_tile(f, false, n_p, n_t, m, p, 0, b, SM_MIN(all - b, most));
            else
                run_tile(f, false, 1, n_t, m, p, 0, b, SM_MIN(all - b, most));
        }
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m) {
    const size_t all = m->acts->k_pad / (size_t)f.block, most = COLUMNS / (size_t)f.block;
    switch (m->n_tokens) {
    case 1: run_packed(f, 2, 1, m); return;
    case 2: run_packed(f, 2, 2, m); return;
    case 3: run_packed(f, 1, 3, m); return;
    case 4: run_packed(f, 1, 4, m); return;
    case 5: run_packed(f, 1, 5, m); return;
    case 6: run_packed(f, 1, 6, m); return;
    }
    /* Columns outside, panels inside: so much of the activations stays in L2. */
    for (size_t b = 0; b < all; b += most)
        for (size_t p = 0; p < m->n_panels; p++) run_panel(f, m, p, b, SM_MIN(all - b, most));
}

#define SM_CODES(NAME, name, ...)                              \
    static void matmul_##name(const struct sm_matmul *m) {     \
        integers(SM_LAYOUT(__VA_ARGS__), m);                   \
    }
#include "../../quants/codes.def"
#undef SM_CODES

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#include "../../quants/codes.def"
#undef SM_CODES
}
