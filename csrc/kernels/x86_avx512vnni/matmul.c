/* Matrix products on AVX-512 VNNI: one panel row per 32-bit lane, weights as dpbusd's unsigned
 * operand, activations broadcast four signed bytes at a time.
 *
 * A tile holds n_p panels x n_t tokens in registers.  One or two tokens run four panels wide on the
 * packed bytes, so that several memory streams are in flight; some more, of formats with one scale,
 * one panel wide.  Many unpack two panels at a time into scratch and use them for all tokens:
 * FEW_COLUMNS columns (in L1) for few tokens, TILE_COLUMNS (64 KB, well inside L2) for many; longer
 * rows carry their sums in `out`. */
#include <immintrin.h>
#include <stdatomic.h>

#include "../panels.h"
#include "../tier.h"
#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS SM_PANEL_ROWS
#define TILE_TOKENS 8
#define FLOAT_TOKENS 6
#define MANY_TOKENS 18
#define TILE_COLUMNS 2048
#define FEW_COLUMNS 512
#define PREFETCH_BYTES 2048 /* ahead of each stream of packed panels */

/* ---- codes ------------------------------------------------------------------------------------------------- */

/* The 8 groups of a slab as bytes 0 .. 2^bits - 1: group[g] holds columns 4 g .. 4 g + 3. */
INLINE void load_slab(struct sm_layout f, const uint8_t *slab, __m512i group[8]) {
    __m512i low[8], high[2];
    const __m512i low_mask = _mm512_set1_epi8((char)((1 << f.low) - 1));
    const __m512i high_mask = _mm512_set1_epi8((char)(((1 << f.high) - 1) << f.low));
#pragma GCC unroll 8
    for (int i = 0; i < f.low; i++) low[i] = _mm512_loadu_si512(slab + 64 * i);
#pragma GCC unroll 2
    for (int i = 0; i < f.high; i++) high[i] = _mm512_loadu_si512(slab + 64 * (f.low + i));
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        __m512i x = low[g % f.low];
        if (f.low < 8) {
            x = _mm512_srli_epi16(x, (unsigned)(g / f.low * f.low));
            x = _mm512_and_si512(x, low_mask);
        }
        if (f.high > 0) {
            int shift = g / f.high * f.high - f.low; /* bits down to the code's top */
            __m512i y = high[g % f.high];
            y = shift > 0 ? _mm512_srli_epi16(y, (unsigned)shift)
                          : _mm512_slli_epi16(y, (unsigned)-shift);
            x = _mm512_ternarylogic_epi32(x, y, high_mask, 0xf8); /* x | (y & mask) */
        }
        group[g] = sm_look_up(f, x);
    }
}

