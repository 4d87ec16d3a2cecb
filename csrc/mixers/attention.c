/* Softmax attention over the paged cache.
 *
 * Two schedules, one answer (the chunks and their order are absolute, kernels.h):
 *   - decode (batch->alone): one phase over (token, kv head, chunk of SM_CHUNK positions); whoever
 *     takes a head's last chunk first writes the new position's K and V, which nobody else reads.
 *     The output projection folds the chunks while it prepares its activations.
 *   - otherwise: K and V of all tokens enter the cache in one phase, then blocks of tokens walk
 *     their chunks and fold as they go.
 * One load of K or V serves all query heads of its group. */
#include "../forward.h"
#include "../mathx.h"

#define TOKENS_PER_ITEM 8

/* First position the token at `position` sees. */
static int first_visible(const struct sm_attention *a, int position) {
    int window = a->weights->plan.window;
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}
static int first_chunk(const struct sm_attention *a, int position) {
    return first_visible(a, position) / SM_CHUNK;
}

/* The sequence that token t attends to, and how many of its positions it sees at most. */
static const struct sm_seq *seq_of(const struct sm_attention *a, size_t t) {
    return a->across ? a->p->batch->sources[t] : a->p->batch->seqs[t];
}
static int end_of(const struct sm_attention *a, size_t t) {
    const struct sm_layer_plan *plan = &a->weights->plan;
    if (a->across) return a->p->batch->sources[t]->n;
    int end = a->p->batch->ends[t];
    return plan->window > 0 ? SM_MIN(end, a->p->batch->positions[t] + 1 + plan->behind) : end;
}

/* Of the query heads of a kv head those that go together, at most SM_ATTEND_MAX. */
struct heads {
    size_t kv_head, first, n;
};

/* The heads after h, h->n of them; false where there are none.  To begin with, first and n are 0. */
static bool next_heads(const struct sm_attention *a, struct heads *h) {
    h->first += h->n;
    h->n = SM_MIN(a->group - h->first, SM_ATTEND_MAX);
    return h->n > 0;
}

/* Among all query heads. */
static size_t first_head(const struct sm_attention *a, const struct heads *h) {
    return h->kv_head * a->group + h->first;
}

/* Where token t's queries of these heads begin in buffers->q. */
static float *query_of(const struct sm_attention *a, size_t t, const struct heads *h) {
    return a->p->buffers->q + (t * a->n_head_kv * a->group + first_head(a, h)) * a->head;
}

static void rope(const struct sm_attention *a, size_t t, float *x) {
    const struct sm_model *m = a->p->model;
    if (a->weights->plan.rope < 0) return;
    size_t half = (size_t)m->h.n_rot / 2;
    size_t at = (t * (size_t)m->h.n_rope + (size_t)a->weights->plan.rope) * half;
    const float *cos = a->p->buffers->cos + at, *sin = a->p->buffers->sin + at;
    switch (m->arch->rope) {
    case SM_ROPE_PAIRS: m->kernels->rope_pairs(x, cos, sin, half); break;
    case SM_ROPE_HALVES: m->kernels->rope_halves(x, cos, sin, half); break;
    case SM_ROPE_NONE: break;
    }
}

/* Norms and turns head `head` of token t's q or k, x [head]; weight: as sm_qk_norm says, or NULL. */
static void norm_and_turn(const struct sm_attention *a, const float *weight, size_t t, size_t head,
                          float *x) {
    const struct sm_model *m = a->p->model;
    if (m->arch->norms_turned) rope(a, t, x);
    if (weight != NULL && m->arch->qk_norm != SM_QK_NORM_ROW) {
        size_t row = m->arch->qk_norm == SM_QK_NORM_HEADS ? head : 0;
        sm_model_norm(m, x, x, weight + row * a->head, NULL, a->head);
    }
    if (!m->arch->norms_turned) rope(a, t, x);
}

/* x [head] of q, k or v, each value at most the limit in size, where there is one; NaN stays.
 * Comparisons alone: no kernel's affair. */
static void limit(const struct sm_attention *a, float *x) {
    float most = a->p->model->h.qkv_limit;
    for (size_t i = 0; i < a->head && most > 0; i++) x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
}

