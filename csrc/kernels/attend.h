/* How the vector tiers walk through attention; what differs between them comes in as functions.
 *
 * Queries go in tiles of up to SM_TILE_Q.  All tiles pass over a page while it is in the nearest
 * cache.  One tile widens float16 or int8 as it loads it, which waiting for memory hides; for several,
 * a page is widened once.  As that costs more than narrower tiles do, a few more queries than
 * SM_TILE_Q (the heads of one token that share a kv head) go in one tile where a tier can.  Pages are too short for the processor to guess what comes next, so each page's
 * loads ask for the next page's.
 *
 * Scratch: scores [n_q][SM_SCORE_STRIDE], which become the e_j; behind SM_ATTEND_MAX of them a widened page. */
#ifndef SM_ATTEND_H
#define SM_ATTEND_H

#include "../fma.h"
#include "kernels.h"

#define SM_TILE_Q 6
/* Floats between rows of scores: with SM_CHUNK alone they would share a few of the cache's sets. */
#define SM_SCORE_STRIDE (SM_CHUNK + 16)

/* One tile of queries against positions [lo, hi) of one page. */
struct sm_part {
    const float *q;         /* [n_q][head] */
    float *weight;          /* [n_q][SM_SCORE_STRIDE] scores, then e_j */
    float *o;               /* [n_q][head] */
    size_t n_q, head;
    const void *page;       /* K or V, from position `base` on */
    const void *next;       /* the page to come */
    size_t base, lo, hi;
};

/* Scores of the part; lo and hi are multiples of 16. */
typedef void sm_score_fn(int kv_type, const struct sm_part *p);
/* Scores at [begin, end), multiples of 16, become e_j where lo <= j < hi and 0 elsewhere. */
typedef void sm_softmax_fn(float *score, size_t begin, size_t end, size_t lo, size_t hi, float *m,
                           float *l);
/* x [n] = softcap(x, cap), n a multiple of 16. */
typedef void sm_cap_fn(float *x, float cap, size_t n);
/* o += e_j v_j; positions outside a query's own range have e_j = 0, and v is finite. */
typedef void sm_value_fn(int kv_type, const struct sm_part *p);

/* out [n] = the n values from `at` on of `page`, n a multiple of 4; asks for as many of `next`. */
typedef void sm_widen_fn(int kv_type, const void *page, const void *next, size_t at, size_t n,
                         float *out);
/* x_j = x_j * scale_j for lo <= j < hi, else 0; for all j of the vectors of 16 that hold one. */
typedef void sm_scale_fn(float *x, const float *scale, size_t lo, size_t hi);

/* Queries [first, first + n_q) and the positions that any of them sees. */
struct sm_tile {
    size_t first, n_q, lo, hi;
};

/* The part of a tile's work that lies in a page. */
static inline struct sm_part sm_part_of(const struct sm_attend *a, const struct sm_tile *t,
                                        size_t page) {
    return (struct sm_part){.q = a->q + t->first * a->head,
                            .weight = (float *)a->scratch + t->first * SM_SCORE_STRIDE,
                            .o = a->o + t->first * a->head,
                            .n_q = t->n_q, .head = a->head, .base = page * SM_PAGE,
                            .lo = SM_MAX(page * SM_PAGE, t->lo),
                            .hi = SM_MIN((page + 1) * SM_PAGE, t->hi)};
}

/* Widens positions lo .. hi - 1 of a page that starts at position `base`; the widened page. */
static inline __attribute__((always_inline)) const void *
sm_widen_part(const struct sm_attend *a, int kv_type, sm_widen_fn *widen, size_t base, size_t lo,
              size_t hi, const void *page, const void *next) {
    float *wide = (float *)a->scratch + SM_ATTEND_MAX * SM_SCORE_STRIDE;
    size_t from = (lo - base) * a->head;
    widen(kv_type, page, next, from, (hi - lo) * a->head, wide + from);
    return wide;
}

/* Queries of tile t by the scales of a page that starts at position `base`: [lo, hi), cut to each
 * query's own range where `own`. */
static inline __attribute__((always_inline)) void
sm_scale_part(const struct sm_attend *a, const struct sm_tile *t, sm_scale_fn *scale, size_t base,
              size_t lo, size_t hi, const float *scales, bool own) {
    for (size_t i = t->first; i < t->first + t->n_q; i++) {
        size_t from = own ? SM_MAX(lo, (size_t)a->lo[i]) : lo;
        size_t to = own ? SM_MIN(hi, (size_t)a->hi[i]) : hi;
        if (from < to)
            scale((float *)a->scratch + i * SM_SCORE_STRIDE + base, scales, from - base, to - base);
    }
}

