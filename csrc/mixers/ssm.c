/* Selective state space (Mamba 2).
 *
 * mix rows: [z: inner][x: inner][b: groups * states][c: groups * states][time step: heads],
 * inner = heads * head.  A sequence's state in a layer is the convolution's (conv.c), then
 * [heads][states][head].  A head's tokens follow each other in one thread, ascending, and nothing of
 * a token's step depends on where a pass began: any cut of a text gives the same bits.
 *
 *     x, b, c = silu(conv(x, b, c))
 *     dt = softplus(time step + bias)
 *     h = exp(dt a) h + dt x b^T;  y = c h + d x           for each head
 *     y = norm(y * silu(z))                                 for each group */
#include "../forward.h"
#include "../mathx.h"

struct scan {
    const struct sm_pass *p;
    const struct sm_layer *layer;
    size_t inner, head, n_head, n_state, n_group, stride, state_at;
};

/* log(1 + e^x).  Beyond 20 either way one of the two terms alone is it, in float. */
static double softplus(double x) {
    if (x > 20) return x;
    double e = sm_exp(x);
    return x < -20 ? e : sm_log(1 + e);
}

/* One head of one sequence: its tokens in their order. */
static void scan_item(void *context, size_t index, void *scratch, float *local) {
    const struct scan *s = context;
    const struct sm_run *run = &s->p->batch->runs[index / s->n_head];
    const struct sm_layer *layer = s->layer;
    size_t h = index % s->n_head, at = s->state_at + h * s->n_state * s->head;
    size_t group = h / (s->n_head / s->n_group);
    (void)scratch;
    (void)local;
    float *first = (run->mid != NULL ? run->mid : run->to) + at;
    const float *from = first;
    if (run->from != NULL) from = run->from + at;
    else memset(first, 0, s->n_state * s->head * sizeof(float));
    for (size_t t = 0; t < run->n; t++) {
        float *row = s->p->buffers->mix + (run->first + t) * s->stride;
        float *x = row + s->inner + h * s->head;
        const float *b = row + 2 * s->inner + group * s->n_state;
        const float *c = b + s->n_group * s->n_state;
        double step = row[s->stride - s->n_head + h];
        float dt = (float)softplus(step + (double)layer->ssm_dt_b[h]);
        float *to = t + 1 == run->n ? run->to + at : first;
        const struct sm_ssm_step call = {
            .y = x, .to = to, .from = from, .x = x, .b = b, .c = c, .dt = dt,
            .decay = (float)sm_exp((double)dt * (double)layer->ssm_a[h]),
            .skip = layer->ssm_d[h], .head = s->head, .n_state = s->n_state,
        };
        s->p->model->kernels->ssm_step(&call);
        from = to;
    }
}

/* norm(y * silu(z)) of token t, each group by itself */
static const float *gated_row(const struct sm_source *source, size_t t, float *room) {
    const struct sm_model *m = source->context;
    const float *z = source->x + t * source->stride, *weight = source->weight;
    size_t n = source->k / (size_t)m->h.ssm_group;
    m->kernels->swiglu(room, z, z + source->k, source->k);
    for (size_t at = 0; at < source->k; at += n)
        m->kernels->rms_norm(room + at, room + at, weight + at, n, source->eps);
    return room;
}

void sm_mixer_ssm(const struct sm_pass *p, int layer, struct sm_source *out) {
    const struct sm_model *m = p->model;
    const struct sm_hparams *h = &m->h;
    struct scan s = {
        .p = p, .layer = &m->layers[layer], .inner = (size_t)sm_mixer_out(h),
        .head = (size_t)h->ssm_head, .n_head = (size_t)h->n_ssm_head,
        .n_state = (size_t)h->ssm_state, .n_group = (size_t)h->ssm_group,
        .stride = (size_t)sm_mixer_in(h),
        .state_at = sm_cache_state(p->cache, m->layers[layer].plan.rank) +
                    (size_t)(h->conv_kernel - 1) * (size_t)h->conv_width,
    };
    const struct sm_convolution c = {.rows = p->buffers->mix + s.inner, .stride = s.stride,
                                     .weight = s.layer->ssm_conv, .bias = s.layer->ssm_conv_b};
    sm_mixer_convolve(p, layer, &c);
    sm_ops_each(p->ops, SM_TIMER_MIXER, p->batch->n_runs * s.n_head, scan_item, &s);
    *out = (struct sm_source){.row = gated_row, .kernels = m->kernels, .context = m,
                              .x = p->buffers->mix, .stride = s.stride, .k = s.inner,
                              .weight = s.layer->ssm_norm, .eps = h->norm_eps};
}