/* Codes of n_slabs slabs of one panel, beginning with slab `first`: codes [n_slabs][8][64]. */
INLINE void unpack(struct sm_layout f, uint8_t *codes, const uint8_t *panel, size_t first,
                   size_t n_slabs) {
    const size_t per_block = (size_t)(f.block / SM_SLAB);
    for (size_t i = first; i < first + n_slabs; i++, codes += 8 * 64) {
        __m512i group[8];
        const uint8_t *slab = panel + i / per_block * sm_layout_bytes(f) + sm_layout_codes(f) +
                              i % per_block * sm_layout_slab(f);
        load_slab(f, slab, group);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) _mm512_store_si512(codes + 64 * g, group[g]);
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------------- */

/* Some blocks (at most TILE_COLUMNS columns) of n_t tokens against n_p panels. */
struct tile {
    const uint8_t *panel[4]; /* at the first block to do */
    const uint8_t *codes[2]; /* unpacked codes [8][64] of each slab, slab_step apart */
    size_t slab_step, n_blocks;
    const int8_t *q;         /* [n_t][stride] */
    const float *d, *s;      /* [n_t][row_blocks] */
    size_t stride, row_blocks;
    float *out;              /* [n_t][ld], ROWS * n_p columns */
    size_t ld;
    bool carry;              /* starts from out instead of zero */
    bool first_pass;         /* packed: prefetches; later tokens find the panels in the cache */
    size_t n_within;         /* packed: blocks whose prefetch stays in the panel */
    uintptr_t to_next;       /* from a panel's end to the panel that follows in this stream */
    const uint8_t *ahead[2]; /* unpacked: as many packed bytes that are to come, asked for meanwhile; or NULL */
    /* Of the sums of q over a sub-block (32 columns at most): */
    int32_t seed[TILE_TOKENS][TILE_COLUMNS / 16]; /* -bias * sum, what the codes' bias adds */
    int32_t pairs[TILE_TOKENS][TILE_COLUMNS / 32]; /* neighbours as two int16, for the mins */
};

/* Fills seed and pairs from sum, [n_t][row_sums] from the first block on: one per 32 columns in
 * formats of one scale, else one per 16. */
INLINE void prepare_sums(struct sm_layout f, int n_t, struct tile *a, const int16_t *sum,
                         size_t row_sums) {
    const size_t n = a->n_blocks * (f.block == 32 ? 1 : 16);
    for (int t = 0; t < n_t; t++)
        for (size_t i = 0; i < n; i += 16) {
            __mmask16 there = (__mmask16)(n - i < 16 ? (1u << (n - i)) - 1 : 0xffff);
            __m256i words = _mm256_maskz_loadu_epi16(there, sum + (size_t)t * row_sums + i);
            if (f.bias != 0) {
                __m512i x = _mm512_cvtepi16_epi32(words);
                __m512i scaled = _mm512_slli_epi32(x, (unsigned)__builtin_ctz((unsigned)f.bias));
                _mm512_storeu_si512(a->seed[t] + i, _mm512_sub_epi32(_mm512_setzero_si512(), scaled));
            }
            if (f.scales == SM_SCALES_NONE || !f.mins) continue;
            if (f.sub == 16) {
                _mm256_storeu_si256((__m256i *)(a->pairs[t] + i / 2), words);
            } else { /* sums over 32 columns: |sum| <= 32 * 127 still fits */
                __m256i two = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
                _mm_storeu_si128((__m128i *)(a->pairs[t] + i / 4), _mm256_cvtepi32_epi16(two));
            }
        }
}

/* Prefetches bytes from .. to - 1 of what follows PREFETCH_BYTES later in panel p's stream. */
INLINE void prefetch(const struct tile *a, int p, size_t block, size_t from, size_t to) {
    uintptr_t ahead = (uintptr_t)a->panel[p] + PREFETCH_BYTES + (block < a->n_within ? 0 : a->to_next);
    for (size_t i = from; i < to; i += 64) _mm_prefetch((const void *)(ahead + i), _MM_HINT_T0);
}

/* Asks for some of the bytes that are to come, while codes are multiplied: no inline code, lest it take
 * registers from the loops around it. */
static __attribute__((noinline)) void prefetch_ahead(const struct tile *a, size_t from, size_t to) {
    for (int p = 0; p < 2; p++)
        for (size_t i = from; i < to; i += 64) _mm_prefetch(a->ahead[p] + i, _MM_HINT_T0);
    atomic_signal_fence(memory_order_seq_cst); /* else it has no effect that a compiler knows */
}

INLINE __m512i broadcast4(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
INLINE __m512i seed_of(struct sm_layout f, const struct tile *a, int t, size_t i) {
    return f.bias == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(a->seed[t][i]);
}
INLINE void load_acc(int n_p, int n_t, const struct tile *a, __m512 acc[4][TILE_TOKENS]) {
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++)
            acc[p][t] = a->carry ? _mm512_loadu_ps(a->out + (size_t)t * a->ld + p * ROWS)
                                 : _mm512_setzero_ps();
}
INLINE void store_acc(int n_p, int n_t, const struct tile *a, __m512 acc[4][TILE_TOKENS]) {
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++)
            _mm512_storeu_ps(a->out + (size_t)t * a->ld + p * ROWS, acc[p][t]);
}

/* Scales the sums of block b of panel p and adds them up. */
INLINE void add_block(struct sm_layout f, int n_t, const struct tile *a, size_t b, int p,
                      const __m512i isum[TILE_TOKENS], __m512 acc[TILE_TOKENS]) {
    const uint8_t *block = a->panel[p] + b * sm_layout_bytes(f);
    __m512 dw = sm_load_d(f, block), mw = _mm512_setzero_ps();
    if (f.mins) mw = sm_load_f16(block + 2 * ROWS);
    for (int t = 0; t < n_t; t++) {
        size_t at = (size_t)t * a->row_blocks + b;
        __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[at]));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum[t]), scale, acc[t]);
        if (f.mins) acc[t] = _mm512_fmadd_ps(mw, _mm512_set1_ps(a->s[at]), acc[t]);
    }
}

