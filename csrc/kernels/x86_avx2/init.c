#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "avx2";
    SM_NAME(sm_init_matmul)(k);
}
