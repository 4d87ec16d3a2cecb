/* Products of integer formats on AVX-VNNI: weights as dpbusd's unsigned operand, activations
 * broadcast four signed bytes at a time.
 *
 * One or two tokens run WIDE panels at once on the packed bytes, so that several memory streams are
 * in flight.  More run on one panel, in tiles of about equal size.  MANY_TOKENS have the panel
 * unpacked into scratch before, except for formats of one scale and one plane, whose codes are as
 * fast to unpack as to load.  Tiles have at most COLUMNS columns; longer rows carry their sums in
 * `out`.
 *
 * A tile of up to TILE_TOKENS tokens sums both halves of a panel, which hides dpbusd's latency but
 * takes 12 of 16 registers.  The floats they are added to therefore stay in memory. */
#include "../x86_avx2/matmul.h"
#include "../tier.h"

#define WIDE 4
#define TILE_TOKENS 6
#define UNPACKED (8 * SM_GROUP_BYTES) /* bytes of an unpacked slab */
#define MANY_TOKENS 13

/* ---- tiles ------------------------------------------------------------------------------------------------- */

/* Some blocks (at most COLUMNS columns) of n_t tokens against a panel, or WIDE of them. */
struct tile {
    const uint8_t *panel[WIDE]; /* at the first block to do */
    const uint8_t *codes;      /* unpacked: [8][64] of each slab */
    size_t n_blocks;
    const int8_t *q;           /* [n_t][stride] */
    const float *d, *s;        /* [n_t][row_blocks] */
    size_t stride, row_blocks;
    float *out;                /* [n_t][ld] */
    size_t ld;
    bool carry;                /* starts from out instead of zero */
    float *acc, *scaled;       /* [2][TILE_TOKENS][HALF]: the tile's sums; those of a group */
    size_t n_within, to_next;  /* packed: blocks whose prefetch stays in the panel; from a panel's
                                * end to the panel that follows in this stream */
    bool first_pass;           /* packed: prefetches; later tokens find the panel in the cache */
    /* Of the sums of q over a sub-block (32 columns at most): */
    int32_t seed[TILE_TOKENS][COLUMNS / 16];  /* -bias * sum, what the codes' bias adds */
    int32_t pairs[TILE_TOKENS][COLUMNS / 32]; /* neighbours as two int16, for the mins */
};

/* Fills seed and pairs from sum, [n_t][row_sums] from the first block on: one per 32 columns in
 * formats of one scale, else one per 16. */
INLINE void prepare_sums(struct sm_layout f, int n_t, struct tile *a, const int16_t *sum,
                         size_t row_sums) {
    const bool mins = f.mins && f.scales != SM_SCALES_NONE;
    const size_t n = a->n_blocks * (f.block == 32 ? 1 : 16);
    for (int t = 0; t < n_t; t++, sum += row_sums) {
        for (size_t i = 0; f.bias != 0 && i < n; i++) a->seed[t][i] = -f.bias * sum[i];
        for (size_t i = 0; mins && i < n; i += 16) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(sum + i));
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
    return f.bias == 0 ? _mm256_setzero_si256() : _mm256_set1_epi32(a->seed[t][i]);
}
INLINE __m256 d_of(const struct tile *a, int t, size_t b) {
    return _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]);
}

/* acc plus the sum over block b, of one scale. */
INLINE __m256 add_block(struct sm_layout f, const struct tile *a, int t, size_t b, __m256 dw,
                        __m256 mw, __m256i isum, __m256 acc) {
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(dw, d_of(a, t, b)), acc);
    if (!f.mins) return acc;
    return _mm256_fmadd_ps(mw, _mm256_set1_ps(a->s[(size_t)t * a->row_blocks + b]), acc);
}
/* A half's m, d of which is given. */
INLINE __m256 load_m(struct sm_layout f, const uint8_t *d) {
    return f.mins ? load_f16(d + 2 * ROWS) : _mm256_setzero_ps();
}

