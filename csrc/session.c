/* Sequences, and the turning of spans into batches. */
#include "session.h"

#include "cpu.h"
#include "forward.h"

/* A tile of ops.c holds at least one panel of every token. */
#define MAX_BATCH 2048

/* What passes over at most n tokens need: the batch's arrays, [n] each, and what buffers point into. */
struct room {
    size_t n;
    float *floats;
    size_t n_float_bytes;
    int32_t *tokens;
    int *positions, *ends;
    struct sm_seq **seqs;
    const struct sm_seq **sources;
    struct sm_adaptation *adaptations;
    struct sm_block *blocks;
    struct sm_run *runs;
    size_t *wanted;
    float **logits, **peaks;
    const uint32_t **allowed;
    size_t *hidden;
    float **states;
};

struct sm_session {
    const struct sm_model *model;
    struct sm_session_params params;
    struct sm_cache cache;
    struct sm_ops *ops;
    struct sm_buffers buffers;
    struct room room;           /* for n_batch tokens, or for the longest text that ran as a whole */
    size_t cap_partial;         /* floats */
    struct sm_timers timers;
    struct sm_statistics *statistics; /* or NULL */
};

/* Whether a text of this span is one pass, however long. */
static bool is_whole(const struct sm_session *s, const struct sm_span *span) {
    return span->encodes || s->model->arch->is_encoder;
}

/* Rows of the feed-forward for n tokens: one for each, or for each expert that a token uses: of these
 * as many at once as there are tokens, and in decode all. */
static size_t n_ff_rows(const struct sm_hparams *h, size_t n) {
    return h->n_expert > 0 ? SM_MAX(n, SM_MIN(n, SM_ALONE_MAX) * (size_t)h->n_used) : n;
}

static size_t ff_width(const struct sm_hparams *h) {
    return (size_t)(h->n_expert > 0 ? SM_MAX(h->n_ff_expert, h->n_ff_shared) : h->n_ff);
}

/* Points *b into `floats` for n tokens; NULL: only the number of floats is wanted, which is given. */
static size_t lay_out(const struct sm_session *s, size_t n, float *floats, struct sm_buffers *b) {
    const struct sm_hparams *h = &s->model->h;
    const struct sm_arch *arch = s->model->arch;
    size_t n_embd = (size_t)h->n_embd, n_angles = (size_t)(h->n_rope * (h->n_rot / 2));
    size_t q_size = (size_t)(h->n_head * h->head), kv_size = (size_t)(h->n_head_kv * h->head);
    bool has_y = arch->norms == SM_NORMS_AFTER || arch->norms == SM_NORMS_AROUND;
    const struct {
        float **at;
        size_t n, width;
    } parts[] = {
        {&b->mix, n, h->n_state_layer > 0 ? (size_t)sm_mixer_in(h) : 0},
        {&b->x, n, n_embd}, {&b->q, n, q_size}, {&b->k, n, kv_size}, {&b->v, n, kv_size},
        {&b->h, n_ff_rows(h, n), ff_width(h)}, {&b->wanted, n, arch->is_encoder ? 0 : n_embd},
        {&b->cos, n, n_angles}, {&b->sin, n, n_angles}, {&b->y, n, has_y ? n_embd : 0},
    };
    size_t all = 0;
    for (size_t i = 0; i < SM_COUNT(parts); i++) {
        if (floats != NULL) *parts[i].at = floats + all;
        all += sm_round_up(parts[i].n * parts[i].width, SM_ALIGN);
    }
    return all;
}

static void free_room(struct room *r) {
    sm_free(r->floats);
    sm_free(r->tokens);
    sm_free(r->positions);
    sm_free(r->ends);
    sm_free(r->seqs);
    sm_free(r->sources);
    sm_free(r->adaptations);
    sm_free(r->blocks);
    sm_free(r->runs);
    sm_free(r->wanted);
    sm_free(r->logits);
    sm_free(r->peaks);
    sm_free(r->allowed);
    sm_free(r->hidden);
    sm_free(r->states);
}

