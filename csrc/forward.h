/* One forward pass over a batch of tokens of several sequences. */
#ifndef SM_FORWARD_H
#define SM_FORWARD_H

#include "cache.h"
#include "model.h"
#include "ops.h"

/* Consecutive tokens of one sequence that attend together. */
struct sm_block {
    size_t first, n;
};

/* All tokens of one sequence, and the states (cache.h) of recurrent layers around them. */
struct sm_run {
    size_t first, n;
    const float *from; /* before the tokens; NULL: the text begins here */
    float *mid;        /* to be written: before the last token; NULL: not wanted */
    float *to;         /* to be written: after all */
};

struct sm_batch {
    size_t n;
    const int32_t *tokens;      /* [n] */
    const int *positions;       /* [n], ascending within a sequence, whose tokens are neighbours */
    const int *ends;            /* [n] a token sees its sequence up to here, not included */
    struct sm_seq *const *seqs; /* [n], pages reserved up to the tokens' positions */
    const struct sm_block *blocks; /* [n_blocks], of SM_ATTEND_MAX / (heads per kv head) tokens, or of one */
    size_t n_blocks;
    const struct sm_adaptation *adaptations; /* [n], or NULL: no token has an adapter */
    const struct sm_run *runs;  /* [n_runs] */
    size_t n_runs;
    /* Where there is an encoder: the tokens are texts for it, each as a whole, and the sequences get
     * what the decoder's layers attend to; else [n] sequences that have, or NULL. */
    bool encodes;
    const struct sm_seq *const *sources;
    bool alone;                 /* at most SM_ALONE_MAX tokens, each of another sequence: decode */
    const size_t *wanted;       /* [n_wanted] tokens whose logits are asked for */
    float *const *logits;       /* [n_wanted] pointers to [n_vocab], */
    float *const *peaks;        /* [n_wanted] and to their peaks, NULL: not wanted */
    const uint32_t *const *allowed; /* [n_wanted] tokens whose logits count (ops.h), NULL: all */
    size_t n_wanted;
    const size_t *hidden;       /* [n_hidden] tokens whose last hidden states are asked for */
    float *const *states;       /* [n_hidden] pointers to [n_embd] */
    size_t n_hidden;
};

#define SM_ALONE_MAX 32

/* Activations of a pass; sizes for n_tokens tokens. */
struct sm_buffers {
    float *x;          /* [n][n_embd] the residual stream */
    float *y;          /* [n][n_embd] what is normed before it adds to x; only where there are such norms */
    float *q;          /* [n][n_head * head], then attention's result */
    float *k, *v;      /* [n][n_head_kv * head] */
    float *mix;        /* [n][sm_mixer_in] of recurrent layers */
    float *h;          /* [n][n_ff]; experts: see experts.c */
    struct sm_router *router; /* where there are experts, else NULL */
    float *cos, *sin;  /* [n][n_rope][n_rot / 2] */
    const double *freqs; /* [n_rope][n_rot / 2] radians per position */
    float *wanted;     /* [n][n_embd] rows of x whose logits are wanted */
    float *partial;    /* decode: [n][n_head][max_chunks][head + 2], see mixers/attention.c */
    size_t max_chunks;
};

struct sm_pass {
    const struct sm_model *model;
    const struct sm_batch *batch;
    const struct sm_buffers *buffers;
    const struct sm_cache *cache;
    struct sm_ops *ops;
};

/* Result in sm_ops_status. */
void sm_forward(const struct sm_pass *p);

/* experts.c: the feed-forward of experts.  Memory for n_tokens tokens. */
int sm_router_new(const struct sm_hparams *h, size_t n_tokens, struct sm_router **out,
                  smallm_error *err);
void sm_router_free(struct sm_router *r); /* NULL allowed */
uint64_t sm_router_bytes(const struct sm_router *r);
/* x += the sum over the experts that the router chooses for `input`, and the shared one. */
void sm_feed_experts(const struct sm_pass *p, const struct sm_layer *layer,
                     const struct sm_source *input);

/* What the attention of one layer needs until its result has been read. */
struct sm_attention {
    const struct sm_pass *p;
    int layer;                   /* among those of the cache's pages */
    const struct sm_layer *weights;
    bool across;                 /* to the encoder's text */
    const float *biases;         /* [n_head][SM_DISTANCES] or NULL */
    size_t group;                /* query heads of a kv head */
    size_t head, n_head_kv;
    size_t items_before[SM_ALONE_MAX + 1]; /* decode: items of earlier tokens; [n] is their number */
};

/* What mixers/conv.c convolves: conv_width channels of each row. */
struct sm_convolution {
    float *rows;         /* [n][stride] in and out */
    size_t stride;
    const float *weight; /* [conv_kernel][conv_width] */
    const float *bias;   /* [conv_width] or NULL */
    /* x = b * x before and y = c * y after, with b and c in a row before x; else y = silu(y) after */
    bool gates;
};
void sm_mixer_convolve(const struct sm_pass *p, int layer, const struct sm_convolution *c);

/* mixers/conv.c, mixers/ssm.c: buffers->mix of the batch -> *out, a source of rows [sm_mixer_out].
 * The states after each run, and in its middle, are written. */
void sm_mixer_conv(const struct sm_pass *p, int layer, struct sm_source *out);
void sm_mixer_ssm(const struct sm_pass *p, int layer, struct sm_source *out);

/* mixers/attention.c: q, k, v of the batch -> *out, a source of rows [n_head * head] that is good
 * as long as *a is.  K and V enter the cache. */
void sm_mixer_attention(const struct sm_pass *p, int layer, struct sm_attention *a,
                        struct sm_source *out);
/* The same for q of a decoder's tokens, and the K and V of their sources. */
void sm_mixer_attention_across(const struct sm_pass *p, int layer, struct sm_attention *a,
                               struct sm_source *out);
/* k, v of the encoder's tokens, for one of the decoder's layers, enter the cache. */
void sm_mixer_attention_store(const struct sm_pass *p, int layer);

#endif
