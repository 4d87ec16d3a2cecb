/* One thread that owns a session, and the requests that callers on any thread hand it.
 *
 * A step of the thread: let go of cancelled requests, start new ones from the longest prefix some
 * sequence already holds, then one forward pass over a token of every decoding request and chunks
 * of the prompts.  The session gives the same bits however texts are batched, cut or forked, so
 * nothing here changes an answer.
 *
 * Invariants
 *   - A request belongs to the engine until `engine` in it becomes NULL, under its own lock; from
 *     then on the engine never touches it.  What is not marked shared is the engine thread's alone
 *     from submit until then.
 *   - An engine's lock is never taken inside a request's lock, nor the other way round.
 *   - tokens [n_tokens] is the text so far; seq holds its first sm_seq_length(seq) positions, at
 *     least the prompt's once it decodes, and then all but the newest token.
 *   - The engine never waits for a reader: chunks go to slabs, which a reader that keeps up hands
 *     back, so that decoding then allocates nothing. */
#include "engine.h"

#include <math.h>

#include "cpu.h"
#include "os.h"
#include "sampler.h"
#include "session.h"

#define MAX_KEPT 4        /* sequences of ended requests, for prompts that go on from there */
#define MIXED_PREFILL 128 /* prompt tokens beside decoding requests: bounds how long these wait */
#define MIN_PREFILL 32    /* what repeated cancelling leaves of a pass */
#define SLAB_BYTES 4096
/* A reader is woken for several tokens at once where they come fast, but not much later than this
 * after the oldest: it runs on a core that the pass needs. */
#define PATIENCE_NS 10000000u

struct slab { /* a piece of a request's queue: records back to back */
    struct slab *next;
    size_t capacity, n_written, n_read;
    char bytes[];
};

struct record { /* then int32 top_ids[n_top], float top_logprobs[n_top], text; padded */
    int32_t token;
    float logprob;
    int32_t n_top, finish;
    size_t n_text;
};
#define RECORD_ALIGN 8

struct source { /* the text of a model's encoder; n 0: there is none */
    struct sm_seq *seq; /* what the encoder made of it; empty until then */
    int32_t *tokens;    /* [n] */
    int32_t n;
};

struct stop { /* a stop string and how far the text's end matches it (Knuth, Morris, Pratt) */
    const char *text; /* [n] */
    uint32_t *border; /* [n] length of the longest proper prefix of text[0..i] that ends it */
    size_t n, matched;
};

struct smallm_request {
    int64_t process;
    struct sm_lock *lock;
    atomic_bool cancelled;

    /* Shared, under `lock`. */
    smallm_engine *engine; /* NULL: the answer has ended */
    struct slab *read, *write, *spare; /* list of slabs from read to write; spare may be NULL */
    int32_t finish;
    smallm_error error;    /* code 0: none */
    int32_t n_cached, n_completion, n_chunks;
    uint64_t t_submit, t_start, t_prompt, t_first, t_end; /* sm_clock_ns; 0: not yet */

    /* The engine thread's. */
    smallm_request *prev, *next;
    struct source source;
    struct sm_seq *seq;
    int32_t *tokens; /* [n_tokens], room for tokens_capacity */
    size_t tokens_capacity;
    int32_t n_prompt, n_tokens, n_source;
    int32_t limit;   /* tokens to generate at most; prompt and answer fit the context */
    int32_t n_chunk, n_logprobs;
    int32_t n_take;  /* tokens in the pass being built */
    uint64_t t_unsaid; /* when the oldest chunk was pushed that the reader was not woken for, or 0 */
    struct sm_adaptation adaptation;
    smallm_adapter *adapter; /* the same, held until the request is freed */
    float *logits;   /* the caller's [n_prompt - n_skip][n_vocab], or NULL */
    int32_t n_skip;  /* tokens of the prompt whose logits are not wanted */
    float *embedding; /* the caller's [n_embd], or NULL */
    double *sum;     /* [n_embd] of hidden states, where an embedding is wanted; else NULL */
    float *row;      /* [n_vocab] the newest position's and their peaks; NULL where limit is 0 */
    struct sm_sampler *sampler;
    bool text_begun; /* some token so far was more than a control token */
    struct stop *stops; /* [n_stop] */
    size_t n_stop;
    char *stop_text;       /* the strings and, */
    uint32_t *stop_border; /* in the same places, their borders */
    char *pending;         /* [n_pending] text that is not in a chunk yet */
    size_t n_pending, pending_capacity;
};

struct kept { /* the text of an ended request */
    struct source source;
    struct sm_seq *seq;
    struct sm_adaptation adaptation; /* it was made with */
    smallm_adapter *adapter;         /* the same, held: no other one can get its address */
    int32_t *tokens; /* [n] */
    int32_t n;
};

struct list {
    smallm_request *first, *last;
};

struct smallm_engine {
    int64_t process;
    const struct sm_model *model;
    const struct sm_tokenizer *tokenizer;
    struct sm_session *session;
    struct sm_thread *thread;
    struct sm_lock *lock;
    int32_t n_vocab, n_embd;
    enum sm_pooling pooling;
    struct sm_session_params params;
    atomic_bool closing;
    atomic_bool abort; /* ends the running pass: something in it was cancelled */

    /* Shared, under `lock`. */
    struct list submitted;
    smallm_engine_info info;
    struct sm_timers timers;

    /* The thread's. */
    struct list active;
    struct kept kept[MAX_KEPT]; /* [n_kept] least recently used first */
    int n_kept;
    struct sm_span *spans;     /* [n_batch] the pass being built, */
    smallm_request **in_pass;  /* [n_batch] and whose span each is */
    float *hidden;             /* [cap_hidden][n_embd] states of its tokens, n_hidden of them so far */
    size_t cap_hidden, n_hidden;
    int n_spans;
    int32_t prefill_cap;       /* prompt tokens of the next pass at most */
    bool prompts_turn, sources_turn;
    int n_timed;               /* spans of the newest pass where all were of one token, else 0 */
    uint64_t pass_ns;          /* what it took, sampling included */
    uint64_t sample_ns;
};

