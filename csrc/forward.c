/* The transformer, from top to bottom.
 *
 * Knows the mathematics and nothing of threads, instruction sets, weight formats or model names.
 * Shapes: n tokens; x, y [n][n_embd]; q [n][n_head * head]; k, v [n][n_head_kv * head]; h [n][n_ff]. */
#include "forward.h"

#include <math.h>

#include "mathx.h"

#define TOKENS_PER_ITEM 8

/* x_t = scale E[token_t], + P[position_t] where positions are learned, + T[0] where texts have kinds,
 * normed where there is such a norm;
 * (cos, sin)_t[i] = magnitude (cos, sin)(position_t * freq_i), for each table of frequencies */
static void embed_tokens(void *context, size_t item, void *scratch, float *local) {
    const struct sm_pass *p = context;
    const struct sm_model *m = p->model;
    size_t n_pairs = (size_t)m->h.n_rot / 2, n_angles = (size_t)m->h.n_rope * n_pairs;
    size_t n_embd = (size_t)m->h.n_embd;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, p->batch->n);
    (void)scratch;
    (void)local;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++) {
        float *x = p->buffers->x + t * n_embd;
        int status = sm_model_embed(m, p->batch->tokens[t], x, NULL);
        if (status != SMALLM_OK) sm_ops_fail(p->ops, status);
        if (m->h.embed_scale != 1) m->kernels->scale(x, x, m->h.embed_scale, n_embd);
        size_t position = (size_t)p->batch->positions[t];
        if (m->positions != NULL) m->kernels->add(x, m->positions + position * n_embd, n_embd);
        if (m->types != NULL) m->kernels->add(x, m->types, n_embd);
        if (m->embed_norm != NULL) sm_model_norm(m, x, x, m->embed_norm, m->embed_norm_b, n_embd);
        for (size_t i = 0; i < n_angles; i++) {
            double s, c, magnitude = m->rope_magnitude[i / n_pairs];
            sm_sincos((double)position * p->buffers->freqs[i], &s, &c);
            p->buffers->cos[t * n_angles + i] = (float)(magnitude * c);
            p->buffers->sin[t * n_angles + i] = (float)(magnitude * s);
        }
    }
}

/* norm(x), of the model's kind; x itself where there is no such norm */
static struct sm_source norm(const struct sm_model *m, const float *x, const float *weight,
                             const float *bias) {
    size_t n_embd = (size_t)m->h.n_embd;
    if (weight == NULL) return sm_source_rows(x, n_embd, n_embd);
    if (m->arch->norm == SM_NORM_RMS)
        return sm_source_rms_norm(m->kernels, x, n_embd, n_embd, weight, m->h.norm_eps);
    return sm_source_layer_norm(m->kernels, x, n_embd, n_embd, weight, bias, m->h.norm_eps);
}

/* x_t = x_t + norm(y_t) */
struct add_normed {
    const struct sm_pass *p;
    const float *weight;
};
static void add_normed(void *context, size_t item, void *scratch, float *local) {
    const struct add_normed *a = context;
    const struct sm_model *m = a->p->model;
    size_t n_embd = (size_t)m->h.n_embd;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, a->p->batch->n);
    (void)scratch;
    (void)local;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++) {
        float *y = a->p->buffers->y + t * n_embd;
        sm_model_norm(m, y, y, a->weight, NULL, n_embd);
        m->kernels->add(a->p->buffers->x + t * n_embd, y, n_embd);
    }
}