/* Formats of one scale per 32 columns. */
INLINE void plain_tile(struct sm_layout f, int n_p, int n_t, const struct tile *a) {
    __m512 acc[4][TILE_TOKENS];
    load_acc(n_p, n_t, a, acc);
    const size_t step = sm_layout_bytes(f);
    for (size_t b = 0; b < a->n_blocks; b++) {
        __m512i isum[2][TILE_TOKENS];
        if (a->ahead[0] != NULL) prefetch_ahead(a, b * step, (b + 1) * step);
        for (int t = 0; t < n_t; t++)
            for (int p = 0; p < n_p; p++) isum[p][t] = seed_of(f, a, t, b);
        const int8_t *q = a->q + SM_SLAB * b;
        for (int g = 0; g < 8; g++) {
            __m512i w[2];
            for (int p = 0; p < n_p; p++)
                w[p] = _mm512_loadu_si512(a->codes[p] + b * a->slab_step + g * 64);
            for (int t = 0; t < n_t; t++) {
                __m512i x = broadcast4(q + (size_t)t * a->stride + 4 * g);
                for (int p = 0; p < n_p; p++)
                    isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], w[p], x);
            }
        }
        for (int p = 0; p < n_p; p++) add_block(f, n_t, a, b, p, isum[p], acc[p]);
    }
    store_acc(n_p, n_t, a, acc);
}

/* The same from the packed bytes: up to four panels of up to two tokens, or one of more. */
INLINE void plain_packed_tile(struct sm_layout f, int n_p, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    __m512 acc[4][TILE_TOKENS];
    load_acc(n_p, n_t, a, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
        const int8_t *q = a->q + SM_SLAB * b;
        __m512i isum[4][TILE_TOKENS];
        for (int p = 0; p < n_p; p++) {
            if (a->first_pass) prefetch(a, p, b, b * step, (b + 1) * step);
            __m512i w[8];
            load_slab(f, a->panel[p] + b * step + sm_layout_codes(f), w);
            for (int t = 0; t < n_t; t++) isum[p][t] = seed_of(f, a, t, b);
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++)
                for (int t = 0; t < n_t; t++)
                    isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], w[g],
                                                     broadcast4(q + (size_t)t * a->stride + 4 * g));
        }
        for (int p = 0; p < n_p; p++) add_block(f, n_t, a, b, p, isum[p], acc[p]);
    }
    store_acc(n_p, n_t, a, acc);
}

