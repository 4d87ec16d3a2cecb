/* Architectures: one row each, holding only what the file does not say.
 *
 * Sizes and constants come from the file's keys, options from the tensors that are there
 * (tensors.def).  No other file knows an architecture's name. */
#ifndef SM_ARCH_H
#define SM_ARCH_H

#include "gguf.h"

enum sm_rope_style {
    SM_ROPE_PAIRS, /* turns neighbours (x[2 i], x[2 i + 1]) */
    SM_ROPE_HALVES, /* turns (x[i], x[i + n_rot / 2]) */
    SM_ROPE_NONE   /* positions are learned, or a change of the scores (ALiBi) */
};

enum sm_norm_kind {
    SM_NORM_RMS,        /* x / rms(x) * weight */
    SM_NORM_LAYER,      /* (x - mean) / deviation * weight + bias */
    SM_NORM_LAYER_PLAIN, /* the same without a bias */
    SM_NORM_LAYER_BARE /* and without a weight; before attention and feed-forward only */
};

/* Where attention and feed-forward have norms: of what they read, of what they add to x, or both. */
enum sm_norm_place {
    SM_NORMS_BEFORE,
    SM_NORMS_AFTER,
    SM_NORMS_AROUND,
    SM_NORMS_OF_SUM /* x itself is normed once they have added to it, and after the embeddings */
};

/* Norms of q and k, of the model's kind without a bias. */
enum sm_qk_norm {
    SM_QK_NORM_NONE,
    SM_QK_NORM_HEAD,  /* each head by itself, all with one weight [head] */
    SM_QK_NORM_HEADS, /* each head by itself, with its row of [heads][head]; where the file has them */
    SM_QK_NORM_ROW    /* all heads of a token together, [heads * head] */
};

enum sm_ffn_kind {
    SM_FFN_SWIGLU, /* silu(W_gate x) * W_up x */
    SM_FFN_SWIGLU_CLAMPED, /* a variant with limits, of experts only: kernels.h */
    SM_FFN_GEGLU,  /* gelu(W_gate x) * W_up x, the tanh form */
    SM_FFN_GEGLU_ERF, /* the same, the exact form */
    SM_FFN_RELU2GLU, /* relu(W_gate x)^2 * W_up x */
    SM_FFN_GELU,   /* gelu(W_up x), the tanh form */
    SM_FFN_GELU_ERF, /* that, the exact form */
    SM_FFN_RELU2,  /* relu(W_up x)^2 */
    SM_FFN_RELU    /* relu(W_up x) */
};

/* Whether attention and feed-forward both read x and then add to it. */
enum sm_parallel {
    SM_PARALLEL_NO,
    SM_PARALLEL_SHARED,  /* yes, and they share a norm */
    SM_PARALLEL_IF_SHARED, /* yes where the file has no norm of the feed-forward's own */
    SM_PARALLEL_KEY,     /* as the key use_parallel_residual says, each with its norm */
    SM_PARALLEL_SECOND   /* yes; attention's own norm is attn_norm_2 where the file has it */
};

/* Biases that a file must have; where it has others, they are added, too. */
enum sm_bias_rule {
    SM_BIAS_FREE,
    SM_BIAS_QKV,
    SM_BIAS_LAYERS,    /* all matrices of a layer */
    SM_BIAS_EVERYWHERE /* and the head */
};

/* Which vectors of the last layer an embedding is made of. */
enum sm_pooling { SM_POOLING_MEAN, SM_POOLING_FIRST, SM_POOLING_LAST };

/* Over which experts' logits the router's softmax goes.  What the file says comes first. */
enum sm_router_kind {
    SM_ROUTER_NONE,  /* the architecture has no experts */
    SM_ROUTER_ALL,   /* all: the weights of the chosen ones sum to less than 1 */
    SM_ROUTER_CHOSEN /* the chosen ones; the same as over all and then divided by their sum */
};