/* sum of min * sum q over block b, for one half of it. */
INLINE void sum_mins(struct sm_layout f, int n_t, const struct tile *a, const uint8_t *block,
                     int half, size_t b, __m256i msum[TILE_TOKENS]) {
    const int n_pairs = f.block / f.sub / 2;
    for (int t = 0; t < n_t; t++) msum[t] = _mm256_setzero_si256();
    for (int i = 0; i < n_pairs; i++) {
        __m256i two = pair_up(load_mins(f, block, half, 2 * i),
                              load_mins(f, block, half, 2 * i + 1));
        for (int t = 0; t < n_t; t++) {
            __m256i sums = _mm256_set1_epi32(a->pairs[t][b * (size_t)n_pairs + (size_t)i]);
            msum[t] = _mm256_dpwssd_avx_epi32(msum[t], two, sums);
        }
    }
}
/* acc less those mins. */
INLINE __m256 subtract_mins(const struct tile *a, int t, size_t b, __m256 dmin, __m256i msum,
                            __m256 acc) {
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum), _mm256_mul_ps(dmin, d_of(a, t, b)), acc);
}

/* Prefetches bytes from .. to - 1 of what comes PREFETCH_BYTES later in panel p's stream. */
INLINE void prefetch_stream(const struct tile *a, int p, size_t block, size_t from, size_t to) {
    prefetch(a->panel[p] + from + (block < a->n_within ? 0 : a->to_next), to - from);
}

/* ---- one panel --------------------------------------------------------------------------------------------- */

INLINE float *place(float *acc, int h, int t) { return acc + (h * TILE_TOKENS + t) * HALF; }

INLINE void load_acc(int n_t, const struct tile *a) {
    for (int h = 0; h < 2; h++)
        for (int t = 0; t < n_t; t++) {
            const float *out = a->out + (size_t)t * a->ld + h * HALF;
            __m256 acc = a->carry ? _mm256_loadu_ps(out) : _mm256_setzero_ps();
            _mm256_store_ps(place(a->acc, h, t), acc);
        }
}
INLINE void store_acc(int n_t, const struct tile *a) {
    for (int h = 0; h < 2; h++)
        for (int t = 0; t < n_t; t++) {
            float *out = a->out + (size_t)t * a->ld + h * HALF;
            _mm256_storeu_ps(out, _mm256_load_ps(place(a->acc, h, t)));
        }
}

/* Adds code * q over groups first .. first + n_groups - 1 of a slab. */
INLINE void add_groups(struct sm_layout f, bool packed, int n_t, int first, int n_groups,
                       const uint8_t *slab, const int8_t *q, size_t stride,
                       __m256i isum[2][TILE_TOKENS]) {
    /* Else compilers keep the floats in registers, and these sums in memory. */
    __asm__ volatile("" : : : "memory");
#pragma GCC unroll 8
    for (int g = first; g < first + n_groups; g++) {
        __m256i w[2];
        for (int h = 0; h < 2; h++)
            w[h] = packed ? load_group(f, slab + 32 * h, g) : load_plane(slab + 32 * h, g);
        for (int t = 0; t < n_t; t++) {
            __m256i x = broadcast4(q + (size_t)t * stride + 4 * g);
            for (int h = 0; h < 2; h++) isum[h][t] = _mm256_dpbusd_avx_epi32(isum[h][t], w[h], x);
        }
    }
}

/* Formats of one scale per 32 columns. */
INLINE void plain_tile(struct sm_layout f, bool packed, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    load_acc(n_t, a);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel[0] + b * step;
        if (packed && a->first_pass) prefetch_stream(a, 0, b, b * step, (b + 1) * step);
        const uint8_t *slab = packed ? block + sm_layout_codes(f) : a->codes + UNPACKED * b;
        __m256i isum[2][TILE_TOKENS];
        for (int t = 0; t < n_t; t++) isum[0][t] = isum[1][t] = seed_of(f, a, t, b);
        add_groups(f, packed, n_t, 0, 8, slab, a->q + SM_SLAB * b, a->stride, isum);
        for (int h = 0; h < 2; h++) {
            const uint8_t *d = block + 2 * HALF * h;
            __m256 dw = load_d(f, d), mw = load_m(f, d);
            for (int t = 0; t < n_t; t++) {
                float *at = place(a->acc, h, t);
                __m256 acc = add_block(f, a, t, b, dw, mw, isum[h][t], _mm256_load_ps(at));
                _mm256_store_ps(at, acc);
            }
        }
    }
    store_acc(n_t, a);
}

/* Formats of 256 columns with integer scales.  Sums of scale * dot stay below 2^24 within a group,
 * so they are exact as floats. */