/* Of the scores of token t. */
static float scale_of(const struct sm_attention *a, size_t t) {
    const struct sm_hparams *h = &a->p->model->h;
    if (h->temperature == 0) return h->attn_scale;
    int times = a->p->batch->positions[t] / h->temperature_length;
    return (float)((double)h->attn_scale * (1 + (double)h->temperature * sm_log(1 + times)));
}

/* Normed, turned and scaled queries of token t: out [h->n][head]. */
static void make_queries(const struct sm_attention *a, size_t t, const struct heads *h, float *out) {
    memcpy(out, query_of(a, t, h), h->n * a->head * sizeof(float));
    for (size_t g = 0; g < h->n; g++) {
        limit(a, out + g * a->head);
        norm_and_turn(a, a->weights->q_norm, t, first_head(a, h) + g, out + g * a->head);
    }
    a->p->model->kernels->scale(out, out, scale_of(a, t), h->n * a->head);
}

/* Norms and turns token t's k and writes k and v of one head to the cache.  tmp: [head] */
static void store_kv(const struct sm_attention *a, size_t t, size_t kv_head, float *tmp) {
    const struct sm_pass *p = a->p;
    size_t at = (t * a->n_head_kv + kv_head) * a->head;
    int position = p->batch->positions[t];
    const struct sm_page *page = p->batch->seqs[t]->pages[position / SM_PAGE];
    memcpy(tmp, p->buffers->k + at, a->head * sizeof(float));
    limit(a, tmp);
    limit(a, p->buffers->v + at);
    norm_and_turn(a, a->weights->k_norm, t, kv_head, tmp);
    p->model->kernels->kv_store(p->cache->kv_type,
                                sm_cache_part(p->cache, page, a->layer, (int)kv_head, 0),
                                sm_cache_part(p->cache, page, a->layer, (int)kv_head, 1),
                                (size_t)(position % SM_PAGE), tmp, p->buffers->v + at, a->head);
}

/* The pages of one chunk up to position `last`, for the kernel. */
static void set_pages(const struct sm_attention *a, struct sm_attend *call, const struct sm_seq *seq,
                      size_t kv_head, int chunk, int last) {
    const struct sm_cache *c = a->p->cache;
    for (int i = 0; i < SM_CHUNK_PAGES; i++) {
        int page = chunk * SM_CHUNK_PAGES + i;
        bool visible = page * SM_PAGE <= last;
        call->k[i] = visible ? sm_cache_part(c, seq->pages[page], a->layer, (int)kv_head, 0) : NULL;
        call->v[i] = visible ? sm_cache_part(c, seq->pages[page], a->layer, (int)kv_head, 1) : NULL;
    }
    call->kv_type = c->kv_type;
    call->head = a->head;
    call->cap = a->p->model->h.attn_cap;
}

/* Sum and maximum of a query head before its first chunk, O [head] with them: those of its sink.
 * false where it has none. */
static bool begin_with_sink(const struct sm_attention *a, size_t q_head, float *M, float *L, float *O) {
    if (a->weights->sinks == NULL) return false;
    *M = a->weights->sinks[q_head];
    *L = 1;
    memset(O, 0, a->head * sizeof(float));
    return true;
}

/* What the queries of the token at `position` need for ALiBi in `chunk`. */
static void set_slopes(const struct sm_attention *a, const struct heads *h, int position, int chunk,
                       float *slope, int *at) {
    const float *slopes = a->p->model->slopes;
    for (size_t g = 0; g < h->n && slopes != NULL; g++) {
        slope[g] = slopes[first_head(a, h) + g];
        at[g] = position - chunk * SM_CHUNK;
    }
}

/* Where the biases of the queries of the token at `position` begin in `chunk`. */
static void set_biases(const struct sm_attention *a, const struct heads *h, int position, int chunk,
                       const float **bias) {
    int distance = SM_MAX(SM_MIN(chunk * SM_CHUNK - position, SM_FAR), -SM_FAR - SM_CHUNK);
    for (size_t g = 0; g < h->n && a->biases != NULL; g++)
        bias[g] = a->biases + (first_head(a, h) + g) * SM_DISTANCES + (distance + SM_FAR + SM_CHUNK);
}