/* What mixes the tokens of a layer: attention where it has kv heads, else what the file has keys of. */
enum sm_mixer {
    SM_MIXER_ATTENTION,
    SM_MIXER_CONV, /* gated causal convolution over a few tokens */
    SM_MIXER_SSM   /* selective state space */
};

struct sm_arch {
    const char *name;   /* general.architecture, and the prefix of its keys */
    const char *models; /* published ones that have it, for people */
    bool is_encoder; /* every token sees all of its text; no head, no logits */
    /* A decoder whose layers attend to what an encoder made of another text, too. */
    bool has_encoder;
    enum sm_rope_style rope;
    bool rope_by_key;     /* where the key rope.scaling.finetuned is false, there is none */
    enum sm_norm_kind norm;
    enum sm_norm_place norms;
    /* Of embeddings; attention's in the first layer of an encoder is then there if its tensor is. */
    bool embed_norm;
    enum sm_qk_norm qk_norm;
    bool norms_turned;    /* norms of q and k come after rope */
    enum sm_ffn_kind ffn; /* where it is SWIGLU or GEGLU_ERF, the key hidden_activation comes first */
    bool relu_ungated;    /* it is a relu in files whose first layer has no gate */
    enum sm_bias_rule bias;
    enum sm_router_kind router;
    bool may_be_dense;    /* the file says whether there are experts */
    const char *ffn_norm; /* the tensor of the feed-forward's norm; NULL: ffn_norm.weight */
    bool sinks;       /* attention has sinks in every layer */
    bool sub_norms;   /* of what attention and feed-forward gave, before their last matrices */
    bool unscaled;    /* scores are not scaled by head^(-1/2) */
    bool biased_distances; /* scores have learned biases by the distance of query and key */
    bool scaled_head; /* a head that is tied, or has no gates before it, by n_embd^(-1/2) */
    bool yarn_exact;  /* where yarn begins and ends mixing is not rounded to whole pairs */
    bool gate_in_up;  /* one tensor holds the rows of the feed-forward's gate, then those of up */
    bool shared_gate; /* the expert that all tokens use is weighed by sigmoid(w x) */
    enum sm_parallel parallel;
    int window;         /* of files that do not name theirs; 0: none */
    /* Of every so many layers the last ... 0: none is different. */
    int window_period;  /* ... has no window; the file's pattern comes first */
    bool window_later;  /* ... but the first, with which every period begins */
    int unturned_period; /* ... has no rope */
    bool turns_windows; /* in models with windows only layers with one have rope */
    double local_base;  /* rope's base in layers with a window; 0: as in the others */
    bool plain_windows; /* rope is not scaled in layers with a window */
    bool scaled_embeddings; /* by sqrt(n_embd) */
    bool divided_logits;    /* by logit_scale, where others are multiplied */
    bool named_scales;      /* the file must name those of embeddings, layers and logits */
    double attn_cap, logit_cap; /* soft caps of files that do not name theirs; 0: none */
    double max_alibi;   /* of files that do not name theirs; 0: none */
    const char *output_norm; /* the tensor's name where it is not output_norm.weight; else NULL */
    int wide_layers;    /* models of so many layers scale scores by (n_embd / n_head)^(-1/2) */
};

/* The rope scaling "yarn": pairs that turn less than `slow` times within the original context turn
 * by rope_scale, those that turn more than `fast` times as they did, between them both are mixed. */
struct sm_yarn {
    bool used;
    double context, fast, slow;
    double magnitude;  /* of cos and sin; 0: 1 - 0.1 log(rope_scale) */
    double log_multiplier; /* that is divided by 1 - 0.1 log(rope_scale) times this */
};

#define SM_LAYERS_MAX 1024
#define SM_BUCKETS_MAX 255 /* of distances: half of them still stand for one distance each */

