/* Where the arrays of prepared activations lie in one piece of memory. */
#include "kernels.h"

/* The arrays follow each other, each SM_ALIGN-aligned; memory NULL only measures. */
static size_t place(struct sm_acts *a, enum sm_act act, size_t n, size_t k, uint8_t *memory) {
    size_t k_pad = sm_act_pad(act, k);
    *a = (struct sm_acts){.k = k, .k_pad = k_pad, .stride = k_pad % 1024 == 0 ? k_pad + 64 : k_pad};
    size_t n_blocks = a->k_pad / (act == SM_ACT_Q8_256 ? 256 : 32), used = 0;
#define PLACE(field, count)                                                     \
    do {                                                                        \
        if (memory != NULL) a->field = (void *)(memory + used);                 \
        used += sm_round_up(n * (count) * sizeof *a->field, SM_ALIGN);          \
    } while (0)
    if (act == SM_ACT_F32) {
        PLACE(f, a->stride);
    } else {
        PLACE(q, a->stride);
        PLACE(d, n_blocks);
        if (act == SM_ACT_Q8_32) PLACE(s, n_blocks);
        PLACE(sum, act == SM_ACT_Q8_32 ? n_blocks : a->k_pad / 16);
    }
#undef PLACE
    return used;
}

size_t sm_acts_bytes(enum sm_act act, size_t n, size_t k) {
    struct sm_acts a;
    return place(&a, act, n, k, NULL);
}

void sm_acts_place(struct sm_acts *a, enum sm_act act, size_t n, size_t k, void *memory) {
    place(a, act, n, k, memory);
}
