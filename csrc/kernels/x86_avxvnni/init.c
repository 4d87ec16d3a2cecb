/* AVX-VNNI over AVX2: integer dot products without AVX-512. */
#include "../tier.h"

void SM_NAME(sm_init)(struct sm_kernels *k) {
    k->name = "avxvnni";
    SM_NAME(sm_init_matmul)(k);
}