struct sm_hparams {
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;
    /* Layers with attention, and the others.  An encoder's need their K and V only while they run and keep
     * them in one place: n_kv_layer is 1. */
    int n_kv_layer, n_state_layer;
    int n_encoder;      /* layers of the encoder, besides; 0: there is none */
    int decoder_start;  /* the token that a decoder beside an encoder begins with, else -1 */
    int n_buckets;      /* of distances that share a bias; 0: scores have none */
    int head;           /* size of one head's q, k and v */
    int n_rot;          /* leading dimensions of a head that rope turns, even */
    /* Positions a query sees in layers with a window, its own included; encoders: half as many, rounded
     * down, on both sides of its own. */
    int window;
    bool recurrent[SM_LAYERS_MAX]; /* [n_layer] whether a layer carries a state in place of K and V */
    bool windowed[SM_LAYERS_MAX]; /* [n_layer] whether a layer has a window */
    int n_expert, n_used;       /* experts of a layer, and of them those that a token uses; 0: none */
    int n_ff_expert, n_ff_shared; /* of one expert, and of the expert that all tokens use */
    enum sm_router_kind router;
    enum sm_ffn_kind ffn;
    float expert_scale;         /* of the router's weights */
    float norm_eps;
    /* Tables of angles: of all layers, or 0 of those without and 1 of those with a window.
     * Pair i turns by position * rope_scale / factor[i] * base^(-2 i / n_rot). */
    int n_rope;         /* 1 or 2; 0: nothing turns */
    double rope_base[2], rope_scale[2];
    struct sm_yarn yarn;
    double rope_magnitude; /* what rope multiplies lengths by, too */
    bool long_rope;     /* the file must have rope factors for long and for short contexts */
    int n_ctx_original; /* contexts up to this take a file's short rope factors, others the long ones */
    bool parallel;      /* by the key */
    float attn_scale;   /* of scores */
    /* Beyond so many positions they are scaled by 1 + temperature log(1 + floor(position / that)), too. */
    float temperature;  /* 0: by nothing else */
    int temperature_length;
    float qkv_limit;    /* of the size of q, k and v as their matrices give them; 0: none */
    float attn_cap, logit_cap; /* soft caps of scores and logits; 0: none */
    float embed_scale, residual_scale, logit_scale; /* of embeddings, what layers add to x, logits */
    int conv_kernel, conv_width; /* of recurrent layers: taps, and channels that are convolved */
    int n_ssm_head;     /* of state spaces: heads; 0: recurrent layers convolve and no more; */
    int ssm_head, ssm_state, ssm_group; /* a head's values, states of a value, groups that share b and c */
    double max_alibi;   /* of ALiBi's slopes; 0: no ALiBi */
    enum sm_pooling pooling;
};

/* What differs from layer to layer and is no tensor. */
struct sm_layer_plan {
    int window; /* positions a query sees up to its own, which is one of them; 0: all */
    int behind; /* where that is not 0: positions that it sees behind its own */
    int rope;   /* the table of angles; -1: q and k do not turn */
    enum sm_mixer mixer;
    int rank;   /* among the layers with a cache of its kind */
};

/* The row the file asks for.  SMALLM_E_UNSUPPORTED lists those there are. */
int sm_arch_find(const struct sm_gguf *g, const struct sm_arch **out, smallm_error *err);

/* Reads and judges all hyperparameters.  n_vocab is what the key vocab_size says, 0 where it is
 * missing: the tokenizer decides. */
int sm_arch_read(const struct sm_arch *arch, const struct sm_gguf *g, struct sm_hparams *h,
                 smallm_error *err);

/* Of recurrent layers: values of a token that the first product makes, and that the second reads. */
static inline int sm_mixer_in(const struct sm_hparams *h) {
    return h->n_ssm_head > 0 ? h->n_ssm_head * h->ssm_head + h->conv_width + h->n_ssm_head
                             : 3 * h->conv_width;
}
static inline int sm_mixer_out(const struct sm_hparams *h) {
    return h->n_ssm_head > 0 ? h->n_ssm_head * h->ssm_head : h->conv_width;
}

/* layer: of the decoder, or behind those of the encoder. */
struct sm_layer_plan sm_arch_plan(const struct sm_arch *arch, const struct sm_hparams *h, int layer);

#endif
