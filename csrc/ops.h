/* Splits work over the pool and calls kernels: the only file between the mathematics (forward.c,
 * mixers/) and threads.
 *
 * Every operation is one phase, or two where there are SM_FEW tokens or more: with few tokens each
 * thread prepares the activations for itself, which costs less than a barrier; with many they are
 * prepared once, split by token.  Quantized once per activation format in a phase.
 *
 * The cancel flag is read before every phase; once cancelled or failed, operations do nothing and
 * sm_ops_status tells. */
#ifndef SM_OPS_H
#define SM_OPS_H

#include <stdatomic.h>

#include "adapter.h"
#include "peaks.h"
#include "statistics.h"
#include "threads.h"
#include "timers.h"

#define SM_FEW 4
#define SM_PRODUCTS_MAX 8 /* of one sm_ops_project */

/* What a matmul reads.  row(source, t, room) gives token t's k values: where they lie already, or made
 * in room [k]. */
struct sm_source {
    const float *(*row)(const struct sm_source *s, size_t t, float *room);
    const struct sm_kernels *kernels;
    const void *context;   /* the mixer's own */
    const float *x;        /* [n][stride] */
    size_t stride, k;
    const float *weight;   /* norms: [k] */
    const float *bias;     /* layer norms: [k] */
    float eps;
};

/* Where a product goes: out_t[r] (+)= scale (sum_k w[r][k] source_t[k] + bias[r]), or a gelu or the
 * soft cap of that.  Where w has a scale, the sum is first multiplied by it. */
struct sm_product {
    const struct sm_matrix *w;
    const float *bias;     /* [n_rows] or NULL */
    float *out;            /* [n][stride], or NULL with rows */
    size_t stride;
    float *const *rows;    /* [n] pointers to [n_rows], where they do not lie in one block, */
    float *const *peaks;   /* [n] and to their peaks (peaks.h), NULL: not wanted; or NULL for all */
    /* [n] bit r % 32 of word r / 32: row r is asked for, NULL: all are; or NULL for all.  Panels
     * without a row that is asked for are not read, and give -infinity.  With rows and peaks only. */
    const uint32_t *const *allowed;
    bool add;              /* adds to what is there: the residual */
    /* A kernel slot that the sums go through, or NULL.  Not with add. */
    void (*apply)(float *out, const float *x, size_t n);
    float scale;           /* 0: none */
    float cap;             /* of the soft cap, 0: none; with rows only */
};

struct sm_ops;

/* Buffers for n_tokens tokens, or slots of experts, at once: products of more tokens take several turns.
 * k_max: the longest row any product reads; timed: keeps timers; statistics: what products read is added
 * to them, in phases of its own; NULL: it is not. */
int sm_ops_new(int n_threads, size_t n_tokens, size_t k_max, const struct sm_kernels *kernels, bool timed,
               struct sm_statistics *statistics, struct sm_ops **out, smallm_error *err);
void sm_ops_free(struct sm_ops *o); /* NULL allowed */
uint64_t sm_ops_bytes(const struct sm_ops *o);

/* What sm_ops_reserve would add to sm_ops_bytes. */
uint64_t sm_ops_reserve_bytes(const struct sm_ops *o, size_t rank);
/* Makes room for adapters of this rank.  SMALLM_E_MEMORY: nothing has changed. */
int sm_ops_reserve(struct sm_ops *o, size_t rank, smallm_error *err);

/* Starts a pass; `cancel` may be NULL.  adaptations [n]: what each token adds to the matrices, within
 * the rank reserved; NULL: nothing.  Wherever a product's matrix has an id, row t of what it reads is
 * then token t of the pass. */
void sm_ops_begin(struct sm_ops *o, const atomic_bool *cancel, const struct sm_adaptation *adaptations);
/* SMALLM_OK, SMALLM_E_CANCELLED or what sm_ops_fail was told first. */
int sm_ops_status(struct sm_ops *o);
/* Ends a pass: adds where its time went to *timers, where it is kept. */
void sm_ops_end(struct sm_ops *o, struct sm_timers *timers);
void sm_ops_fail(struct sm_ops *o, int status); /* any thread */

