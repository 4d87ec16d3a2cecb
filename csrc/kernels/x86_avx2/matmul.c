/* Matrix products on AVX2 without VNNI: eight panel rows per register, so a panel is two halves.
 *
 * Unsigned codes times signed activations by maddubs, which adds pairs in 16 bits: codes of b bits
 * allow as many steps before widening as keep 2 (2^b - 1) 127 each below 2^15 (8 for 4 bits, 4 for
 * 5, 2 for 6).  Widening multiplies by the sub-block's integer scale at no cost.  8-bit codes take
 * the sign trick: |w| as the unsigned operand, the activation with w's sign; 2 * 128 * 127 still
 * fits.
 *
 * One token runs four halves wide on the packed bytes.  More unpack a panel into scratch, TILE_COLUMNS
 * columns (in L1) at a time, and use it for all of them in tiles of 4, 2 or 1; longer rows carry
 * their sums in `out`. */
#include "matmul.h"

#include "../tier.h"

#define TILE_TOKENS 4
#define TILE_COLUMNS 1024
#define MAX_HALVES 4

/* ---- codes ------------------------------------------------------------------------------------------------- */

/* maddubs steps that fit 16 bits. */
INLINE int steps_of(struct sm_layout f) {
    int bits = sm_layout_bits(f);
    return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
}

/* One group of 4 columns: pairs of products in int16. */
INLINE __m256i pairs_of(struct sm_layout f, __m256i codes, __m256i q) {
    if (sm_layout_bits(f) < 8) return _mm256_maddubs_epi16(codes, q);
    __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8((char)0x80));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
}

/* ---- tiles ------------------------------------------------------------------------------------------------- */

/* Some blocks of n_t tokens against a panel. */
struct tile {
    const uint8_t *panel;    /* at the first block to do */
    const uint8_t *codes;    /* [8][64] of each slab, slab_step apart */
    size_t slab_step, n_blocks;
    const int8_t *q;         /* [n_t][stride] */
    const float *d, *s;      /* [n_t][row_blocks] */
    size_t stride, row_blocks;
    float *out;              /* [n_t][ld] */
    size_t ld;
    bool carry;              /* starts from out instead of zero */
    /* From the sums of q over a sub-block (32 columns at most): */
    int32_t seed[TILE_TOKENS][TILE_COLUMNS / 32];  /* formats of one scale: -bias * sum */
    int32_t pairs[TILE_TOKENS][TILE_COLUMNS / 32]; /* others: neighbours as two int16 */
};

/* Adds to a sum where it stands.  Left alone, GCC makes trees of sums of integers, and needs a register
 * for each leaf. */
INLINE void add16(__m256i *sum, __m256i x) { __asm__("vpaddw %1, %0, %0" : "+x"(*sum) : "x"(x)); }
INLINE void add32(__m256i *sum, __m256i x) { __asm__("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(x)); }

/* Fills seed or pairs from sum, [n_t][row_sums] from the first block on. */
INLINE void prepare_sums(struct sm_layout f, int n_t, struct tile *a, const int16_t *sum, size_t row_sums) {
    const size_t n = a->n_blocks * (f.block == 32 ? 1 : 16);
    for (int t = 0; t < n_t; t++, sum += row_sums) {
        if (f.block == 32)
            for (size_t i = 0; i < n; i++) a->seed[t][i] = -f.bias * sum[i];
        else if (f.sub == 16)
            memcpy(a->pairs[t], sum, n * sizeof *sum);
        else
            for (size_t i = 0; i < n; i += 16) { /* |sum| over 32 columns still fits */
                __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(sum + i));
                x = _mm256_madd_epi16(x, _mm256_set1_epi16(1));
                x = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xD8);
                _mm_storeu_si128((__m128i *)(a->pairs[t] + i / 4), _mm256_castsi256_si128(x));
            }
    }
}

/* sum of code * q over n_groups groups of one half, widened by `factor` (int16 in both halves of each
 * int32). */