/* Makes room for n tokens.  SMALLM_E_MEMORY: nothing has changed. */
static int make_room(struct sm_session *s, size_t n, smallm_error *err) {
    struct room r = {.n = n, .n_float_bytes = lay_out(s, n, NULL, &s->buffers) * sizeof(float)};
    r.floats = sm_alloc(r.n_float_bytes);
    r.tokens = sm_calloc(n, sizeof r.tokens[0]);
    r.positions = sm_calloc(n, sizeof r.positions[0]);
    r.ends = sm_calloc(n, sizeof r.ends[0]);
    r.seqs = sm_calloc(n, sizeof r.seqs[0]);
    r.sources = sm_calloc(n, sizeof r.sources[0]);
    r.adaptations = sm_calloc(n, sizeof r.adaptations[0]);
    r.blocks = sm_calloc(n, sizeof r.blocks[0]);
    r.runs = sm_calloc(n, sizeof r.runs[0]);
    r.wanted = sm_calloc(n, sizeof r.wanted[0]);
    r.logits = sm_calloc(n, sizeof r.logits[0]);
    r.peaks = sm_calloc(n, sizeof r.peaks[0]);
    r.allowed = sm_calloc(n, sizeof r.allowed[0]);
    r.hidden = sm_calloc(n, sizeof r.hidden[0]);
    r.states = sm_calloc(n, sizeof r.states[0]);
    if (r.floats == NULL || r.tokens == NULL || r.positions == NULL || r.ends == NULL || r.seqs == NULL ||
        r.sources == NULL || r.adaptations == NULL || r.blocks == NULL || r.runs == NULL ||
        r.wanted == NULL || r.logits == NULL || r.peaks == NULL || r.allowed == NULL ||
        r.hidden == NULL || r.states == NULL) {
        free_room(&r);
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for activations of %zu tokens", n);
    }
    lay_out(s, n, r.floats, &s->buffers);
    free_room(&s->room);
    s->room = r;
    return SMALLM_OK;
}

static int allocate(struct sm_session *s, smallm_error *err) {
    const struct sm_hparams *h = &s->model->h;
    size_t n = (size_t)s->params.n_batch;
    int status = make_room(s, n, err);
    if (status != SMALLM_OK) return status;
    s->buffers.freqs = sm_model_rope_freqs(s->model, s->params.n_ctx);
    if (h->n_expert > 0) {
        status = sm_router_new(h, n, &s->buffers.router, err);
        if (status != SMALLM_OK) return status;
    }
    size_t k_max = SM_MAX(SM_MAX((size_t)h->n_embd, (size_t)(h->n_head * h->head)), ff_width(h));
    if (h->n_state_layer > 0) k_max = SM_MAX(k_max, (size_t)sm_mixer_out(h));
    if (s->params.observed) {
        status = sm_statistics_new(s->model, &s->statistics, err);
        if (status != SMALLM_OK) return status;
    }
    return sm_ops_new(s->params.n_threads, n_ff_rows(h, n), k_max, s->model->kernels, s->params.timed,
                      s->statistics, &s->ops, err);
}

int sm_session_new(const struct sm_model *model, const struct sm_session_params *params,
                   struct sm_session **out, smallm_error *err) {
    *out = NULL;
    if (params->n_batch < 1 || params->n_batch > MAX_BATCH)
        return sm_fail(err, SMALLM_E_ARGUMENT, "n_batch is %d; allowed are 1 to %d",
                       params->n_batch, MAX_BATCH);
    struct sm_session *s = sm_calloc(1, sizeof *s);
    if (s == NULL) return sm_fail(err, SMALLM_E_MEMORY, "no memory for a session");
    s->model = model;
    s->params = *params;
    int status = allocate(s, err);
    if (status != SMALLM_OK) goto fail;
    uint64_t scratch = sm_session_scratch_bytes(s), limit = params->memory_limit;
    if (limit != 0 && limit <= scratch) {
        status = sm_fail(err, SMALLM_E_BUDGET,
                         "activations of %d tokens need %llu bytes; memory_limit is %llu",
                         params->n_batch, (unsigned long long)scratch, (unsigned long long)limit);
        goto fail;
    }
    status = sm_cache_init(&s->cache, &model->h, params->kv_type, limit == 0 ? 0 : limit - scratch, err);
    if (status != SMALLM_OK) goto fail;
    *out = s;
    return SMALLM_OK;
fail:
    sm_session_free(s);
    return status;
}