/* s_j += slope * (j - at) at n positions from `begin` on, n a multiple of 16. */
static inline void sm_add_slope(float *score, size_t begin, size_t n, float slope, int at) {
    for (size_t j = begin; j < begin + n; j += 16)
        for (size_t l = 0; l < 16; l++)
            score[j + l] = sm_fma(slope, (float)((int)(j + l) - at), score[j + l]);
}

/* s_j += bias_j at n positions from `begin` on, n a multiple of 16. */
static inline void sm_add_bias(float *score, size_t begin, size_t n, const float *bias) {
    for (size_t j = begin; j < begin + n; j += 16)
        for (size_t l = 0; l < 16; l++) score[j + l] += bias[j + l];
}

/* most_alone: queries that the tier's functions take in a single tile, at least SM_TILE_Q. */
static inline __attribute__((always_inline)) void
sm_attend_tiles(const struct sm_attend *a, int kv_type, size_t most_alone, sm_score_fn *score,
                sm_cap_fn *cap, sm_softmax_fn *softmax, sm_value_fn *value, sm_widen_fn *widen,
                sm_scale_fn *scale) {
    struct sm_tile tile[(SM_ATTEND_MAX + SM_TILE_Q - 1) / SM_TILE_Q];
    size_t n_tiles = a->n_q <= most_alone ? 1 : (a->n_q + SM_TILE_Q - 1) / SM_TILE_Q;
    size_t lo = SM_CHUNK, hi = 0;
    for (size_t t = 0, i = 0; t < n_tiles; t++) {
        struct sm_tile s = {.first = i, .n_q = (a->n_q - i) / (n_tiles - t), .lo = SM_CHUNK};
        for (; i < s.first + s.n_q; i++) {
            s.lo = SM_MIN(s.lo, (size_t)a->lo[i]);
            s.hi = SM_MAX(s.hi, (size_t)a->hi[i]);
        }
        lo = SM_MIN(lo, s.lo);
        hi = SM_MAX(hi, s.hi);
        tile[t] = s;
    }
    const size_t first = lo / SM_PAGE, last = (hi - 1) / SM_PAGE;
    const bool once = kv_type != SMALLM_KV_F32 && n_tiles > 1, scaled = kv_type == SMALLM_KV_Q8;

    for (size_t page = first; page <= last; page++) {
        const size_t base = page * SM_PAGE, end = SM_MIN(base + SM_PAGE, sm_round_up(hi, 16));
        const void *k = a->k[page], *next = page < last ? a->k[page + 1] : a->v[first];
        if (once)
            k = sm_widen_part(a, kv_type, widen, base, SM_MAX(base, lo / 16 * 16), end, k, next);
        for (size_t t = 0; t < n_tiles; t++) {
            struct sm_part p = sm_part_of(a, &tile[t], page);
            p.page = k;
            p.next = next;
            p.lo = p.lo / 16 * 16;
            p.hi = sm_round_up(p.hi, 16);
            if (once) score(SMALLM_KV_F32, &p);
            else score(kv_type, &p);
            if (scaled && p.lo < p.hi)
                sm_scale_part(a, &tile[t], scale, base, p.lo, p.hi, sm_kv_scales(a->k[page], a->head),
                              false);
        }
    }
    for (size_t t = 0; t < n_tiles; t++)
        for (size_t i = tile[t].first; i < tile[t].first + tile[t].n_q; i++) {
            float *s = (float *)a->scratch + i * SM_SCORE_STRIDE;
            size_t begin = tile[t].lo / 16 * 16, end = sm_round_up(tile[t].hi, 16);
            if (a->cap != 0) cap(s + begin, a->cap, end - begin);
            if (a->slope != NULL) sm_add_slope(s, begin, end - begin, a->slope[i], a->at[i]);
            if (a->bias != NULL) sm_add_bias(s, begin, end - begin, a->bias[i]);
            softmax(s, begin, end, (size_t)a->lo[i], (size_t)a->hi[i], a->m + i, a->l + i);
        }
    memset(a->o, 0, a->n_q * a->head * sizeof *a->o);
    for (size_t page = first; page <= last; page++) {
        const size_t base = page * SM_PAGE;
        const void *v = a->v[page], *next = page < last ? a->v[page + 1] : a->next;
        if (next == NULL) next = v;
        if (once)
            v = sm_widen_part(a, kv_type, widen, base, SM_MAX(base, lo), SM_MIN(base + SM_PAGE, hi), v,
                              next);
        for (size_t t = 0; t < n_tiles; t++) {
            struct sm_part p = sm_part_of(a, &tile[t], page);
            p.page = v;
            p.next = next;
            if (scaled && p.lo < p.hi)
                sm_scale_part(a, &tile[t], scale, base, p.lo, p.hi, sm_kv_scales(a->v[page], a->head),
                              true);
            if (once) value(SMALLM_KV_F32, &p);
            else value(kv_type, &p);
        }
    }
    for (size_t i = 0; i < a->n_q * a->head; i++) a->o[i] += 0.0f;
}

#endif