/* Scale (below) and min of sub-block s for the 16 rows of a block, as int32. */
INLINE __m512i load_scales(struct sm_layout f, const uint8_t *block, int s) {
    if (f.scales == SM_SCALES_ONES) return _mm512_set1_epi32(1);
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

/* Takes the mins of block b of panel p off the accumulators. */
INLINE void subtract_mins(struct sm_layout f, int n_t, const struct tile *a, size_t b, int p,
                          __m512 acc[TILE_TOKENS]) {
    const uint8_t *block = a->panel[p] + b * sm_layout_bytes(f);
    const int n_pairs = f.block / f.sub / 2;
    __m512i msum[TILE_TOKENS];
    for (int t = 0; t < n_t; t++) msum[t] = _mm512_setzero_si512();
    for (int i = 0; i < n_pairs; i++) {
        __m512i even = load_mins(f, block, 2 * i), odd = load_mins(f, block, 2 * i + 1);
        __m512i pair = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        for (int t = 0; t < n_t; t++)
            msum[t] = _mm512_dpwssd_epi32(
                msum[t], pair, _mm512_set1_epi32(a->pairs[t][b * (size_t)n_pairs + (size_t)i]));
    }
    __m512 dmin = sm_load_f16(block + 2 * ROWS);
    for (int t = 0; t < n_t; t++) {
        __m512 scale = _mm512_mul_ps(dmin, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
        acc[t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(msum[t]), scale, acc[t]);
    }
}

/* Formats of 256 columns with integer scales, unpacked.  Sums of scale * dot stay below 2^24 within
 * a group, so they are exact as floats, where the multiply-add costs half of vpmulld. */
INLINE void scaled_tile(struct sm_layout f, int n_p, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f);
    const int n_sub = f.block / f.sub, sub_groups = f.sub / 4, group_subs = f.group / f.sub;
    const size_t line = step / (size_t)n_sub;
    __m512 acc[4][TILE_TOKENS];
    load_acc(n_p, n_t, a, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
#pragma GCC unroll 1
        for (int first = 0; first < n_sub; first += group_subs) {
            __m512 scaled[2][TILE_TOKENS];
            if (a->ahead[0] != NULL)
                prefetch_ahead(a, b * step + (size_t)first * line,
                               b * step + (size_t)(first + group_subs) * line);
            for (int p = 0; p < n_p; p++)
                for (int t = 0; t < n_t; t++) scaled[p][t] = _mm512_setzero_ps();
#pragma GCC unroll 1
            for (int s = first; s < first + group_subs; s++) {
                __m512i isum[2][TILE_TOKENS];
                for (int t = 0; t < n_t; t++)
                    for (int p = 0; p < n_p; p++) /* biased formats have sub == 16 */
                        isum[p][t] = seed_of(f, a, t, 16 * b + (size_t)s);
#pragma GCC unroll 4 /* all 8 at once spill the sums */
                for (int g = 0; g < sub_groups; g++) {
                    const size_t at = (64 * b + (size_t)(s * sub_groups + g)) * 64;
                    const int8_t *q = a->q + 256 * b + (size_t)(s * f.sub + 4 * g);
                    __m512i w[2];
                    for (int p = 0; p < n_p; p++) w[p] = _mm512_load_si512(a->codes[p] + at);
                    for (int t = 0; t < n_t; t++) {
                        __m512i x = broadcast4(q + (size_t)t * a->stride);
                        for (int p = 0; p < n_p; p++)
                            isum[p][t] = _mm512_dpbusd_epi32(isum[p][t], w[p], x);
                    }
                }
                for (int p = 0; p < n_p; p++) {
                    __m512 scale = _mm512_cvtepi32_ps(load_scales(f, a->panel[p] + b * step, s));
                    for (int t = 0; t < n_t; t++) {
                        __m512 dot = _mm512_cvtepi32_ps(isum[p][t]);
                        scaled[p][t] = _mm512_fmadd_ps(dot, scale, scaled[p][t]);
                    }
                }
            }
            for (int p = 0; p < n_p; p++) {
                __m512 dw = sm_load_d(f, a->panel[p] + b * step);
                for (int t = 0; t < n_t; t++) {
                    __m512 scale = _mm512_mul_ps(dw, _mm512_set1_ps(a->d[t * a->row_blocks + b]));
                    acc[p][t] = _mm512_fmadd_ps(scaled[p][t], scale, acc[p][t]);
                }
            }
        }
        if (f.mins)
            for (int p = 0; p < n_p; p++) subtract_mins(f, n_t, a, b, p, acc[p]);
    }
    store_acc(n_p, n_t, a, acc);
}

/* The same from the packed bytes, a slab of 32 columns at a time: one or two tokens. */
INLINE void scaled_packed_tile(struct sm_layout f, int n_p, int n_t, const struct tile *a) {
    const size_t step = sm_layout_bytes(f), n_slabs = (size_t)(f.block / SM_SLAB);
    const int slab_subs = SM_SLAB / f.sub, sub_groups = f.sub / 4;
    __m512 acc[4][TILE_TOKENS];
    load_acc(n_p, n_t, a, acc);
    for (size_t b = 0; b < a->n_blocks; b++) {
        __m512 scale[4][TILE_TOKENS], scaled[4][TILE_TOKENS];
        for (int p = 0; p < n_p; p++) {
            __m512 dw = sm_load_d(f, a->panel[p] + b * step);
            for (int t = 0; t < n_t; t++) {
                scale[p][t] =
                    _mm512_mul_ps(dw, _mm512_set1_ps(a->d[(size_t)t * a->row_blocks + b]));
                scaled[p][t] = _mm512_setzero_ps();
            }
        }
#pragma GCC unroll 1
        for (size_t i = 0; i < n_slabs; i++) {
            const size_t line = step / n_slabs, from = b * step + i * line;
            const int8_t *q = a->q + 256 * b + SM_SLAB * i;
            const bool ends = (i + 1) * SM_SLAB % (size_t)f.group == 0; /* a group */
            for (int p = 0; p < n_p; p++) {
                const uint8_t *block = a->panel[p] + b * step;
                prefetch(a, p, b, from, from + line);
                __m512i w[8];
                load_slab(f, block + sm_layout_codes(f) + i * sm_layout_slab(f), w);
#pragma GCC unroll 2
                for (int s = 0; s < slab_subs; s++) {
                    const int sub = (int)i * slab_subs + s;
                    __m512 sub_scale = _mm512_cvtepi32_ps(load_scales(f, block, sub));
                    for (int t = 0; t < n_t; t++) {
                        __m512i isum = seed_of(f, a, t, 16 * b + (size_t)sub);
#pragma GCC unroll 8
                        for (int g = 0; g < sub_groups; g++)
                            isum = _mm512_dpbusd_epi32(
                                isum, w[s * sub_groups + g],
                                broadcast4(q + (size_t)t * a->stride + s * f.sub + 4 * g));
                        scaled[p][t] =
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum), sub_scale, scaled[p][t]);
                    }
                }
                for (int t = 0; ends && t < n_t; t++) {
                    acc[p][t] = _mm512_fmadd_ps(scaled[p][t], scale[p][t], acc[p][t]);
                    scaled[p][t] = _mm512_setzero_ps();
                }
            }
        }
        if (f.mins)
            for (int p = 0; p < n_p; p++) subtract_mins(f, n_t, a, b, p, acc[p]);
    }
    store_acc(n_p, n_t, a, acc);
}

