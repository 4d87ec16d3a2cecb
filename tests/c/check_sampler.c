/* The sampler against a second, naive one written from the formulas alone: libm's exp and log in
 * double, full sorts, no state.  Then what must hold by definition: ties, order of the steps,
 * refusals, infinities, the shape of the distribution. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "sampler.h"

#define MAX_VOCAB 512

static uint64_t random_state = 1;
static uint64_t random_bits(void) { /* xorshift64: nothing in common with the sampler's */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}
static double random_unit(void) { return (double)(random_bits() >> 11) * 0x1p-53; }
static int random_below(int n) { return (int)(random_bits() % (uint64_t)n); }

/* ---- the naive sampler ----------------------------------------------------------------------- */

struct naive {
    double p[MAX_VOCAB];     /* the probability with which each token is drawn */
    int order[MAX_VOCAB], n; /* tokens left, in the order in which the draw passes them */
    double margin;           /* how close a decision was */
};

static double sort_key[MAX_VOCAB];
static int by_key(const void *a, const void *b) { /* largest first, then by id */
    int i = *(const int *)a, j = *(const int *)b;
    if (sort_key[i] != sort_key[j]) return sort_key[i] > sort_key[j] ? -1 : 1;
    return i - j;
}

static void softmax(const double *x, const int *set, int n, double *p) {
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) max = fmax(max, x[set[i]]);
    for (int i = 0; i < n; i++) sum += exp(x[set[i]] - max);
    for (int i = 0; i < n; i++) p[set[i]] = exp(x[set[i]] - max) / sum;
}

/* Cuts the sorted set after its smallest part that sums to `mass`. */
static int prefix(const double *p, const int *set, int n, double mass, double *margin) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += p[set[i]];
        *margin = fmin(*margin, fabs(sum - mass));
        if (sum >= mass) return i + 1;
    }
    return n;
}

