/* A model: hyperparameters, tokenizer, packed weights.  Immutable and shareable once loaded. */
#ifndef SM_MODEL_H
#define SM_MODEL_H

#include "arch.h"
#include "gguf.h"
#include "kernels/kernels.h"
#include "tokenizer.h"

/* A matrix as panels: n_rows outputs, k inputs. */
struct sm_matrix {
    enum sm_type type;
    size_t n_rows, k;
    size_t n_panels, panel_bytes;
    uint8_t *panels; /* [n_panels][panel_bytes] */
};

struct sm_layer {
#define SM_VECTOR(field, ...) float *field;
#define SM_MATRIX(field, ...) struct sm_matrix field;
#include "tensors.def"
#undef SM_VECTOR
#undef SM_MATRIX
};

struct sm_hparams {
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;
    int head;           /* size of one head's q, k and v */
    int n_rot;          /* dimensions of a head that rope turns, even */
    float norm_eps;
    double rope_base, rope_scale; /* angle = position * rope_scale * base^(-2 i / n_rot) / factor[i] */
    int window;         /* positions a query sees, itself included; 0: all */
};

struct sm_model;

int sm_model_open(const char *path, const smallm_model_params *params, struct sm_model **out,
                  smallm_error *err);
void sm_model_free(struct sm_model *m);

const struct sm_tokenizer *sm_model_tokenizer(const struct sm_model *m);
const struct sm_hparams *sm_model_hparams(const struct sm_model *m);
const struct sm_kernels *sm_model_kernels(const struct sm_model *m);
void sm_model_get_info(const struct sm_model *m, smallm_model_info *out);
/* As smallm_model_metadata. */
int sm_model_metadata(const struct sm_model *m, size_t i, const char **key, const char **value, size_t *n_value);

#endif
