/* Attention on AVX2 (attend.h): 8 positions (scores) or 8 head dimensions (values) to a vector, and
 * as many vectors to a tile of queries as make at most 12 sums in registers. */
#include "../attend.h"
#include "../quantize.h"
#include "../tier.h"
#include "expf.h"

#define INLINE static inline __attribute__((always_inline))
#define MAX_VECTORS 8

/* Elements [at, at + 8) of a page. */
INLINE __m256 load(int kv_type, const void *page, size_t at) {
    if (kv_type == SMALLM_KV_F32) return _mm256_loadu_ps((const float *)page + at);
    if (kv_type == SMALLM_KV_Q8) {
        __m128i codes = _mm_loadl_epi64((const __m128i *)((const int8_t *)page + at));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)page + at)));
}
/* [at, at + 4), else 0. */
INLINE __m256 load_four(int kv_type, const void *page, size_t at) {
    __m128 four;
    if (kv_type == SMALLM_KV_F32) {
        four = _mm_loadu_ps((const float *)page + at);
    } else if (kv_type == SMALLM_KV_Q8) {
        int32_t codes;
        memcpy(&codes, (const int8_t *)page + at, sizeof codes);
        four = _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(codes)));
    } else {
        four = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)((const uint16_t *)page + at)));
    }
    return _mm256_insertf128_ps(_mm256_setzero_ps(), four, 0);
}

/* Asks for n values of the next page; float32 is not asked for, since widened pages look like it. */
INLINE void prefetch(int kv_type, const void *next, size_t at, int n) {
    if (kv_type == SMALLM_KV_F32) return;
    const size_t bytes = sm_kv_value_bytes(kv_type);
    for (size_t i = 0; i < (size_t)n * bytes; i += 64)
        _mm_prefetch((const char *)next + at * bytes + i, _MM_HINT_T1);
}

/* ---- scores --------------------------------------------------------------------------------- */

/* s_j of n_q queries at 8 n_v positions (n_v even) from j on. */
INLINE void score_tile(int kv_type, int n_v, int n_q, const struct sm_part *p, size_t j) {
    const size_t head = p->head, at = (j - p->base) * head; /* of [n_v / 2][head][16] */
    const float *q = p->q;
    const void *page = p->page, *next = p->next;
    __m256 acc[MAX_VECTORS][SM_TILE_Q];
    for (int v = 0; v < n_v; v++)
        for (int i = 0; i < n_q; i++) acc[v][i] = _mm256_setzero_ps();
    for (size_t d = 0; d < head; d++) {
        __m256 key[MAX_VECTORS];
        prefetch(kv_type, next, at + (size_t)n_v * 8 * d, n_v * 8);
        for (int v = 0; v < n_v; v++)
            key[v] = load(kv_type, page, at + ((size_t)(v / 2) * head + d) * 16 + v % 2 * 8);
        for (int i = 0; i < n_q; i++) {
            __m256 query = _mm256_broadcast_ss(q + (size_t)i * head + d);
            for (int v = 0; v < n_v; v++) acc[v][i] = _mm256_fmadd_ps(query, key[v], acc[v][i]);
        }
    }
    for (int v = 0; v < n_v; v++)
        for (int i = 0; i < n_q; i++)
            _mm256_storeu_ps(p->weight + i * SM_SCORE_STRIDE + j + 8 * v, acc[v][i]);
}

INLINE void score_queries(int kv_type, int n_v, int n_q, const struct sm_part *p) {
    size_t j = p->lo, step = (size_t)n_v * 8;
    for (; j + step <= p->hi; j += step) score_tile(kv_type, n_v, n_q, p, j);
    for (; j < p->hi; j += 16) score_tile(kv_type, 2, n_q, p, j);
}

INLINE void score_part(int kv_type, const struct sm_part *p) {
    switch (p->n_q) {
    case 1: score_queries(kv_type, 8, 1, p); break;
    case 2: score_queries(kv_type, 4, 2, p); break;
    case 3: score_queries(kv_type, 4, 3, p); break;
    case 4: score_queries(kv_type, 2, 4, p); break;
    case 5: score_queries(kv_type, 2, 5, p); break;
    default: score_queries(kv_type, 2, 6, p); break;
    }
}

/* All bits of positions j .. j + 7 inside [lo, hi). */
INLINE __m256 valid(size_t j, size_t lo, size_t hi) {
    __m256i below_hi = lanes_below(hi > j ? hi - j : 0);
    __m256i below_lo = lanes_below(lo > j ? lo - j : 0);
    return _mm256_castsi256_ps(_mm256_andnot_si256(below_lo, below_hi));
}

INLINE void cap_scores(float *x, float cap, size_t n) {
    const __m256 c = _mm256_set1_ps(cap), twice = _mm256_set1_ps(2.0f / cap);
    for (size_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(x + i, softcap8(_mm256_loadu_ps(x + i), c, twice));
}

INLINE void softmax(float *score, size_t begin, size_t end, size_t lo, size_t hi, float *m_out,
                    float *l_out) {
    const __m256 least = _mm256_set1_ps(-__builtin_inff());
    __m256 max = least;
    for (size_t j = begin; j < end; j += 8) { /* max_ps gives its second operand for a NaN score */
        __m256 s = _mm256_blendv_ps(least, _mm256_loadu_ps(score + j), valid(j, lo, hi));
        max = _mm256_max_ps(s, max);
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    float m = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four))) + 0.0f;
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t j = begin; j < end; j += 16)
        for (size_t i = 0; i < 2; i++) {
            __m256 s = _mm256_loadu_ps(score + j + 8 * i);
            __m256 e = expf8(_mm256_sub_ps(s, _mm256_set1_ps(m)));
            e = _mm256_and_ps(e, valid(j + 8 * i, lo, hi));
            sum[i] = _mm256_add_ps(sum[i], e);
            _mm256_storeu_ps(score + j + 8 * i, e);
        }
    *m_out = m;
    *l_out = tree16(sum[0], sum[1]);
}

