/* AVX2 with FMA and F16C: the slots it does faster than what lies below. */
#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "avx2";
    k->prepare[SM_ACT_Q8_32] = SM_NAME(sm_prepare_q8_32);
    k->prepare[SM_ACT_Q8_256] = SM_NAME(sm_prepare_q8_256);
    k->attend = SM_NAME(sm_attend);
    k->kv_store = SM_NAME(sm_kv_store);
    k->rms_norm = SM_NAME(sm_rms_norm);
    k->layer_norm = SM_NAME(sm_layer_norm);
    k->rope_pairs = SM_NAME(sm_rope_pairs);
    k->rope_halves = SM_NAME(sm_rope_halves);
    k->swiglu = SM_NAME(sm_swiglu);
    k->swiglu_clamped = SM_NAME(sm_swiglu_clamped);
    k->geglu = SM_NAME(sm_geglu);
    k->geglu_erf = SM_NAME(sm_geglu_erf);
    k->relu2glu = SM_NAME(sm_relu2glu);
    k->gelu = SM_NAME(sm_gelu);
    k->gelu_erf = SM_NAME(sm_gelu_erf);
    k->softcap = SM_NAME(sm_softcap);
    k->silu = SM_NAME(sm_silu);
    k->conv = SM_NAME(sm_conv);
    k->ssm_step = SM_NAME(sm_ssm_step);
    k->peaks = SM_NAME(sm_peaks);
    SM_NAME(sm_init_matmul)(k);
}