/* ---- lists ----------------------------------------------------------------------------------- */

static void append(struct list *l, smallm_request *r) {
    r->prev = l->last;
    r->next = NULL;
    if (l->last) l->last->next = r;
    else l->first = r;
    l->last = r;
}

static void take_out(struct list *l, smallm_request *r) {
    if (r->prev) r->prev->next = r->next;
    else l->first = r->next;
    if (r->next) r->next->prev = r->prev;
    else l->last = r->prev;
}

/* ---- a request's queue ----------------------------------------------------------------------- */

static struct slab *slab_new(size_t capacity) {
    struct slab *s = sm_alloc(sizeof *s + capacity);
    if (s) *s = (struct slab){.capacity = capacity};
    return s;
}

/* Inside the lock.  Appends a chunk: sampled may be NULL (no token), text [n_text] may hold any
 * bytes.  false: out of memory. */
static bool push(smallm_request *r, const struct sm_sampled *sampled, const char *text,
                 size_t n_text, int32_t finish) {
    struct record rec = {.token = -1, .logprob = NAN, .finish = finish};
    if (sampled) {
        rec.token = sampled->token;
        rec.logprob = sampled->logprob;
        rec.n_top = sampled->n_top;
    }
    rec.n_text = sm_utf8_clean(text, n_text, NULL);
    size_t n_ids = (size_t)rec.n_top * sizeof(int32_t);
    size_t need = sm_round_up(sizeof rec + 2 * n_ids + rec.n_text, RECORD_ALIGN);
    if (r->write->capacity - r->write->n_written < need) {
        struct slab *s = r->spare;
        if (s && s->capacity >= need) r->spare = NULL;
        else s = slab_new(SM_MAX(need, SLAB_BYTES));
        if (!s) return false;
        r->write->next = s;
        r->write = s;
    }
    char *at = r->write->bytes + r->write->n_written;
    memcpy(at, &rec, sizeof rec);
    at += sizeof rec;
    if (rec.n_top > 0) {
        memcpy(at, sampled->top_ids, n_ids);
        memcpy(at + n_ids, sampled->top_logprobs, n_ids);
    }
    sm_utf8_clean(text, n_text, at + 2 * n_ids);
    r->write->n_written += need;
    if (sampled) {
        r->n_completion++;
        if (!r->t_first) r->t_first = sm_clock_ns();
    }
    return true;
}

/* Inside the lock.  The oldest chunk, whose pointers hold until the next call. */
static bool pull(smallm_request *r, smallm_chunk *out) {
    struct slab *s = r->read;
    if (s->n_read == s->n_written) {
        struct slab *next = s->next;
        s->next = NULL; /* the reader is done with all of it: from the start again */
        s->n_read = s->n_written = 0;
        if (next) {
            if (r->spare) sm_free(s);
            else r->spare = s;
            s = r->read = next;
        }
    }
    if (s->n_read == s->n_written) return false;
    struct record rec;
    const char *at = s->bytes + s->n_read;
    memcpy(&rec, at, sizeof rec);
    at += sizeof rec;
    size_t n_ids = (size_t)rec.n_top * sizeof(int32_t);
    out->token = rec.token;
    out->logprob = rec.logprob;
    out->text = at + 2 * n_ids;
    out->n_text = rec.n_text;
    out->top_ids = (const int32_t *)(const void *)at;
    out->top_logprobs = (const float *)(const void *)(at + n_ids);
    out->n_top = rec.n_top;
    out->finish = rec.finish;
    s->n_read += sm_round_up(sizeof rec + 2 * n_ids + rec.n_text, RECORD_ALIGN);
    return true;
}

/* ---- text held back -------------------------------------------------------------------------- */

/* Takes the next byte of the text; true: the string is complete with it. */
static bool stop_feed(struct stop *s, char c) {
    while (s->matched > 0 && s->text[s->matched] != c) s->matched = s->border[s->matched - 1];
    if (s->text[s->matched] == c) s->matched++;
    return s->matched == s->n;
}

static void stop_prepare(struct stop *s) {
    s->border[0] = 0;
    for (size_t i = 1, n = 0; i < s->n; i++) {
        while (n > 0 && s->text[i] != s->text[n]) n = s->border[n - 1];
        if (s->text[i] == s->text[n]) n++;
        s->border[i] = (uint32_t)n;
    }
}

/* Adds a token's bytes to the pending text.  *stopped: a stop string is complete, whichever ends
 * first (the longest of those that end together); it and what follows are dropped. */
static bool add_text(smallm_request *r, struct sm_str piece, bool *stopped) {
    *stopped = false;
    if (!sm_grow(&r->pending, &r->pending_capacity, r->n_pending + piece.n, 1)) return false;
    for (size_t i = 0; i < piece.n && !*stopped; i++) {
        size_t longest = 0;
        r->pending[r->n_pending++] = piece.s[i];
        for (size_t j = 0; j < r->n_stop; j++) {
            if (stop_feed(&r->stops[j], piece.s[i])) longest = SM_MAX(longest, r->stops[j].n);
        }
        r->n_pending -= longest;
        *stopped = longest > 0;
    }
    return true;
}

/* How much of the pending text nothing that comes can change. */
static size_t settled(const smallm_request *r) {
    size_t held = 0;
    for (size_t i = 0; i < r->n_stop; i++) held = SM_MAX(held, r->stops[i].matched);
    return sm_utf8_complete(r->pending, r->n_pending - held);
}

/* ---- ending a request ------------------------------------------------------------------------ */

static void free_source(smallm_engine *e, struct source *s) {
    sm_seq_free(e->session, s->seq);
    sm_free(s->tokens);
    *s = (struct source){.seq = NULL};
}

