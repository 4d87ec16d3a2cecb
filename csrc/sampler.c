/* Logits -> token.  Owns the random state, the window of recent tokens, and scratch that is there
 * before the first token.
 *
 * Invariants: x below are logits; every sum runs in a fixed order, every exponential and logarithm
 * is ours, so the same input gives the same token on every platform.  Candidates are ranked by
 * logit, equal ones by ascending id.
 *
 *   penalties    per token of the window with c > 0 occurrences: x = x > 0 ? x / r : x * r, then
 *                x -= c * frequency + presence
 *   bias         x += b (-inf forbids)
 *   mask         x = -inf where the token's bit is 0
 *   greedy       temperature 0: the best token; nothing below applies
 *   top_k        the k best
 *   typical      p = softmax(x) of those left, H = -sum p ln p; the fewest with the smallest
 *                |-ln p - H| (as float; equal ones by ascending id) whose p sum to typical_p
 *   top_p        p = softmax(x) of those left; the fewest best whose p sum to top_p
 *   min_p        those with x - x_best >= ln min_p, that is p >= min_p * p_best
 *   temperature  drawn with weights exp((x - x_best) / temperature)
 *
 * A difference of two equal infinities counts as 0: tokens at +inf share all the mass. */
#include "sampler.h"

#include <float.h>
#include <math.h>

#include "mathx.h"

#define BLOCK 32 /* logits looked at together; more than compilers unroll instead of vectorizing */

struct cand {
    float key; /* the rank: a logit, or a negated deviation */
    int32_t id;
};

struct pool { /* candidates, sorted only as far as somebody looked */
    struct cand *c; /* [n] first a heap, best on top, then the n_sorted best, best last */
    int n, n_sorted;
};

struct change { /* what a logit and its peak were before */
    int32_t id;
    float x, peak;
};

struct recent { /* a token of the window */
    int32_t id, count;
};

struct sm_sampler {
    int32_t n_vocab;
    float temperature, top_p, typical_p;
    int32_t top_k;      /* 0: all */
    bool has_min_p;
    double ln_min_p;
    uint64_t seed, n_drawn;

    /* Penalties; window 0: none. */
    double repeat, frequency, presence;
    int32_t window;
    uint64_t n_seen;
    int32_t *ring;         /* [window] the last tokens */
    int32_t *slot;         /* [n_vocab] 1 + index into recent, 0: not in the window */
    struct recent *recent; /* [n_recent], room for window */
    int32_t n_recent;

    int32_t *bias_ids; /* [n_bias] */
    float *bias;       /* [n_bias] */
    size_t n_bias;
    uint32_t *allowed; /* [(n_vocab + 31) / 32] or NULL */

    struct change *changes; /* [n_changes] room for window + n_bias */
    size_t n_changes;
    float *masked, *masked_peaks; /* [n_vocab] and its peaks, or NULL without a mask */
    struct cand *cands; /* [top_k or n_vocab], or NULL where none are listed */
};

/* ---- making ---------------------------------------------------------------------------------- */

