/* AVX-512 with VNNI: the slots it does faster than what lies below. */
#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "avx512vnni";
    k->prepare[SM_ACT_Q8_32] = SM_NAME(sm_prepare_q8_32);
    k->prepare[SM_ACT_Q8_256] = SM_NAME(sm_prepare_q8_256);
    k->attend = SM_NAME(sm_attend);
    k->swiglu = SM_NAME(sm_swiglu);
    k->swiglu_clamped = SM_NAME(sm_swiglu_clamped);
    k->geglu = SM_NAME(sm_geglu);
    k->geglu_erf = SM_NAME(sm_geglu_erf);
    k->relu2glu = SM_NAME(sm_relu2glu);
    k->gelu = SM_NAME(sm_gelu);
    k->gelu_erf = SM_NAME(sm_gelu_erf);
    k->softcap = SM_NAME(sm_softcap);
    k->fit = SM_NAME(sm_fit);
    SM_NAME(sm_init_matmul)(k);
}