static void naive_sample(const float *logits, int n_vocab, const smallm_sampling *s,
                         const int32_t *history, int n_history, struct naive *out) {
    double x[MAX_VOCAB], p[MAX_VOCAB];
    double r = s->repeat_penalty == 0 ? 1 : s->repeat_penalty;
    int first = s->repeat_last_n < 0 ? 0 : n_history - s->repeat_last_n;
    for (int i = 0; i < n_vocab; i++) {
        int count = 0;
        for (int j = first < 0 ? 0 : first; j < n_history; j++) count += history[j] == i;
        x[i] = logits[i];
        if (count == 0) continue;
        x[i] = x[i] > 0 ? x[i] / r : x[i] * r;
        x[i] = (float)(x[i] - (count * (double)s->frequency_penalty + (double)s->presence_penalty));
    }
    for (size_t i = 0; i < s->n_bias; i++) {
        double *v = &x[s->bias_ids[i]];
        *v = (float)(*v + s->bias[i]);
    }
    for (int i = 0; s->allowed && i < n_vocab; i++) {
        if (!(s->allowed[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
    }
    *out = (struct naive){.margin = INFINITY};
    int *set = out->order, n = 0;
    for (int i = 0; i < n_vocab; i++) {
        sort_key[i] = x[i];
        if (x[i] > -INFINITY) set[n++] = i;
    }
    bool cut = s->top_k > 0 && s->top_k < n_vocab;
    bool typical = s->typical_p > 0 && s->typical_p < 1, top = s->top_p > 0 && s->top_p < 1;
    if (s->temperature == 0 || cut || typical || top || s->min_p > 0)
        qsort(set, (size_t)n, sizeof *set, by_key);
    if (s->temperature == 0) {
        out->p[set[0]] = 1;
        out->n = 1;
        return;
    }
    if (cut && n > s->top_k) n = s->top_k;
    if (typical) {
        double entropy = 0;
        softmax(x, set, n, p);
        for (int i = 0; i < n; i++) entropy -= p[set[i]] > 0 ? p[set[i]] * log(p[set[i]]) : 0;
        for (int i = 0; i < n; i++) {
            /* Rounded, so that equal deviations are equal whatever their last bits. */
            double d = fabs(-log(p[set[i]]) - entropy);
            sort_key[set[i]] = -round(d * 1e6);
        }
        qsort(set, (size_t)n, sizeof *set, by_key);
        for (int i = 1; i < n; i++) {
            double gap = sort_key[set[i - 1]] - sort_key[set[i]];
            if (gap > 0 && gap < 3) out->margin = 0;
            if (gap == 0 && x[set[i]] != x[set[i - 1]]) out->margin = 0;
        }
        n = prefix(p, set, n, s->typical_p, &out->margin);
        for (int i = 0; i < n; i++) sort_key[set[i]] = x[set[i]];
        qsort(set, (size_t)n, sizeof *set, by_key);
    }
    if (top) {
        softmax(x, set, n, p);
        n = prefix(p, set, n, s->top_p, &out->margin);
    }
    if (s->min_p > 0) {
        softmax(x, set, n, p);
        int kept = 1;
        for (; kept < n; kept++) {
            double ratio = p[set[kept]] / p[set[0]];
            out->margin = fmin(out->margin, fabs(ratio - s->min_p));
            if (ratio < s->min_p) break;
        }
        n = kept;
    }
    for (int i = 0; i < n; i++) x[set[i]] /= s->temperature;
    softmax(x, set, n, out->p);
    out->n = n;
}

/* SplitMix64's i-th number for a seed, as published. */
static double naive_uniform(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z = z ^ (z >> 31);
    return (double)(z >> 11) / 9007199254740992.0;
}

static int naive_draw(const struct naive *d, double u, double *margin) {
    double sum = 0;
    *margin = d->margin;
    int token = d->order[0];
    for (int i = 0; i < d->n; i++) {
        if (d->p[d->order[i]] > 0) token = d->order[i];
        sum += d->p[d->order[i]];
        if (i + 1 < d->n) *margin = fmin(*margin, fabs(sum - u));
        if (sum > u) return token;
    }
    return token;
}

/* ---- helpers --------------------------------------------------------------------------------- */

static smallm_sampling sampling(void) { return (smallm_sampling){.size = sizeof(smallm_sampling)}; }

static int made_for; /* n_vocab of the newest sampler, which is that of all that are in use */

static struct sm_sampler *make(const smallm_sampling *p, int n_vocab) {
    made_for = n_vocab;
    struct sm_sampler *s = NULL;
    smallm_error err = {.size = sizeof err};
    int rc = sm_sampler_new(p, n_vocab, 1024, &s, &err);
    CHECK(rc == SMALLM_OK, "%s", err.message);
    if (rc != SMALLM_OK) exit(1);
    return s;
}

/* sm_sampler_next on a copy, which has to be as it was afterwards. */
static int next(struct sm_sampler *s, const float *logits, int n_top, struct sm_sampled *out,
                smallm_error *err) {
    static float x[MAX_VOCAB], peaks[MAX_VOCAB], peaks_before[MAX_VOCAB];
    size_t n = (size_t)made_for;
    memcpy(x, logits, n * sizeof *x);
    sm_peaks(peaks, x, n);
    memcpy(peaks_before, peaks, sm_n_peaks(n) * sizeof *peaks);
    int rc = sm_sampler_next(s, x, peaks, n_top, out, err);
    CHECK(memcmp(x, logits, n * sizeof *x) == 0, "logits changed");
    CHECK(memcmp(peaks, peaks_before, sm_n_peaks(n) * sizeof *peaks) == 0, "peaks changed");
    return rc;
}

static int sample_once(const smallm_sampling *p, const float *logits, int n_vocab) {
    struct sm_sampler *s = make(p, n_vocab);
    struct sm_sampled out;
    smallm_error err = {.size = sizeof err};
    int rc = next(s, logits, -1, &out, &err);
    sm_sampler_free(s);
    return rc < 0 ? rc : out.token;
}

/* Which tokens some draw of many gives, as bits. */
static uint64_t reachable(smallm_sampling p, const float *logits, int n_vocab) {
    uint64_t seen = 0;
    for (p.seed = 0; p.seed < 2000; p.seed++) {
        int token = sample_once(&p, logits, n_vocab);
        CHECK(token >= 0 && token < n_vocab, "%d", token);
        seen |= UINT64_C(1) << token;
    }
    return seen;
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void check_against_naive(void) {
    int n_compared = 0, n_close = 0;
    static struct naive expected;
    for (int round = 0; round < 3000; round++) {
        int n_vocab = 1 + random_below(round % 2 ? 40 : 400);
        float logits[MAX_VOCAB], bias[3];
        int32_t bias_ids[3], history[200];
        uint32_t allowed[(MAX_VOCAB + 31) / 32];
        double spread = 1 + 9 * random_unit();
        bool coarse = random_below(3) == 0; /* many equal logits */
        for (int i = 0; i < n_vocab; i++) {
            double v = (random_unit() + random_unit() + random_unit() - 1.5) * spread;
            logits[i] = (float)(coarse ? floor(v * 2) / 2 : v);
            if (random_below(50) == 0 && i > 0) logits[i] = -INFINITY;
        }
        smallm_sampling p = sampling();
        p.temperature = random_below(5) ? (float)(0.2 + 1.5 * random_unit()) : 0;
        if (random_below(2)) p.top_k = random_below(60);
        if (random_below(2)) p.top_p = (float)random_unit();
        if (random_below(2)) p.min_p = (float)(random_unit() * random_unit() * 0.99);
        if (random_below(3) == 0) p.typical_p = (float)random_unit();
        if (random_below(2)) {
            p.repeat_penalty = (float)(0.7 + random_unit());
            p.frequency_penalty = (float)(random_unit() - 0.3);
            p.presence_penalty = (float)(random_unit() - 0.3);
            p.repeat_last_n = random_below(80) - 1;
        }
        if (random_below(3) == 0) {
            p.n_bias = 3;
            p.bias_ids = bias_ids;
            p.bias = bias;
            for (int i = 0; i < 3; i++) {
                bias_ids[i] = random_below(n_vocab);
                bias[i] = (float)(random_unit() * 8 - 4);
                if (random_below(4) == 0 && bias_ids[i] != 0) bias[i] = -INFINITY;
            }
        }
        if (random_below(3) == 0) {
            for (size_t i = 0; i < SM_COUNT(allowed); i++) allowed[i] = (uint32_t)random_bits();
            allowed[0] |= 1;
            p.allowed = allowed;
        }
        p.seed = random_bits();
        struct sm_sampler *s = make(&p, n_vocab);
        int n_history = 0, n_drawn = 0;
        for (int i = random_below(60); i > 0; i--) {
            history[n_history] = random_below(n_vocab < 12 ? n_vocab : 12);
            sm_sampler_accept(s, history[n_history++]);
        }
        float before[MAX_VOCAB];
        memcpy(before, logits, sizeof(float) * (size_t)n_vocab);
        for (int step = 0; step < 20; step++) {
            struct sm_sampled out;
            smallm_error err = {.size = sizeof err};
            int rc = next(s, logits, -1, &out, &err);
            CHECK(rc == SMALLM_OK, "round %d: %s", round, err.message);
            CHECK(isnan(out.logprob) && out.n_top == 0, "round %d", round);
            naive_sample(logits, n_vocab, &p, history, n_history, &expected);
            double margin, u = p.temperature > 0 ? naive_uniform(p.seed, (uint64_t)n_drawn++) : 0;
            int token = naive_draw(&expected, u, &margin);
            if (margin < 1e-5) {
                n_close++;
            } else {
                n_compared++;
                CHECK(out.token == token, "round %d step %d: %d, expected %d (margin %g)", round,
                      step, (int)out.token, token, margin);
            }
            sm_sampler_accept(s, out.token);
            history[n_history++] = out.token;
        }
        CHECK(memcmp(before, logits, sizeof(float) * (size_t)n_vocab) == 0, "logits were changed");
        sm_sampler_free(s);
        if (n_failed > 10) return;
    }
    CHECK(n_compared > 50000 && n_close < n_compared / 20, "%d compared, %d too close", n_compared,
          n_close);
}

static void check_logprobs(void) {
    for (int round = 0; round < 300; round++) {
        int n_vocab = 1 + random_below(400), n_top = random_below(65);
        float logits[MAX_VOCAB];
        int order[MAX_VOCAB];
        double max = -INFINITY, sum = 0;
        for (int i = 0; i < n_vocab; i++) {
            logits[i] = (float)floor(random_unit() * 100) / 4;
            sort_key[i] = logits[i];
            order[i] = i;
            max = fmax(max, logits[i]);
        }
        for (int i = 0; i < n_vocab; i++) sum += exp(logits[i] - max);
        qsort(order, (size_t)n_vocab, sizeof *order, by_key);
        /* The probabilities are those before any change, whatever the settings. */
        int32_t id = 0;
        float bias = 100;
        smallm_sampling p = sampling();
        p.temperature = round % 2 ? 0.5f : 0;
        p.top_k = 3;
        p.bias_ids = &id;
        p.bias = &bias;
        p.n_bias = 1;
        struct sm_sampler *s = make(&p, n_vocab);
        struct sm_sampled out;
        smallm_error err = {.size = sizeof err};
        int rc = next(s, logits, n_top, &out, &err);
        CHECK(rc == SMALLM_OK && out.token == 0, "%d: %s", rc, err.message);
        CHECK(fabs(out.logprob - (logits[0] - max - log(sum))) < 1e-5, "%g", (double)out.logprob);
        CHECK(out.n_top == (n_top < n_vocab ? n_top : n_vocab), "%d", (int)out.n_top);
        for (int i = 0; i < out.n_top; i++) {
            double expected = logits[order[i]] - max - log(sum);
            CHECK(out.top_ids[i] == order[i], "%d: %d, not %d", i, (int)out.top_ids[i], order[i]);
            CHECK(fabs(out.top_logprobs[i] - expected) < 1e-5, "%d: %g, not %g", i,
                  (double)out.top_logprobs[i], expected);
        }
        sm_sampler_free(s);
    }
}

/* Chi-squared over 7 tokens: 6 degrees of freedom exceed 40 once in two million runs, and the
 * seeds are fixed. */
static void check_distribution(void) {
    const float logits[7] = {0, 1, -1, 0.5f, 2, -3, 1.5f};
    static struct naive expected;
    for (int with_cut = 0; with_cut < 2; with_cut++) {
        smallm_sampling p = sampling();
        p.temperature = 1.3f;
        p.top_k = with_cut ? 6 : 0;
        naive_sample(logits, 7, &p, NULL, 0, &expected);
        int counts[7] = {0};
        const int n = 40000;
        struct sm_sampler *s = make(&p, 7);
        for (int i = 0; i < n; i++) {
            struct sm_sampled out;
            if (next(s, logits, -1, &out, NULL) == SMALLM_OK) counts[out.token]++;
        }
        sm_sampler_free(s);
        double chi = 0;
        for (int i = 0; i < 7; i++) {
            double mean = n * expected.p[i];
            if (mean > 0) chi += (counts[i] - mean) * (counts[i] - mean) / mean;
            else CHECK(counts[i] == 0, "token %d was cut and drawn", i);
        }
        CHECK(chi < 40, "%g", chi);
        /* First draws of neighbouring seeds (a list of prompts uses them) are as independent. */
        memset(counts, 0, sizeof counts);
        for (p.seed = 0; p.seed < 40000; p.seed++) counts[sample_once(&p, logits, 7)]++;
        chi = 0;
        for (int i = 0; i < 7; i++) {
            double mean = n * expected.p[i];
            if (mean > 0) chi += (counts[i] - mean) * (counts[i] - mean) / mean;
        }
        CHECK(chi < 40, "over seeds: %g", chi);
    }
}

static void check_ties(void) {
    float logits[100];
    for (int i = 0; i < 100; i++) logits[i] = 1;
    smallm_sampling p = sampling();
    logits[0] = logits[1] = 0;
    CHECK(sample_once(&p, logits, 100) == 2, "greedy");
    p.temperature = 1;
    p.top_k = 3;
    CHECK(reachable(p, logits, 60) == 0x1C, "top_k: %llx",
          (unsigned long long)reachable(p, logits, 60));
    p.top_k = 0;
    p.top_p = 3.5f / 58; /* 58 tokens share nearly all */
    for (int i = 0; i < 2; i++) logits[i] = -30;
    CHECK(reachable(p, logits, 60) == 0x3C, "top_p: %llx",
          (unsigned long long)reachable(p, logits, 60));
    p.top_p = 0;
    p.typical_p = 3.5f / 58;
    CHECK(reachable(p, logits, 60) == 0x3C, "typical: %llx",
          (unsigned long long)reachable(p, logits, 60));
}

/* Cases by hand in which another order would give another set. */
static void check_order(void) {
    const float even[4] = {0, -1.386294361f, -1.386294361f, -1.386294361f}; /* 4/7 1/7 1/7 1/7 */
    smallm_sampling p = sampling();
    p.temperature = 100; /* before top_p, it would make all equal and let three through */
    p.top_p = 0.55f;
    CHECK(reachable(p, even, 4) == 1, "temperature after top_p");
    p.top_p = 0;
    p.min_p = 0.3f; /* before min_p, temperature would keep all */
    CHECK(reachable(p, even, 4) == 1, "temperature after min_p");

    p = sampling();
    p.temperature = 1;
    p.top_k = 2;     /* 4/5 and 1/5 of what is left */
    p.top_p = 0.75f; /* of all, it would take three */
    CHECK(reachable(p, even, 4) == 1, "top_p after top_k");

    p = sampling();
    p.temperature = 1;
    p.typical_p = 0.2f;
    const float flat[8] = {1.2f}; /* p = 0.32 and 7 of 0.097: -ln p is 0.81 below H, 0.39 above */
    CHECK(reachable(p, flat, 8) == 0x0E, "typical");
    p.min_p = 0.5f; /* relative to the best one left */
    CHECK(reachable(p, flat, 8) == 0x0E, "min_p after typical");

    int32_t id = 0;
    float bias = 2.3f;
    p = sampling();
    p.bias_ids = &id;
    p.bias = &bias;
    p.n_bias = 1;
    p.repeat_penalty = 10;
    p.repeat_last_n = 8;
    const float before[2] = {0.5f, 2};
    struct sm_sampler *s = make(&p, 2); /* (0.5 / 10) + 2.3 > 2; (0.5 + 2.3) / 10 < 2 */
    struct sm_sampled out;
    sm_sampler_accept(s, 0);
    CHECK(next(s, before, -1, &out, NULL) == SMALLM_OK && out.token == 0,
          "bias after penalties");
    sm_sampler_free(s);

    const float probable[4] = {2.3f, 0, 0, 0};
    uint32_t allowed = 0xE;
    bias = 100;
    p.repeat_penalty = 0;
    p.allowed = &allowed;
    CHECK(sample_once(&p, probable, 4) == 1, "mask after bias");
    p.temperature = 1;
    p.top_k = 1;
    CHECK(sample_once(&p, probable, 4) == 1, "top_k after mask");
}

static void check_determinism(void) {
    float logits[300];
    for (int i = 0; i < 300; i++) logits[i] = (float)((i * 7919) % 1000) / 100.0f;
    smallm_sampling p = sampling();
    p.temperature = 0.9f;
    p.top_k = 50;
    p.top_p = 0.98f;
    p.repeat_penalty = 1.2f;
    p.repeat_last_n = 16;
    p.seed = 42;
    struct sm_sampler *a = make(&p, 300), *b = make(&p, 300);
    p.seed = 43;
    struct sm_sampler *c = make(&p, 300);
    struct sm_sampled x, y, z;
    int n_differ = 0;
    for (int i = 0; i < 200; i++) {
        next(a, logits, -1, &x, NULL);
        next(b, logits, 5, &y, NULL); /* log-probabilities change nothing */
        next(c, logits, -1, &z, NULL);
        CHECK(x.token == y.token, "step %d", i);
        n_differ += x.token != z.token;
        sm_sampler_accept(a, x.token);
        sm_sampler_accept(b, y.token);
        sm_sampler_accept(c, z.token);
    }
    CHECK(n_differ > 100, "seeds 42 and 43 differ in %d of 200", n_differ);
    sm_sampler_free(a);
    sm_sampler_free(b);
    sm_sampler_free(c);
}

static void check_infinities(void) {
    float logits[40] = {0};
    smallm_sampling all[4];
    for (int i = 0; i < 4; i++) all[i] = sampling();
    all[1].temperature = 0.5f;
    all[2].temperature = 1e-38f;
    all[2].top_k = 5;
    all[3].temperature = 3e38f;
    all[3].typical_p = 0.9f;
    all[3].top_p = 0.9f;
    for (int i = 0; i < 4; i++) {
        struct sm_sampled out;
        smallm_error err = {.size = sizeof err};
        struct sm_sampler *s = make(&all[i], 40);
        logits[33] = INFINITY;
        int rc = next(s, logits, 2, &out, &err);
        CHECK(rc == SMALLM_OK && out.token == 33 && out.logprob == 0, "+inf, settings %d", i);
        CHECK(out.top_ids[0] == 33 && out.top_ids[1] == 0 && out.top_logprobs[1] == -INFINITY,
              "+inf, settings %d", i);
        logits[35] = NAN;
        rc = next(s, logits, -1, &out, &err);
        CHECK(rc == SMALLM_E_NUMERIC && strstr(err.message, "35"), "NaN: %d %s", rc, err.message);
        logits[35] = 0;
        logits[33] = 0;
        logits[7] = NAN;
        CHECK(next(s, logits, -1, &out, &err) == SMALLM_E_NUMERIC, "NaN");
        for (int j = 0; j < 40; j++) logits[j] = -INFINITY;
        CHECK(next(s, logits, -1, &out, &err) == SMALLM_E_NUMERIC, "all -inf");
        logits[39] = -3e38f;
        rc = next(s, logits, 3, &out, &err);
        CHECK(rc == SMALLM_OK && out.token == 39 && out.logprob == 0, "one left: %d", rc);
        for (int j = 0; j < 40; j++) logits[j] = 0;
        sm_sampler_free(s);
    }
    /* Two infinities share the mass. */
    logits[3] = logits[20] = INFINITY;
    all[1].top_p = 0.99f;
    CHECK(reachable(all[1], logits, 40) == (1u << 3 | 1u << 20), "two at +inf");
    /* Huge finite logits: neighbours far apart. */
    for (int j = 0; j < 40; j++) logits[j] = 1e30f;
    logits[9] = 1.1e30f;
    CHECK(reachable(all[1], logits, 40) == 1u << 9, "huge logits");
}

static void refuse(smallm_sampling p, const char *word, int line) {
    struct sm_sampler *s = NULL;
    smallm_error err = {.size = sizeof err};
    int rc = sm_sampler_new(&p, 10, 100, &s, &err);
    CHECK(rc == SMALLM_E_ARGUMENT && s == NULL, "line %d: %d", line, rc);
    CHECK(strstr(err.message, word), "line %d: \"%s\" does not name %s", line, err.message, word);
    sm_sampler_free(s);
}

static void check_refusals(void) {
    smallm_sampling p;
#define REFUSE(field, ...)                                                                         \
    do {                                                                                           \
        p = sampling();                                                                            \
        p.field = __VA_ARGS__;                                                                     \
        refuse(p, #field, __LINE__);                                                               \
    } while (0)
    REFUSE(size, 0);
    REFUSE(temperature, -0.1f);
    REFUSE(temperature, NAN);
    REFUSE(temperature, INFINITY);
    REFUSE(top_k, -1);
    REFUSE(top_p, 1.01f);
    REFUSE(top_p, -0.01f);
    REFUSE(top_p, NAN);
    REFUSE(min_p, 1);
    REFUSE(min_p, -0.5f);
    REFUSE(typical_p, 2);
    REFUSE(repeat_penalty, -1);
    REFUSE(repeat_penalty, INFINITY);
    REFUSE(frequency_penalty, NAN);
    REFUSE(frequency_penalty, -INFINITY);
    REFUSE(presence_penalty, INFINITY);
    REFUSE(repeat_last_n, -2);
    REFUSE(n_bias, 1);
    int32_t ids[2] = {9, 10};
    float values[2] = {0, NAN};
    p = sampling();
    p.bias_ids = ids;
    p.bias = values;
    p.n_bias = 2;
    refuse(p, "bias_ids[1]", __LINE__);
    ids[1] = -1;
    refuse(p, "bias_ids[1]", __LINE__);
    ids[1] = 1;
    refuse(p, "bias[1]", __LINE__);
    values[1] = INFINITY;
    refuse(p, "bias[1]", __LINE__);

    /* What forbids everything is the caller's mistake, and said when it happens. */
    const float logits[10] = {0};
    uint32_t none = 0xFFFFFC00;
    p = sampling();
    p.allowed = &none;
    CHECK(sample_once(&p, logits, 10) == SMALLM_E_ARGUMENT, "mask of nothing");
    int32_t only = 0;
    float never = -INFINITY;
    p = sampling();
    p.bias_ids = &only;
    p.bias = &never;
    p.n_bias = 1;
    CHECK(sample_once(&p, logits, 1) == SMALLM_E_ARGUMENT, "bias against everything");
}

#ifdef SMALLM_TEST_ALLOC
static void check_allocations(void) {
    int32_t id = 3;
    float bias = 1;
    uint32_t allowed = 0xFFFF;
    smallm_sampling p = sampling();
    p.temperature = 1;
    p.top_p = 0.9f;
    p.repeat_penalty = 1.1f;
    p.repeat_last_n = 8;
    p.bias_ids = &id;
    p.bias = &bias;
    p.n_bias = 1;
    p.allowed = &allowed;
    long n = 1;
    for (;; n++) {
        struct sm_sampler *s = NULL;
        smallm_error err = {.size = sizeof err};
        sm_test_fail_alloc(n);
        int rc = sm_sampler_new(&p, 10, 100, &s, &err);
        if (rc == SMALLM_OK) {
            const float logits[10] = {0};
            made_for = 10;
            struct sm_sampled out;
            sm_test_fail_alloc(1); /* choosing allocates nothing */
            CHECK(next(s, logits, 5, &out, NULL) == SMALLM_OK, "allocation");
            sm_test_fail_alloc(0);
            sm_sampler_free(s);
            break;
        }
        CHECK(rc == SMALLM_E_MEMORY && s == NULL && err.code == rc, "%ld: %d", n, rc);
    }
    CHECK(n == 12, "%ld allocations", n);
}
#endif

int main(void) {
    check_against_naive();
    check_logprobs();
    check_distribution();
    check_ties();
    check_order();
    check_determinism();
    check_infinities();
    check_refusals();
#ifdef SMALLM_TEST_ALLOC
    check_allocations();
#endif
    printf("check_sampler: %s\n", n_failed ? "FAILED" : "ok");
    return n_failed != 0;
}