static int judge(const smallm_sampling *p, int32_t n_vocab, smallm_error *err) {
    const struct {
        const char *name;
        float value, low, high;
        bool open; /* high itself is not allowed */
        const char *range;
    } fields[] = {
        {"temperature", p->temperature, 0, INFINITY, true, "0 and above"},
        {"top_p", p->top_p, 0, 1, false, "0 to 1"},
        {"min_p", p->min_p, 0, 1, true, "0 up to, but not including, 1"},
        {"typical_p", p->typical_p, 0, 1, false, "0 to 1"},
        {"repeat_penalty", p->repeat_penalty, 0, INFINITY, true, "0 and above"},
        {"frequency_penalty", p->frequency_penalty, -INFINITY, INFINITY, true, "finite numbers"},
        {"presence_penalty", p->presence_penalty, -INFINITY, INFINITY, true, "finite numbers"},
    };
    for (size_t i = 0; i < SM_COUNT(fields); i++) {
        float v = fields[i].value;
        if (!(v >= fields[i].low && v <= fields[i].high) || isinf(v) ||
            (fields[i].open && v == fields[i].high))
            return sm_fail(err, SMALLM_E_ARGUMENT, "%s is %g; allowed are %s", fields[i].name,
                           (double)v, fields[i].range);
    }
    if (p->top_k < 0)
        return sm_fail(err, SMALLM_E_ARGUMENT, "top_k is %d; allowed are 0 (all) and above",
                       (int)p->top_k);
    if (p->repeat_last_n < -1)
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "repeat_last_n is %d; allowed are -1 (the context), 0 (none) and above",
                       (int)p->repeat_last_n);
    if (p->n_bias > 0 && (!p->bias_ids || !p->bias))
        return sm_fail(err, SMALLM_E_ARGUMENT, "n_bias is %zu, but %s is NULL", p->n_bias,
                       p->bias_ids ? "bias" : "bias_ids");
    for (size_t i = 0; i < p->n_bias; i++) {
        if (p->bias_ids[i] < 0 || p->bias_ids[i] >= n_vocab)
            return sm_fail(err, SMALLM_E_ARGUMENT, "bias_ids[%zu] is %d; allowed are 0 to %d", i,
                           (int)p->bias_ids[i], (int)n_vocab - 1);
        if (!(p->bias[i] < INFINITY))
            return sm_fail(err, SMALLM_E_ARGUMENT,
                           "bias[%zu] is %g; allowed are finite numbers and -infinity", i,
                           (double)p->bias[i]);
    }
    return SMALLM_OK;
}

static void *copy_of(const void *src, size_t n, size_t size) {
    size_t bytes;
    void *p = sm_mul(n, size, &bytes) ? sm_alloc(bytes) : NULL;
    if (p) memcpy(p, src, bytes);
    return p;
}

int sm_sampler_new(const smallm_sampling *params, int32_t n_vocab, int32_t n_ctx,
                   struct sm_sampler **out, smallm_error *err) {
    *out = NULL;
    smallm_sampling p;
    int rc = sm_read_struct(&p, sizeof p, params, "smallm_sampling", err);
    if (rc == SMALLM_OK) rc = judge(&p, n_vocab, err);
    if (rc != SMALLM_OK) return rc;

    struct sm_sampler *s = sm_calloc(1, sizeof *s);
    if (!s) goto fail;
    s->n_vocab = n_vocab;
    s->temperature = p.temperature;
    s->top_k = p.top_k < n_vocab ? p.top_k : 0;
    s->top_p = p.top_p == 0 ? 1 : p.top_p;
    s->typical_p = p.typical_p == 0 ? 1 : p.typical_p;
    s->has_min_p = p.min_p > 0;
    s->ln_min_p = s->has_min_p ? sm_log((double)p.min_p) : -INFINITY;
    s->seed = p.seed;
    s->repeat = p.repeat_penalty == 0 ? 1 : (double)p.repeat_penalty;
    s->frequency = (double)p.frequency_penalty;
    s->presence = (double)p.presence_penalty;
    if (s->repeat != 1 || s->frequency != 0 || s->presence != 0)
        s->window = p.repeat_last_n < 0 ? n_ctx : SM_MIN(p.repeat_last_n, n_ctx);

    if (s->window > 0) {
        s->ring = sm_alloc((size_t)s->window * sizeof *s->ring);
        s->slot = sm_calloc((size_t)n_vocab, sizeof *s->slot);
        s->recent = sm_alloc((size_t)s->window * sizeof *s->recent);
        if (!s->ring || !s->slot || !s->recent) goto fail;
    }
    if (p.n_bias > 0) {
        s->n_bias = p.n_bias;
        s->bias_ids = copy_of(p.bias_ids, p.n_bias, sizeof *p.bias_ids);
        s->bias = copy_of(p.bias, p.n_bias, sizeof *p.bias);
        if (!s->bias_ids || !s->bias) goto fail;
    }
    if (p.allowed) {
        s->allowed = copy_of(p.allowed, ((size_t)n_vocab + 31) / 32, sizeof *p.allowed);
        if (!s->allowed) goto fail;
    }
    if (s->window > 0 || s->n_bias > 0) {
        s->changes = sm_alloc(((size_t)s->window + s->n_bias) * sizeof *s->changes);
        if (!s->changes) goto fail;
    }
    if (s->allowed) {
        s->masked = sm_alloc((size_t)n_vocab * sizeof *s->masked);
        s->masked_peaks = sm_alloc(sm_n_peaks((size_t)n_vocab) * sizeof *s->masked_peaks);
        if (!s->masked || !s->masked_peaks) goto fail;
    }
    if (s->temperature > 0 && (s->top_k > 0 || s->typical_p < 1 || s->top_p < 1 || s->has_min_p)) {
        size_t n = (size_t)(s->top_k > 0 ? s->top_k : n_vocab);
        s->cands = sm_alloc(n * sizeof *s->cands);
        if (!s->cands) goto fail;
    }
    *out = s;
    return SMALLM_OK;
fail:
    sm_sampler_free(s);
    return sm_fail(err, SMALLM_E_MEMORY, "out of memory for sampling from %d tokens", (int)n_vocab);
}