INLINE void add_groups(struct sm_layout f, int n_t, int n_groups, const uint8_t *codes,
                       const int8_t *q, size_t stride, __m256i factor, __m256i isum[TILE_TOKENS]) {
    const int steps = SM_MIN(steps_of(f), n_groups);
    for (int first = 0; first < n_groups; first += steps) {
        __m256i pairs[TILE_TOKENS];
        for (int g = first; g < first + steps; g++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(codes + SM_GROUP_BYTES * g));
            for (int t = 0; t < n_t; t++) {
                __m256i p = pairs_of(f, w, broadcast4(q + (size_t)t * stride + 4 * g));
                if (g == first) pairs[t] = p;
                else add16(&pairs[t], p);
            }
        }
        for (int t = 0; t < n_t; t++) add32(&isum[t], _mm256_madd_epi16(pairs[t], factor));
    }
}

/* Formats of one scale per 32 columns. */
INLINE void plain_tile(struct sm_layout f, int n_t, int half, const struct tile *a, __m256 *acc) {
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *d = a->panel + b * sm_layout_bytes(f) + 2 * HALF * half;
        __m256i isum[TILE_TOKENS];
        for (int t = 0; t < n_t; t++) {
            isum[t] = _mm256_setzero_si256();
            if (f.bias != 0 && sm_layout_bits(f) < 8) isum[t] = _mm256_set1_epi32(a->seed[t][b]);
        }
        add_groups(f, n_t, 8, a->codes + b * a->slab_step + 32 * half, a->q + SM_SLAB * b, a->stride,
                   _mm256_set1_epi16(1), isum);
        __m256 dw = load_d(f, d);
        for (int t = 0; t < n_t; t++) {
            size_t at = (size_t)t * a->row_blocks + b;
            __m256 scale = _mm256_mul_ps(dw, _mm256_set1_ps(a->d[at]));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum[t]), scale, acc[t]);
            if (f.mins) acc[t] = _mm256_fmadd_ps(load_f16(d + 2 * ROWS), _mm256_set1_ps(a->s[at]), acc[t]);
        }
    }
}

/* Formats of 256 columns with integer scales. */
INLINE void scaled_tile(struct sm_layout f, int n_t, int half, const struct tile *a, __m256 *acc) {
    const int n_sub = f.block / f.sub, group_subs = f.group / f.sub, n_pairs = n_sub / 2;
    const int subs = f.scales == SM_SCALES_ONES ? 2 : 1; /* that can be summed at once */
    for (size_t b = 0; b < a->n_blocks; b++) {
        const uint8_t *block = a->panel + b * sm_layout_bytes(f);
        const uint8_t *codes = a->codes + 64 * b * SM_GROUP_BYTES + 32 * half;
        const int8_t *q = a->q + 256 * b;
        __m256 dw = load_d(f, block + 2 * HALF * half), scale_of[TILE_TOKENS];
        for (int t = 0; t < n_t; t++)
            scale_of[t] = _mm256_mul_ps(dw, _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
#pragma GCC unroll 1
        for (int first = 0; first < n_sub; first += group_subs) {
            __m256i isum[TILE_TOKENS];
            for (int t = 0; t < n_t; t++) isum[t] = _mm256_setzero_si256();
#pragma GCC unroll 1
            for (int s = first; s < first + group_subs; s += 2) {
                __m256i scale[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; i += subs) {
                    scale[i] = load_scales(f, block, half, s + i);
                    scale[i + subs - 1] = scale[i];
                    add_groups(f, n_t, subs * f.sub / 4, codes + (s + i) * (f.sub / 4) * SM_GROUP_BYTES,
                               q + (size_t)((s + i) * f.sub), a->stride, pair_up(scale[i], scale[i]), isum);
                }
                if (f.bias == 0 || sm_layout_bits(f) == 8) continue;
                /* take bias * scale * sum off for two at once */
                __m256i two = _mm256_slli_epi16(pair_up(scale[0], scale[1]), __builtin_ctz(f.bias));
                for (int t = 0; t < n_t; t++) {
                    __m256i sums = _mm256_set1_epi32(a->pairs[t][b * (size_t)n_pairs + (size_t)s / 2]);
                    isum[t] = _mm256_sub_epi32(isum[t], _mm256_madd_epi16(two, sums));
                }
            }
            for (int t = 0; t < n_t; t++)
                acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum[t]), scale_of[t], acc[t]);
        }
        if (!f.mins) continue;
        __m256i msum[TILE_TOKENS];
        for (int t = 0; t < n_t; t++) msum[t] = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int i = 0; i < n_pairs; i++) {
            __m256i two = pair_up(load_mins(f, block, half, 2 * i), load_mins(f, block, half, 2 * i + 1));
            for (int t = 0; t < n_t; t++) {
                __m256i sums = _mm256_set1_epi32(a->pairs[t][b * (size_t)n_pairs + (size_t)i]);
                add32(&msum[t], _mm256_madd_epi16(two, sums));
            }
        }
        __m256 dmin = load_f16(block + 2 * ROWS + 2 * HALF * half);
        for (int t = 0; t < n_t; t++) {
            __m256 scale = _mm256_mul_ps(dmin, _mm256_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
            acc[t] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum[t]), scale, acc[t]);
        }
    }
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* Tokens t .. t + n_t - 1 of m against a panel, n_blocks blocks from `first` on: one half after the
 * other, for which the activations are then in L1. */
