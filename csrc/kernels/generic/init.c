/* The reference tier: every slot, in plain C.  Compiled for the baseline and once more with
 * hardware FMA (dispatch.c takes that one where it can); both give the same bits. */
#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    *k = (struct sm_kernels){
        .name = "generic",
        .prepare = {[SM_ACT_F32] = SM_NAME(sm_prepare_f32),
                    [SM_ACT_Q8_32] = SM_NAME(sm_prepare_q8_32),
                    [SM_ACT_Q8_256] = SM_NAME(sm_prepare_q8_256)},
        .attend = SM_NAME(sm_attend),
        .attend_fold = SM_NAME(sm_attend_fold),
        .attend_finish = SM_NAME(sm_attend_finish),
        .kv_store = SM_NAME(sm_kv_store),
        .rms_norm = SM_NAME(sm_rms_norm),
        .layer_norm = SM_NAME(sm_layer_norm),
        .rope_pairs = SM_NAME(sm_rope_pairs),
        .rope_halves = SM_NAME(sm_rope_halves),
        .swiglu = SM_NAME(sm_swiglu),
        .swiglu_clamped = SM_NAME(sm_swiglu_clamped),
        .geglu = SM_NAME(sm_geglu),
        .geglu_erf = SM_NAME(sm_geglu_erf),
        .relu2glu = SM_NAME(sm_relu2glu),
        .gelu = SM_NAME(sm_gelu),
        .gelu_erf = SM_NAME(sm_gelu_erf),
        .relu = SM_NAME(sm_relu),
        .relu2 = SM_NAME(sm_relu2),
        .softcap = SM_NAME(sm_softcap),
        .sigmoid = SM_NAME(sm_sigmoid),
        .silu = SM_NAME(sm_silu),
        .conv = SM_NAME(sm_conv),
        .ssm_step = SM_NAME(sm_ssm_step),
        .scale = SM_NAME(sm_scale),
        .add = SM_NAME(sm_add),
        .add_scaled = SM_NAME(sm_add_scaled),
        .route = SM_NAME(sm_route),
        .peaks = SM_NAME(sm_peaks),
        .fit = SM_NAME(sm_fit),
    };
    SM_NAME(sm_init_matmul)(k);
}
