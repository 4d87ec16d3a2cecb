/* Attention over a chunk of positions, folding of chunks, and what the cache holds (kernels.h). */
#include <math.h>

#include "../../f16.h"
#include "../expf.h"
#include "../quantize.h"
#include "../tier.h"

static void load(int kv_type, float *out, const void *in, size_t offset, size_t n) {
    if (kv_type == SMALLM_KV_F32) {
        memcpy(out, (const float *)in + offset, n * sizeof *out);
    } else if (kv_type == SMALLM_KV_Q8) {
        for (size_t i = 0; i < n; i++) out[i] = ((const int8_t *)in)[offset + i];
    } else {
        const uint16_t *half = (const uint16_t *)in + offset;
        for (size_t i = 0; i < n; i++) out[i] = sm_f16_to_f32(half[i]);
    }
}

/* score[0 .. 16) of one query against 16 positions, k [head][16]. */
static void score16(float *score, const float *q, const float *k, size_t head) {
    float acc[16] = {0};
    for (size_t d = 0; d < head; d++)
        for (size_t j = 0; j < 16; j++) acc[j] = sm_fma(q[d], k[16 * d + j], acc[j]);
    memcpy(score, acc, sizeof acc);
}

/* Scores at lo <= j < hi become e_j; their maximum and sum into *m_out and *l_out.  The maximum
 * has no negative zero, which leaves its order free. */
static void softmax(float *score, size_t lo, size_t hi, float *m_out, float *l_out) {
    float m = -INFINITY, lane[16] = {0};
    for (size_t j = lo; j < hi; j++) m = score[j] > m ? score[j] : m;
    m += 0.0f;
    for (size_t j = lo; j < hi; j++) {
        score[j] = sm_expf(score[j] - m);
        lane[j % 16] += score[j];
    }
    for (size_t half = 8; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) lane[i] += lane[i + half];
    *m_out = m;
    *l_out = lane[0];
}

void SM_NAME(sm_attend)(const struct sm_attend *a) {
    float *score = a->scratch;                   /* [n_q][SM_CHUNK] */
    float *buffer = score + a->n_q * SM_CHUNK;   /* [head][16] of K, [head] of V */
    size_t head = a->head, first = SM_CHUNK, last = 0;
    for (size_t i = 0; i < a->n_q; i++) {
        first = SM_MIN(first, (size_t)a->lo[i]);
        last = SM_MAX(last, (size_t)a->hi[i]);
    }
    for (size_t j = first / 16 * 16; j < last; j += 16) {
        load(a->kv_type, buffer, a->k[j / SM_PAGE], j % SM_PAGE * head, 16 * head);
        const float *scale = sm_kv_scales(a->k[j / SM_PAGE], head) + j % SM_PAGE;
        for (size_t i = 0; i < a->n_q; i++) {
            float *s = score + i * SM_CHUNK + j;
            score16(s, a->q + i * head, buffer, head);
            for (size_t l = 0; l < 16 && a->kv_type == SMALLM_KV_Q8; l++) s[l] *= scale[l];
        }
    }
    for (size_t i = 0; i < a->n_q; i++) {
        float *s = score + i * SM_CHUNK;
        for (int j = a->lo[i]; j < a->hi[i] && a->cap != 0; j++) s[j] = sm_softcap(s[j], a->cap);
        for (int j = a->lo[i]; j < a->hi[i] && a->slope != NULL; j++)
            s[j] = sm_fma(a->slope[i], (float)(j - a->at[i]), s[j]);
        for (int j = a->lo[i]; j < a->hi[i] && a->bias != NULL; j++) s[j] += a->bias[i][j];
    }
    for (size_t i = 0; i < a->n_q; i++)
        softmax(score + i * SM_CHUNK, (size_t)a->lo[i], (size_t)a->hi[i], a->m + i, a->l + i);
    memset(a->o, 0, a->n_q * head * sizeof *a->o);
    for (size_t j = first; j < last; j++) {
        load(a->kv_type, buffer, a->v[j / SM_PAGE], j % SM_PAGE * head, head);
        for (size_t i = 0; i < a->n_q; i++) {
            if (j < (size_t)a->lo[i] || j >= (size_t)a->hi[i]) continue;
            float e = score[i * SM_CHUNK + j], *o = a->o + i * head;
            if (a->kv_type == SMALLM_KV_Q8) e *= sm_kv_scales(a->v[j / SM_PAGE], head)[j % SM_PAGE];
            for (size_t d = 0; d < head; d++) o[d] = sm_fma(e, buffer[d], o[d]);
        }
    }
    for (size_t i = 0; i < a->n_q * head; i++) a->o[i] += 0.0f;
}

void SM_NAME(sm_attend_fold)(float *M, float *L, float *O, float m, float l, const float *o,
                             size_t head) {
    float max = m > *M ? m : *M;
    float a = sm_expf(*M - max), b = sm_expf(m - max);
    *M = max;
    *L = sm_fma(*L, a, l * b);
    for (size_t d = 0; d < head; d++) O[d] = sm_fma(O[d], a, o[d] * b);
}

void SM_NAME(sm_attend_finish)(float *out, const float *O, float L, size_t head) {
    float r = 1.0f / L;
    for (size_t d = 0; d < head; d++) out[d] = O[d] * r;
}

static uint16_t to_f16(float x) {
    return sm_f32_to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

void SM_NAME(sm_kv_store)(int kv_type, void *k_page, void *v_page, size_t slot, const float *k,
                          const float *v, size_t head) {
    size_t at = slot / 16 * 16 * head + slot % 16; /* of K[0]; K[d] lies 16 further each */
    if (kv_type == SMALLM_KV_F32) {
        for (size_t d = 0; d < head; d++) ((float *)k_page)[at + 16 * d] = k[d];
        memcpy((float *)v_page + slot * head, v, head * sizeof *v);
    } else if (kv_type == SMALLM_KV_Q8) {
        sm_kv_store_q8(k_page, v_page, slot, k, v, head);
    } else {
        uint16_t *kh = k_page, *vh = (uint16_t *)v_page + slot * head;
        for (size_t d = 0; d < head; d++) {
            kh[at + 16 * d] = to_f16(k[d]);
            vh[d] = to_f16(v[d]);
        }
    }
}
