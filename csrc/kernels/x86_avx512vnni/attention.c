/* Attention on AVX-512 (attend.h): 16 positions (scores) or 16 head dimensions (values) to a
 * vector, up to four vectors to a tile of 6 queries or two to one of 8: at most 24 sums in registers. */
#include "../attend.h"
#include "../tier.h"
#include "expf.h"

#define INLINE static inline __attribute__((always_inline))
#define MOST_ALONE 8 /* queries of a single tile that widens as it loads */

/* Elements [at, at + 16) of a page. */
INLINE __m512 load(int kv_type, const void *page, size_t at) {
    if (kv_type == SMALLM_KV_F32) return _mm512_loadu_ps((const float *)page + at);
    if (kv_type == SMALLM_KV_Q8) {
        __m128i codes = _mm_loadu_si128((const __m128i *)((const int8_t *)page + at));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    const uint16_t *h = (const uint16_t *)page + at;
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
}
/* Those of the mask, else 0. */
INLINE __m512 load_masked(int kv_type, const void *page, size_t at, __mmask16 mask) {
    if (kv_type == SMALLM_KV_F32) return _mm512_maskz_loadu_ps(mask, (const float *)page + at);
    if (kv_type == SMALLM_KV_Q8) {
        __m128i codes = _mm_maskz_loadu_epi8(mask, (const int8_t *)page + at);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)page + at));
}

/* Asks for n values of the next page; float32 is not asked for, since widened pages look like it. */
INLINE void prefetch(int kv_type, const void *next, size_t at, int n) {
    if (kv_type == SMALLM_KV_F32) return;
    const size_t bytes = sm_kv_value_bytes(kv_type);
    for (size_t i = 0; i < (size_t)n * bytes; i += 64)
        _mm_prefetch((const char *)next + at * bytes + i, _MM_HINT_T1);
}