void sm_session_free(struct sm_session *s) {
    if (s == NULL) return;
    sm_cache_free(&s->cache);
    sm_ops_free(s->ops);
    sm_statistics_free(s->statistics);
    sm_router_free(s->buffers.router);
    sm_free(s->buffers.partial);
    free_room(&s->room);
    sm_free(s);
}

/* ---- sequences --------------------------------------------------------------------------------------------- */

int sm_seq_new(struct sm_session *s, struct sm_seq **out, smallm_error *err) {
    (void)s;
    *out = sm_calloc(1, sizeof **out);
    return *out != NULL ? SMALLM_OK : sm_fail(err, SMALLM_E_MEMORY, "no memory for a sequence");
}

int sm_seq_fork(struct sm_session *s, const struct sm_seq *src, int n, struct sm_seq **out,
                smallm_error *err) {
    int status = sm_seq_new(s, out, err);
    if (status != SMALLM_OK) return status;
    if (n < 0 || n > src->n)
        status = sm_fail(err, SMALLM_E_ARGUMENT, "fork at position %d; the sequence holds %d", n, src->n);
    else
        status = sm_cache_share(&s->cache, *out, src, sm_cache_reach(&s->cache, src, n), err);
    if (status != SMALLM_OK) {
        sm_seq_free(s, *out);
        *out = NULL;
    }
    return status;
}

void sm_seq_rewind(struct sm_session *s, struct sm_seq *seq, int n) {
    sm_cache_truncate(&s->cache, seq, sm_cache_reach(&s->cache, seq, n));
}

int sm_seq_reach(const struct sm_session *s, const struct sm_seq *seq, int n) {
    return sm_cache_reach(&s->cache, seq, n);
}

int sm_seq_length(const struct sm_seq *seq) { return seq->n; }

void sm_seq_free(struct sm_session *s, struct sm_seq *seq) {
    if (seq == NULL) return;
    sm_cache_drop(&s->cache, seq);
    sm_free(seq->pages);
    sm_free(seq);
}

/* ---- running ----------------------------------------------------------------------------------------------- */

/* Room for a text that is longer than any before: it comes out of the cache's, which must still hold the
 * text. */
static int grow_room(struct sm_session *s, size_t n, smallm_error *err) {
    uint64_t before = s->room.n_float_bytes, limit = s->cache.memory_limit;
    uint64_t need = lay_out(s, n, NULL, &s->buffers) * sizeof(float) - before;
    uint64_t pages = (n + SM_PAGE - 1) / SM_PAGE * s->cache.page_bytes;
    uint64_t cache = SM_MAX(pages, s->cache.n_bytes);
    if (limit != 0 && (need >= limit || cache > limit - need))
        return sm_fail(err, SMALLM_E_BUDGET,
                       "a text of %zu tokens needs another %llu bytes of activations and %llu of cache; "
                       "memory_limit leaves %llu", n, (unsigned long long)need, (unsigned long long)pages,
                       (unsigned long long)limit);
    int status = make_room(s, n, err);
    if (limit != 0) s->cache.memory_limit -= s->room.n_float_bytes - before;
    return status;
}

/* Judges the spans and reserves what the pass will write. */
static int prepare(struct sm_session *s, const struct sm_span *spans, int n_spans, smallm_error *err) {
    int n = 0;
    for (int i = 0; i < n_spans; i++) {
        const struct sm_span *span = &spans[i];
        bool fits = span->n <= s->params.n_batch - n || (n_spans == 1 && is_whole(s, span));
        if (span->n < 1 || !fits)
            return sm_fail(err, SMALLM_E_ARGUMENT, "a pass of %d tokens; allowed are 1 to %d",
                           n + span->n, s->params.n_batch);
        bool has_encoder = s->model->h.n_encoder > 0, has_source = span->source != NULL && span->source->n > 0;
        if (span->encodes != spans[0].encodes || has_encoder != (span->encodes || has_source) ||
            (span->encodes && span->seq->n > 0))
            return sm_fail(err, SMALLM_E_ARGUMENT,
                           "a pass encodes whole texts, or decodes with what encoding them gave");
        if (s->model->arch->is_encoder && span->seq->n > 0)
            return sm_fail(err, SMALLM_E_ARGUMENT, "a text of an encoder goes on after %d tokens; it is run "
                                                   "as a whole", span->seq->n);
        if (span->n > s->params.n_ctx - span->seq->n)
            return sm_fail(err, SMALLM_E_CONTEXT, "%d tokens; the context holds %d",
                           span->seq->n + span->n, s->params.n_ctx);
        n += span->n;
        int status = n > (int)s->room.n ? grow_room(s, (size_t)n, err) : SMALLM_OK;
        if (status == SMALLM_OK)
            status = sm_cache_reserve(&s->cache, span->seq, span->seq->n + span->n, err);
        if (status != SMALLM_OK) return status;
    }
    return SMALLM_OK;
}

