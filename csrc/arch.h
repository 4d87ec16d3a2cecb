/* Architectures: one row each, holding only what the file does not say.
 *
 * Sizes and constants come from the file's keys, options from the tensors that are there
 * (tensors.def).  No other file knows an architecture's name. */
#ifndef SM_ARCH_H
#define SM_ARCH_H

#include "gguf.h"

enum sm_rope_style {
    SM_ROPE_PAIRS, /* turns neighbours (x[2 i], x[2 i + 1]) */
    SM_ROPE_HALVES /* turns (x[i], x[i + n_rot / 2]) */
};

enum sm_norm_kind {
    SM_NORM_RMS,  /* x / rms(x) * weight */
    SM_NORM_LAYER /* (x - mean) / deviation * weight + bias */
};

enum sm_ffn_kind {
    SM_FFN_SWIGLU, /* silu(W_gate x) * W_up x */
    SM_FFN_GELU    /* gelu(W_up x), the tanh form */
};

/* Biases that a file must have; where it has others, they are added, too. */
enum sm_bias_rule { SM_BIAS_FREE, SM_BIAS_QKV, SM_BIAS_EVERYWHERE };

/* Over which experts' logits the router's softmax goes.  What the file says comes first. */
enum sm_router_kind {
    SM_ROUTER_NONE,  /* the architecture has no experts */
    SM_ROUTER_ALL,   /* all: the weights of the chosen ones sum to less than 1 */
    SM_ROUTER_CHOSEN /* the chosen ones; the same as over all and then divided by their sum */
};

struct sm_arch {
    const char *name; /* general.architecture, and the prefix of its keys */
    enum sm_rope_style rope;
    enum sm_norm_kind norm;
    enum sm_ffn_kind ffn;
    enum sm_bias_rule bias;
    enum sm_router_kind router;
    bool shared_gate; /* the expert that all tokens use is weighed by sigmoid(w x) */
    bool parallel; /* attention and feed-forward read the same norm and add to the same x */
};

struct sm_hparams {
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;
    int head;           /* size of one head's q, k and v */
    int n_rot;          /* leading dimensions of a head that rope turns, even */
    int window;         /* positions a query sees, its own included; 0: all */
    int n_expert, n_used;       /* experts of a layer, and of them those that a token uses; 0: none */
    int n_ff_expert, n_ff_shared; /* of one expert, and of the expert that all tokens use */
    enum sm_router_kind router;
    float expert_scale;         /* of the router's weights */
    float norm_eps;
    double rope_base;   /* pair i turns by position * rope_scale / factor[i] * base^(-2 i / n_rot) */
    double rope_scale;
};

/* The row the file asks for.  SMALLM_E_UNSUPPORTED lists those there are. */
int sm_arch_find(const struct sm_gguf *g, const struct sm_arch **out, smallm_error *err);

/* Reads and judges all hyperparameters.  n_vocab is what the key vocab_size says, 0 where it is
 * missing: the tokenizer decides. */
int sm_arch_read(const struct sm_arch *arch, const struct sm_gguf *g, struct sm_hparams *h,
                 smallm_error *err);

#endif