INLINE void run_tile(struct sm_layout f, int n_t, const struct sm_matmul *m, size_t panel, size_t t,
                     size_t first, size_t n_blocks) {
    const struct sm_acts *acts = m->acts;
    const size_t sums = f.block == 32 ? 1 : 16; /* activation sums of a block */
    struct tile a;
    a.n_blocks = n_blocks;
    a.stride = acts->stride;
    a.row_blocks = acts->k_pad / (size_t)f.block;
    a.ld = m->ld;
    a.carry = first != 0;
    size_t row = m->first + t, at = row * a.row_blocks + first;
    a.panel = m->panels + panel * m->panel_bytes + first * sm_layout_bytes(f);
    a.codes = f.low == 8 ? a.panel + sm_layout_codes(f) : m->scratch; /* 8 bits need no unpacking */
    a.slab_step = f.low == 8 ? sm_layout_bytes(f) : 8 * SM_GROUP_BYTES;
    a.q = acts->q + row * a.stride + first * (size_t)f.block;
    a.d = acts->d + at;
    a.s = f.block == 32 ? acts->s + at : NULL;
    a.out = m->out + t * m->ld + panel * ROWS;
    prepare_sums(f, n_t, &a, acts->sum + at * sums, a.row_blocks * sums);
#pragma GCC unroll 1
    for (int half = 0; half < 2; half++) {
        float *out = a.out + half * HALF;
        __m256 acc[TILE_TOKENS];
        for (int i = 0; i < n_t; i++)
            acc[i] = a.carry ? _mm256_loadu_ps(out + (size_t)i * a.ld) : _mm256_setzero_ps();
        if (f.scales == SM_SCALES_NONE)
            plain_tile(f, n_t, half, &a, acc);
        else
            scaled_tile(f, n_t, half, &a, acc);
        for (int i = 0; i < n_t; i++) _mm256_storeu_ps(out + (size_t)i * a.ld, acc[i]);
    }
}

/* n_b blocks of one panel from b on. */
INLINE void run_panel(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t b, size_t n_b) {
    const size_t slabs = (size_t)f.block / SM_SLAB, n = m->n_tokens;
    if (f.low < 8)
        unpack(f, m->scratch, m->panels + panel * m->panel_bytes, b * slabs, n_b * slabs);
    size_t t = 0;
    for (; t + 4 <= n; t += 4) run_tile(f, 4, m, panel, t, b, n_b);
    for (; t + 2 <= n; t += 2) run_tile(f, 2, m, panel, t, b, n_b);
    if (t < n) run_tile(f, 1, m, panel, t, b, n_b);
}