static void free_kept(smallm_engine *e, int i) {
    free_source(e, &e->kept[i].source);
    sm_seq_free(e->session, e->kept[i].seq);
    sm_free(e->kept[i].tokens);
    sm_adapter_drop(e->kept[i].adapter);
    e->n_kept--;
    memmove(&e->kept[i], &e->kept[i + 1], (size_t)(e->n_kept - i) * sizeof e->kept[0]);
}

/* Keys and values depend on what was added to the matrices. */
static bool same_adaptation(struct sm_adaptation a, struct sm_adaptation b) {
    return a.adapter == b.adapter && (a.adapter == NULL || a.scale == b.scale);
}

static bool same_source(const struct source *a, const struct source *b) {
    return a->n == b->n && (a->n == 0 || memcmp(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens) == 0);
}

/* The request's text has been encoded, or needs not to be. */
static bool is_encoded(const struct source *s) {
    return s->n == 0 || (s->seq != NULL && sm_seq_length(s->seq) == s->n);
}

static int32_t common_prefix(const int32_t *a, int32_t n_a, const int32_t *b, int32_t n_b) {
    int32_t i = 0, n = SM_MIN(n_a, n_b);
    while (i < n && a[i] == b[i]) i++;
    return i;
}

/* Puts the request's sequence among the kept ones.  Those it goes on from say nothing more; all
 * together hold at most a context, so that idle memory stays in proportion. */
static void keep(smallm_engine *e, smallm_request *r) {
    struct kept new = {.source = r->source, .seq = r->seq, .adaptation = r->adaptation, .adapter = r->adapter,
                       .tokens = r->tokens, .n = (int32_t)sm_seq_length(r->seq)};
    sm_adapter_hold(new.adapter);
    int64_t sum = new.source.n + new.n;
    r->source = (struct source){.seq = NULL};
    r->seq = NULL;
    r->tokens = NULL;
    for (int i = e->n_kept - 1; i >= 0; i--) {
        struct kept *k = &e->kept[i];
        if (same_adaptation(k->adaptation, new.adaptation) && same_source(&k->source, &new.source) &&
            common_prefix(k->tokens, k->n, new.tokens, new.n) == k->n)
            free_kept(e, i);
        else sum += k->source.n + k->n;
    }
    while (e->n_kept > 0 && (e->n_kept == MAX_KEPT || sum > e->params.n_ctx)) {
        sum -= e->kept[0].source.n + e->kept[0].n;
        free_kept(e, 0);
    }
    e->kept[e->n_kept++] = new;
}

/* Lets go of a request whose last chunk is (sampled, text): afterwards it is the caller's alone.
 * code other than OK: it failed, with err's message and no last chunk. */
static void end(smallm_engine *e, smallm_request *r, int32_t finish,
                const struct sm_sampled *sampled, size_t n_text, int code,
                const smallm_error *err) {
    take_out(&e->active, r);
    bool keeps = !e->params.observed && !r->embedding; /* observed texts run from their beginnings */
    if (r->seq && code == SMALLM_OK && keeps && sm_seq_length(r->seq) > 0) keep(e, r);
    else sm_seq_free(e->session, r->seq);
    free_source(e, &r->source);
    r->seq = NULL;
    sm_free(r->tokens);
    r->tokens = NULL;
    sm_free(r->row);
    r->row = NULL;
    sm_free(r->sum);
    r->sum = NULL;
    sm_sampler_free(r->sampler);
    r->sampler = NULL;

    sm_lock_enter(e->lock);
    e->info.n_running--;
    sm_lock_leave(e->lock);

    sm_lock_enter(r->lock);
    if (code == SMALLM_OK && !push(r, sampled, r->pending, n_text, finish)) {
        code = sm_fail(&r->error, SMALLM_E_MEMORY, "out of memory for the answer's last text");
    } else if (code != SMALLM_OK) {
        sm_fail(&r->error, code, "%s", err->message);
    }
    r->finish = code == SMALLM_OK ? finish : SMALLM_FINISH_ERROR;
    r->t_end = sm_clock_ns();
    r->engine = NULL;
    sm_lock_wake_all(r->lock);
    sm_lock_leave(r->lock);
}

static void end_error(smallm_engine *e, smallm_request *r, int code, const smallm_error *err) {
    end(e, r, SMALLM_FINISH_ERROR, NULL, 0, code, err);
}

/* Ends it with all text that was held back. */
static void end_flush(smallm_engine *e, smallm_request *r, int32_t finish,
                      const struct sm_sampled *sampled) {
    end(e, r, finish, sampled, r->n_pending, SMALLM_OK, NULL);
}

/* ---- one token ------------------------------------------------------------------------------- */

/* Inside the request's lock. */
static void wake_reader(smallm_request *r) {
    sm_lock_wake_all(r->lock);
    r->t_unsaid = 0;
}

/* Inside the request's lock: wakes the reader of a chunk just pushed, or leaves that to the next pass. */
static void tell_reader(const smallm_engine *e, smallm_request *r) {
    uint64_t now = sm_clock_ns();
    if (r->t_unsaid == 0) r->t_unsaid = now;
    bool first = r->n_completion == 1;
    if (first || now + e->pass_ns - r->t_unsaid > PATIENCE_NS) wake_reader(r);
}

/* Before a pass that takes longer than the last ones: nobody waits for its end. */
static void tell_readers(smallm_engine *e) {
    for (smallm_request *r = e->active.first; r; r = r->next) {
        if (r->t_unsaid == 0) continue;
        sm_lock_enter(r->lock);
        wake_reader(r);
        sm_lock_leave(r->lock);
    }
}