/* Valid positions of `chunk` for token t. */
static void set_range(const struct sm_attention *a, size_t t, int chunk, int16_t *lo, int16_t *hi) {
    int begin = chunk * SM_CHUNK, first = first_visible(a, a->p->batch->positions[t]);
    *lo = (int16_t)(SM_MAX(first, begin) - begin);
    *hi = (int16_t)(SM_MIN(end_of(a, t), begin + SM_CHUNK) - begin);
}

/* ---- decode ------------------------------------------------------------------------------------------------ */

/* A token's partial results of one kv head and chunk: m [group], l [group], o [group][head]. */
static float *partial_of(const struct sm_attention *a, size_t t, size_t kv_head, size_t chunk) {
    const struct sm_buffers *b = a->p->buffers;
    size_t index = (t * a->n_head_kv + kv_head) * b->max_chunks + chunk;
    return b->partial + index * a->group * (a->head + 2);
}

/* What an item of the decode phase is. */
struct decode {
    size_t t, kv_head;
    int first, chunk; /* of the chunks that t sees, and the item's own */
};

static struct decode decode_of(const struct sm_attention *a, size_t item) {
    struct decode d = {.t = 0};
    while (item >= a->items_before[d.t + 1]) d.t++;
    item -= a->items_before[d.t];
    d.kv_head = item % a->n_head_kv;
    d.first = first_chunk(a, a->p->batch->positions[d.t]);
    d.chunk = d.first + (int)(item / a->n_head_kv);
    return d;
}

/* The page of K that an item reads first. */
static const void *first_page(const struct sm_attention *a, size_t item) {
    const struct sm_batch *batch = a->p->batch;
    if (item >= a->items_before[batch->n]) return NULL;
    struct decode d = decode_of(a, item);
    int position = SM_MAX(first_visible(a, batch->positions[d.t]), d.chunk * SM_CHUNK);
    return sm_cache_part(a->p->cache, seq_of(a, d.t)->pages[position / SM_PAGE], a->layer,
                         (int)d.kv_head, 0);
}

/* next: the page that is probably read after this. */
static void decode_heads(const struct sm_attention *a, const struct decode *d, const struct heads *h,
                         const void *next, void *scratch, float *local) {
    int position = a->p->batch->positions[d->t];
    make_queries(a, d->t, h, local);
    int16_t lo[SM_ATTEND_MAX], hi[SM_ATTEND_MAX];
    float slope[SM_ATTEND_MAX];
    int at[SM_ATTEND_MAX];
    const float *bias[SM_ATTEND_MAX];
    for (size_t g = 0; g < h->n; g++) set_range(a, d->t, d->chunk, &lo[g], &hi[g]);
    set_slopes(a, h, position, d->chunk, slope, at);
    set_biases(a, h, position, d->chunk, bias);
    float *m = partial_of(a, d->t, d->kv_head, (size_t)(d->chunk - d->first));
    struct sm_attend call = {.q = local, .lo = lo, .hi = hi, .n_q = h->n, .m = m + h->first,
                             .l = m + a->group + h->first, .o = m + 2 * a->group + h->first * a->head,
                             .scratch = scratch, .next = next,
                             .slope = a->p->model->slopes != NULL ? slope : NULL, .at = at,
                             .bias = a->biases != NULL ? bias : NULL};
    set_pages(a, &call, seq_of(a, d->t), d->kv_head, d->chunk, end_of(a, d->t) - 1);
    a->p->model->kernels->attend(&call);
}

static void decode_item(void *context, size_t item, void *scratch, float *local) {
    const struct sm_attention *a = context;
    const struct decode d = decode_of(a, item);
    if (!a->across && d.chunk == a->p->batch->positions[d.t] / SM_CHUNK)
        store_kv(a, d.t, d.kv_head, local);
    /* Neighbouring items are taken one after the other, mostly. */
    const void *next = first_page(a, item + 1);
    struct heads h = {.kv_head = d.kv_head};
    while (next_heads(a, &h)) decode_heads(a, &d, &h, next, scratch, local);
}

