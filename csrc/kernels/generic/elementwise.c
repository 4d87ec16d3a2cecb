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
    for (size_t i = 0; i < n; i++) out[i] = sm_fma((x[i] - mean) * r, w[i], b[i]);
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

void SM_NAME(sm_gelu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] / (1.0f + sm_expf(-(x[i] * sm_fma(SM_GELU_B, x[i] * x[i], SM_GELU_A))));
}

void SM_NAME(sm_scale)(float *out, const float *x, float a, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] * a;
}

void SM_NAME(sm_add)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += x[i];
}

void SM_NAME(sm_peaks)(float *out, const float *x, size_t n) { sm_peaks(out, x, n); }