/* Samples from logits [n_vocab] and hands the reader what can be handed. */
static void next_token(smallm_engine *e, smallm_request *r, float *logits) {
    smallm_error err = {.size = sizeof err};
    struct sm_sampled sampled;
    int rc = sm_sampler_next(r->sampler, logits, r->row + e->n_vocab, r->n_logprobs, &sampled, &err);
    if (rc != SMALLM_OK) {
        end_error(e, r, rc, &err);
        return;
    }
    if (sm_tokenizer_is_eog(e->tokenizer, sampled.token)) {
        end_flush(e, r, SMALLM_FINISH_STOP, NULL);
        return;
    }
    bool stopped;
    char buf[4];
    struct sm_str piece = sm_tokenizer_piece(e->tokenizer, sampled.token, !r->text_begun,
                                             SMALLM_SKIP_SPECIAL, buf);
    if (!sm_tokenizer_is_control(e->tokenizer, sampled.token)) r->text_begun = true;
    if (!sm_grow(&r->tokens, &r->tokens_capacity, (size_t)r->n_tokens + 1, sizeof *r->tokens) ||
        !add_text(r, piece, &stopped)) {
        rc = sm_fail(&err, SMALLM_E_MEMORY, "out of memory for the answer after %d tokens",
                     (int)(r->n_tokens - r->n_prompt));
        end_error(e, r, rc, &err);
        return;
    }
    r->tokens[r->n_tokens++] = sampled.token;
    sm_sampler_accept(r->sampler, sampled.token);
    if (stopped) {
        end_flush(e, r, SMALLM_FINISH_STOP, &sampled);
        return;
    }
    if (r->n_tokens - r->n_prompt == r->limit) {
        end_flush(e, r, SMALLM_FINISH_LENGTH, &sampled);
        return;
    }
    size_t n = settled(r);
    sm_lock_enter(r->lock);
    bool pushed = push(r, &sampled, r->pending, n, SMALLM_FINISH_NONE);
    if (pushed) tell_reader(e, r);
    sm_lock_leave(r->lock);
    if (!pushed) {
        rc = sm_fail(&err, SMALLM_E_MEMORY, "out of memory for chunks that nobody has read yet");
        end_error(e, r, rc, &err);
        return;
    }
    r->n_pending -= n;
    memmove(r->pending, r->pending + n, r->n_pending);
}

/* ---- embeddings ------------------------------------------------------------------------------ */

/* Room for the hidden states of a pass: of n_batch tokens, or of one text that runs as a whole. */
static int reserve_hidden(smallm_engine *e, int32_t n_prompt, smallm_error *err) {
    size_t n = (size_t)SM_MAX(e->params.n_batch, e->model->arch->is_encoder ? n_prompt : 0);
    if (n <= e->cap_hidden) return SMALLM_OK;
    float *hidden = sm_alloc(n * (size_t)e->n_embd * sizeof *hidden);
    if (!hidden) return sm_fail(err, SMALLM_E_MEMORY, "no memory for hidden states of %zu tokens", n);
    sm_free(e->hidden);
    e->hidden = hidden;
    e->cap_hidden = n;
    return SMALLM_OK;
}

/* Pools the hidden states [n][n_embd] of a pass, the text's positions first .. first + n - 1. */
static void pool(const smallm_engine *e, smallm_request *r, const float *hidden, int first, int n) {
    const size_t n_embd = (size_t)e->n_embd;
    const float *last = hidden + (size_t)(n - 1) * n_embd;
    switch (e->pooling) {
    case SM_POOLING_MEAN:
        for (int t = 0; t < n; t++)
            for (size_t i = 0; i < n_embd; i++) r->sum[i] += (double)hidden[(size_t)t * n_embd + i];
        if (first + n < r->n_prompt) return;
        for (size_t i = 0; i < n_embd; i++) r->embedding[i] = (float)(r->sum[i] / r->n_prompt);
        return;
    case SM_POOLING_FIRST:
        if (first == 0) memcpy(r->embedding, hidden, n_embd * sizeof(float));
        return;
    case SM_POOLING_LAST:
        if (first + n == r->n_prompt) memcpy(r->embedding, last, n_embd * sizeof(float));
        return;
    }
}

/* ---- one pass -------------------------------------------------------------------------------- */

/* Gives a request its sequences: forks of `from`, which has n tokens in common with it, and of its
 * source, or new ones. */
static int begin(smallm_engine *e, smallm_request *r, const struct source *source,
                 const struct sm_seq *from, int32_t n, smallm_error *err) {
    int rc = SMALLM_OK;
    if (r->source.n > 0)
        rc = from ? sm_seq_fork(e->session, source->seq, r->source.n, &r->source.seq, err)
                  : sm_seq_new(e->session, &r->source.seq, err);
    if (rc == SMALLM_OK)
        rc = from ? sm_seq_fork(e->session, from, n, &r->seq, err)
                  : sm_seq_new(e->session, &r->seq, err);
    if (rc == SMALLM_OK) return SMALLM_OK;
    sm_seq_free(e->session, r->source.seq);
    r->source.seq = NULL;
    return rc;
}

/* Starts a request from a fork of the longest prefix that a kept or running sequence shares with
 * it; where there is an encoder, among those with the same source, which is shared, too.  Tokens
 * whose logits are wanted always run, as the prompt's last one does; where statistics are kept, all. */
