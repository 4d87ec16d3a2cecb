/* The feed-forward of experts: which expert gets which token, and with what weight.
 *
 *     l = W_router s + b               the router's logits, one for each expert
 *     x += r sum over the chosen e, ascending, of p_e FF_e(s)     p: kernels.h, route
 *     x += r g FF_shared(s)            g = sigmoid(w_shared s), or 1 where there is no w_shared
 *
 * r is the model's residual_scale, a factor of the weights.
 *
 * A token's choice depends on that token alone, and its sum is over experts in the order of their
 * ids: neither knows what else is in the batch. */
#include "forward.h"

#define TOKENS_PER_ITEM 8
#define FEW 16 /* tokens that are gone through on the spot: sooner done than a phase */

struct sm_router {
    float *s;            /* [n][n_embd] what all experts read, while their results change x */
    float *logits;       /* [n][n_expert] */
    float *chosen;       /* [n][n_used] weights */
    float *shared;       /* [n] logits of the shared expert, then its weights */
    float *weights;      /* [n * n_used] by slot */
    size_t *first;       /* [n_expert + 1] */
    uint32_t *tokens;    /* [n * n_used] by slot */
    uint32_t *all;       /* [n] 0, 1, 2, ...: the shared expert's tokens */
    uint16_t *ids;       /* [n][n_used] ascending */
    uint8_t *memory;
    size_t n_bytes;
};

int sm_router_new(const struct sm_hparams *h, size_t n_tokens, struct sm_router **out,
                  smallm_error *err) {
    size_t n_slots = n_tokens * (size_t)h->n_used, n_expert = (size_t)h->n_expert;
    *out = NULL;
    struct sm_router *r = sm_calloc(1, sizeof *r);
    if (r == NULL) return sm_fail(err, SMALLM_E_MEMORY, "no memory for the router");
    struct {
        void **at;
        size_t bytes;
    } const parts[] = {
        {(void **)&r->s, n_tokens * (size_t)h->n_embd * sizeof r->s[0]},
        {(void **)&r->logits, n_tokens * n_expert * sizeof r->logits[0]},
        {(void **)&r->chosen, n_slots * sizeof r->chosen[0]},
        {(void **)&r->shared, n_tokens * sizeof r->shared[0]},
        {(void **)&r->weights, n_slots * sizeof r->weights[0]},
        {(void **)&r->first, (n_expert + 1) * sizeof r->first[0]},
        {(void **)&r->tokens, n_slots * sizeof r->tokens[0]},
        {(void **)&r->all, n_tokens * sizeof r->all[0]},
        {(void **)&r->ids, n_slots * sizeof r->ids[0]},
    };
    for (size_t i = 0; i < SM_COUNT(parts); i++) r->n_bytes += sm_round_up(parts[i].bytes, SM_ALIGN);
    r->memory = sm_alloc(r->n_bytes);
    if (r->memory == NULL) {
        sm_free(r);
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for the router of %zu tokens", n_tokens);
    }
    uint8_t *at = r->memory;
    for (size_t i = 0; i < SM_COUNT(parts); i++) {
        *parts[i].at = at;
        at += sm_round_up(parts[i].bytes, SM_ALIGN);
    }
    for (size_t t = 0; t < n_tokens; t++) r->all[t] = (uint32_t)t;
    *out = r;
    return SMALLM_OK;
}

void sm_router_free(struct sm_router *r) {
    if (r == NULL) return;
    sm_free(r->memory);
    sm_free(r);
}

uint64_t sm_router_bytes(const struct sm_router *r) { return r == NULL ? 0 : r->n_bytes; }

/* What a phase over the tokens needs. */
struct walk {
    const struct sm_pass *p;
    const struct sm_source *s;
    void (*run)(const struct walk *w, size_t begin, size_t end); /* tokens begin .. end - 1 */
};

static void walk_item(void *context, size_t item, void *scratch, float *local) {
    const struct walk *w = context;
    (void)scratch;
    (void)local;
    w->run(w, item * TOKENS_PER_ITEM, SM_MIN((item + 1) * TOKENS_PER_ITEM, w->p->batch->n));
}

