/* Names inside a tier's folder, which is compiled with SM_TIER set to the tier's name. */
#ifndef SM_TIER_H
#define SM_TIER_H

#include "kernels.h"

#define SM_NAME_JOIN(name, tier) name##__##tier
#define SM_NAME_EXPAND(name, tier) SM_NAME_JOIN(name, tier)
#define SM_NAME(name) SM_NAME_EXPAND(name, SM_TIER)

/* Fills the slots this tier improves (generic: all) and the tier's name. */
void SM_NAME(sm_init)(struct sm_kernels *k);         /* init.c */
void SM_NAME(sm_init_matmul)(struct sm_kernels *k);  /* matmul.c */

/* Slots that init.c takes from its neighbours. */
sm_prepare_fn SM_NAME(sm_prepare_f32), SM_NAME(sm_prepare_q8_32), SM_NAME(sm_prepare_q8_256);
sm_attend_fn SM_NAME(sm_attend);
sm_gated_fn SM_NAME(sm_swiglu), SM_NAME(sm_swiglu_clamped), SM_NAME(sm_geglu), SM_NAME(sm_geglu_erf),
    SM_NAME(sm_relu2glu);
void SM_NAME(sm_attend_fold)(float *M, float *L, float *O, float m, float l, const float *o,
                             size_t head);
void SM_NAME(sm_attend_finish)(float *out, const float *O, float L, size_t head);
void SM_NAME(sm_kv_store)(int kv_type, void *k_page, void *v_page, size_t slot, const float *k,
                          const float *v, size_t head);
void SM_NAME(sm_rms_norm)(float *out, const float *x, const float *w, size_t n, float eps);
void SM_NAME(sm_layer_norm)(float *out, const float *x, const float *w, const float *b, size_t n,
                            float eps);
void SM_NAME(sm_rope_pairs)(float *x, const float *cos, const float *sin, size_t n_pairs);
void SM_NAME(sm_rope_halves)(float *x, const float *cos, const float *sin, size_t n_pairs);
void SM_NAME(sm_gelu)(float *out, const float *x, size_t n);
void SM_NAME(sm_gelu_erf)(float *out, const float *x, size_t n);
void SM_NAME(sm_relu)(float *out, const float *x, size_t n);
void SM_NAME(sm_relu2)(float *out, const float *x, size_t n);
void SM_NAME(sm_softcap)(float *out, const float *x, float cap, size_t n);
void SM_NAME(sm_sigmoid)(float *out, const float *x, size_t n);
void SM_NAME(sm_silu)(float *out, const float *x, size_t n);
void SM_NAME(sm_conv)(float *out, const float *const *x, const float *w, size_t stride,
                      const float *bias, size_t k, size_t n);
void SM_NAME(sm_ssm_step)(const struct sm_ssm_step *a);
void SM_NAME(sm_scale)(float *out, const float *x, float a, size_t n);
void SM_NAME(sm_add)(float *out, const float *x, size_t n);
void SM_NAME(sm_add_scaled)(float *out, const float *x, float a, size_t n);
bool SM_NAME(sm_route)(uint16_t *ids, float *weights, size_t n_used, const float *logits,
                       size_t n_expert, bool of_chosen, float scale);
void SM_NAME(sm_peaks)(float *out, const float *x, size_t n);
sm_fit_fn SM_NAME(sm_fit);

#endif