/* sum of code * q over groups first .. first + n_groups - 1 of a slab, widened by `factor`. */
INLINE __m256i sum_groups(struct sm_layout f, const __m256i w[8], const int8_t *q, int first,
                          int n_groups, __m256i factor) {
    const int steps = SM_MIN(steps_of(f), n_groups);
    __m256i isum = _mm256_setzero_si256(), pairs = isum;
#pragma GCC unroll 8
    for (int g = first; g < first + n_groups; g++) {
        __m256i p = pairs_of(f, w[g], broadcast4(q + 4 * g));
        pairs = (g - first) % steps == 0 ? p : _mm256_add_epi16(pairs, p);
        if ((g - first + 1) % steps == 0)
            isum = _mm256_add_epi32(isum, _mm256_madd_epi16(pairs, factor));
    }
    return isum;
}

/* One block of a format of one scale, packed, against half `side` of a panel. */
INLINE __m256 plain_block(struct sm_layout f, const struct sm_acts *a, size_t at, const uint8_t *block,
                          int side, const int8_t *q, __m256 acc) {
    __m256i w[8];
    load_slab(f, block + sm_layout_codes(f) + 32 * side, w);
    __m256i isum = sum_groups(f, w, q, 0, 8, _mm256_set1_epi16(1));
    if (sm_layout_bits(f) < 8 && f.bias != 0)
        isum = _mm256_sub_epi32(isum, _mm256_set1_epi32(f.bias * a->sum[at]));
    __m256 scale = _mm256_mul_ps(load_d(f, block + 2 * HALF * side), _mm256_set1_ps(a->d[at]));
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), scale, acc);
    if (!f.mins) return acc;
    return _mm256_fmadd_ps(load_f16(block + 2 * ROWS + 2 * HALF * side), _mm256_set1_ps(a->s[at]), acc);
}

/* The same for formats with integer scales. */
INLINE __m256 scaled_block(struct sm_layout f, const struct sm_acts *a, size_t at, const uint8_t *block,
                           int side, const int8_t *q, __m256 acc) {
    const int slab_subs = SM_SLAB / f.sub, n_slabs = f.block / SM_SLAB;
    const int16_t *sum = a->sum + 16 * at;
    const __m256 d = _mm256_set1_ps(a->d[at]);
    const __m256 scale = _mm256_mul_ps(load_d(f, block + 2 * HALF * side), d);
    __m256i isum = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int i = 0; i < n_slabs; i++) {
        __m256i w[8], before = _mm256_setzero_si256();
        load_slab(f, block + sm_layout_codes(f) + (size_t)i * sm_layout_slab(f) + 32 * side, w);
#pragma GCC unroll 2
        for (int s = 0; s < slab_subs; s++) {
            __m256i factor = load_scales(f, block, side, i * slab_subs + s);
            isum = _mm256_add_epi32(isum, sum_groups(f, w, q + SM_SLAB * i, s * (f.sub / 4), f.sub / 4,
                                                     pair_up(factor, factor)));
            if (f.bias != 0 && sm_layout_bits(f) < 8 && s == 1) { /* biased formats have sub == 16 */
                __m256i sums = sum_pair(sum, 2 * i);
                __m256i two = _mm256_slli_epi16(pair_up(before, factor), __builtin_ctz(f.bias));
                isum = _mm256_sub_epi32(isum, _mm256_madd_epi16(two, sums));
            }
            before = factor;
        }
        if ((i + 1) * SM_SLAB % f.group != 0) continue;
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), scale, acc);
        isum = _mm256_setzero_si256();
    }
    if (!f.mins) return acc;
    __m256i msum = _mm256_setzero_si256();
    for (int i = 0; i < 16; i += 2) {
        __m256i two = pair_up(load_mins(f, block, side, i * 16 / f.sub),
                              load_mins(f, block, side, (i + 1) * 16 / f.sub));
        msum = _mm256_add_epi32(msum, _mm256_madd_epi16(two, sum_pair(sum, i)));
    }
    __m256 dmin = _mm256_mul_ps(load_f16(block + 2 * ROWS + 2 * HALF * side), d);
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum), dmin, acc);
}

