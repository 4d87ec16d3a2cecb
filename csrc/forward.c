/* The transformer, from top to bottom.
 *
 * Knows the mathematics and nothing of threads, instruction sets, weight formats or model names.
 * Shapes: n tokens; x [n][n_embd]; q [n][n_head * head]; k, v [n][n_head_kv * head]; h [n][n_ff]. */
#include "forward.h"

#include "mathx.h"

#define TOKENS_PER_ITEM 8

/* x_t = E[token_t];  (cos, sin)_t[i] of the angle position_t * freq_i */
static void embed_tokens(void *context, size_t item, void *scratch, float *local) {
    const struct sm_pass *p = context;
    const struct sm_model *m = p->model;
    size_t half = (size_t)m->h.n_rot / 2, n_embd = (size_t)m->h.n_embd;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, p->batch->n);
    (void)scratch;
    (void)local;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++) {
        int status = sm_model_embed(m, p->batch->tokens[t], p->buffers->x + t * n_embd, NULL);
        if (status != SMALLM_OK) sm_ops_fail(p->ops, status);
        for (size_t i = 0; i < half; i++) {
            double s, c;
            sm_sincos(p->batch->positions[t] * m->rope_freqs[i], &s, &c);
            p->buffers->cos[t * half + i] = (float)c;
            p->buffers->sin[t * half + i] = (float)s;
        }
    }
}

/* norm(x), of the model's kind */
static struct sm_source norm(const struct sm_model *m, const float *x, const float *weight,
                             const float *bias) {
    size_t n_embd = (size_t)m->h.n_embd;
    if (m->arch->norm == SM_NORM_LAYER)
        return sm_source_layer_norm(m->kernels, x, n_embd, n_embd, weight, bias, m->h.norm_eps);
    return sm_source_rms_norm(m->kernels, x, n_embd, n_embd, weight, m->h.norm_eps);
}

/* h = silu(W_gate s + b_gate) * (W_up s + b_up), or gelu(W_up s + b_up) */
static void expand(const struct sm_pass *p, const struct sm_layer *layer, const struct sm_source *s) {
    size_t n = p->batch->n, n_ff = (size_t)p->model->h.n_ff;
    const struct sm_product gate = {.w = &layer->w_gate, .bias = layer->b_gate};
    const struct sm_product up = {.w = &layer->w_up, .bias = layer->b_up, .out = p->buffers->h,
                                  .stride = n_ff, .gelu = true};
    switch (p->model->arch->ffn) {
    case SM_FFN_SWIGLU: sm_ops_gated(p->ops, n, s, &gate, &up, p->buffers->h, n_ff); break;
    case SM_FFN_GELU: sm_ops_project(p->ops, n, s, &up, 1); break;
    }
}

static void run_layer(const struct sm_pass *p, int index) {
    const struct sm_model *m = p->model;
    const struct sm_layer *layer = &m->layers[index];
    const struct sm_buffers *b = p->buffers;
    size_t n = p->batch->n, n_embd = (size_t)m->h.n_embd, n_ff = (size_t)m->h.n_ff;
    size_t q_size = (size_t)(m->h.n_head * m->h.head), kv_size = (size_t)(m->h.n_head_kv * m->h.head);

    /* q, k, v = W_q, W_k, W_v norm(x), each + b */
    struct sm_source normed = norm(m, b->x, layer->attn_norm, layer->attn_norm_b);
    const struct sm_product qkv[] = {
        {.w = &layer->wq, .bias = layer->bq, .out = b->q, .stride = q_size},
        {.w = &layer->wk, .bias = layer->bk, .out = b->k, .stride = kv_size},
        {.w = &layer->wv, .bias = layer->bv, .out = b->v, .stride = kv_size},
    };
    sm_ops_project(p->ops, n, &normed, qkv, SM_COUNT(qkv));

    /* parallel: the feed-forward reads the same norm(x), before attention adds to x */
    if (m->arch->parallel) expand(p, layer, &normed);

    /* x = x + W_o attention(rope(q), rope(k), v) + b_o */
    struct sm_attention attention;
    struct sm_source attended;
    sm_mixer_attention(p, index, &attention, &attended);
    const struct sm_product o = {.w = &layer->wo, .bias = layer->bo, .out = b->x, .stride = n_embd,
                                 .add = true};
    sm_ops_project(p->ops, n, &attended, &o, 1);

    /* x = x + W_down expand(norm(x)) + b_down */
    if (!m->arch->parallel) {
        normed = norm(m, b->x, layer->ffn_norm, layer->ffn_norm_b);
        if (m->h.n_expert > 0) {
            sm_feed_experts(p, layer, &normed);
            return;
        }
        expand(p, layer, &normed);
    }
    struct sm_source hidden = sm_source_rows(b->h, n_ff, n_ff);
    const struct sm_product down = {.w = &layer->w_down, .bias = layer->b_down, .out = b->x,
                                    .stride = n_embd, .add = true};
    sm_ops_project(p->ops, n, &hidden, &down, 1);
}

void sm_forward(const struct sm_pass *p) {
    const struct sm_model *m = p->model;
    const struct sm_batch *batch = p->batch;
    size_t n_embd = (size_t)m->h.n_embd;
    sm_ops_each(p->ops, SM_TIMER_EMBED, (batch->n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, embed_tokens,
                (void *)p);
    for (int i = 0; i < m->h.n_layer; i++) run_layer(p, i);

    /* logits = W_head norm(x) + b_head, of the wanted tokens only */
    if (batch->n_wanted == 0 || sm_ops_status(p->ops) != SMALLM_OK) return;
    for (size_t i = 0; i < batch->n_wanted; i++)
        memcpy(p->buffers->wanted + i * n_embd, p->buffers->x + batch->wanted[i] * n_embd,
               n_embd * sizeof(float));
    struct sm_source normed = norm(m, p->buffers->wanted, m->output_norm, m->output_norm_b);
    const struct sm_product head = {.w = &m->head, .bias = m->head_bias, .rows = batch->logits,
                                    .peaks = batch->peaks, .allowed = batch->allowed};
    sm_ops_project_fine(p->ops, batch->n_wanted, &normed, &head);
}