/* Sources. */
struct sm_source sm_source_rows(const float *x, size_t stride, size_t k);
struct sm_source sm_source_rms_norm(const struct sm_kernels *kernels, const float *x, size_t stride,
                                    size_t k, const float *weight, float eps);
/* The norm of what another source gives; *of is needed as long as the result is. */
struct sm_source sm_source_rms_norm_of(const struct sm_kernels *kernels, const struct sm_source *of,
                                       const float *weight, float eps);
struct sm_source sm_source_layer_norm(const struct sm_kernels *kernels, const float *x, size_t stride,
                                      size_t k, const float *weight, const float *bias, float eps);

/* n tokens through every product, at most SM_PRODUCTS_MAX. */
void sm_ops_project(struct sm_ops *o, size_t n, const struct sm_source *s,
                    const struct sm_product *products, size_t n_products);

/* The same for one product, with what int8 activations lose given back: x = a + b, a = x rounded to
 * int8, b = x - a rounded to int8; the result is the sum of both products.  The weights are read
 * once, so with few tokens it costs next to nothing.  For the head, whose
 * rounding goes straight into the logits (benchmarks/quality.py). */
void sm_ops_project_fine(struct sm_ops *o, size_t n, const struct sm_source *s,
                         const struct sm_product *product);

/* out = gated(gate, up), a kernel slot, of products gate and up of equal shape; out is [n][stride]. */
void sm_ops_gated(struct sm_ops *o, size_t n, const struct sm_source *s, const struct sm_product *gate,
                  const struct sm_product *up, sm_gated_fn *gated, float *out, size_t stride);

/* A stack of `n` gated feed-forwards of one shape: expert e's rows follow those of e - 1. */
struct sm_experts {
    size_t n, n_ff, n_embd;              /* n_ff and n_embd are multiples of SM_PANEL_ROWS */
    const struct sm_matrix *gate, *up;   /* [n * n_ff][n_embd] */
    const struct sm_matrix *down;        /* [n * n_embd][n_ff] */
    const float *b_gate, *b_up, *b_down; /* [n][n_ff], [n][n_ff], [n][n_embd], or NULL */
    sm_gated_fn *gated;                  /* a kernel slot */
};

/* Which expert gets which tokens, as slots: sorted by expert, then by token. */
struct sm_routing {
    const size_t *first;    /* [n_expert + 1] first[e] .. first[e + 1] - 1 are the slots of expert e */
    const uint32_t *tokens; /* [slots] */
    const float *weights;   /* [slots] */
};

/* out_t += weight (W_down gated(W_gate s_t + b_gate, W_up s_t + b_up) + b_down) for every slot, for a
 * token in the order of its experts' ids, each by one add_scaled.
 *
 * Reads the panels of the experts that have tokens, each once for all its tokens (with fewer than
 * SM_FEW tokens once for each, out of the cache).  Rounds of as many experts as sm_ops_new's
 * n_tokens has rows for; in a round two phases, or up to four where activations are prepared
 * before them: the first splits over (expert x panels of gate and up), the second over the panels
 * of down, where a thread adds those of all experts, one after the other: no sums are left to fold.
 * In decode: one round of two phases, as a dense feed-forward has.
 *
 * h: room for [n_tokens of sm_ops_new][n_ff]; out: [n][stride]. */
void sm_ops_experts(struct sm_ops *o, size_t n, const struct sm_source *s,
                    const struct sm_experts *experts, const struct sm_routing *routing, float *h,
                    float *out, size_t stride);

/* run(context, item, scratch) for every item < n, in any order on any thread; its time counts as
 * `timer`.  scratch:
 * SM_SCRATCH_BYTES for kernels, followed by SM_LOCAL_FLOATS floats of the caller's. */
#define SM_LOCAL_FLOATS ((size_t)SM_ATTEND_MAX * (3 * SM_HEAD_MAX + 4))
typedef void sm_item_fn(void *context, size_t item, void *scratch, float *local);
void sm_ops_each(struct sm_ops *o, enum sm_timer timer, size_t n, sm_item_fn *run, void *context);

#endif