/* One token against four halves from half `half` on, packed: several memory streams in flight. */
INLINE void run_one(struct sm_layout f, const struct sm_matmul *m, size_t half) {
    const struct sm_acts *a = m->acts;
    const size_t n_blocks = a->k_pad / (size_t)f.block, at = m->first * n_blocks;
    const size_t step = sm_layout_bytes(f), n_ahead = (PREFETCH_BYTES + step - 1) / step;
    __m256 acc[MAX_HALVES];
    for (int h = 0; h < MAX_HALVES; h++) acc[h] = _mm256_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        const int8_t *q = a->q + m->first * a->stride + (size_t)f.block * b;
        for (int h = 0; h < MAX_HALVES; h++) {
            const uint8_t *block = m->panels + (half + (size_t)h) / 2 * m->panel_bytes + b * step;
            const int side = (int)((half + (size_t)h) % 2);
            /* Two panels on, where this one ends: this stream's next. */
            if (h % 2 == 0) prefetch(block + (b + n_ahead < n_blocks ? 0 : m->panel_bytes), step);
            acc[h] = f.scales == SM_SCALES_NONE ? plain_block(f, a, at + b, block, side, q, acc[h])
                                                : scaled_block(f, a, at + b, block, side, q, acc[h]);
        }
    }
    for (int h = 0; h < MAX_HALVES; h++)
        _mm256_storeu_ps(m->out + (half + (size_t)h) * HALF, acc[h]);
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m) {
    if (m->n_tokens == 1 && m->n_panels >= 2) {
        size_t h = 0, n = 2 * m->n_panels;
        for (; h + MAX_HALVES <= n; h += MAX_HALVES) run_one(f, m, h);
        /* A rest runs over some halves again: the same numbers in the same places. */
        if (h < n) run_one(f, m, n - MAX_HALVES);
        return;
    }
    /* Columns outside, panels inside: so much of the activations stays in L2. */
    const size_t all = m->acts->k_pad / (size_t)f.block, most = TILE_COLUMNS / (size_t)f.block;
    for (size_t b = 0; b < all; b += most)
        for (size_t p = 0; p < m->n_panels; p++) run_panel(f, m, p, b, SM_MIN(all - b, most));
}

#define SM_CODES(NAME, name, ...)                              \
    static void matmul_##name(const struct sm_matmul *m) {     \
        integers(SM_LAYOUT(__VA_ARGS__), m);                   \
    }
#include "../../quants/codes.def"
#undef SM_CODES

/* ---- floats ---------------------------------------------------------------------------------------- */

typedef __m256 load_fn(const uint8_t *p);

INLINE __m256 load_f32(const uint8_t *p) { return _mm256_loadu_ps((const float *)(const void *)p); }
INLINE __m256 load_bf16(const uint8_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* Both halves of n_p panels x n_t tokens. */
INLINE void float_tile(load_fn *load, size_t size, int n_p, int n_t, const struct sm_matmul *m,
                       size_t panel, size_t row, float *out) {
    size_t k_pad = m->acts->k_pad, stride = m->acts->stride;
    const uint8_t *w = m->panels + panel * m->panel_bytes; /* [n_p][k_pad][16] */
    const float *x = m->acts->f + row * stride;            /* [n_t][stride] */
    __m256 acc[MAX_HALVES][TILE_TOKENS];
    for (int h = 0; h < 2 * n_p; h++)
        for (int t = 0; t < n_t; t++) acc[h][t] = _mm256_setzero_ps();
    for (size_t c = 0; c < k_pad; c++)
        for (int h = 0; h < 2 * n_p; h++) {
            const uint8_t *at = w + h / 2 * m->panel_bytes + (c * ROWS + h % 2 * HALF) * size;
            if (n_t == 1 && h % 2 == 0 && c * size % 4 == 0) prefetch(at, 1); /* a line each */
            __m256 column = load(at);
            for (int t = 0; t < n_t; t++)
                acc[h][t] = _mm256_fmadd_ps(column, _mm256_set1_ps(x[(size_t)t * stride + c]), acc[h][t]);
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
    k->matmul[SM_TYPE_BF16] = k->matmul[SM_TYPE_NVFP4] = matmul_bf16;
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = matmul_##name;
#define SM_SAME(NAME, name, AS, as) k->matmul[SM_TYPE_##NAME] = matmul_##as;
#include "../../quants/codes.def"
#undef SM_CODES
}
