/* Causal convolution over the newest tokens: a mixer by itself, and the first half of a state space.
 *
 * A sequence's state is what the next token's convolution reads: the inputs of the last
 * conv_kernel - 1 tokens, [conv_kernel - 1][conv_width].  Nothing depends on how a text was cut:
 * each output is one sum over its taps, oldest first. */
#include "../forward.h"

#define CHANNELS 128 /* of an item: a row's part that stays in the first cache */

struct walk {
    const struct sm_pass *p;
    const struct sm_convolution *c;
    size_t taps, width, n_parts, state_at; /* channels are cut into n_parts */
};

static const float zeros[CHANNELS];

/* Input of the run's token i, or of one before it: channels from `at` on. */
static const float *input(const struct walk *w, const struct sm_run *run, ptrdiff_t i, size_t at) {
    const struct sm_convolution *c = w->c;
    if (i >= 0) return c->rows + (run->first + (size_t)i) * c->stride + at;
    if (run->from == NULL) return zeros;
    return run->from + w->state_at + (w->taps - 1 - (size_t)-i) * w->width + at;
}

/* The state after n tokens of the run. */
static void save(const struct walk *w, const struct sm_run *run, float *state, size_t n_tokens,
                 size_t at, size_t n) {
    for (size_t r = 0; r + 1 < w->taps; r++)
        memcpy(state + w->state_at + r * w->width + at,
               input(w, run, (ptrdiff_t)(n_tokens + r) - (ptrdiff_t)(w->taps - 1), at),
               n * sizeof(float));
}

static void item(void *context, size_t index, void *scratch, float *local) {
    const struct walk *w = context;
    const struct sm_convolution *c = w->c;
    const struct sm_kernels *k = w->p->model->kernels;
    const struct sm_run *run = &w->p->batch->runs[index / w->n_parts];
    size_t at = index % w->n_parts * CHANNELS, n = SM_MIN(CHANNELS, w->width - at);
    (void)scratch;
    (void)local;
    /* x = b * x */
    for (size_t t = run->first; c->gates && t < run->first + run->n; t++) {
        float *x = c->rows + t * c->stride + at;
        const float *b = x - 2 * w->width;
        for (size_t i = 0; i < n; i++) x[i] *= b[i];
    }
    if (run->mid != NULL) save(w, run, run->mid, run->n - 1, at, n);
    save(w, run, run->to, run->n, at, n);
    /* y_t = sum over j of w_j x_(t - taps + 1 + j) + bias, in place: the last token first, since
     * earlier ones are read by it */
    for (size_t t = run->n; t-- > 0;) {
        const float *x[SM_TAPS_MAX];
        for (size_t j = 0; j < w->taps; j++)
            x[j] = input(w, run, (ptrdiff_t)(t + j) - (ptrdiff_t)(w->taps - 1), at);
        float *y = c->rows + (run->first + t) * c->stride + at;
        k->conv(y, x, c->weight + at, w->width, c->bias != NULL ? c->bias + at : NULL, w->taps, n);
        if (c->gates) { /* y = c * y */
            const float *gate = y - w->width;
            for (size_t i = 0; i < n; i++) y[i] *= gate[i];
        } else { /* y = silu(y) */
            k->silu(y, y, n);
        }
    }
}

void sm_mixer_convolve(const struct sm_pass *p, int layer, const struct sm_convolution *c) {
    const struct sm_hparams *h = &p->model->h;
    struct walk w = {.p = p, .c = c, .taps = (size_t)h->conv_kernel, .width = (size_t)h->conv_width,
                     .state_at = sm_cache_state(p->cache, p->model->layers[layer].plan.rank)};
    w.n_parts = (w.width + CHANNELS - 1) / CHANNELS;
    sm_ops_each(p->ops, SM_TIMER_MIXER, p->batch->n_runs * w.n_parts, item, &w);
}

/* mix rows: [b][c][x], each n_embd */
void sm_mixer_conv(const struct sm_pass *p, int layer, struct sm_source *out) {
    size_t width = (size_t)p->model->h.conv_width;
    const struct sm_convolution c = {.rows = p->buffers->mix + 2 * width, .stride = 3 * width,
                                     .weight = p->model->layers[layer].conv, .gates = true};
    sm_mixer_convolve(p, layer, &c);
    *out = sm_source_rows(c.rows, c.stride, width);
}
