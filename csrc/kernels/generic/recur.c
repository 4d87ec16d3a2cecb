/* Mixers that carry a state: causal convolution, and the step of a state space (kernels.h). */
#include "../expf.h"
#include "../tier.h"

void SM_NAME(sm_conv)(float *out, const float *const *x, const float *w, size_t stride,
                      const float *bias, size_t k, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float acc = bias != NULL ? bias[i] : 0.0f;
        for (size_t j = 0; j < k; j++) acc = sm_fma(w[j * stride + i], x[j][i], acc);
        out[i] = acc;
    }
}

void SM_NAME(sm_silu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] / (1.0f + sm_expf(-x[i]));
}

void SM_NAME(sm_ssm_step)(const struct sm_ssm_step *a) {
    size_t head = a->head;
    float u[SM_HEAD_MAX], y[SM_HEAD_MAX];
    for (size_t i = 0; i < head; i++) {
        u[i] = a->x[i] * a->dt;
        y[i] = a->x[i] * a->skip;
    }
    for (size_t s = 0; s < a->n_state; s++)
        for (size_t i = 0; i < head; i++) {
            float h = sm_fma(a->from[s * head + i], a->decay, u[i] * a->b[s]);
            a->to[s * head + i] = h;
            y[i] = sm_fma(h, a->c[s], y[i]);
        }
    memcpy(a->y, y, head * sizeof *y);
}