/* ---- values --------------------------------------------------------------------------------- */

/* o += e_j v_j of n_q queries at 8 n_v dimensions from d on (four: at 4 of them). */
INLINE void value_tile(int kv_type, bool four, int n_v, int n_q, const struct sm_part *p, size_t d) {
    const size_t head = p->head, base = p->base, hi = p->hi;
    const float *weight = p->weight;
    const void *page = p->page, *next = p->next;
    float *o = p->o + d;
    __m256 acc[MAX_VECTORS][SM_TILE_Q];
    for (int v = 0; v < n_v; v++)
        for (int i = 0; i < n_q; i++)
            acc[v][i] = four ? load_four(SMALLM_KV_F32, o, (size_t)i * head)
                             : _mm256_loadu_ps(o + (size_t)i * head + 8 * v);
    for (size_t j = p->lo; j < hi; j++) {
        const size_t at = (j - base) * head + d;
        __m256 value[MAX_VECTORS];
        prefetch(kv_type, next, at, n_v * 8);
        for (int v = 0; v < n_v; v++)
            value[v] = four ? load_four(kv_type, page, at) : load(kv_type, page, at + 8 * v);
        for (int i = 0; i < n_q; i++) {
            __m256 e = _mm256_broadcast_ss(weight + i * SM_SCORE_STRIDE + j);
            for (int v = 0; v < n_v; v++) acc[v][i] = _mm256_fmadd_ps(e, value[v], acc[v][i]);
        }
    }
    for (int v = 0; v < n_v; v++)
        for (int i = 0; i < n_q; i++) {
            if (four)
                _mm_storeu_ps(o + (size_t)i * head, _mm256_castps256_ps128(acc[v][i]));
            else
                _mm256_storeu_ps(o + (size_t)i * head + 8 * v, acc[v][i]);
        }
}

INLINE void value_queries(int kv_type, int n_v, int n_q, const struct sm_part *p) {
    size_t d = 0, step = (size_t)n_v * 8;
    for (; d + step <= p->head; d += step) value_tile(kv_type, false, n_v, n_q, p, d);
    for (; d + 8 <= p->head; d += 8) value_tile(kv_type, false, 1, n_q, p, d);
    if (d < p->head) value_tile(kv_type, true, 1, n_q, p, d);
}

INLINE void value_part(int kv_type, const struct sm_part *p) {
    switch (p->n_q) {
    case 1: value_queries(kv_type, 8, 1, p); break;
    case 2: value_queries(kv_type, 4, 2, p); break;
    case 3: value_queries(kv_type, 4, 3, p); break;
    case 4: value_queries(kv_type, 2, 4, p); break;
    case 5: value_queries(kv_type, 2, 5, p); break;
    default: value_queries(kv_type, 2, 6, p); break;
    }
}

INLINE void widen(int kv_type, const void *page, const void *next, size_t at, size_t n, float *out) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        if (i % 32 == 0) prefetch(kv_type, next, at + i, 32);
        _mm256_storeu_ps(out + i, load(kv_type, page, at + i));
    }
    if (i < n) _mm_storeu_ps(out + i, _mm256_castps256_ps128(load_four(kv_type, page, at + i)));
}

INLINE void scale(float *x, const float *by, size_t lo, size_t hi) {
    for (size_t j = lo / 16 * 16; j < sm_round_up(hi, 16); j += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + j), _mm256_loadu_ps(by + j));
        _mm256_storeu_ps(x + j, _mm256_and_ps(v, valid(j, lo, hi)));
    }
}

/* ---- the slot ------------------------------------------------------------------------------- */

static void attend_f16(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_F16, SM_TILE_Q, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}
static void attend_f32(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_F32, SM_TILE_Q, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}
static void attend_q8(const struct sm_attend *a) {
    sm_attend_tiles(a, SMALLM_KV_Q8, SM_TILE_Q, score_part, cap_scores, softmax, value_part, widen,
                    scale);
}

void SM_NAME(sm_attend)(const struct sm_attend *a) {
    switch (a->kv_type) {
    case SMALLM_KV_F32: attend_f32(a); break;
    case SMALLM_KV_Q8: attend_q8(a); break;
    default: attend_f16(a); break;
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
    if (kv_type == SMALLM_KV_Q8) {
        sm_kv_store_q8(k_page, v_page, slot, k, v, head);
        return;
    }
    const __m128 max = _mm_set1_ps(65504.0f), min = _mm_set1_ps(-65504.0f);
    uint16_t *kh = (uint16_t *)k_page + at, *vh = (uint16_t *)v_page + slot * head;
    for (size_t d = 0; d < head; d += 4) {
        uint16_t column[4];
        __m128 kd = _mm_max_ps(min, _mm_min_ps(max, _mm_loadu_ps(k + d)));
        __m128 vd = _mm_max_ps(min, _mm_min_ps(max, _mm_loadu_ps(v + d)));
        _mm_storel_epi64((__m128i *)column, _mm_cvtps_ph(kd, _MM_FROUND_TO_NEAREST_INT));
        _mm_storel_epi64((__m128i *)(vh + d), _mm_cvtps_ph(vd, _MM_FROUND_TO_NEAREST_INT));
        for (size_t i = 0; i < 4; i++) kh[(d + i) * 16] = column[i];
    }
}