/* Room for what the pass's adapters need: it comes out of the cache's. */
static int reserve_adapters(struct sm_session *s, const struct sm_span *spans, int n_spans,
                            smallm_error *err) {
    size_t rank = 0;
    for (int i = 0; i < n_spans; i++)
        if (spans[i].adaptation.adapter != NULL) rank = SM_MAX(rank, spans[i].adaptation.adapter->rank);
    uint64_t before = sm_ops_bytes(s->ops), need = sm_ops_reserve_bytes(s->ops, rank);
    uint64_t limit = s->cache.memory_limit;
    if (limit != 0 && (need >= limit || s->cache.n_bytes > limit - need))
        return sm_fail(err, SMALLM_E_BUDGET,
                       "an adapter of rank %zu needs %llu bytes; memory_limit leaves %llu", rank,
                       (unsigned long long)need, (unsigned long long)(limit - s->cache.n_bytes));
    int status = sm_ops_reserve(s->ops, rank, err);
    if (limit != 0) s->cache.memory_limit -= sm_ops_bytes(s->ops) - before;
    return status;
}

/* Room for the partial results of a decode pass (mixers/attention.c). */
static int reserve_partial(struct sm_session *s, const struct sm_batch *batch, smallm_error *err) {
    const struct sm_hparams *h = &s->model->h;
    size_t n_chunks = 0;
    for (size_t t = 0; t < batch->n; t++) {
        int end = batch->ends[t];
        if (batch->sources != NULL) end = SM_MAX(end, batch->sources[t]->n);
        n_chunks = SM_MAX(n_chunks, (size_t)(end - 1) / SM_CHUNK + 1);
    }
    size_t need = batch->n * (size_t)h->n_head * n_chunks * (size_t)(h->head + 2);
    s->buffers.max_chunks = n_chunks;
    if (need > s->cap_partial) { /* grows by doubling, so that decode hardly ever allocates */
        size_t cap = SM_MAX(need, 2 * s->cap_partial);
        float *partial = sm_alloc(cap * sizeof(float));
        if (partial == NULL)
            return sm_fail(err, SMALLM_E_MEMORY, "no memory for attention over %zu positions",
                           n_chunks * SM_CHUNK);
        sm_free(s->buffers.partial);
        s->buffers.partial = partial;
        s->cap_partial = cap;
    }
    return SMALLM_OK;
}