INLINE void scaled_tile(struct sm_layout f, bool packed, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f), slab_step = packed ? sm_layout_slab(f) : UNPACKED;
    const int n_slabs = f.block / SM_SLAB, group_slabs = f.group / SM_SLAB;
    const int slab_subs = SM_SLAB / f.sub, sub_groups = f.sub / 4;
    load_acc(n_t, a);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel[0] + b * step;
        const uint8_t *slabs =
            packed ? block + sm_layout_codes(f) : a->codes + b * (size_t)n_slabs * slab_step;
        if (packed && a->first_pass) prefetch_stream(a, 0, b, b * step, (b + 1) * step);
#pragma GCC unroll 1
        for (int first = 0; first < n_slabs; first += group_slabs) {
#pragma GCC unroll 1
            for (int i = first; i < first + group_slabs; i++)
#pragma GCC unroll 2
                for (int s = 0; s < slab_subs; s++) {
                    const int sub = i * slab_subs + s;
                    __m256i isum[2][TILE_TOKENS];
                    for (int t = 0; t < n_t; t++) /* biased formats have sub == 16 */
                        isum[0][t] = isum[1][t] = seed_of(f, a, t, 16 * b + (size_t)sub);
                    add_groups(f, packed, n_t, s * sub_groups, sub_groups,
                               slabs + (size_t)i * slab_step,
                               a->q + 256 * b + (size_t)(SM_SLAB * i), a->stride, isum);
                    for (int h = 0; h < 2; h++) {
                        __m256 scale = _mm256_cvtepi32_ps(load_scales(f, block, h, sub));
                        for (int t = 0; t < n_t; t++) {
                            float *scaled = place(a->scaled, h, t);
                            __m256 dot = _mm256_cvtepi32_ps(isum[h][t]);
                            dot = i == first && s == 0
                                      ? _mm256_mul_ps(dot, scale)
                                      : _mm256_fmadd_ps(dot, scale, _mm256_load_ps(scaled));
                            _mm256_store_ps(scaled, dot);
                        }
                    }
                }
            for (int h = 0; h < 2; h++) {
                __m256 dw = load_d(f, block + 2 * HALF * h);
                for (int t = 0; t < n_t; t++) {
                    float *acc = place(a->acc, h, t);
                    __m256 scaled = _mm256_load_ps(place(a->scaled, h, t));
                    __m256 scale = _mm256_mul_ps(dw, d_of(a, t, b));
                    _mm256_store_ps(acc, _mm256_fmadd_ps(scaled, scale, _mm256_load_ps(acc)));
                }
            }
        }
        for (int h = 0; f.mins && h < 2; h++) {
            __m256i msum[TILE_TOKENS];
            sum_mins(f, n_t, a, block, h, b, msum);
            __m256 dmin = load_m(f, block + 2 * HALF * h);
            for (int t = 0; t < n_t; t++) {
                float *acc = place(a->acc, h, t);
                _mm256_store_ps(acc, subtract_mins(a, t, b, dmin, msum[t], _mm256_load_ps(acc)));
            }
        }
    }
    store_acc(n_t, a);
}

/* ---- WIDE panels, packed ----------------------------------------------------------------------------------- */

INLINE void load_wide(int n_t, const struct tile *a, __m256 acc[2 * WIDE][2]) {
    for (int h = 0; h < 2 * WIDE; h++)
        for (int t = 0; t < n_t; t++)
            acc[h][t] = a->carry ? _mm256_loadu_ps(a->out + (size_t)t * a->ld + h * HALF)
                                 : _mm256_setzero_ps();
}
INLINE void store_wide(int n_t, const struct tile *a, __m256 acc[2 * WIDE][2]) {
    for (int h = 0; h < 2 * WIDE; h++)
        for (int t = 0; t < n_t; t++)
            _mm256_storeu_ps(a->out + (size_t)t * a->ld + h * HALF, acc[h][t]);
}

/* Adds code * q over groups first .. first + n_groups - 1 of one half of a packed slab. */
INLINE void add_packed(struct sm_layout f, int n_t, int first, int n_groups, const uint8_t *slab,
                       const int8_t *q, size_t stride, __m256i isum[2]) {
#pragma GCC unroll 8
    for (int g = first; g < first + n_groups; g++) {
        __m256i w = load_group(f, slab, g);
        for (int t = 0; t < n_t; t++)
            isum[t] = _mm256_dpbusd_avx_epi32(isum[t], w,
                                              broadcast4(q + (size_t)t * stride + 4 * g));
    }
}