/* Folds token t's chunks: out [n_head * head]. */
static const float *decode_row(const struct sm_source *s, size_t t, float *out) {
    const struct sm_attention *a = s->context;
    const struct sm_kernels *k = s->kernels;
    int position = a->p->batch->positions[t];
    size_t n_chunks = (size_t)((end_of(a, t) - 1) / SM_CHUNK - first_chunk(a, position) + 1);
    for (size_t h = 0; h < a->n_head_kv; h++)
        for (size_t g = 0; g < a->group; g++) {
            const float *first = partial_of(a, t, h, 0);
            float M = first[g], L = first[a->group + g];
            float *O = out + (h * a->group + g) * a->head;
            size_t c = 0;
            if (!begin_with_sink(a, h * a->group + g, &M, &L, O)) {
                memcpy(O, first + 2 * a->group + g * a->head, a->head * sizeof(float));
                c = 1;
            }
            for (; c < n_chunks; c++) {
                const float *next = partial_of(a, t, h, c);
                k->attend_fold(&M, &L, O, next[g], next[a->group + g],
                               next + 2 * a->group + g * a->head, a->head);
            }
            k->attend_finish(O, O, L, a->head);
        }
    return out;
}

/* ---- prefill ----------------------------------------------------------------------------------------------- */

static void store_item(void *context, size_t item, void *scratch, float *local) {
    const struct sm_attention *a = context;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, a->p->batch->n);
    (void)scratch;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++)
        for (size_t h = 0; h < a->n_head_kv; h++) store_kv(a, t, h, local);
}

/* One block of tokens: all its chunks, folded; the result replaces the queries. */
static void block_heads(const struct sm_attention *a, const struct sm_block *block,
                        const struct heads *h, void *scratch, float *local) {
    const struct sm_batch *batch = a->p->batch;
    const struct sm_kernels *k = a->p->model->kernels;
    const int *positions = batch->positions + block->first;
    size_t n = h->n, head = a->head;
    size_t rows = SM_ATTEND_MAX;
    float *q = local, *o = q + rows * head, *O = o + rows * head; /* [block->n * n][head] */
    float *m = O + rows * head, *l = m + rows, *M = l + rows, *L = M + rows; /* [block->n * n] */

    for (size_t i = 0; i < block->n; i++)
        make_queries(a, block->first + i, h, q + i * n * head);
    int first = first_chunk(a, positions[0]), last = end_of(a, block->first + block->n - 1) - 1;
    for (int chunk = first; chunk <= last / SM_CHUNK; chunk++) {
        /* Tokens that see the chunk lie together: windows and ends ascend. */
        size_t begin = 0, end = block->n;
        while (end_of(a, block->first + begin) <= chunk * SM_CHUNK) begin++;
        while (first_chunk(a, positions[end - 1]) > chunk) end--;
        if (begin >= end) continue;
        int16_t lo[SM_ATTEND_MAX], hi[SM_ATTEND_MAX];
        float slope[SM_ATTEND_MAX];
        int at[SM_ATTEND_MAX];
        const float *bias[SM_ATTEND_MAX];
        for (size_t i = begin; i < end; i++) {
            for (size_t g = 0; g < n; g++)
                set_range(a, block->first + i, chunk, &lo[i * n + g], &hi[i * n + g]);
            set_slopes(a, h, positions[i], chunk, slope + i * n, at + i * n);
            set_biases(a, h, positions[i], chunk, bias + i * n);
        }
        size_t from = begin * n;
        struct sm_attend call = {.q = q + from * head, .lo = lo + from, .hi = hi + from,
                                 .n_q = (end - begin) * n, .m = m + from, .l = l + from,
                                 .o = o + from * head, .scratch = scratch,
                                 .slope = a->p->model->slopes != NULL ? slope + from : NULL,
                                 .at = at + from,
                                 .bias = a->biases != NULL ? bias + from : NULL};
        set_pages(a, &call, seq_of(a, block->first), h->kv_head, chunk, last);
        k->attend(&call);
        for (size_t i = begin; i < end; i++)
            for (size_t r = i * n; r < (i + 1) * n; r++) {
                size_t q_head = first_head(a, h) + r % n;
                if (chunk == first_chunk(a, positions[i]) &&
                    !begin_with_sink(a, q_head, &M[r], &L[r], O + r * head)) {
                    M[r] = m[r];
                    L[r] = l[r];
                    memcpy(O + r * head, o + r * head, head * sizeof(float));
                } else {
                    k->attend_fold(&M[r], &L[r], O + r * head, m[r], l[r], o + r * head, head);
                }
            }
    }
    for (size_t i = 0; i < block->n; i++)
        for (size_t g = 0; g < n; g++)
            k->attend_finish(query_of(a, block->first + i, h) + g * head, O + (i * n + g) * head,
                             L[i * n + g], head);
}

