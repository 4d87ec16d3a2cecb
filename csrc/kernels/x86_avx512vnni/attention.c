/* Attention on AVX-512: 16 positions (scores) or 16 head dimensions (values) to a vector.
 *
 * Queries go in tiles of up to TILE_Q, against up to four vectors at once: 24 sums in registers.
 * Few queries read the cache as it is, once.  Many queries would widen each float16 again and again,
 * so every page is first widened into scratch, where it stays in the nearest cache.
 *
 * Scratch: scores [n_q][SM_CHUNK], then one page as floats. */
#include "../../f16.h"
#include "../tier.h"
#include "expf.h"

#define INLINE static inline __attribute__((always_inline))
#define TILE_Q 6
#define WIDEN_FROM 13 /* queries */
#define MAX_TILES ((SM_ATTEND_MAX + TILE_Q - 1) / TILE_Q)

/* Elements [at, at + 16) of a page, those of the mask. */
INLINE __m512 load(bool half, const void *page, size_t at) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)page + at)));
    return _mm512_loadu_ps((const float *)page + at);
}
INLINE __m512 load_masked(bool half, const void *page, size_t at, __mmask16 mask) {
    if (half) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)page + at));
    return _mm512_maskz_loadu_ps(mask, (const float *)page + at);
}

INLINE __mmask16 lanes_below(size_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* ---- scores ---------------------------------------------------------------------------------- */

/* score [n_q][SM_CHUNK] at 16 n_g positions; k [n_g][head][16], q [n_q][head]. */
INLINE void score_tile(bool half, int n_g, int n_q, float *score, const float *q, const void *k,
                       size_t at, size_t head) {
    __m512 acc[4][TILE_Q];
    for (int g = 0; g < n_g; g++)
        for (int i = 0; i < n_q; i++) acc[g][i] = _mm512_setzero_ps();
    for (size_t d = 0; d < head; d++) {
        __m512 keys[4];
        for (int g = 0; g < n_g; g++) keys[g] = load(half, k, at + ((size_t)g * head + d) * 16);
        for (int i = 0; i < n_q; i++) {
            __m512 query = _mm512_set1_ps(q[(size_t)i * head + d]);
            for (int g = 0; g < n_g; g++) acc[g][i] = _mm512_fmadd_ps(query, keys[g], acc[g][i]);
        }
    }
    for (int g = 0; g < n_g; g++)
        for (int i = 0; i < n_q; i++) _mm512_storeu_ps(score + i * SM_CHUNK + 16 * g, acc[g][i]);
}

INLINE void score_queries(bool half, int n_g, size_t n_q, float *score, const float *q,
                          const void *k, size_t at, size_t head) {
    switch (n_q) {
    case 1: score_tile(half, n_g, 1, score, q, k, at, head); break;
    case 2: score_tile(half, n_g, 2, score, q, k, at, head); break;
    case 3: score_tile(half, n_g, 3, score, q, k, at, head); break;
    case 4: score_tile(half, n_g, 4, score, q, k, at, head); break;
    case 5: score_tile(half, n_g, 5, score, q, k, at, head); break;
    default: score_tile(half, n_g, 6, score, q, k, at, head); break;
    }
}

/* Scores of one tile at positions [lo, hi) of a page, both multiples of 16; k holds the page from
 * position `base` on. */
INLINE void score_page(bool half, size_t n_q, float *score, const float *q, const void *k,
                       size_t base, size_t lo, size_t hi, size_t head) {
    size_t j = lo;
    for (; j + 64 <= hi; j += 64)
        score_queries(half, 4, n_q, score + j, q, k, (j - base) * head, head);
    for (; j + 32 <= hi; j += 32)
        score_queries(half, 2, n_q, score + j, q, k, (j - base) * head, head);
    for (; j < hi; j += 16)
        score_queries(half, 1, n_q, score + j, q, k, (j - base) * head, head);
}

/* Scores at [begin, end), multiples of 16, become e_j where lo <= j < hi and 0 elsewhere. */
INLINE void softmax(float *score, size_t begin, size_t end, size_t lo, size_t hi, float *m_out,
                    float *l_out) {
    __m512 max = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (size_t j = begin; j < end; j += 16) {
        __mmask16 mask = lanes_below(hi > j ? hi - j : 0) & ~lanes_below(lo > j ? lo - j : 0);
        /* max_ps gives its second operand where a score is NaN. */
        max = _mm512_mask_max_ps(max, mask, _mm512_loadu_ps(score + j), max);
    }
    float m = _mm512_reduce_max_ps(max) + 0.0f;
    for (size_t j = begin; j < end; j += 16) {
        __mmask16 mask = lanes_below(hi > j ? hi - j : 0) & ~lanes_below(lo > j ? lo - j : 0);
        __m512 e = expf16(_mm512_sub_ps(_mm512_loadu_ps(score + j), _mm512_set1_ps(m)));
        e = _mm512_maskz_mov_ps(mask, e);
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(score + j, e);
    }
    *m_out = m;
    *l_out = tree16(sum);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* o [n_q][head] at 16 n_v dimensions from d on (`mask`: of the last vector) += e_j v_j over
 * [lo, hi); v [..][head] begins with position `base`. */
INLINE void value_tile(bool half, int n_v, int n_q, float *o, const float *e, const void *v,
                       size_t base, size_t lo, size_t hi, size_t d, __mmask16 mask, size_t head) {
    __m512 acc[4][TILE_Q];
    for (int i = 0; i < n_q; i++)
        for (int c = 0; c < n_v; c++)
            acc[c][i] = n_v > 1 ? _mm512_loadu_ps(o + (size_t)i * head + d + 16 * c)
                                : _mm512_maskz_loadu_ps(mask, o + (size_t)i * head + d);
    for (size_t j = lo; j < hi; j++) {
        __m512 values[4];
        size_t at = (j - base) * head + d;
        for (int c = 0; c < n_v; c++)
            values[c] = n_v > 1 ? load(half, v, at + 16 * c) : load_masked(half, v, at, mask);
        for (int i = 0; i < n_q; i++) {
            __m512 weight = _mm512_set1_ps(e[i * SM_CHUNK + j]);
            for (int c = 0; c < n_v; c++) acc[c][i] = _mm512_fmadd_ps(weight, values[c], acc[c][i]);
        }
    }
    for (int i = 0; i < n_q; i++)
        for (int c = 0; c < n_v; c++) {
            if (n_v > 1)
                _mm512_storeu_ps(o + (size_t)i * head + d + 16 * c, acc[c][i]);
            else
                _mm512_mask_storeu_ps(o + (size_t)i * head + d, mask, acc[c][i]);
        }
}

INLINE void value_queries(bool half, int n_v, size_t n_q, float *o, const float *e, const void *v,
                          size_t base, size_t lo, size_t hi, size_t d, size_t head) {
    __mmask16 mask = lanes_below(head - d);
    switch (n_q) {
    case 1: value_tile(half, n_v, 1, o, e, v, base, lo, hi, d, mask, head); break;
    case 2: value_tile(half, n_v, 2, o, e, v, base, lo, hi, d, mask, head); break;
    case 3: value_tile(half, n_v, 3, o, e, v, base, lo, hi, d, mask, head); break;
    case 4: value_tile(half, n_v, 4, o, e, v, base, lo, hi, d, mask, head); break;
    case 5: value_tile(half, n_v, 5, o, e, v, base, lo, hi, d, mask, head); break;
    default: value_tile(half, n_v, 6, o, e, v, base, lo, hi, d, mask, head); break;
    }
}

/* One tile of queries over positions [lo, hi) of a page. */
INLINE void value_page(bool half, size_t n_q, float *o, const float *e, const void *v, size_t base,
                       size_t lo, size_t hi, size_t head) {
    size_t d = 0;
    for (; d + 64 <= head; d += 64) value_queries(half, 4, n_q, o, e, v, base, lo, hi, d, head);
    for (; d + 32 <= head; d += 32) value_queries(half, 2, n_q, o, e, v, base, lo, hi, d, head);
    for (; d < head; d += 16) value_queries(half, 1, n_q, o, e, v, base, lo, hi, d, head);
}

/* ---- the slot -------------------------------------------------------------------------------- */

static void widen(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, load(true, in, i));
    if (i < n) {
        __mmask16 mask = lanes_below(n - i);
        _mm512_mask_storeu_ps(out + i, mask, load_masked(true, in, i, mask));
    }
}

/* Queries [first, first + n) and the positions some of them see. */
struct tile {
    size_t first, n, lo, hi;
};

static size_t make_tiles(const struct sm_attend *a, struct tile tile[MAX_TILES]) {
    size_t n_tiles = (a->n_q + TILE_Q - 1) / TILE_Q;
    for (size_t t = 0, i = 0; t < n_tiles; t++) {
        struct tile s = {.first = i, .n = (a->n_q - i) / (n_tiles - t), .lo = SM_CHUNK};
        for (; i < s.first + s.n; i++) {
            s.lo = SM_MIN(s.lo, (size_t)a->lo[i]);
            s.hi = SM_MAX(s.hi, (size_t)a->hi[i]);
        }
        tile[t] = s;
    }
    return n_tiles;
}

INLINE void attend(const struct sm_attend *a, bool half) {
    struct tile tile[MAX_TILES];
    size_t n_tiles = make_tiles(a, tile), head = a->head, first = SM_CHUNK, last = 0;
    float *score = a->scratch, *wide = score + a->n_q * SM_CHUNK;
    const bool widened = half && a->n_q >= WIDEN_FROM;
    for (size_t t = 0; t < n_tiles; t++) {
        first = SM_MIN(first, tile[t].lo);
        last = SM_MAX(last, tile[t].hi);
    }
    size_t first16 = first / 16 * 16, last16 = sm_round_up(last, 16);

    for (size_t page = first / SM_PAGE; page * SM_PAGE < last; page++) {
        size_t base = page * SM_PAGE;
        size_t lo = SM_MAX(base, first16), hi = SM_MIN(base + SM_PAGE, last16);
        if (widened)
            widen(wide, (const uint16_t *)a->k[page] + (lo - base) * head, (hi - lo) * head);
        for (size_t t = 0; t < n_tiles; t++) {
            const struct tile s = tile[t];
            size_t from = SM_MAX(lo, s.lo / 16 * 16), to = SM_MIN(hi, sm_round_up(s.hi, 16));
            float *out = score + s.first * SM_CHUNK;
            const float *q = a->q + s.first * head;
            if (widened)
                score_page(false, s.n, out, q, wide, lo, from, to, head);
            else
                score_page(half, s.n, out, q, a->k[page], base, from, to, head);
        }
    }
    for (size_t t = 0; t < n_tiles; t++)
        for (size_t i = tile[t].first; i < tile[t].first + tile[t].n; i++)
            softmax(score + i * SM_CHUNK, tile[t].lo / 16 * 16, sm_round_up(tile[t].hi, 16),
                    (size_t)a->lo[i], (size_t)a->hi[i], a->m + i, a->l + i);

    memset(a->o, 0, a->n_q * head * sizeof *a->o);
    for (size_t page = first / SM_PAGE; page * SM_PAGE < last; page++) {
        size_t base = page * SM_PAGE;
        size_t lo = SM_MAX(base, first), hi = SM_MIN(base + SM_PAGE, last);
        if (widened)
            widen(wide, (const uint16_t *)a->v[page] + (lo - base) * head, (hi - lo) * head);
        for (size_t t = 0; t < n_tiles; t++) {
            const struct tile s = tile[t];
            size_t from = SM_MAX(lo, s.lo), to = SM_MIN(hi, s.hi);
            float *out = a->o + s.first * head;
            const float *e = score + s.first * SM_CHUNK;
            if (widened)
                value_page(false, s.n, out, e, wide, lo, from, to, head);
            else
                value_page(half, s.n, out, e, a->v[page], base, from, to, head);
        }
    }
    for (size_t i = 0; i < a->n_q * head; i++) a->o[i] += 0.0f;
}

static void attend_f16(const struct sm_attend *a) { attend(a, true); }
static void attend_f32(const struct sm_attend *a) { attend(a, false); }

void SM_NAME(sm_attend)(const struct sm_attend *a) {
    if (a->kv_type == SMALLM_KV_F32)
        attend_f32(a);
    else
        attend_f16(a);
}

void SM_NAME(sm_attend_fold)(float *M, float *L, float *O, float m, float l, const float *o,
                             size_t head) {
    float max = m > *M ? m : *M;
    float a = sm_expf(*M - max), b = sm_expf(m - max);
    *M = max;
    *L = sm_fma(*L, a, l * b);
    __m512 av = _mm512_set1_ps(a), bv = _mm512_set1_ps(b);
    for (size_t d = 0; d < head; d += 16) {
        __mmask16 mask = lanes_below(head - d);
        __m512 add = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, o + d), bv);
        __m512 sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, O + d), av, add);
        _mm512_mask_storeu_ps(O + d, mask, sum);
    }
}