static int start(smallm_engine *e, smallm_request *r, smallm_error *err) {
    int32_t n_most = r->embedding ? 0 : r->logits ? r->n_skip : r->n_prompt - 1;
    if (r->embedding) {
        int rc = reserve_hidden(e, r->n_prompt, err);
        if (rc != SMALLM_OK) return rc;
    }
    for (;;) {
        const struct source *source = NULL;
        const struct sm_seq *from = NULL;
        int32_t n_best = r->source.n > 0 ? -1 : 0, n;
        int best_kept = -1;
        for (smallm_request *o = e->active.first; o && !e->params.observed; o = o->next) {
            if (!o->seq || !same_adaptation(o->adaptation, r->adaptation) ||
                !is_encoded(&o->source) || !same_source(&o->source, &r->source))
                continue;
            n = common_prefix(o->tokens, (int32_t)sm_seq_length(o->seq), r->tokens, n_most);
            n = sm_seq_reach(e->session, o->seq, n);
            if (n > n_best) {
                n_best = n;
                from = o->seq;
                source = &o->source;
            }
        }
        for (int i = 0; i < e->n_kept; i++) {
            if (!same_adaptation(e->kept[i].adaptation, r->adaptation) ||
                !same_source(&e->kept[i].source, &r->source))
                continue;
            n = common_prefix(e->kept[i].tokens, e->kept[i].n, r->tokens, n_most);
            n = sm_seq_reach(e->session, e->kept[i].seq, n);
            if (n > n_best) {
                n_best = n;
                from = e->kept[i].seq;
                source = &e->kept[i].source;
                best_kept = i;
            }
        }
        int rc = begin(e, r, source, from, n_best, err);
        if (rc == SMALLM_OK) {
            if (best_kept >= 0) { /* it is now the most recently used */
                struct kept used = e->kept[best_kept];
                memmove(&e->kept[best_kept], &e->kept[best_kept + 1],
                        (size_t)(e->n_kept - 1 - best_kept) * sizeof used);
                e->kept[e->n_kept - 1] = used;
            }
            sm_lock_enter(r->lock);
            r->n_cached = from ? n_best + r->source.n : 0;
            r->t_start = sm_clock_ns();
            sm_lock_leave(r->lock);
            return SMALLM_OK;
        }
        if (e->n_kept == 0 || (rc != SMALLM_E_MEMORY && rc != SMALLM_E_BUDGET)) return rc;
        free_kept(e, 0);
    }
}

static bool decodes(const smallm_request *r) { return sm_seq_length(r->seq) >= r->n_prompt; }

static void add_span(smallm_engine *e, smallm_request *r, int n) {
    int done = sm_seq_length(r->seq);
    bool last = done + n >= r->n_prompt, decode = decodes(r);
    struct sm_span *s = &e->spans[e->n_spans];
    *s = (struct sm_span){.seq = r->seq, .source = r->source.seq, .tokens = r->tokens + done, .n = n,
                          .adaptation = r->adaptation};
    if (last && r->row) s->peaks = r->row + e->n_vocab;
    if (r->embedding) {
        s->want = SM_WANT_HIDDEN;
        s->logits = e->hidden + e->n_hidden * (size_t)e->n_embd;
        e->n_hidden += (size_t)n;
    } else if (r->logits && !decode) {
        s->want = SM_WANT_ROWS;
        s->n_skip = SM_MIN(SM_MAX(r->n_skip - done, 0), n);
        s->logits = r->logits + (size_t)SM_MAX(done - r->n_skip, 0) * (size_t)e->n_vocab;
    } else if (last && r->row) {
        s->want = SM_WANT_LAST;
        s->logits = r->row;
        if (r->n_logprobs < 0) s->allowed = sm_sampler_allowed(r->sampler);
    }
    e->in_pass[e->n_spans++] = r;
}

/* Chooses texts for the encoder, each as a whole: all that fit, or one that would fit nowhere, or none
 * where it is the others' turn. */
static void build_sources(smallm_engine *e) {
    int32_t room = e->params.n_batch;
    bool others = false;
    e->n_spans = 0;
    for (smallm_request *r = e->active.first; r; r = r->next) others = others || is_encoded(&r->source);
    e->sources_turn = !(others && e->sources_turn);
    for (smallm_request *r = e->active.first; r && e->sources_turn; r = r->next) {
        if (is_encoded(&r->source) || (r->source.n > room && e->n_spans > 0)) continue;
        room = e->prefill_cap < e->params.n_batch ? 0 : room - r->source.n; /* one where many cancel */
        e->spans[e->n_spans] = (struct sm_span){.seq = r->source.seq, .encodes = true, .n = r->source.n,
                                                .tokens = r->source.tokens,
                                                .adaptation = r->adaptation};
        e->in_pass[e->n_spans++] = r;
    }
}

/* Chooses the next pass.  Decoding requests come first, a token each, and leave room for prompts:
 * where they alone would fill the passes, every other one gives half of itself to prompts.  Prompts
 * share their room evenly; what short ones leave goes to the first.  Who runs goes behind who must
 * wait. */
static void build(smallm_engine *e) {
    int32_t n_batch = e->params.n_batch, n_decode = 0, n_prompts = 0, n_active;
    smallm_request *r;
    for (r = e->active.first; r; r = r->next) {
        r->n_take = 0;
        if (!is_encoded(&r->source)) continue;
        if (decodes(r)) n_decode++;
        else n_prompts++;
    }
    n_active = n_decode + n_prompts;
    int32_t decode_room = SM_MIN(n_decode, n_batch);
    if (n_decode >= n_batch && n_prompts > 0) {
        e->prompts_turn = !e->prompts_turn;
        if (e->prompts_turn) decode_room = n_batch - SM_MAX(n_batch / 2, 1);
    }
    int32_t room = SM_MIN(n_batch - decode_room, e->prefill_cap);
    if (n_decode > 0) room = SM_MIN(room, MIXED_PREFILL);
    bool whole = e->model->arch->is_encoder; /* an encoder's texts, of which the first has all it needs */
    if (whole) room = n_batch;
    int32_t share = n_prompts > 0 ? SM_MAX(room / n_prompts, 1) : 0;
    for (int round = 0; round < 2; round++) {
        for (r = e->active.first; r && room > 0; r = r->next) {
            if (decodes(r) || !is_encoded(&r->source)) continue;
            int32_t most = SM_MIN(r->n_prompt - (int32_t)sm_seq_length(r->seq), r->n_chunk);
            int32_t n = SM_MIN(SM_MIN(most - r->n_take, room), round == 0 ? share : room);
            if (whole) n = most - r->n_take <= room || room == n_batch ? most - r->n_take : 0;
            r->n_take += n;
            room = whole && n > 0 && e->prefill_cap < n_batch ? 0 : room - n; /* one where many cancel */
        }
    }
    e->n_spans = 0;
    e->n_hidden = 0;
    for (r = e->active.first; r; r = r->next) {
        if (decodes(r) && decode_room > 0) {
            decode_room--;
            r->n_take = 1;
        }
        if (r->n_take > 0) add_span(e, r, r->n_take);
    }
    for (int i = 0; i < e->n_spans && e->n_spans < n_active; i++) {
        take_out(&e->active, e->in_pass[i]);
        append(&e->active, e->in_pass[i]);
    }
}