static void fill_batch(struct sm_session *s, const struct sm_span *spans, int n_spans,
                       struct sm_batch *batch) {
    const struct sm_hparams *h = &s->model->h;
    const struct room *r = &s->room;
    size_t group = h->n_kv_layer > 0 ? (size_t)(h->n_head / h->n_head_kv) : 1;
    size_t block_tokens = SM_MAX(SM_ATTEND_MAX / group, 1);
    *batch = (struct sm_batch){.tokens = r->tokens, .positions = r->positions, .ends = r->ends,
                               .seqs = r->seqs, .blocks = r->blocks, .runs = r->runs,
                               .wanted = r->wanted, .logits = r->logits, .peaks = r->peaks,
                               .allowed = r->allowed, .hidden = r->hidden, .states = r->states,
                               .alone = true};
    for (int i = 0; i < n_spans; i++) {
        const struct sm_span *span = &spans[i];
        size_t n = (size_t)span->n;
        if (n > 1) batch->alone = false;
        if (span->adaptation.adapter != NULL) batch->adaptations = r->adaptations;
        for (size_t t = 0; t < n; t++) {
            size_t at = batch->n + t;
            r->tokens[at] = span->tokens[t];
            r->positions[at] = span->seq->n + (int)t;
            r->ends[at] = span->seq->n + (is_whole(s, span) ? span->n : (int)t + 1);
            r->seqs[at] = span->seq;
            r->sources[at] = span->source;
            r->adaptations[at] = span->adaptation;
            if (span->want == SM_WANT_HIDDEN) {
                r->hidden[batch->n_hidden] = at;
                r->states[batch->n_hidden++] = span->logits + t * (size_t)h->n_embd;
            }
            size_t skip = span->want == SM_WANT_ROWS ? (size_t)span->n_skip : n - 1;
            if ((span->want == SM_WANT_ROWS || span->want == SM_WANT_LAST) && t >= skip) {
                r->wanted[batch->n_wanted] = at;
                r->allowed[batch->n_wanted] = span->want == SM_WANT_LAST ? span->allowed : NULL;
                r->peaks[batch->n_wanted] = t + 1 == n ? span->peaks : NULL;
                r->logits[batch->n_wanted++] = span->logits + (t - skip) * (size_t)h->n_vocab;
            }
        }
        const struct sm_seq *seq = span->seq;
        r->runs[batch->n_runs++] =
            (struct sm_run){.first = batch->n, .n = n,
                            .from = seq->state != NULL ? seq->state->data : NULL,
                            .mid = seq->mid != NULL ? seq->mid->data : NULL,
                            .to = seq->next != NULL ? seq->next->data : NULL};
        for (size_t t = 0; t < n; t += block_tokens)
            r->blocks[batch->n_blocks++] =
                (struct sm_block){.first = batch->n + t, .n = SM_MIN(block_tokens, n - t)};
        batch->n += n;
    }
    if (batch->n > SM_ALONE_MAX) batch->alone = false;
    batch->encodes = spans[0].encodes;
    if (h->n_encoder > 0 && !batch->encodes) batch->sources = r->sources;
}

int sm_session_run(struct sm_session *s, const struct sm_span *spans, int n_spans,
                   const atomic_bool *cancel, smallm_error *err) {
    int status = reserve_adapters(s, spans, n_spans, err);
    if (status == SMALLM_OK) status = prepare(s, spans, n_spans, err);
    if (status != SMALLM_OK) return status;
    struct sm_batch batch;
    fill_batch(s, spans, n_spans, &batch);
    if (batch.alone) {
        status = reserve_partial(s, &batch, err);
        if (status != SMALLM_OK) return status;
    }
    const struct sm_pass pass = {.model = s->model, .batch = &batch, .buffers = &s->buffers,
                                 .cache = &s->cache, .ops = s->ops};
    uint64_t fpenv = sm_fpenv_enter();
    sm_ops_begin(s->ops, cancel, batch.adaptations);
    sm_forward(&pass);
    sm_ops_end(s->ops, &s->timers);
    sm_fpenv_leave(fpenv);
    status = sm_ops_status(s->ops);
    if (status != SMALLM_OK && s->statistics != NULL) s->statistics->torn = true;
    switch (status) {
    case SMALLM_OK: break;
    case SMALLM_E_CANCELLED: return sm_fail(err, status, "cancelled");
    case SMALLM_E_NUMERIC:
        return sm_fail(err, status, "an activation became infinite or NaN: the weights or the cache "
                                    "type cannot represent this text");
    default: return sm_fail(err, status, "an embedding could not be read from the model's file");
    }
    for (int i = 0; i < n_spans; i++)
        sm_cache_commit(&s->cache, spans[i].seq, spans[i].seq->n + spans[i].n);
    return SMALLM_OK;
}

const struct sm_timers *sm_session_timers(const struct sm_session *s) { return &s->timers; }

const struct sm_statistics *sm_session_statistics(const struct sm_session *s) { return s->statistics; }

uint64_t sm_session_cache_bytes(const struct sm_session *s) { return s->cache.n_bytes; }

uint64_t sm_session_scratch_bytes(const struct sm_session *s) {
    return s->room.n_float_bytes + sm_ops_bytes(s->ops) + sm_router_bytes(s->buffers.router) +
           s->cap_partial * sizeof(float) + (s->statistics != NULL ? s->statistics->n_bytes : 0);
}
