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
#define SM_EXPERTS(field, ...) struct sm_matrix field;
#define SM_BIASES(field, ...) float *field;
#include "tensors.def"
#undef SM_VECTOR
#undef SM_MATRIX
#undef SM_EXPERTS
#undef SM_BIASES
};

struct sm_metadata { /* one scalar or string key of the file, as text */
    const char *key, *value;
    size_t n_value;
};

struct sm_model {
    struct sm_hparams h;
    const struct sm_arch *arch;
    const struct sm_kernels *kernels;
    struct sm_tokenizer *tokenizer;
    struct sm_layer *layers;       /* [h.n_layer] */
    struct sm_matrix head;         /* logits; the embedding table too where they are tied */
    float *head_bias;              /* [n_vocab] or NULL */
    float *output_norm;            /* [n_embd] */
    float *output_norm_b;          /* [n_embd] or NULL */
    double *rope_freqs;            /* [n_rot / 2] radians per position */
    const struct sm_tensor_info *embeddings; /* untied: rows are read from the file; else NULL */
    struct sm_gguf *file;          /* open where `embeddings` is not NULL */
    uint8_t *panels;               /* all matrices' */
    float *vectors;                /* all vectors' */
    struct sm_metadata *metadata;  /* [n_metadata] */
    size_t n_metadata;
    smallm_model_info info;
};

/* The embedding of token `id` (in range) into out [n_embd]. */
int sm_model_embed(const struct sm_model *m, int32_t id, float *out, smallm_error *err);

int sm_model_open(const char *path, const smallm_model_params *params, struct sm_model **out,
                  smallm_error *err);
void sm_model_free(struct sm_model *m);

const struct sm_tokenizer *sm_model_tokenizer(const struct sm_model *m);
void sm_model_get_info(const struct sm_model *m, smallm_model_info *out);
/* As smallm_model_metadata. */
int sm_model_metadata(const struct sm_model *m, size_t i, const char **key, const char **value,
                      size_t *n_value);

#endif