/* The pass has run: counts it, then lets each request go on. */
static void advance(smallm_engine *e, const struct sm_span *spans, smallm_request **requests,
                    int n_spans) {
    sm_lock_enter(e->lock);
    e->info.n_forward++;
    for (int i = 0; i < n_spans; i++) e->info.n_tokens += (uint64_t)spans[i].n;
    e->info.n_cache_bytes = sm_session_cache_bytes(e->session);
    e->info.n_scratch_bytes = sm_session_scratch_bytes(e->session);
    if (e->params.timed) {
        e->timers = *sm_session_timers(e->session);
        e->timers.ns[SM_TIMER_SAMPLE] = e->sample_ns;
    }
    sm_lock_leave(e->lock);
    uint64_t started = e->params.timed ? sm_clock_ns() : 0;
    for (int i = 0; i < n_spans; i++) {
        smallm_request *r = requests[i];
        int32_t done = (int32_t)sm_seq_length(r->seq);
        if (spans[i].encodes) {
            sm_lock_enter(r->lock);
            r->n_chunks++;
            sm_lock_leave(r->lock);
            continue;
        }
        if (done - spans[i].n < r->n_prompt) {
            sm_lock_enter(r->lock);
            r->n_chunks++;
            if (done == r->n_prompt) r->t_prompt = sm_clock_ns();
            sm_lock_leave(r->lock);
            if (r->embedding) pool(e, r, spans[i].logits, done - spans[i].n, spans[i].n);
            if (done < r->n_prompt) continue;
            if (r->limit == 0) {
                end_flush(e, r, SMALLM_FINISH_LENGTH, NULL);
                continue;
            }
        }
        size_t last_row = spans[i].want == SM_WANT_ROWS ? (size_t)(spans[i].n - spans[i].n_skip - 1) : 0;
        next_token(e, r, spans[i].logits + last_row * (size_t)e->n_vocab);
    }
    if (e->params.timed) e->sample_ns += sm_clock_ns() - started;
}

/* Runs spans [n] of requests [n].  Where memory is short, kept sequences go first.  What then still
 * fails is tried one by one, so that only the requests that cause it fail. */
static void run(smallm_engine *e, const struct sm_span *spans, smallm_request **requests, int n) {
    smallm_error err = {.size = sizeof err};
    for (;;) {
        int rc = sm_session_run(e->session, spans, n, &e->abort, &err);
        if (rc == SMALLM_OK) {
            e->prefill_cap = e->params.n_batch;
            advance(e, spans, requests, n);
            return;
        }
        if (rc == SMALLM_E_CANCELLED) {
            /* Smaller passes next, or cancelling often enough would stop everybody else. */
            e->prefill_cap = SM_MAX(e->prefill_cap / 4, MIN_PREFILL);
            return;
        }
        if ((rc == SMALLM_E_MEMORY || rc == SMALLM_E_BUDGET) && e->n_kept > 0) {
            free_kept(e, 0);
            continue;
        }
        if (n == 1) {
            end_error(e, requests[0], rc, &err);
            return;
        }
        break;
    }
    for (int i = 0; i < n; i++) run(e, &spans[i], &requests[i], 1);
}

static void step(smallm_engine *e) {
    /* In this order: a cancel that the loop does not see raises the flag again afterwards. */
    atomic_store(&e->abort, false);
    if (atomic_load(&e->closing)) return;
    for (smallm_request *r = e->active.first, *next; r; r = next) {
        next = r->next;
        smallm_error err = {.size = sizeof err};
        int rc = SMALLM_OK;
        if (atomic_load(&r->cancelled)) end_flush(e, r, SMALLM_FINISH_CANCELLED, NULL);
        else if (!r->seq) rc = start(e, r, &err);
        if (rc != SMALLM_OK) end_error(e, r, rc, &err);
    }
    if (!e->active.first) return;
    build_sources(e);
    if (e->n_spans == 0) build(e);
    bool single = true; /* a token each, and as many as in the pass that was timed */
    for (int i = 0; i < e->n_spans; i++) single = single && e->spans[i].n == 1;
    if (!single || e->n_spans != e->n_timed) tell_readers(e);
    uint64_t began = sm_clock_ns();
    int n_spans = e->n_spans;
    run(e, e->spans, e->in_pass, n_spans);
    e->n_timed = single ? n_spans : 0;
    e->pass_ns = sm_clock_ns() - began;
}

static void work(void *arg) {
    smallm_engine *e = arg;
    (void)sm_fpenv_enter(); /* the thread is ours: nothing to restore */
    for (bool closing = false; !closing;) {
        sm_lock_enter(e->lock);
        while (!e->submitted.first && !e->active.first && !atomic_load(&e->closing)) {
            sm_lock_wait(e->lock, -1);
        }
        while (e->submitted.first) {
            smallm_request *r = e->submitted.first;
            take_out(&e->submitted, r);
            append(&e->active, r);
        }
        closing = atomic_load(&e->closing);
        sm_lock_leave(e->lock);
        if (!closing) step(e);
    }
    smallm_error err = {.size = sizeof err};
    int rc = sm_fail(&err, SMALLM_E_CLOSED, "the engine was closed before the answer ended");
    while (e->active.first) end_error(e, e->active.first, rc, &err);
}

/* ---- the engine ------------------------------------------------------------------------------ */

