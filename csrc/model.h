/* A model: hyperparameters, tokenizer, packed weights.  Immutable and shareable once loaded. */
#ifndef SM_MODEL_H
#define SM_MODEL_H

#include "arch.h"
#include "gguf.h"
#include "kernels/kernels.h"
#include "tokenizer.h"

#define SM_NAME_MAX 64 /* bytes of a tensor's name that we know, its NUL included */

/* A matrix as panels: n_rows outputs, k inputs. */
struct sm_matrix {
    enum sm_type type;
    float *scale;    /* [1] a factor of all weights, or NULL */
    size_t n_rows, k;
    size_t n_panels, panel_bytes;
    uint8_t *panels; /* [n_panels][panel_bytes] */
    size_t id;       /* sm_model.matrices[id - 1] is it, or has it as a range of its panels; 0: the head */
};

struct sm_named_matrix {
    char name[SM_NAME_MAX]; /* of the tensor */
    const struct sm_matrix *matrix;
    size_t n_experts; /* whose rows follow each other; 0: none, and adapters may change it */
};

/* From SM_FAR on distances have the same bias.  A row of biases begins SM_FAR + SM_CHUNK positions
 * before the query: whatever the distance, a chunk's biases lie together in it. */
#define SM_FAR 128
#define SM_DISTANCES (2 * (SM_FAR + SM_CHUNK))

struct sm_layer {
    struct sm_layer_plan plan;
    bool parallel; /* the feed-forward reads x before attention adds to it */
    const float *biases; /* [n_head][SM_DISTANCES] of scores, or NULL: `distances` spread out */
#define SM_VECTOR(field, ...) float *field;
#define SM_ROWS(field, ...) float *field;
#define SM_MATRIX(field, ...) struct sm_matrix field;
#define SM_EXPERTS(field, ...) struct sm_matrix field;
#include "tensors.def"
#undef SM_VECTOR
#undef SM_ROWS
#undef SM_MATRIX
#undef SM_EXPERTS
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
    struct sm_layer *layers;       /* [h.n_layer + h.n_encoder] the encoder's last */
    struct sm_named_matrix *matrices; /* [n_matrices] of all layers */
    size_t n_matrices;
    struct sm_matrix head;         /* logits; the embedding table too where they are tied */
    float *head_bias;              /* [n_vocab] or NULL */
    float *output_norm;            /* [n_embd]; NULL: x is normed already */
    float *output_norm_b;          /* [n_embd] or NULL */
    float *encoder_norm;           /* [n_embd] of the encoder's last layer, or NULL */
    float *biases;                 /* of all layers, or NULL */
    float *types;                  /* [kinds of texts][n_embd], of which the first is used; or NULL */
    float *embed_norm;             /* [n_embd] of embeddings, or NULL */
    float *embed_norm_b;           /* [n_embd] or NULL */
    float *positions;              /* [n_ctx_train][n_embd] learned ones, or NULL */
    /* [n_rope][n_rot / 2] radians per position; behind them, where the file has factors for short
     * contexts, those of these. */
    double *rope_freqs;
    double rope_magnitude[2];      /* [n_rope] of their cos and sin */
    bool has_short;
    float *ones;                   /* [n_embd] of norms without weights, or NULL */
    float *slopes;                 /* [n_head] of ALiBi, or NULL */
    const struct sm_tensor_info *embeddings; /* untied: rows are read from the file; else NULL */
    struct sm_gguf *file;          /* open where `embeddings` is not NULL */
    uint8_t *panels;               /* all matrices' */
    float *vectors;                /* all vectors' */
    struct sm_metadata *metadata;  /* [n_metadata] */
    size_t n_metadata;
    smallm_model_info info;
};

/* out [n] = norm(x [n]) of the model's kind; may work in place.  b: NULL for none. */
static inline void sm_model_norm(const struct sm_model *m, float *out, const float *x, const float *w,
                                 const float *b, size_t n) {
    if (m->arch->norm == SM_NORM_RMS) m->kernels->rms_norm(out, x, w, n, m->h.norm_eps);
    else m->kernels->layer_norm(out, x, w, b, n, m->h.norm_eps);
}

/* The kernel slot of the feed-forward's gate; NULL: it has none. */
static inline sm_gated_fn *sm_model_gate(const struct sm_model *m) {
    switch (m->h.ffn) {
    case SM_FFN_SWIGLU: return m->kernels->swiglu;
    case SM_FFN_SWIGLU_CLAMPED: return m->kernels->swiglu_clamped;
    case SM_FFN_GEGLU: return m->kernels->geglu;
    case SM_FFN_GEGLU_ERF: return m->kernels->geglu_erf;
    case SM_FFN_RELU2GLU: return m->kernels->relu2glu;
    case SM_FFN_GELU:
    case SM_FFN_GELU_ERF:
    case SM_FFN_RELU2:
    case SM_FFN_RELU: break;
    }
    return NULL;
}

/* The frequencies for contexts of n_ctx positions. */
static inline const double *sm_model_rope_freqs(const struct sm_model *m, int n_ctx) {
    bool is_short = m->has_short && n_ctx <= m->h.n_ctx_original;
    return m->rope_freqs + (is_short ? m->h.n_rot / 2 : 0);
}

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