static void walk(const struct sm_pass *p, const struct sm_source *s,
                 void (*run)(const struct walk *w, size_t begin, size_t end), enum sm_timer timer) {
    struct walk w = {.p = p, .s = s, .run = run};
    size_t n = p->batch->n;
    if (sm_ops_status(p->ops) != SMALLM_OK) return;
    if (n <= FEW)
        run(&w, 0, n);
    else
        sm_ops_each(p->ops, timer, (n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, walk_item, &w);
}

static void read_rows(const struct walk *w, size_t begin, size_t end) {
    size_t n_embd = (size_t)w->p->model->h.n_embd;
    for (size_t t = begin; t < end; t++) {
        float *room = w->p->buffers->router->s + t * n_embd;
        const float *row = w->s->row(w->s, t, room);
        if (row != room) memcpy(room, row, n_embd * sizeof *row);
    }
}

static void choose(const struct walk *w, size_t begin, size_t end) {
    const struct sm_pass *p = w->p;
    const struct sm_hparams *h = &p->model->h;
    const struct sm_router *r = p->buffers->router;
    size_t n_used = (size_t)h->n_used, n_expert = (size_t)h->n_expert;
    for (size_t t = begin; t < end; t++)
        if (!p->model->kernels->route(r->ids + t * n_used, r->chosen + t * n_used, n_used,
                                      r->logits + t * n_expert, n_expert,
                                      h->router == SM_ROUTER_CHOSEN,
                                      h->expert_scale * h->residual_scale))
            sm_ops_fail(p->ops, SMALLM_E_NUMERIC);
}

/* Slots by expert, then by token, of what the tokens chose. */
static void sort_slots(struct sm_router *r, size_t n, size_t n_used, size_t n_expert) {
    memset(r->first, 0, (n_expert + 1) * sizeof r->first[0]);
    for (size_t i = 0; i < n * n_used; i++) r->first[r->ids[i] + 1]++;
    for (size_t e = 0; e < n_expert; e++) r->first[e + 1] += r->first[e];
    for (size_t i = 0; i < n * n_used; i++) {
        size_t slot = r->first[r->ids[i]]++;
        r->tokens[slot] = (uint32_t)(i / n_used);
        r->weights[slot] = r->chosen[i];
    }
    memmove(r->first + 1, r->first, n_expert * sizeof r->first[0]); /* each stands at its end */
    r->first[0] = 0;
}

void sm_feed_experts(const struct sm_pass *p, const struct sm_layer *layer,
                     const struct sm_source *input) {
    const struct sm_model *m = p->model;
    const struct sm_buffers *b = p->buffers;
    struct sm_router *r = b->router;
    size_t n = p->batch->n, n_embd = (size_t)m->h.n_embd;
    size_t n_expert = (size_t)m->h.n_expert, n_used = (size_t)m->h.n_used;

    walk(p, input, read_rows, SM_TIMER_PREPARE);
    const struct sm_source s = sm_source_rows(r->s, n_embd, n_embd);
    const struct sm_product logits[] = {
        {.w = &layer->router, .bias = layer->b_router, .out = r->logits, .stride = n_expert},
        {.w = &layer->s_router, .out = r->shared, .stride = 1},
    };
    sm_ops_project(p->ops, n, &s, logits, m->arch->shared_gate ? 2 : 1);
    walk(p, NULL, choose, SM_TIMER_FINISH);
    if (sm_ops_status(p->ops) != SMALLM_OK) return;
    sort_slots(r, n, n_used, n_expert);

    sm_gated_fn *gated = sm_model_gate(m);
    const struct sm_experts experts = {
        .n = n_expert, .n_ff = (size_t)m->h.n_ff_expert, .n_embd = n_embd,
        .gate = &layer->x_gate, .up = &layer->x_up, .down = &layer->x_down,
        .b_gate = layer->bx_gate, .b_up = layer->bx_up, .b_down = layer->bx_down, .gated = gated,
    };
    const struct sm_routing chosen = {.first = r->first, .tokens = r->tokens, .weights = r->weights};
    sm_ops_experts(p->ops, n, &s, &experts, &chosen, b->h, b->x, n_embd);
    if (m->h.n_ff_shared == 0) return;

    for (size_t t = 0; t < n && !m->arch->shared_gate; t++) r->shared[t] = 1;
    if (m->arch->shared_gate) m->kernels->sigmoid(r->shared, r->shared, n);
    m->kernels->scale(r->shared, r->shared, m->h.residual_scale, n);
    const struct sm_experts all_use = {
        .n = 1, .n_ff = (size_t)m->h.n_ff_shared, .n_embd = n_embd,
        .gate = &layer->s_gate, .up = &layer->s_up, .down = &layer->s_down, .gated = gated,
    };
    const size_t first[] = {0, n};
    const struct sm_routing every = {.first = first, .tokens = r->all, .weights = r->shared};
    sm_ops_experts(p->ops, n, &s, &all_use, &every, b->h, b->x, n_embd);
}