void SM_NAME(sm_kv_store)(int kv_type, void *k_page, void *v_page, size_t slot, const float *k,
                          const float *v, size_t head) {
    size_t at = slot / 16 * 16 * head + slot % 16; /* of K[0]; K[d] lies 16 further each */
    if (kv_type == SMALLM_KV_F32) {
        for (size_t d = 0; d < head; d++) ((float *)k_page)[at + 16 * d] = k[d];
        memcpy((float *)v_page + slot * head, v, head * sizeof *v);
        return;
    }
    const __m512 max = _mm512_set1_ps(65504.0f), min = _mm512_set1_ps(-65504.0f);
    uint16_t *kh = (uint16_t *)k_page + at, *vh = (uint16_t *)v_page + slot * head;
    for (size_t d = 0; d < head; d += 16) {
        __mmask16 mask = lanes_below(head - d);
        uint16_t column[16];
        __m512 kd = _mm512_max_ps(min, _mm512_min_ps(max, _mm512_maskz_loadu_ps(mask, k + d)));
        __m512 vd = _mm512_max_ps(min, _mm512_min_ps(max, _mm512_maskz_loadu_ps(mask, v + d)));
        _mm256_storeu_si256((__m256i *)column, _mm512_cvtps_ph(kd, _MM_FROUND_TO_NEAREST_INT));
        _mm256_mask_storeu_epi16(vh + d, mask, _mm512_cvtps_ph(vd, _MM_FROUND_TO_NEAREST_INT));
        for (size_t i = 0; i < SM_MIN(head - d, 16); i++) kh[(d + i) * 16] = column[i];
    }
}