void sm_sampler_free(struct sm_sampler *s) {
    if (!s) return;
    sm_free(s->ring);
    sm_free(s->slot);
    sm_free(s->recent);
    sm_free(s->bias_ids);
    sm_free(s->bias);
    sm_free(s->allowed);
    sm_free(s->changes);
    sm_free(s->masked);
    sm_free(s->masked_peaks);
    sm_free(s->cands);
    sm_free(s);
}

const uint32_t *sm_sampler_allowed(const struct sm_sampler *s) { return s->allowed; }

/* ---- the window of recent tokens ------------------------------------------------------------- */

static void forget(struct sm_sampler *s, int32_t token) {
    int32_t i = s->slot[token] - 1;
    if (--s->recent[i].count > 0) return;
    s->slot[token] = 0;
    s->recent[i] = s->recent[--s->n_recent];
    if (i < s->n_recent) s->slot[s->recent[i].id] = i + 1;
}

void sm_sampler_accept(struct sm_sampler *s, int32_t token) {
    if (s->window == 0) return;
    int32_t *place = &s->ring[s->n_seen % (uint64_t)s->window];
    if (s->n_seen++ >= (uint64_t)s->window) forget(s, *place);
    *place = token;
    if (s->slot[token] == 0) {
        s->recent[s->n_recent] = (struct recent){token, 0};
        s->slot[token] = ++s->n_recent;
    }
    s->recent[s->slot[token] - 1].count++;
}

static void change(struct sm_sampler *s, float *x, float *peaks, int32_t id, float value) {
    s->changes[s->n_changes++] = (struct change){id, x[id], peaks[id / SM_PEAK]};
    x[id] = value;
    peaks[id / SM_PEAK] = sm_peak(x, (size_t)s->n_vocab, (size_t)id / SM_PEAK);
}

/* Penalties and bias. */
static void adjust(struct sm_sampler *s, float *x, float *peaks) {
    for (int32_t i = 0; i < s->n_recent; i++) {
        struct recent r = s->recent[i];
        double v = (double)x[r.id];
        v = v > 0 ? v / s->repeat : v * s->repeat;
        change(s, x, peaks, r.id, (float)(v - (r.count * s->frequency + s->presence)));
    }
    for (size_t i = 0; i < s->n_bias; i++) {
        int32_t id = s->bias_ids[i];
        float v = s->bias[i] == -INFINITY ? -INFINITY : (float)((double)x[id] + (double)s->bias[i]);
        change(s, x, peaks, id, v);
    }
}

static void restore(struct sm_sampler *s, float *x, float *peaks) {
    while (s->n_changes > 0) { /* the last first: a token may have changed twice */
        struct change c = s->changes[--s->n_changes];
        x[c.id] = c.x;
        peaks[c.id / SM_PEAK] = c.peak;
    }
}

/* x with -inf where the mask is 0, to s->masked. */
static void mask(struct sm_sampler *s, const float *x) {
    float *y = s->masked;
    memcpy(y, x, (size_t)s->n_vocab * sizeof *y);
    for (int32_t i = 0; i < s->n_vocab; i += 32) {
        uint32_t word = s->allowed[i / 32];
        if (word == UINT32_MAX) continue;
        for (int32_t j = i; j < s->n_vocab && j < i + 32; j++, word >>= 1) {
            if (!(word & 1)) y[j] = -INFINITY;
        }
    }
    sm_peaks(s->masked_peaks, y, (size_t)s->n_vocab);
}