INLINE void plain_wide(struct sm_layout f, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    __m256 acc[2 * WIDE][2];
    load_wide(n_t, a, acc);
    for (size_t b = 0; b < a->n_blocks; b++)
        for (int h = 0; h < 2 * WIDE; h++) {
            const uint8_t *block = a->panel[h / 2] + b * step;
            if (h % 2 == 0) prefetch_stream(a, h / 2, b, b * step, (b + 1) * step);
            __m256i isum[2];
            for (int t = 0; t < n_t; t++) isum[t] = seed_of(f, a, t, b);
            add_packed(f, n_t, 0, 8, block + sm_layout_codes(f) + h % 2 * 32, a->q + SM_SLAB * b,
                       a->stride, isum);
            const uint8_t *d = block + h % 2 * 2 * HALF;
            __m256 dw = load_d(f, d), mw = load_m(f, d);
            for (int t = 0; t < n_t; t++)
                acc[h][t] = add_block(f, a, t, b, dw, mw, isum[t], acc[h][t]);
        }
    store_wide(n_t, a, acc);
}

INLINE void scaled_wide(struct sm_layout f, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f), n_slabs = (size_t)(f.block / SM_SLAB);
    const int slab_subs = SM_SLAB / f.sub, sub_groups = f.sub / 4;
    __m256 acc[2 * WIDE][2];
    load_wide(n_t, a, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
        __m256 scale[2 * WIDE][2], scaled[2 * WIDE][2];
        for (int h = 0; h < 2 * WIDE; h++) {
            __m256 dw = load_d(f, a->panel[h / 2] + b * step + h % 2 * 2 * HALF);
            for (int t = 0; t < n_t; t++) {
                scale[h][t] = _mm256_mul_ps(dw, d_of(a, t, b));
                scaled[h][t] = _mm256_setzero_ps();
            }
        }
#pragma GCC unroll 1
        for (size_t i = 0; i < n_slabs; i++) {
            const size_t from = b * step + i * (step / n_slabs);
            const bool ends = (i + 1) * SM_SLAB % (size_t)f.group == 0; /* a group */
            for (int h = 0; h < 2 * WIDE; h++) {
                const uint8_t *block = a->panel[h / 2] + b * step;
                const uint8_t *slab =
                    block + sm_layout_codes(f) + i * sm_layout_slab(f) + h % 2 * 32;
                if (h % 2 == 0) prefetch_stream(a, h / 2, b, from, from + step / n_slabs);
#pragma GCC unroll 2
                for (int s = 0; s < slab_subs; s++) {
                    const int sub = (int)i * slab_subs + s;
                    __m256 sub_scale = _mm256_cvtepi32_ps(load_scales(f, block, h % 2, sub));
                    __m256i isum[2];
                    for (int t = 0; t < n_t; t++) isum[t] = seed_of(f, a, t, 16 * b + (size_t)sub);
                    add_packed(f, n_t, s * sub_groups, sub_groups, slab,
                               a->q + 256 * b + SM_SLAB * i, a->stride, isum);
                    for (int t = 0; t < n_t; t++)
                        scaled[h][t] =
                            _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum[t]), sub_scale, scaled[h][t]);
                }
                for (int t = 0; ends && t < n_t; t++) {
                    acc[h][t] = _mm256_fmadd_ps(scaled[h][t], scale[h][t], acc[h][t]);
                    scaled[h][t] = _mm256_setzero_ps();
                }
            }
        }
        for (int h = 0; f.mins && h < 2 * WIDE; h++) {
            const uint8_t *block = a->panel[h / 2] + b * step;
            __m256i msum[TILE_TOKENS];
            sum_mins(f, n_t, a, block, h % 2, b, msum);
            __m256 dmin = load_m(f, block + h % 2 * 2 * HALF);
            for (int t = 0; t < n_t; t++)
                acc[h][t] = subtract_mins(a, t, b, dmin, msum[t], acc[h][t]);
        }
    }
    store_wide(n_t, a, acc);
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* Tokens t .. t + n_t - 1 of m against n_p (1 or WIDE) panels from `panel` on, n_blocks blocks from
 * `first` on. */