/* ---- panels ------------------------------------------------------------------------------------------------ */

/* Tokens t .. t + n_t - 1 of m against n_p panels from `panel` on, n_blocks blocks from `first` on. */
INLINE void run_tile(struct sm_layout f, bool unpacked, int n_p, int n_t, const struct sm_matmul *m,
                     size_t panel, size_t t, size_t first, size_t n_blocks, const uint8_t *ahead) {
    const struct sm_acts *acts = m->acts;
    const size_t step = sm_layout_bytes(f), sums = f.block == 32 ? 1 : 16; /* of a block */
    struct tile a;
    a.slab_step = f.low == 8 ? step : 8 * 64;
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
    for (int p = 0; unpacked && p < n_p; p++) /* 8 bits need no unpacking */
        a.codes[p] = f.low == 8 ? a.panel[p] + sm_layout_codes(f)
                                : (uint8_t *)m->scratch + p * (TILE_COLUMNS * ROWS);
    size_t n_left = a.row_blocks - first, n_ahead = (PREFETCH_BYTES + step - 1) / step;
    a.n_within = n_left > n_ahead ? n_left - n_ahead : 0;
    size_t n_done = panel + (size_t)n_p;
    const uint8_t *next = m->panels + n_done * m->panel_bytes;
    if (n_done == m->n_panels && m->next != NULL) next = m->next;
    a.to_next = (uintptr_t)next - (uintptr_t)(m->panels + (panel + 1) * m->panel_bytes);
    prepare_sums(f, n_t, &a, acts->sum + at * sums, a.row_blocks * sums);
    a.first_pass = t == 0;
    for (int p = 0; p < 2; p++)
        a.ahead[p] = t == 0 && ahead != NULL ? ahead + (size_t)p * m->panel_bytes : NULL;
    if (f.scales == SM_SCALES_NONE && unpacked)
        plain_tile(f, n_p, n_t, &a);
    else if (f.scales == SM_SCALES_NONE)
        plain_packed_tile(f, n_p, n_t, &a);
    else if (unpacked)
        scaled_tile(f, n_p, n_t, &a);
    else
        scaled_packed_tile(f, n_p, n_t, &a);
}

/* Two panels over unpacked codes of n_b blocks from b on, in tiles of 6 (4), 2 and 1 tokens. */
INLINE void run_pair(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t b, size_t n_b,
                     const uint8_t *ahead) {
    const size_t per_block = (size_t)f.block / SM_SLAB, n = m->n_tokens;
    size_t t = 0;
    for (size_t p = 0; p < 2 && f.low < 8; p++)
        unpack(f, (uint8_t *)m->scratch + p * (TILE_COLUMNS * ROWS),
               m->panels + (panel + p) * m->panel_bytes, b * per_block, n_b * per_block);
    if (f.scales == SM_SCALES_NONE)
        for (; t + 6 <= n; t += 6) run_tile(f, true, 2, 6, m, panel, t, b, n_b, ahead);
    for (; t + 4 <= n; t += 4) run_tile(f, true, 2, 4, m, panel, t, b, n_b, ahead);
    for (; t + 2 <= n; t += 2) run_tile(f, true, 2, 2, m, panel, t, b, n_b, ahead);
    if (t < n) run_tile(f, true, 2, 1, m, panel, t, b, n_b, ahead);
}