INLINE __mmask16 lanes_below(size_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* ---- scores --------------------------------------------------------------------------------- */

/* s_j of n_q queries at 16 n_g positions from j on. */
INLINE void score_tile(int kv_type, int n_g, int n_q, const struct sm_part *p, size_t j) {
    const size_t head = p->head, at = (j - p->base) * head; /* of [n_g][head][16] */
    const float *q = p->q;
    const void *page = p->page, *next = p->next;
    __m512 acc[4][MOST_ALONE];
    for (int g = 0; g < n_g; g++)
        for (int i = 0; i < n_q; i++) acc[g][i] = _mm512_setzero_ps();
    for (size_t d = 0; d < head; d++) {
        __m512 key[4];
        prefetch(kv_type, next, at + (size_t)n_g * 16 * d, n_g * 16);
        for (int g = 0; g < n_g; g++) key[g] = load(kv_type, page, at + ((size_t)g * head + d) * 16);
        for (int i = 0; i < n_q; i++) {
            __m512 query = _mm512_set1_ps(q[(size_t)i * head + d]);
            for (int g = 0; g < n_g; g++) acc[g][i] = _mm512_fmadd_ps(query, key[g], acc[g][i]);
        }
    }
    for (int g = 0; g < n_g; g++)
        for (int i = 0; i < n_q; i++)
            _mm512_storeu_ps(p->weight + i * SM_SCORE_STRIDE + j + 16 * g, acc[g][i]);
}

INLINE void score_some(int kv_type, int n_g, const struct sm_part *p, size_t j) {
    switch (p->n_q) {
    case 1: score_tile(kv_type, n_g, 1, p, j); break;
    case 2: score_tile(kv_type, n_g, 2, p, j); break;
    case 3: score_tile(kv_type, n_g, 3, p, j); break;
    case 4: score_tile(kv_type, n_g, 4, p, j); break;
    case 5: score_tile(kv_type, n_g, 5, p, j); break;
    case 6: score_tile(kv_type, n_g, 6, p, j); break;
    case 7: score_tile(kv_type, SM_MIN(n_g, 2), 7, p, j); break;
    default: score_tile(kv_type, SM_MIN(n_g, 2), 8, p, j); break;
    }
}

INLINE void score_part(int kv_type, const struct sm_part *p) {
    size_t j = p->lo;
    for (; p->n_q <= SM_TILE_Q && j + 64 <= p->hi; j += 64) score_some(kv_type, 4, p, j);
    for (; j + 32 <= p->hi; j += 32) score_some(kv_type, 2, p, j);
    for (; j < p->hi; j += 16) score_some(kv_type, 1, p, j);
}

/* Lanes of positions j .. j + 15 inside [lo, hi). */
INLINE __mmask16 valid(size_t j, size_t lo, size_t hi) {
    if (lo <= j && j + 16 <= hi) return 0xffff;
    return lanes_below(hi > j ? hi - j : 0) & (__mmask16)~lanes_below(lo > j ? lo - j : 0);
}

INLINE void cap_scores(float *x, float cap, size_t n) {
    const __m512 c = _mm512_set1_ps(cap), twice = _mm512_set1_ps(2.0f / cap);
    for (size_t i = 0; i < n; i += 16)
        _mm512_storeu_ps(x + i, softcap16(_mm512_loadu_ps(x + i), c, twice));
}

INLINE void softmax(float *score, size_t begin, size_t end, size_t lo, size_t hi, float *m_out,
                    float *l_out) {
    __m512 max = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (size_t j = begin; j < end; j += 16) /* max_ps gives its second operand for a NaN score */
        max = _mm512_mask_max_ps(max, valid(j, lo, hi), _mm512_loadu_ps(score + j), max);
    float m = _mm512_reduce_max_ps(max) + 0.0f;
    for (size_t j = begin; j < end; j += 16) {
        __m512 e = expf16(_mm512_sub_ps(_mm512_loadu_ps(score + j), _mm512_set1_ps(m)));
        e = _mm512_maskz_mov_ps(valid(j, lo, hi), e);
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(score + j, e);
    }
    *m_out = m;
    *l_out = tree16(sum);
}

/* ---- values --------------------------------------------------------------------------------- */

/* o += e_j v_j of n_q queries at 16 n_v dimensions from d on; a single vector may be cut short by
 * the mask. */
INLINE void value_tile(int kv_type, int n_v, int n_q, const struct sm_part *p, size_t d,
                       __mmask16 mask) {
    const size_t head = p->head, base = p->base, hi = p->hi;
    const float *weight = p->weight;
    const void *page = p->page, *next = p->next;
    float *o = p->o + d;
    __m512 acc[4][MOST_ALONE];
    for (int i = 0; i < n_q; i++)
        for (int c = 0; c < n_v; c++)
            acc[c][i] = n_v > 1 ? _mm512_loadu_ps(o + (size_t)i * head + 16 * c)
                                : _mm512_maskz_loadu_ps(mask, o + (size_t)i * head);
    for (size_t j = p->lo; j < hi; j++) {
        const size_t at = (j - base) * head + d;
        __m512 value[4];
        prefetch(kv_type, next, at, n_v * 16);
        for (int c = 0; c < n_v; c++)
            value[c] = n_v > 1 ? load(kv_type, page, at + 16 * c) : load_masked(kv_type, page, at, mask);
        for (int i = 0; i < n_q; i++) {
            __m512 e = _mm512_set1_ps(weight[i * SM_SCORE_STRIDE + j]);
            for (int c = 0; c < n_v; c++) acc[c][i] = _mm512_fmadd_ps(e, value[c], acc[c][i]);
        }
    }
    for (int i = 0; i < n_q; i++)
        for (int c = 0; c < n_v; c++) {
            if (n_v > 1)
                _mm512_storeu_ps(o + (size_t)i * head + 16 * c, acc[c][i]);
            else
                _mm512_mask_storeu_ps(o + (size_t)i * head, mask, acc[c][i]);
        }
}

INLINE void value_some(int kv_type, int n_v, const struct sm_part *p, size_t d) {
    __mmask16 mask = lanes_below(p->head - d);
    switch (p->n_q) {
    case 1: value_tile(kv_type, n_v, 1, p, d, mask); break;
    case 2: value_tile(kv_type, n_v, 2, p, d, mask); break;
    case 3: value_tile(kv_type, n_v, 3, p, d, mask); break;
    case 4: value_tile(kv_type, n_v, 4, p, d, mask); break;
    case 5: value_tile(kv_type, n_v, 5, p, d, mask); break;
    case 6: value_tile(kv_type, n_v, 6, p, d, mask); break;
    case 7: value_tile(kv_type, SM_MIN(n_v, 2), 7, p, d, mask); break;
    default: value_tile(kv_type, SM_MIN(n_v, 2), 8, p, d, mask); break;
    }
}

INLINE void value_part(int kv_type, const struct sm_part *p) {
    size_t d = 0;
    for (; p->n_q <= SM_TILE_Q && d + 64 <= p->head; d += 64) value_some(kv_type, 4, p, d);
    for (; d + 32 <= p->head; d += 32) value_some(kv_type, 2, p, d);
    for (; d < p->head; d += 16) value_some(kv_type, 1, p, d);
}

INLINE void widen(int kv_type, const void *page, const void *next, size_t at, size_t n, float *out) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        if (i % 32 == 0) prefetch(kv_type, next, at + i, 32);
        _mm512_storeu_ps(out + i, load(kv_type, page, at + i));
    }
    __mmask16 rest = lanes_below(n - i);
    if (i < n) _mm512_mask_storeu_ps(out + i, rest, load_masked(kv_type, page, at + i, rest));
}

INLINE void scale(float *x, const float *by, size_t lo, size_t hi) {
    for (size_t j = lo / 16 * 16; j < hi; j += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(by + j));
        _mm512_storeu_ps(x + j, _mm512_maskz_mov_ps(valid(j, lo, hi), v));
    }
}

/* ---- the slot ------------------------------------------------------------------------------- */

static void attend_f16(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_F16, MOST_ALONE, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}
static void attend_f32(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_F32, SM_TILE_Q, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}
static void attend_q8(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_Q8, MOST_ALONE, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}

void SM_NAME(sm_attend)(const struct sm_attend *a) {
    switch (a->kv_type) {
    case SMALLM_KV_F32: attend_f32(a); break;
    case SMALLM_KV_Q8: attend_q8(a); break;
    default: attend_f16(a); break;
    }
}
