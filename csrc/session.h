/* Sequences over one model: a KV cache, scratch memory and a thread pool.
 *
 * One thread at a time.  All memory a pass needs is there before it starts: a pass that fails (out
 * of memory, cancelled, non-finite activation) leaves every sequence as it was. */
#ifndef SM_SESSION_H
#define SM_SESSION_H

#include <stdatomic.h>

#include "adapter.h"
#include "statistics.h"
#include "timers.h"

struct sm_session;
/* What layers keep of one text's tokens; shared between forks.  Of an encoder's text, a source, it is
 * what the decoder's layers attend to: made by one pass, and then never changed. */
struct sm_seq;

struct sm_session_params {
    int n_threads, n_ctx, n_batch, kv_type; /* all resolved: no zeros */
    uint64_t memory_limit;                  /* bytes, 0: none */
    bool timed;                             /* keeps timers */
    bool observed;                          /* keeps statistics */
};

int sm_session_new(const struct sm_model *model, const struct sm_session_params *params,
                   struct sm_session **out, smallm_error *err);
void sm_session_free(struct sm_session *s); /* NULL allowed; free its sequences first */

int sm_seq_new(struct sm_session *s, struct sm_seq **out, smallm_error *err); /* empty */
/* A sequence can be cut anywhere; but where layers are recurrent, what they know of a text cannot be
 * taken back, and only some earlier states are kept.  A sequence that is cut then holds fewer
 * positions than asked for, and its caller runs the tokens in between again: sm_seq_length tells.
 *
 * How many of the first n <= length positions a fork or a rewound sequence holds. */
int sm_seq_reach(const struct sm_session *s, const struct sm_seq *seq, int n);
/* A new sequence holding the first sm_seq_reach(n) positions of src. */
int sm_seq_fork(struct sm_session *s, const struct sm_seq *src, int n, struct sm_seq **out,
                smallm_error *err);
void sm_seq_rewind(struct sm_session *s, struct sm_seq *seq, int n); /* keeps sm_seq_reach(n) */
int sm_seq_length(const struct sm_seq *seq); /* positions held */
void sm_seq_free(struct sm_session *s, struct sm_seq *seq); /* NULL allowed */

enum sm_want { SM_WANT_NONE, SM_WANT_LAST, SM_WANT_ROWS, SM_WANT_HIDDEN };

struct sm_span { /* the next tokens of one sequence */
    struct sm_seq *seq;
    /* Where the model has an encoder: tokens are all of its text, nothing is wanted, and seq, which is
     * empty, becomes a source.  A pass's spans are all of this kind, or none is. */
    bool encodes;
    const struct sm_seq *source; /* where it has one and does not encode: the sequence's source */
    const int32_t *tokens; /* [n] ids in range */
    int n;
    enum sm_want want;
    int n_skip;            /* ROWS: the first tokens, 0 .. n, whose logits are not wanted */
    float *logits;         /* NONE: unused; LAST: [n_vocab]; ROWS: [n - n_skip][n_vocab]; HIDDEN: no
                            * logits, but the hidden states that these are made of, [n][n_embd] */
    const uint32_t *allowed; /* LAST: [(n_vocab + 31) / 32] tokens that count, NULL: all; logits of the
                              * others may be -infinity */
    struct sm_adaptation adaptation;
    float *peaks;          /* NULL, or room for the peaks (peaks.h) of the last token's logits */
};

/* One forward pass over all spans: 1 <= sum of n <= n_batch, each sequence at most once; or one text of
 * an encoder, which may be longer: memory for it grows, and stays.
 * On success every sequence is n tokens longer.  *cancel (may be NULL) is read every phase:
 * SMALLM_E_CANCELLED within that phase.  SMALLM_E_CONTEXT where a sequence would exceed n_ctx,
 * SMALLM_E_BUDGET / SMALLM_E_MEMORY where the cache cannot grow. */
int sm_session_run(struct sm_session *s, const struct sm_span *spans, int n_spans,
                   const atomic_bool *cancel, smallm_error *err);

/* Where the time of all passes so far went; all 0 where it is not kept. */
const struct sm_timers *sm_session_timers(const struct sm_session *s);

/* Of all passes so far; NULL where they are not kept. */
const struct sm_statistics *sm_session_statistics(const struct sm_session *s);

uint64_t sm_session_cache_bytes(const struct sm_session *s);
uint64_t sm_session_scratch_bytes(const struct sm_session *s);

#endif