static void block_item(void *context, size_t item, void *scratch, float *local) {
    const struct sm_attention *a = context;
    const struct sm_batch *batch = a->p->batch;
    /* Late blocks see the most: they go first. */
    const struct sm_block *block = &batch->blocks[batch->n_blocks - 1 - item / a->n_head_kv];
    struct heads h = {.kv_head = item % a->n_head_kv};
    while (next_heads(a, &h)) block_heads(a, block, &h, scratch, local);
}

/* ---- norms of all heads together --------------------------------------------------------------------------- */

static void norm_rows(void *context, size_t item, void *scratch, float *local) {
    const struct sm_attention *a = context;
    const struct sm_model *m = a->p->model;
    size_t kv_size = a->n_head_kv * a->head, q_size = a->group * kv_size;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, a->p->batch->n);
    (void)scratch;
    (void)local;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++) {
        float *q = a->p->buffers->q + t * q_size, *k = a->p->buffers->k + t * kv_size;
        sm_model_norm(m, q, q, a->weights->q_norm, NULL, q_size);
        sm_model_norm(m, k, k, a->weights->k_norm, NULL, kv_size);
    }
}

/* ---- the mixer --------------------------------------------------------------------------------------------- */

static struct sm_attention attention_of(const struct sm_pass *p, int layer) {
    const struct sm_hparams *h = &p->model->h;
    const struct sm_layer *weights = &p->model->layers[layer];
    return (struct sm_attention){.p = p, .layer = weights->plan.rank, .weights = weights,
                                 .biases = weights->biases,
                                 .group = (size_t)(h->n_head / h->n_head_kv),
                                 .head = (size_t)h->head, .n_head_kv = (size_t)h->n_head_kv};
}

static size_t n_items(const struct sm_pass *p) {
    return (p->batch->n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM;
}

/* From q, and K and V in the cache or, of the tokens themselves, still in k and v. */
static void run(struct sm_attention *a, struct sm_source *out) {
    const struct sm_pass *p = a->p;
    const struct sm_batch *batch = p->batch;
    size_t q_size = a->group * a->n_head_kv * a->head;
    if (batch->alone) {
        for (size_t t = 0; t < batch->n; t++) {
            int first = first_chunk(a, batch->positions[t]);
            size_t n_chunks = (size_t)((end_of(a, t) - 1) / SM_CHUNK - first + 1);
            a->items_before[t + 1] = a->items_before[t] + n_chunks * a->n_head_kv;
        }
        sm_ops_each(p->ops, SM_TIMER_ATTENTION, a->items_before[batch->n], decode_item, a);
        *out = (struct sm_source){.row = decode_row, .kernels = p->model->kernels, .context = a,
                                  .k = q_size};
    } else {
        if (!a->across) sm_ops_each(p->ops, SM_TIMER_ATTENTION, n_items(p), store_item, a);
        sm_ops_each(p->ops, SM_TIMER_ATTENTION, batch->n_blocks * a->n_head_kv, block_item, a);
        *out = sm_source_rows(p->buffers->q, q_size, q_size);
    }
}

void sm_mixer_attention(const struct sm_pass *p, int layer, struct sm_attention *a,
                        struct sm_source *out) {
    *a = attention_of(p, layer);
    if (p->model->arch->qk_norm == SM_QK_NORM_ROW)
        sm_ops_each(p->ops, SM_TIMER_ATTENTION, n_items(p), norm_rows, a);
    run(a, out);
}

void sm_mixer_attention_across(const struct sm_pass *p, int layer, struct sm_attention *a,
                               struct sm_source *out) {
    *a = attention_of(p, layer);
    a->across = true;
    a->biases = NULL;
    run(a, out);
}

void sm_mixer_attention_store(const struct sm_pass *p, int layer) {
    struct sm_attention a = attention_of(p, layer);
    sm_ops_each(p->ops, SM_TIMER_ATTENTION, n_items(p), store_item, &a);
}