int sm_engine_open(const struct sm_model *model, const smallm_engine_params *params,
                   smallm_engine **out, smallm_error *err) {
    *out = NULL;
    int rc = SMALLM_E_MEMORY;
    smallm_engine *e = sm_calloc(1, sizeof *e);
    if (!e) goto fail;
    e->process = sm_process_id();
    e->model = model;
    e->tokenizer = sm_model_tokenizer(model);
    e->n_vocab = sm_tokenizer_n_vocab(e->tokenizer);
    e->n_embd = model->h.n_embd;
    e->pooling = model->h.pooling;
    e->params = (struct sm_session_params){.n_threads = params->n_threads,
                                           .n_ctx = params->n_ctx,
                                           .n_batch = params->n_batch,
                                           .kv_type = params->kv_type,
                                           .memory_limit = params->memory_limit,
                                           .timed = params->timers == 1,
                                           .observed = params->statistics == 1};
    e->prefill_cap = params->n_batch;
    rc = sm_session_new(model, &e->params, &e->session, err); /* judges n_batch: first */
    if (rc != SMALLM_OK) goto close;
    rc = SMALLM_E_MEMORY;
    e->spans = sm_alloc((size_t)params->n_batch * sizeof *e->spans);
    e->in_pass = sm_alloc((size_t)params->n_batch * sizeof(smallm_request *));
    e->lock = sm_lock_new();
    if (!e->spans || !e->in_pass || !e->lock) goto fail;
    e->info = (smallm_engine_info){.n_threads = params->n_threads,
                                   .n_ctx = params->n_ctx,
                                   .n_batch = params->n_batch,
                                   .kv_type = params->kv_type,
                                   .n_cache_bytes = sm_session_cache_bytes(e->session),
                                   .n_scratch_bytes = sm_session_scratch_bytes(e->session)};
    rc = sm_thread_start(&e->thread, work, e, "smallm-engine", err);
    if (rc != SMALLM_OK) goto close;
    *out = e;
    return SMALLM_OK;
fail:
    sm_fail(err, rc, "out of memory for the engine");
close:
    sm_engine_close(e);
    return rc;
}

void sm_engine_close(smallm_engine *e) {
    if (!e) return;
    if (e->thread) {
        sm_lock_enter(e->lock);
        atomic_store(&e->closing, true);
        atomic_store(&e->abort, true);
        sm_lock_wake_all(e->lock);
        sm_lock_leave(e->lock);
        sm_thread_join(e->thread);
    }
    while (e->n_kept > 0) free_kept(e, 0);
    sm_session_free(e->session);
    sm_lock_free(e->lock);
    sm_free(e->hidden);
    sm_free(e->in_pass);
    sm_free(e->spans);
    sm_free(e);
}

struct sm_engine_limits sm_engine_get_limits(const smallm_engine *e) {
    return (struct sm_engine_limits){e->model, e->n_vocab, e->params.n_ctx, e->params.n_batch,
                                     e->model->h.n_encoder > 0, e->model->arch->is_encoder};
}

void sm_engine_get_info(smallm_engine *e, smallm_engine_info *out) {
    sm_lock_enter(e->lock);
    *out = e->info;
    sm_lock_leave(e->lock);
}

bool sm_engine_timer(smallm_engine *e, size_t i, smallm_timer *out) {
    if (!e->params.timed || i >= SM_TIMER_COUNT) return false;
    sm_timer_name((enum sm_timer)i, out->name, sizeof out->name);
    sm_lock_enter(e->lock);
    out->seconds = (double)e->timers.ns[i] * 1e-9;
    sm_lock_leave(e->lock);
    return true;
}

int sm_engine_statistic(smallm_engine *e, size_t i, smallm_statistic *out, double *squares,
                        uint64_t *counts, smallm_error *err) {
    const struct sm_statistics *s = sm_session_statistics(e->session);
    if (s == NULL || i >= e->model->n_matrices) return SMALLM_DONE;
    int rc = SMALLM_OK;
    sm_lock_enter(e->lock); /* which every request passes before it runs */
    if (e->info.n_running > 0)
        rc = sm_fail(err, SMALLM_E_ARGUMENT, "%d requests run; statistics are told where none does",
                     (int)e->info.n_running);
    else if (s->torn)
        rc = sm_fail(err, SMALLM_E_CANCELLED,
                     "a forward pass broke off: the statistics are not of whole texts; open another engine");
    if (rc == SMALLM_OK) {
        const struct sm_sums *of = &s->of[i];
        memcpy(out->name, e->model->matrices[i].name, sizeof out->name);
        out->n_experts = (int32_t)of->n;
        out->n_cols = (int32_t)of->k;
        if (squares) memcpy(squares, of->squares, of->n * of->k * sizeof *squares);
        if (counts) memcpy(counts, of->counts, of->n * sizeof *counts);
    }
    sm_lock_leave(e->lock);
    return rc;
}

int64_t sm_engine_process(const smallm_engine *e) { return e->process; }

/* ---- requests -------------------------------------------------------------------------------- */

static void request_delete(smallm_request *r) {
    if (!r) return;
    for (struct slab *s = r->read, *next; s; s = next) {
        next = s->next;
        sm_free(s);
    }
    sm_free(r->spare);
    sm_lock_free(r->lock);
    sm_free(r->source.tokens);
    sm_free(r->tokens);
    sm_free(r->row);
    sm_free(r->sum);
    sm_sampler_free(r->sampler);
    sm_adapter_drop(r->adapter);
    sm_free(r->stops);
    sm_free(r->stop_text);
    sm_free(r->stop_border);
    sm_free(r->pending);
    sm_free(r);
}

/* Copies the stop strings into r. */
static bool copy_stops(smallm_request *r, const smallm_request_params *p) {
    size_t n_bytes = 0;
    for (size_t i = 0; i < p->n_stop; i++) n_bytes += p->stop_len[i];
    r->stops = sm_calloc(p->n_stop, sizeof *r->stops);
    r->stop_text = sm_alloc(n_bytes);
    r->stop_border = sm_calloc(n_bytes, sizeof *r->stop_border);
    if (!r->stops || !r->stop_text || !r->stop_border) return false;
    r->n_stop = p->n_stop;
    for (size_t i = 0, at = 0; i < p->n_stop; at += p->stop_len[i++]) {
        memcpy(r->stop_text + at, p->stop[i], p->stop_len[i]);
        r->stops[i] = (struct stop){r->stop_text + at, r->stop_border + at, p->stop_len[i], 0};
        stop_prepare(&r->stops[i]);
    }
    return true;
}