/* One panel, token by token: the odd one of a share that has no neighbour. */
INLINE void run_single(struct sm_layout f, const struct sm_matmul *m) {
    const size_t block = (size_t)f.block, all = m->acts->k_pad / block, most = FEW_COLUMNS / block;
    for (size_t b = 0; b < all; b += most) {
        size_t n_b = SM_MIN(all - b, most);
        if (f.low < 8)
            unpack(f, m->scratch, m->panels, b * block / SM_SLAB, n_b * block / SM_SLAB);
        for (size_t t = 0; t < m->n_tokens; t++) run_tile(f, true, 1, 1, m, 0, t, b, n_b, NULL);
    }
}

/* n_t (1 or 2) tokens straight from the packed bytes. */
INLINE void run_packed(struct sm_layout f, int n_t, const struct sm_matmul *m) {
    const size_t all = m->acts->k_pad / (size_t)f.block, most = TILE_COLUMNS / (size_t)f.block;
    for (size_t p = 0, n_p; p < m->n_panels; p += n_p) {
        const size_t n = SM_MIN(m->n_panels - p, 4);
        n_p = f.scales == SM_SCALES_NONE && n == 3 ? 2 : n;
        for (size_t b = 0; b < all; b += most) {
            size_t n_b = SM_MIN(all - b, most);
            if (f.scales != SM_SCALES_NONE) /* a loop over panels is as fast, and a third of the code */
                run_tile(f, false, (int)n_p, n_t, m, p, 0, b, n_b, NULL);
            else if (n_p == 4)
                run_tile(f, false, 4, n_t, m, p, 0, b, n_b, NULL);
            else if (n_p == 2)
                run_tile(f, false, 2, n_t, m, p, 0, b, n_b, NULL);
            else
                run_tile(f, false, 1, n_t, m, p, 0, b, n_b, NULL);
        }
    }
}

/* 3 tokens to a few times TILE_TOKENS straight from the packed bytes, in tiles of about equal size. */
INLINE void run_several(struct sm_layout f, const struct sm_matmul *m) {
    const size_t all = m->acts->k_pad / (size_t)f.block, most = TILE_COLUMNS / (size_t)f.block;
    const size_t n = m->n_tokens, n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t b = 0; b < all; b += most)
            for (size_t i = 0; i < n_tiles; i++) {
                size_t t = n * i / n_tiles, n_t = n * (i + 1) / n_tiles - t;
                size_t n_b = SM_MIN(all - b, most);
                switch (n_t) {
                case 3: run_tile(f, false, 1, 3, m, p, t, b, n_b, NULL); break;
                case 4: run_tile(f, false, 1, 4, m, p, t, b, n_b, NULL); break;
                case 5: run_tile(f, false, 1, 5, m, p, t, b, n_b, NULL); break;
                case 6: run_tile(f, false, 1, 6, m, p, t, b, n_b, NULL); break;
                case 7: run_tile(f, false, 1, 7, m, p, t, b, n_b, NULL); break;
                default: run_tile(f, false, 1, TILE_TOKENS, m, p, t, b, n_b, NULL); break;
                }
            }
}

/* n_pairs pairs of panels from `panel` on; next: what is read after them.  Of few tokens panels outside and
 * columns inside, so that the packed bytes come in one stream; of many columns outside and panels inside, so
 * that much of the activations stays in L2. */
INLINE void run_pairs(struct sm_layout f, const struct sm_matmul *m, size_t panel, size_t n_pairs,
                      const uint8_t *next) {
    const size_t all = m->acts->k_pad / (size_t)f.block, step = sm_layout_bytes(f);
    const bool few = m->n_tokens < MANY_TOKENS;
    const size_t most = (few ? FEW_COLUMNS : TILE_COLUMNS) / (size_t)f.block;
    const size_t n_chunks = (all + most - 1) / most, n = n_pairs * n_chunks;
    for (size_t i = 0, p = panel, b = 0; i < n; i++) {
        const size_t j = i + 1, own = p, first = b;
        p = panel + 2 * (few ? j / n_chunks : j % n_pairs);
        b = most * (few ? j % n_chunks : j / n_pairs);
        run_pair(f, m, own, first, SM_MIN(all - first, most),
                 j == n ? next : m->panels + p * m->panel_bytes + b * step);
    }
}

