/* LoRA adapters: for some of a model's matrices W a pair A, B, so that W x becomes W x + s B (A x).
 *
 * Bound to one model, immutable once open; any thread may use it.  It lives as long as somebody holds
 * it: whoever opened it, the requests that name it, and texts that were made with it. */
#ifndef SM_ADAPTER_H
#define SM_ADAPTER_H

#include <stdatomic.h>

#include "model.h"

#define SM_RANK_MAX 4096

/* What is added to one matrix [n_rows][k].  Float32 panels (kernels.h). */
struct sm_lora {
    size_t rank;                 /* 0: nothing is added */
    float scale;                 /* alpha / rank */
    const uint8_t *of;           /* the matrix's panels: a part of it (model.h) lies behind */
    uint8_t *a;                  /* [rank][k] */
    uint8_t *b;                  /* [n_rows][rank] */
    size_t a_bytes, b_bytes;     /* of a panel */
};

struct smallm_adapter {
    int64_t process;
    const struct sm_model *model;
    struct sm_lora *loras;       /* [n_loras] by sm_matrix.id */
    size_t n_loras;
    size_t n_matrices;           /* that it changes */
    size_t rank;                 /* the largest */
    uint8_t *panels;
    uint64_t n_bytes;
    _Atomic size_t n_holders;
};

/* What a token's request adds to the matrices: nothing where adapter is NULL. */
struct sm_adaptation {
    const struct smallm_adapter *adapter;
    float scale;
};

static inline const struct sm_lora *sm_adapter_lora(const struct smallm_adapter *a,
                                                    const struct sm_matrix *w) {
    if (a == NULL || a->loras[w->id].rank == 0) return NULL;
    return &a->loras[w->id];
}

/* As smallm_adapter_open; held once. */
int sm_adapter_open(const struct sm_model *model, const char *path,
                    const smallm_adapter_params *params, struct smallm_adapter **out,
                    smallm_error *err);
void sm_adapter_hold(struct smallm_adapter *a); /* NULL allowed, as in: */
void sm_adapter_drop(struct smallm_adapter *a); /* frees it where nobody else holds it */

#endif