/* ---- passes over the vocabulary, or its peaks ------------------------------------------------ */

/* The largest of x [n]; false where one is NaN. */
static bool largest(const float *x, int32_t n, float *out) {
    float top[BLOCK];
    int32_t nan[BLOCK] = {0}, i = 0;
    for (int j = 0; j < BLOCK; j++) top[j] = -INFINITY;
    for (; i + BLOCK <= n; i += BLOCK) {
        for (int j = 0; j < BLOCK; j++) {
            float v = x[i + j];
            top[j] = v > top[j] ? v : top[j];
            nan[j] |= v != v;
        }
    }
    for (; i < n; i++) {
        top[0] = x[i] > top[0] ? x[i] : top[0];
        nan[0] |= x[i] != x[i];
    }
    for (int j = 1; j < BLOCK; j++) {
        top[0] = top[j] > top[0] ? top[j] : top[0];
        nan[0] |= nan[j];
    }
    *out = top[0];
    return !nan[0];
}

static int32_t first_equal(const float *x, const float *peaks, float value) { /* one of x is */
    int32_t i = 0;
    while (peaks[i / SM_PEAK] != value) i += SM_PEAK;
    while (x[i] != value) i++;
    return i;
}

static inline float masked(float x, int32_t mask) { /* x, or 0 where the mask is 0 */
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= mask;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* exp(d) for d <= 0 within 2e-7 relative; 0 from -87 down.  Sums over the vocabulary use this one:
 * it compiles to vector code on any target (hence masks, no conditions), mathx.h's does not. */
static inline float exp_down(float d) {
    int32_t inside = -(int32_t)(d > -87.0f);
    d = masked(d, inside);
    float k = (d * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f; /* to the nearest integer */
    float r = (d - k * 0x1.63p-1f) - k * -0x1.bd0106p-13f;  /* the first product is exact */
    float p = 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = ((int32_t)k + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return masked(p * power, inside);
}

/* e[j] = exp((x[i + j] - max) / t), 0 past the end of x [n]; returns their sum. */
static float exp_block(const float *x, int32_t n, int32_t i, float max, float t,
                       float *e /* [BLOCK] */) {
    float tail[BLOCK];
    const float *block = x + i;
    if (n - i < BLOCK) {
        for (int j = 0; j < BLOCK; j++) tail[j] = j < n - i ? block[j] : -INFINITY;
        block = tail;
    }
    if (max > FLT_MAX) max = FLT_MAX; /* so that infinite logits differ by 0 */
    for (int j = 0; j < BLOCK; j++) {
        float v = block[j] < FLT_MAX ? block[j] : FLT_MAX;
        e[j] = exp_down((v - max) / t);
    }
    float sum[BLOCK / 2];
    for (int j = 0; j < BLOCK / 2; j++) sum[j] = e[j] + e[j + BLOCK / 2];
    for (int h = BLOCK / 4; h > 0; h /= 2) {
        for (int j = 0; j < h; j++) sum[j] += sum[j + h];
    }
    return sum[0];
}

/* Sum of exp((x - max) / t) over x [n]. */
static double sum_exp(const float *x, int32_t n, float max, float t) {
    double sum = 0;
    float e[BLOCK];
    for (int32_t i = 0; i < n; i += BLOCK) sum += (double)exp_block(x, n, i, max, t, e);
    return sum;
}

/* The token at which that sum, ascending by id, first exceeds `target`, which is below it. */
static int32_t find_exp(const float *x, int32_t n, float max, float t, double target) {
    double sum = 0;
    float e[BLOCK];
    int32_t found = 0;
    for (int32_t i = 0; i < n; i += BLOCK) {
        double before = sum;
        sum += (double)exp_block(x, n, i, max, t, e);
        if (!(sum > target)) continue;
        for (int j = 0; j < BLOCK && !(before > target); j++) {
            before += (double)e[j];
            if (e[j] > 0) found = i + j; /* one by one they may round to less than their sum */
        }
        break;
    }
    return found;
}

/* ---- candidates ------------------------------------------------------------------------------ */

static bool better(struct cand a, struct cand b) {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
}

/* Restores the heap c [n] below i: the best on top, or the worst. */
static void sift(struct cand *c, int n, int i, bool worst) {
    struct cand moved = c[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && better(c[child + 1], c[child]) != worst) child++;
        if (better(c[child], moved) == worst) break;
        c[i] = c[child];
    }
    c[i] = moved;
}

static void heapify(struct cand *c, int n, bool worst) {
    for (int i = n / 2 - 1; i >= 0; i--) sift(c, n, i, worst);
}

static struct pool pool_of(struct cand *c, int n) {
    heapify(c, n, false);
    return (struct pool){c, n, 0};
}

/* The i-th best. */
static struct cand pool_at(struct pool *p, int i) {
    while (p->n_sorted <= i) {
        int last = p->n - ++p->n_sorted;
        struct cand best = p->c[0];
        p->c[0] = p->c[last];
        p->c[last] = best;
        sift(p->c, last, 0, false);
    }
    return p->c[p->n - 1 - i];
}

/* The k best of x [n], k <= n, as a pool in c [k].  A heap of the k best so far, worst on top:
 * hardly any of the rest beats its top. */
static struct pool select_top(const float *x, const float *peaks, int32_t n, int k, struct cand *c) {
    for (int i = 0; i < k; i++) c[i] = (struct cand){x[i], i};
    heapify(c, k, true);
    for (int32_t i = k; k > 0 && i < n;) {
        int32_t end = SM_MIN(i / SM_PEAK * SM_PEAK + SM_PEAK, n);
        if (!(peaks[i / SM_PEAK] > c[0].key)) i = end;
        for (; i < end; i++) {
            if (!(x[i] > c[0].key)) continue;
            c[0] = (struct cand){x[i], i};
            sift(c, k, 0, true);
        }
    }
    return pool_of(c, k);
}

static double gap(float x, float best) { return x == best ? 0.0 : (double)x - (double)best; }

/* Leaves the locally typical candidates in *p; *total, the sum of exp(x - max) over p, follows. */
static void keep_typical(const struct sm_sampler *s, const float *x, float max, struct pool *p,
                         double *total) {
    double mean = 0; /* of ln p + ln total, so that -ln p_i - H = mean - d_i */
    for (int i = 0; i < p->n; i++) {
        double d = gap(x[p->c[i].id], max), w = sm_exp(d);
        if (w > 0) mean += w / *total * d;
    }
    for (int i = 0; i < p->n; i++) p->c[i].key = -(float)fabs(mean - gap(x[p->c[i].id], max));
    *p = pool_of(p->c, p->n);
    double need = (double)s->typical_p * *total, sum = 0;
    int kept = 0;
    while (kept < p->n && sum < need) sum += sm_exp(gap(x[pool_at(p, kept++).id], max));
    memmove(p->c, p->c + p->n - kept, (size_t)kept * sizeof *p->c);
    for (int i = 0; i < kept; i++) p->c[i].key = x[p->c[i].id];
    *p = pool_of(p->c, kept);
    *total = sum;
}

/* ---- choosing -------------------------------------------------------------------------------- */

/* Uniform in [0, 1): the top 53 bits of a mixed counter. */
static double uniform(struct sm_sampler *s) {
    uint64_t z = s->seed + ++s->n_drawn * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}

/* The candidates of x [n_vocab] that can survive top_p and min_p.  With no top_k and no typical
 * these only drop tokens below a probability, and a token is listed only if it may be above:
 * all tokens of weight < (1 - top_p) * total / n_vocab together weigh less than 1 - top_p. */
static struct pool list_all(const struct sm_sampler *s, const float *x, const float *peaks,
                            float max, double total) {
    double low = -INFINITY;
    if (s->typical_p == 1) {
        low = s->ln_min_p;
        if (s->top_p < 1) low = SM_MAX(low, sm_log((1 - (double)s->top_p) * total / s->n_vocab));
    }
    /* A little lower, so that rounding costs no token (an ulp where logits are huge). */
    float bound = (float)((double)max + (low - 0.001));
    bound -= fabsf(bound) * 0x1p-23f;
    if (max == INFINITY) bound = -INFINITY;
    int n = 0;
    for (int32_t i = 0; i < s->n_vocab; i += SM_PEAK) {
        if (!(peaks[i / SM_PEAK] > bound)) continue;
        for (int32_t j = i; j < SM_MIN(i + SM_PEAK, s->n_vocab); j++) {
            if (x[j] > bound) s->cands[n++] = (struct cand){x[j], j};
        }
    }
    return pool_of(s->cands, n);
}

/* Draws from x [n_vocab], whose largest value is max > -inf. */
static int32_t draw(struct sm_sampler *s, const float *x, const float *peaks, float max) {
    if (!s->cands) {
        double total = sum_exp(x, s->n_vocab, max, s->temperature);
        return find_exp(x, s->n_vocab, max, s->temperature, uniform(s) * total);
    }
    struct pool p;
    double total = 0; /* sum of exp(x - max) over the candidates */
    if (s->top_k > 0) {
        p = select_top(x, peaks, s->n_vocab, s->top_k, s->cands);
        for (int i = 0; i < p.n; i++) total += sm_exp(gap(pool_at(&p, i).key, max));
    } else {
        total = sum_exp(x, s->n_vocab, max, 1);
        p = list_all(s, x, peaks, max, total);
    }
    if (s->typical_p < 1) keep_typical(s, x, max, &p, &total);

    int kept = p.n;
    float best = pool_at(&p, 0).key;
    if (s->top_p < 1 || s->has_min_p) {
        double need = s->top_p < 1 ? (double)s->top_p * total : INFINITY;
        double sum = sm_exp(gap(best, max));
        for (kept = 1; kept < p.n && sum < need; kept++) {
            float key = pool_at(&p, kept).key;
            if (gap(key, best) < s->ln_min_p) break;
            sum += sm_exp(gap(key, max));
        }
    }

    double t = (double)s->temperature, sum = 0, target;
    for (int i = 0; i < kept; i++) sum += sm_exp(gap(pool_at(&p, i).key, best) / t);
    target = uniform(s) * sum;
    sum = 0;
    for (int i = 0;; i++) {
        sum += sm_exp(gap(pool_at(&p, i).key, best) / t);
        if (sum > target) return pool_at(&p, i).id; /* at the last one at the latest */
    }
}

int sm_sampler_next(struct sm_sampler *s, float *logits, float *peaks, int n_top,
                    struct sm_sampled *out, smallm_error *err) {
    const int32_t n = s->n_vocab, n_peaks = (int32_t)sm_n_peaks((size_t)n);
    float max, raw_max;
    if (!largest(peaks, n_peaks, &raw_max)) {
        int32_t i = 0;
        while (logits[i] == logits[i]) i++;
        return sm_fail(err, SMALLM_E_NUMERIC, "the logit of token %d is NaN", (int)i);
    }
    if (raw_max == -INFINITY && !s->allowed) /* else the mask is to blame */
        return sm_fail(err, SMALLM_E_NUMERIC, "all %d logits are -infinity", (int)n);

    adjust(s, logits, peaks);
    const float *x = logits, *x_peaks = peaks;
    if (s->allowed) {
        mask(s, logits);
        x = s->masked;
        x_peaks = s->masked_peaks;
    }
    largest(x_peaks, n_peaks, &max);
    if (max > -INFINITY)
        out->token = s->temperature > 0 ? draw(s, x, x_peaks, max) : first_equal(x, x_peaks, max);
    restore(s, logits, peaks);
    if (max == -INFINITY)
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "bias and allowed forbid every one of the %d tokens", (int)n);

    out->n_top = 0;
    out->logprob = NAN;
    if (n_top < 0) return SMALLM_OK;
    double ln_total = sm_log(sum_exp(logits, n, raw_max, 1));
    out->logprob = (float)(gap(logits[out->token], raw_max) - ln_total);
    struct cand top[SM_COUNT(out->top_ids)];
    struct pool p = select_top(logits, peaks, n, SM_MIN(n_top, n), top);
    for (; out->n_top < p.n; out->n_top++) {
        struct cand c = pool_at(&p, out->n_top);
        out->top_ids[out->n_top] = c.id;
        out->top_logprobs[out->n_top] = (float)(gap(c.key, raw_max) - ln_total);
    }
    return SMALLM_OK;
}