INLINE void integers(struct sm_layout f, const struct sm_matmul *m) {
    if (m->n_tokens == 1) {
        run_packed(f, 1, m);
    } else if (m->n_tokens == 2) {
        run_packed(f, 2, m);
    } else if (f.scales == SM_SCALES_NONE && m->n_tokens < MANY_TOKENS) {
        run_several(f, m);
    } else if (m->n_panels == 1) {
        run_single(f, m);
    } else {
        /* A rest of one panel runs over its neighbour again: the same numbers in the same places. */
        const size_t n = m->n_panels;
        for (size_t p = 0, n_pairs; p < n; p += 2 * n_pairs) {
            n_pairs = SM_MAX((n - p) / 2, 1);
            run_pairs(f, m, SM_MIN(p, n - 2), n_pairs,
                      p + 2 * n_pairs < n ? m->panels + (n - 2) * m->panel_bytes : m->next);
        }
    }
}

#define SM_CODES(NAME, name, ...)                              \
    void sm_matmul_##name##__avx512vnni(const struct sm_matmul *m) {     \
        integers(SM_LAYOUT(__VA_ARGS__), m);                   \
    }
#include "../../quants/codes.def"
#undef SM_CODES

/* ---- floats ---------------------------------------------------------------------------------------- */

typedef __m512 load_fn(const uint8_t *p);

INLINE __m512 load_f32(const uint8_t *p) { return _mm512_loadu_ps(p); }
INLINE __m512 load_bf16(const uint8_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* n_t tokens from row `row` on against n_p panels from `panel` on. */
INLINE void float_tile(load_fn *load, size_t size, int n_p, int n_t, const struct sm_matmul *m,
                       size_t panel, size_t row, float *out) {
    size_t k_pad = m->acts->k_pad, stride = m->acts->stride;
    const uint8_t *w = m->panels + panel * m->panel_bytes; /* [n_p][k_pad][16] */
    const float *x = m->acts->f + row * stride;            /* [n_t][stride] */
    __m512 acc[4][TILE_TOKENS];
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++) acc[p][t] = _mm512_setzero_ps();
    for (size_t c = 0; c < k_pad; c++)
        for (int p = 0; p < n_p; p++) {
            const uint8_t *at = w + (size_t)p * m->panel_bytes + c * ROWS * size;
            if (n_t <= 2) _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
            __m512 column = load(at);
            for (int t = 0; t < n_t; t++)
                acc[p][t] = _mm512_fmadd_ps(column, _mm512_set1_ps(x[(size_t)t * stride + c]), acc[p][t]);
        }
    for (int p = 0; p < n_p; p++)
        for (int t = 0; t < n_t; t++) _mm512_storeu_ps(out + t * m->ld + p * ROWS, acc[p][t]);
}

INLINE void float_panels(load_fn *load, size_t size, int n_p, const struct sm_matmul *m,
                         size_t panel) {
    for (size_t t = 0; t < m->n_tokens; t += FLOAT_TOKENS) {
        float *out = m->out + t * m->ld + panel * ROWS;
        size_t row = m->first + t;
        switch (SM_MIN(m->n_tokens - t, FLOAT_TOKENS)) {
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
static void matmul_f16(const struct sm_matmul *m) { floats(sm_load_f16, 2, m); }
static void matmul_bf16(const struct sm_matmul *m) { floats(load_bf16, 2, m); }

void SM_NAME(sm_init_matmul)(struct sm_kernels *k) {
    k->matmul[SM_TYPE_F32] = matmul_f32;
    k->matmul[SM_TYPE_F16] = matmul_f16;
    k->matmul[SM_TYPE_BF16] = k->matmul[SM_TYPE_NVFP4] = matmul_bf16;
#define SM_CODES(NAME, name, ...) k->matmul[SM_TYPE_##NAME] = sm_matmul_##name##__avx512vnni;
#define SM_SAME(NAME, name, AS, as) k->matmul[SM_TYPE_##NAME] = sm_matmul_##as##__avx512vnni;
#include "../../quants/codes.def"
#undef SM_CODES
}
