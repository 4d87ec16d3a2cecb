/* This tier's products of integer formats by name, for the tier above it. */
#ifndef SM_AVX512VNNI_MATMUL_H
#define SM_AVX512VNNI_MATMUL_H

#include "../kernels.h"

#define SM_CODES(NAME, name, ...) sm_matmul_fn sm_matmul_##name##__avx512vnni;
#include "../../quants/codes.def"
#undef SM_CODES

#endif