INLINE void run_tile(struct sm_layout f, bool packed, int n_p, int n_t, const struct sm_matmul *m,
                     size_t panel, size_t t, size_t first, size_t n_blocks) {
    const struct sm_acts *acts = m->acts;
    const size_t step = sm_layout_bytes(f), sums = f.block == 32 ? 1 : 16; /* of a block */
    struct tile a;
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
    a.codes = m->scratch;
    a.acc = (float *)(void *)((uint8_t *)m->scratch + COLUMNS * ROWS);
    a.scaled = a.acc + 2 * TILE_TOKENS * HALF;
    size_t n_left = a.row_blocks - first, n_ahead = (PREFETCH_BYTES + step - 1) / step;
    a.n_within = n_left > n_ahead ? n_left - n_ahead : 0;
    a.to_next = (size_t)(n_p - 1) * m->panel_bytes;
    a.first_pass = t == 0;
    prepare_sums(f, n_t, &a, acts->sum + at * sums, a.row_blocks * sums);
    if (f.scales == SM_SCALES_NONE && n_p == 1)
        plain_tile(f, packed, n_t, &a);
    else if (f.scales == SM_SCALES_NONE)
        plain_wide(f, n_t, &a);
    else if (n_p == 1)
        scaled_tile(f, packed, n_t, &a);
    else
        scaled_wide(f, n_t, &a);
}

/* All n_t (1 or 2) tokens against WIDE panels at a time. */
INLINE void run_wide(struct sm_layout f, int n_t, const struct sm_matmul *m) {
    const size_t all = m->acts->k_pad / (size_t)f.block, most = COLUMNS / (size_t)f.block;
    for (size_t p = 0; p < m->n_panels; p += WIDE) {
        /* A rest runs over some panels again: the same numbers in the same places. */
        size_t panel = SM_MIN(p, m->n_panels - WIDE);
        for (size_t b = 0; b < all; b += most)
            run_tile(f, true, WIDE, n_t, m, panel, 0, b, SM_MIN(all - b, most));
    }
}

/* n_b blocks of one panel from b on, in tiles of about equal size. */
INLINE void run_panel(struct sm_layout f, bool packed, const struct sm_matmul *m, size_t panel,
                      size_t b, size_t n_b) {
    const size_t per_block = (size_t)f.block / SM_SLAB, n = m->n_tokens;
    const size_t n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    if (!packed)
        unpack(f, m->scratch, m->panels + panel * m->panel_bytes, b * per_block, n_b * per_block);
    for (size_t i = 0; i < n_tiles; i++) {
        size_t t = n * i / n_tiles, n_t = n * (i + 1) / n_tiles - t;
        if (packed && n_t == 1)
            run_tile(f, packed, 1, 1, m, panel, t, b, n_b);
        else if (packed && n_t == 2)
            run_tile(f, packed, 1, 2, m, panel, t, b, n_b);
        else if (packed && n_t == 3) /* MANY_TOKENS make tiles of 4 to 6 */
            run_tile(f, packed, 1, 3, m, panel, t, b, n_b);
        else if (n_t == 4)
            run_tile(f, packed, 1, 4, m, panel, t, b, n_b);
        else if (n_t == 5)
            run_tile(f, packed, 1, 5, m, panel, t, b, n_b);
        else
            run_tile(f, packed, 1, TILE_TOKENS, m, panel, t, b, n_b);
    }
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m) {
    const size_t n = m->n_panels, all = m->acts->k_pad / (size_t)f.block;
    const size_t most = COLUMNS / (size_t)f.block;
    if (m->n_tokens == 1 && n >= WIDE) {
        run_wide(f, 1, m);
    } else if (m->n_tokens == 2 && n >= WIDE) {
        run_wide(f, 2, m);
    } else if (m->n_tokens < MANY_TOKENS) {
        for (size_t p = 0; p < n; p++)
            for (size_t b = 0; b < all; b += most)
                run_panel(f, true, m, p, b, SM_MIN(all - b, most));
    } else { /* columns outside, panels inside: so much of the activations stays in L2 */
        const bool packed = f.scales == SM_SCALES_NONE && f.high == 0 && f.table == SM_TABLE_NONE;
        for (size_t b = 0; b < all; b += most)
            for (size_t p = 0; p < n; p++) run_panel(f, packed, m, p, b, SM_MIN(all - b, most));
    }
}

#define SM_CODES(NAME, name, ...)                              \
    static void matmul_##name(const struct sm_matmul *m) {     \
        integers(SM_LAYOUT(__VA_ARGS__), m);                   \
    }
#include "../../quants/codes.def"
#undef SM_CODES

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#define SM_SAME(NAME, name, AS, as) k->matmul[SM_TYPE_##NAME] = matmul_##as;
#include "../../quants/codes.def"
#undef SM_CODES
}
