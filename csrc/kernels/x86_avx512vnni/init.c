#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "avx512vnni";
    SM_NAME(sm_init_matmul)(k);
}