/* x = x + scale (W s + b), or x + norm(W s + b) where there is a norm */
static void add_product(const struct sm_pass *p, const struct sm_source *s, const struct sm_matrix *w,
                        const float *bias, const float *norm) {
    size_t n = p->batch->n;
    const struct sm_product product = {.w = w, .bias = bias, .stride = (size_t)p->model->h.n_embd,
                                       .out = norm != NULL ? p->buffers->y : p->buffers->x,
                                       .add = norm == NULL, .scale = p->model->h.residual_scale};
    sm_ops_project(p->ops, n, s, &product, 1);
    if (norm == NULL) return;
    struct add_normed add = {p, norm};
    sm_ops_each(p->ops, SM_TIMER_FINISH, (n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, add_normed, &add);
}

/* x_t = norm(x_t), where there is such a norm */
struct norm_sum {
    const struct sm_pass *p;
    const float *weight, *bias;
};
static void norm_sum_item(void *context, size_t item, void *scratch, float *local) {
    const struct norm_sum *a = context;
    const struct sm_model *m = a->p->model;
    size_t n_embd = (size_t)m->h.n_embd;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, a->p->batch->n);
    (void)scratch;
    (void)local;
    for (size_t t = item * TOKENS_PER_ITEM; t < end; t++) {
        float *x = a->p->buffers->x + t * n_embd;
        sm_model_norm(m, x, x, a->weight, a->bias, n_embd);
    }
}
static void norm_sum(const struct sm_pass *p, const float *weight, const float *bias) {
    if (weight == NULL) return;
    struct norm_sum a = {p, weight, bias};
    sm_ops_each(p->ops, SM_TIMER_FINISH, (p->batch->n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM,
                norm_sum_item, &a);
}

/* h = gated(W_gate s + b_gate, W_up s + b_up), as silu(gate) * up, or a gelu, or the positive part or
 * its square, of W_up s + b_up */
static void expand(const struct sm_pass *p, const struct sm_layer *layer, const struct sm_source *s) {
    size_t n = p->batch->n, n_ff = (size_t)p->model->h.n_ff;
    const struct sm_kernels *k = p->model->kernels;
    sm_gated_fn *gated = sm_model_gate(p->model);
    const struct sm_product gate = {.w = &layer->w_gate, .bias = layer->b_gate};
    struct sm_product up = {.w = &layer->w_up, .bias = layer->b_up, .out = p->buffers->h,
                            .stride = n_ff};
    if (gated != NULL) {
        sm_ops_gated(p->ops, n, s, &gate, &up, gated, up.out, n_ff);
        return;
    }
    switch (p->model->h.ffn) {
    case SM_FFN_GELU: up.apply = k->gelu; break;
    case SM_FFN_RELU: up.apply = k->relu; break;
    case SM_FFN_RELU2: up.apply = k->relu2; break;
    default: up.apply = k->gelu_erf;
    }
    sm_ops_project(p->ops, n, s, &up, 1);
}

/* norm(s), or s itself where there is no such norm */
static struct sm_source sub_norm(const struct sm_model *m, const struct sm_source *s,
                                 const float *weight) {
    return weight == NULL ? *s : sm_source_rms_norm_of(m->kernels, s, weight, m->h.norm_eps);
}

/* h -> x = x + W_down norm(h) + b_down */
static void contract(const struct sm_pass *p, const struct sm_layer *layer) {
    size_t n_ff = (size_t)p->model->h.n_ff;
    struct sm_source hidden = sm_source_rows(p->buffers->h, n_ff, n_ff);
    struct sm_source normed = sub_norm(p->model, &hidden, layer->ffn_sub_norm);
    add_product(p, &normed, &layer->w_down, layer->b_down, layer->post_ffn_norm);
    norm_sum(p, layer->ffn_sum_norm, layer->ffn_sum_norm_b);
}

/* x = x + W_o norm(attention(W_q s + b_q, W_k s + b_k, W_v s + b_v)) + b_o; the norm where there is one */
static void attend(const struct sm_pass *p, int index, const struct sm_source *s) {
    const struct sm_hparams *h = &p->model->h;
    const struct sm_layer *layer = &p->model->layers[index];
    const struct sm_buffers *b = p->buffers;
    size_t q_size = (size_t)(h->n_head * h->head), kv_size = (size_t)(h->n_head_kv * h->head);
    const struct sm_product qkv[] = {
        {.w = &layer->wq, .bias = layer->bq, .out = b->q, .stride = q_size},
        {.w = &layer->wk, .bias = layer->bk, .out = b->k, .stride = kv_size},
        {.w = &layer->wv, .bias = layer->bv, .out = b->v, .stride = kv_size},
    };
    sm_ops_project(p->ops, p->batch->n, s, qkv, SM_COUNT(qkv));
    struct sm_attention attention;
    struct sm_source attended;
    sm_mixer_attention(p, index, &attention, &attended);
    struct sm_source normed = sub_norm(p->model, &attended, layer->attn_sub_norm);
    add_product(p, &normed, &layer->wo, layer->bo, layer->post_attn_norm);
    norm_sum(p, layer->attn_sum_norm, layer->attn_sum_norm_b);
}

/* x = x + W_o attention(W_q s, K, V), with the K and V that the encoder left to this layer */
static void attend_across(const struct sm_pass *p, int index, const struct sm_source *s) {
    const struct sm_layer *layer = &p->model->layers[index];
    const struct sm_product q = {.w = &layer->cross_q, .out = p->buffers->q,
                                 .stride = (size_t)(p->model->h.n_head * p->model->h.head)};
    sm_ops_project(p->ops, p->batch->n, s, &q, 1);
    struct sm_attention attention;
    struct sm_source attended;
    sm_mixer_attention_across(p, index, &attention, &attended);
    add_product(p, &attended, &layer->cross_o, NULL, NULL);
}

/* x = x + W_out conv(W_in s), or a state space in place of the convolution */
static void recur(const struct sm_pass *p, int index, const struct sm_source *s) {
    const struct sm_layer *layer = &p->model->layers[index];
    bool scans = layer->plan.mixer == SM_MIXER_SSM;
    const struct sm_product in = {.w = scans ? &layer->ssm_in : &layer->conv_in, .out = p->buffers->mix,
                                  .stride = (size_t)sm_mixer_in(&p->model->h)};
    sm_ops_project(p->ops, p->batch->n, s, &in, 1);
    struct sm_source mixed;
    (scans ? sm_mixer_ssm : sm_mixer_conv)(p, index, &mixed);
    add_product(p, &mixed, scans ? &layer->ssm_out : &layer->conv_out, NULL, layer->post_attn_norm);
}

/* x = x + mix(norm(x)); beside an encoder x = x + attend_across(norm(x)); x = x + feed(norm(x)), where
 * there is a feed-forward; parallel: both norms
 * are of the same x, and the feed-forward's is the mixer's where it has none of its own */
static void run_layer(const struct sm_pass *p, int index) {
    const struct sm_model *m = p->model;
    const struct sm_layer *layer = &m->layers[index];
    const float *x = p->buffers->x;
    struct sm_source mixed = norm(m, x, layer->attn_norm, layer->attn_norm_b);
    struct sm_source fed = layer->parallel && layer->ffn_norm == NULL
                               ? mixed
                               : norm(m, x, layer->ffn_norm, layer->ffn_norm_b);
    if (layer->parallel) expand(p, layer, &fed); /* before attention adds to x */
    if (layer->plan.mixer == SM_MIXER_ATTENTION) attend(p, index, &mixed);
    else recur(p, index, &mixed);
    if (layer->cross_norm != NULL) {
        struct sm_source crossed = norm(m, x, layer->cross_norm, NULL);
        attend_across(p, index, &crossed);
    }
    if (layer->w_down.n_rows == 0 && m->h.n_expert == 0) return;
    if (m->h.n_expert > 0) {
        sm_feed_experts(p, layer, &fed);
        return;
    }
    if (!layer->parallel) expand(p, layer, &fed);
    contract(p, layer);
}

/* The encoder's layers, of which each keeps its K and V where the last one did; then, for every layer of
 * the decoder, K = W_k norm(x), V = W_v norm(x) */
static void encode(const struct sm_pass *p) {
    const struct sm_model *m = p->model;
    size_t stride = (size_t)(m->h.n_head_kv * m->h.head);
    for (int i = m->h.n_layer; i < m->h.n_layer + m->h.n_encoder; i++) run_layer(p, i);
    struct sm_source normed = norm(m, p->buffers->x, m->encoder_norm, NULL);
    for (int i = 0; i < m->h.n_layer; i++) {
        const struct sm_product kv[] = {
            {.w = &m->layers[i].cross_k, .out = p->buffers->k, .stride = stride},
            {.w = &m->layers[i].cross_v, .out = p->buffers->v, .stride = stride},
        };
        sm_ops_project(p->ops, p->batch->n, &normed, kv, SM_COUNT(kv));
        sm_mixer_attention_store(p, i);
    }
}

/* state_t = norm(x_t), or x_t where layers end with a norm */
static void hand_states(void *context, size_t item, void *scratch, float *local) {
    const struct sm_pass *p = context;
    const struct sm_model *m = p->model;
    size_t n_embd = (size_t)m->h.n_embd;
    size_t end = SM_MIN((item + 1) * TOKENS_PER_ITEM, p->batch->n_hidden);
    (void)scratch;
    (void)local;
    for (size_t i = item * TOKENS_PER_ITEM; i < end; i++) {
        const float *x = p->buffers->x + p->batch->hidden[i] * n_embd;
        float *state = p->batch->states[i];
        if (m->output_norm == NULL) memcpy(state, x, n_embd * sizeof(float));
        else sm_model_norm(m, state, x, m->output_norm, m->output_norm_b, n_embd);
        for (size_t d = 0; d < n_embd; d++)
            if (!isfinite(state[d])) sm_ops_fail(p->ops, SMALLM_E_NUMERIC);
    }
}

void sm_forward(const struct sm_pass *p) {
    const struct sm_model *m = p->model;
    const struct sm_batch *batch = p->batch;
    size_t n_embd = (size_t)m->h.n_embd;
    sm_ops_each(p->ops, SM_TIMER_EMBED, (batch->n + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM, embed_tokens,
                (void *)p);
    if (batch->encodes) {
        encode(p);
        return;
    }
    for (int i = 0; i < m->h.n_layer; i++) run_layer(p, i);
    if (batch->n_hidden > 0)
        sm_ops_each(p->ops, SM_TIMER_FINISH, (batch->n_hidden + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM,
                    hand_states, (void *)p);

    /* logits = softcap(scale (W_head norm(x) + b_head)), of the wanted tokens only */
    if (batch->n_wanted == 0 || sm_ops_status(p->ops) != SMALLM_OK) return;
    for (size_t i = 0; i < batch->n_wanted; i++)
        memcpy(p->buffers->wanted + i * n_embd, p->buffers->x + batch->wanted[i] * n_embd,
               n_embd * sizeof(float));
    struct sm_source normed = norm(m, p->buffers->wanted, m->output_norm, m->output_norm_b);
    const struct sm_product head = {.w = &m->head, .bias = m->head_bias, .rows = batch->logits,
                                    .peaks = batch->peaks, .allowed = batch->allowed,
                                    .scale = m->h.logit_scale, .cap = m->h.logit_cap};
    sm_ops_project_fine(p->ops, batch->n_wanted, &normed, &head);
}