int sm_engine_submit(smallm_engine *e, const smallm_request_params *p, smallm_request **out,
                     smallm_error *err) {
    *out = NULL;
    int rc;
    smallm_request *r = sm_calloc(1, sizeof *r);
    if (!r) return sm_fail(err, SMALLM_E_MEMORY, "out of memory for a request");
    r->process = e->process;
    r->error.size = sizeof r->error;
    r->t_submit = sm_clock_ns();
    r->n_prompt = r->n_tokens = (int32_t)p->n_tokens;
    r->source.n = r->n_source = (int32_t)p->n_source;
    r->limit = SM_MIN(p->max_tokens, e->params.n_ctx - r->n_prompt);
    r->n_chunk = p->n_chunk ? p->n_chunk : e->model->arch->is_encoder ? r->n_prompt : e->params.n_batch;
    r->n_logprobs = p->n_logprobs;
    r->logits = p->logits;
    r->n_skip = p->n_logits ? (int32_t)(p->n_tokens - p->n_logits) : 0;
    r->adapter = p->adapter;
    sm_adapter_hold(r->adapter);
    if (r->adapter != NULL)
        r->adaptation = (struct sm_adaptation){r->adapter, p->adapter_scale != 0 ? p->adapter_scale : 1};
    r->embedding = p->embedding;

    rc = sm_sampler_new(&p->sampling, e->n_vocab, e->params.n_ctx, &r->sampler, err);
    if (rc != SMALLM_OK) goto fail;
    rc = SMALLM_E_MEMORY;
    r->tokens_capacity = p->n_tokens + (size_t)SM_MIN(r->limit, 256);
    r->tokens = sm_alloc(r->tokens_capacity * sizeof *r->tokens);
    r->pending_capacity = 256;
    r->pending = sm_alloc(r->pending_capacity);
    r->read = r->write = slab_new(SLAB_BYTES);
    r->lock = sm_lock_new();
    r->source.tokens = sm_alloc(p->n_source * sizeof *r->source.tokens);
    if (!r->tokens || !r->source.tokens || !r->pending || !r->read || !r->lock) goto fail_memory;
    if (r->limit > 0) {
        size_t n = (size_t)e->n_vocab;
        r->row = sm_alloc((n + sm_n_peaks(n)) * sizeof *r->row);
        if (!r->row) goto fail_memory;
    }
    if (r->embedding) {
        r->sum = sm_calloc((size_t)e->n_embd, sizeof *r->sum);
        if (!r->sum) goto fail_memory;
    }
    if (p->n_stop > 0 && !copy_stops(r, p)) goto fail_memory;
    memcpy(r->tokens, p->tokens, p->n_tokens * sizeof *r->tokens);
    if (p->n_source > 0)
        memcpy(r->source.tokens, p->source, p->n_source * sizeof *r->source.tokens);
    for (int32_t i = 0; i < r->n_prompt; i++) {
        sm_sampler_accept(r->sampler, r->tokens[i]);
        if (!sm_tokenizer_is_control(e->tokenizer, r->tokens[i])) r->text_begun = true;
    }

    r->engine = e;
    sm_lock_enter(e->lock);
    append(&e->submitted, r);
    e->info.n_running++;
    sm_lock_wake_all(e->lock);
    sm_lock_leave(e->lock);
    *out = r;
    return SMALLM_OK;
fail_memory:
    sm_fail(err, rc, "out of memory for a request of %d tokens", (int)r->n_prompt);
fail:
    request_delete(r);
    return rc;
}

int sm_request_next(smallm_request *r, int32_t timeout_ms, smallm_chunk *out, smallm_error *err) {
    *out = (smallm_chunk){.token = -1, .logprob = NAN, .text = ""};
    uint64_t deadline = sm_clock_ns() + (uint64_t)timeout_ms * 1000000u;
    int rc = SMALLM_OK;
    sm_lock_enter(r->lock);
    while (!pull(r, out)) {
        if (!r->engine) {
            rc = r->error.code == SMALLM_OK
                     ? SMALLM_DONE
                     : sm_fail(err, r->error.code, "%s", r->error.message);
            break;
        }
        uint64_t now = sm_clock_ns();
        if (now >= deadline) {
            rc = SMALLM_AGAIN;
            break;
        }
        sm_lock_wait(r->lock, (int64_t)(deadline - now));
    }
    sm_lock_leave(r->lock);
    return rc;
}

void sm_request_cancel(smallm_request *r) {
    atomic_store(&r->cancelled, true);
    sm_lock_enter(r->lock);
    if (r->engine) atomic_store(&r->engine->abort, true);
    sm_lock_leave(r->lock);
}

void sm_request_get_stats(smallm_request *r, smallm_request_stats *out) {
    sm_lock_enter(r->lock);
    uint64_t now = r->t_end ? r->t_end : sm_clock_ns();
    uint64_t start = r->t_start ? r->t_start : now, prompt = r->t_prompt ? r->t_prompt : now;
    *out = (smallm_request_stats){.n_prompt = r->n_source + r->n_prompt,
                                  .n_cached = r->n_cached,
                                  .n_completion = r->n_completion,
                                  .n_chunks = r->n_chunks,
                                  .finish = r->finish,
                                  .queue_s = (double)(start - r->t_submit) * 1e-9,
                                  .prefill_s = (double)(prompt - start) * 1e-9,
                                  .decode_s = (double)(now - prompt) * 1e-9};
    if (r->t_first) out->ttft_s = (double)(r->t_first - r->t_submit) * 1e-9;
    sm_lock_leave(r->lock);
}

void sm_request_free(smallm_request *r) {
    if (!r) return;
    sm_request_cancel(r);
    sm_lock_enter(r->lock);
    while (r->engine) sm_lock_wait(r->lock, -1);
    sm_lock_leave(r->lock);
    request_delete(r);
}

int64_t sm_request_process(const smallm_request *r) { return r->process; }
