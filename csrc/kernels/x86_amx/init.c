/* AMX over AVX-512 VNNI: integer dot products of many tokens. */
#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "amx";
    SM_NAME(sm_init_matmul)(k);
}
