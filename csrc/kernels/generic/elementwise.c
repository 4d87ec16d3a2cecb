/* Norm, rotation and the other slots that walk over one vector. */
#include <math.h>

#include "../expf.h"
#include "../../peaks.h"
#include "../tier.h"

static float tree16(float v[16]) {
    for (size_t half = 8; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

void SM_NAME(sm_rms_norm)(float *out, const float *x, const float *w, size_t n, float eps) {
    float lane[16] = {0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; j++) lane[j] = sm_fma(x[i + j], x[i + j], lane[j]);
    for (; i < n; i++) lane[i % 16] = sm_fma(x[i], x[i], lane[i % 16]);
    float ss = tree16(lane);
    float r = 1.0f / sqrtf(ss / (float)n + eps) + (ss - ss); /* NaN where the squares overflow */
    for (i = 0; i < n; i++) out[i] = (x[i] * r) * w[i];
}

void SM_NAME(sm_layer_norm)(float *out, const float *x, const float *w, const float *b, size_t n,
                            float eps) {
    float lane[16] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 16] += x[i];
    float mean = tree16(lane) / (float)n;
    memset(lane, 0, sizeof lane);
    for (size_t i = 0; i < n; i++) {
        float d = x[i] - mean;
        lane[i % 16] = sm_fma(d, d, lane[i % 16]);
    }
    float ss = tree16(lane);
    float r = 1.0f / sqrtf(ss / (float)n + eps) + (ss - ss);
    for (size_t i = 0; i < n; i++)
        out[i] = sm_fma((x[i] - mean) * r, w[i], b != NULL ? b[i] : 0.0f);
}

void SM_NAME(sm_rope_pairs)(float *x, const float *cos, const float *sin, size_t n_pairs) {
    for (size_t i = 0; i < n_pairs; i++) {
        float x0 = x[2 * i], x1 = x[2 * i + 1];
        x[2 * i] = sm_fma(x0, cos[i], -(x1 * sin[i]));
        x[2 * i + 1] = sm_fma(x0, sin[i], x1 * cos[i]);
    }
}

void SM_NAME(sm_rope_halves)(float *x, const float *cos, const float *sin, size_t n_pairs) {
    for (size_t i = 0; i < n_pairs; i++) {
        float x0 = x[i], x1 = x[i + n_pairs];
        x[i] = sm_fma(x0, cos[i], -(x1 * sin[i]));
        x[i + n_pairs] = sm_fma(x0, sin[i], x1 * cos[i]);
    }
}

void SM_NAME(sm_swiglu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + sm_expf(-gate[i])) * up[i];
}

void SM_NAME(sm_swiglu_clamped)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) { /* the comparisons let NaN pass */
        float g = gate[i] > SM_CLAMP_LIMIT ? SM_CLAMP_LIMIT : gate[i];
        float u = up[i] > SM_CLAMP_LIMIT ? SM_CLAMP_LIMIT : up[i];
        u = u < -SM_CLAMP_LIMIT ? -SM_CLAMP_LIMIT : u;
        out[i] = g / (1.0f + sm_expf(-(g * SM_CLAMP_ALPHA))) * (u + 1.0f);
    }
}

static float gelu(float x) {
    return x / (1.0f + sm_expf(-(x * sm_fma(SM_GELU_B, x * x, SM_GELU_A))));
}

void SM_NAME(sm_geglu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gelu(gate[i]) * up[i];
}

void SM_NAME(sm_relu2glu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) { /* the comparison lets NaN pass */
        float r = gate[i] < 0 ? 0 : gate[i];
        out[i] = r * r * up[i];
    }
}

void SM_NAME(sm_gelu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gelu(x[i]);
}

static float gelu_erf(float x) {
    static const float Q[] = SM_GELU_ERF_Q;
    float t = 1.0f / sm_fma(SM_GELU_ERF_P, fabsf(x), 1.0f), q = Q[0];
    for (size_t j = 1; j < SM_COUNT(Q); j++) q = sm_fma(q, t, Q[j]);
    float h = sm_expf(-(x * x * 0.5f)) * (q * t);
    return x < 0 ? x * h : sm_fma(-x, h, x);
}

void SM_NAME(sm_gelu_erf)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gelu_erf(x[i]);
}

void SM_NAME(sm_geglu_erf)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gelu_erf(gate[i]) * up[i];
}

void SM_NAME(sm_relu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] < 0 ? 0 : x[i];
}

void SM_NAME(sm_relu2)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float r = x[i] < 0 ? 0 : x[i];
        out[i] = r * r;
    }
}

void SM_NAME(sm_softcap)(float *out, const float *x, float cap, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = sm_softcap(x[i], cap);
}

void SM_NAME(sm_sigmoid)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = 1.0f / (1.0f + sm_expf(-x[i]));
}

void SM_NAME(sm_scale)(float *out, const float *x, float a, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] * a;
}

void SM_NAME(sm_add)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += x[i];
}

void SM_NAME(sm_add_scaled)(float *out, const float *x, float a, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = sm_fma(a, x[i], out[i]);
}

/* ids [n_used] ascending: the largest logits, of equal ones the lower ids. */
static void choose(uint16_t *ids, size_t n_used, const float *logits, size_t n_expert) {
    uint16_t best[SM_USED_MAX]; /* [n] largest first */
    size_t n = 0;
    for (size_t e = 0; e < n_expert; e++) {
        if (n == n_used && !(logits[e] > logits[best[n - 1]])) continue;
        size_t at = n < n_used ? n++ : n - 1;
        for (; at > 0 && logits[e] > logits[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = (uint16_t)e;
    }
    for (size_t i = 0; i < n_used; i++) {
        size_t at = i;
        for (; at > 0 && ids[at - 1] > best[i]; at--) ids[at] = ids[at - 1];
        ids[at] = best[i];
    }
}

bool SM_NAME(sm_route)(uint16_t *ids, float *weights, size_t n_used, const float *logits,
                       size_t n_expert, bool of_chosen, float scale) {
    float m = logits[0], lane[16] = {0};
    for (size_t e = 0; e < n_expert; e++) {
        if (!isfinite(logits[e])) return false;
        m = logits[e] > m ? logits[e] : m;
    }
    choose(ids, n_used, logits, n_expert);
    for (size_t i = 0; i < n_used; i++) weights[i] = sm_expf(logits[ids[i]] - m);
    for (size_t i = 0; i < (of_chosen ? n_used : n_expert); i++)
        lane[i % 16] += of_chosen ? weights[i] : sm_expf(logits[i] - m);
    float r = 1.0f / tree16(lane);
    for (size_t i = 0; i < n_used; i++) weights[i] = weights[i] * r * scale;
    return true;
}

void SM_NAME(sm_peaks)(float *out, const float *x, size_t n) { sm_peaks(out, x, n); }
