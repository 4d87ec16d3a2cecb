/* The inner loops of a pass by themselves: a model's own panels and as many keys and values as the
 * pass reads, through the same kernels, all threads at once, each over its fixed half (third, ...).
 *
 *     loops MODEL.gguf THREADS SEQUENCES TOKENS POSITION ROUNDS
 *
 * A pass of SEQUENCES x TOKENS new tokens, the first of each at POSITION.  Nothing is normalized,
 * rotated, quantized, added or waited for, and nothing is sampled: what a pass takes longer than this
 * is not these loops.  Experts are left out.  Prints a JSON object of seconds a pass: medians over ROUNDS
 * of "matrices" of the layers, "head" (one row of logits for each sequence) and "attention", and the mean
 * of all three together, "mean", which also counts the time that other processes had the cores. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "model.h"
#include "os.h"
#include "threads.h"

#define PANELS_AT_ONCE 8   /* as ops.c */
#define TILE_FLOATS 65536  /* as ops.c */

enum { MATRICES, HEAD, ATTENTION, N_LOOPS };

struct run {
    const struct sm_model *m;
    int n_threads;
    size_t n_seqs, n_tokens, position; /* tokens of each sequence */
    struct {
        enum sm_act act;
        size_t k, n;
        struct sm_acts acts;
    } prepared[64];
    size_t n_prepared;
    float **tiles;    /* [n_threads][TILE_FLOATS] */
    void **scratch;   /* [n_threads][SM_SCRATCH_BYTES] */
    uint8_t *kv;      /* [n_seqs][n_layer][n_head_kv][n_pages][2][part_bytes] */
    size_t n_pages, part_bytes;
    int loop;
};

static void die(const char *what) {
    fprintf(stderr, "loops: %s\n", what);
    exit(1);
}

static void *allocate(size_t n) {
    void *p = sm_alloc(n);
    if (p == NULL) die("no memory");
    return p;
}

/* n rows of k pseudo-random values in [-1, 1). */
static struct sm_acts *acts_of(struct run *r, enum sm_act act, size_t k, size_t n) {
    for (size_t i = 0; i < r->n_prepared; i++)
        if (r->prepared[i].act == act && r->prepared[i].k == k && r->prepared[i].n == n)
            return &r->prepared[i].acts;
    if (r->n_prepared == SM_COUNT(r->prepared)) die("too many widths of matrices");
    size_t at = r->n_prepared++;
    r->prepared[at].act = act;
    r->prepared[at].k = k;
    r->prepared[at].n = n;
    struct sm_acts *a = &r->prepared[at].acts;
    sm_acts_place(a, act, n, k, allocate(sm_acts_bytes(act, n, k)));
    float *x = allocate(k * sizeof *x);
    uint32_t seed = 1;
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < k; i++) {
            seed = seed * 1664525 + 1013904223;
            x[i] = (float)(int32_t)seed / 2147483648.0f;
        }
        r->m->kernels->prepare[act](a, t, x);
    }
    sm_free(x);
    return a;
}

/* Thread `thread`'s panels of w. */
static void multiply(struct run *r, const struct sm_matrix *w, size_t n, int thread) {
    if (w->n_panels == 0) return;
    size_t T = (size_t)r->n_threads, begin = w->n_panels * (size_t)thread / T;
    size_t end = w->n_panels * ((size_t)thread + 1) / T;
    size_t step = SM_MIN(PANELS_AT_ONCE, SM_MAX(TILE_FLOATS / (n * SM_PANEL_ROWS), 1));
    const struct sm_acts *acts = acts_of(r, sm_quants[w->type].act, w->k, n);
    for (size_t p = begin; p < end; p += step) {
        struct sm_matmul call = {
            .out = r->tiles[thread], .ld = step * SM_PANEL_ROWS,
            .panels = w->panels + p * w->panel_bytes, .panel_bytes = w->panel_bytes,
            .n_panels = SM_MIN(step, end - p), .acts = acts, .n_tokens = n,
            .next = w->panels + SM_MIN(p + step, w->n_panels - 1) * w->panel_bytes,
            .scratch = r->scratch[thread]};
        r->m->kernels->matmul[w->type](&call);
    }
}

static void multiply_layers(struct run *r, int thread) {
    size_t n = r->n_seqs * r->n_tokens;
    for (int i = 0; i < r->m->h.n_layer; i++) {
        const struct sm_layer *layer = &r->m->layers[i];
        bool fused = layer->wqkv.n_rows > 0; /* then wq, wk and wv are its parts */
#define SM_VECTOR(...)
#define SM_ROWS(...)
#define SM_EXPERTS(...)
#define SM_MATRIX(field, ...) \
    if (!fused || (&layer->field != &layer->wq && &layer->field != &layer->wk && \
                   &layer->field != &layer->wv)) \
        multiply(r, &layer->field, n, thread);
#include "tensors.def"
#undef SM_VECTOR
#undef SM_ROWS
#undef SM_EXPERTS
#undef SM_MATRIX
    }
}

/* The queries first .. first + n - 1 of one sequence and kv head against all chunks they see. */
static void attend(struct run *r, const uint8_t *kv, size_t first, size_t n, int thread) {
    const struct sm_hparams *h = &r->m->h;
    size_t group = (size_t)(h->n_head / h->n_head_kv), head = (size_t)h->head;
    float *q = r->tiles[thread], *o = q + SM_ATTEND_MAX * head;
    float *m = o + SM_ATTEND_MAX * head, *l = m + SM_ATTEND_MAX;
    size_t last = r->position + first + n - 1;
    for (size_t chunk = 0; chunk <= last / SM_CHUNK; chunk++) {
        int16_t lo[SM_ATTEND_MAX] = {0}, hi[SM_ATTEND_MAX];
        size_t n_q = 0;
        for (size_t t = 0; t < n; t++) {
            size_t end = r->position + first + t + 1;
            if (end <= chunk * SM_CHUNK) continue;
            for (size_t g = 0; g < group; g++)
                hi[n_q++] = (int16_t)SM_MIN(end - chunk * SM_CHUNK, SM_CHUNK);
        }
        struct sm_attend call = {.q = q, .lo = lo, .hi = hi, .n_q = n_q, .head = head,
                                 .kv_type = SMALLM_KV_F16, .m = m, .l = l, .o = o,
                                 .scratch = r->scratch[thread]};
        for (size_t i = 0; i < SM_CHUNK_PAGES; i++) {
            size_t page = chunk * SM_CHUNK_PAGES + i;
            if (page * SM_PAGE > last) continue;
            call.k[i] = kv + 2 * page * r->part_bytes;
            call.v[i] = kv + (2 * page + 1) * r->part_bytes;
        }
        r->m->kernels->attend(&call);
    }
}

static void attend_layers(struct run *r, int thread) {
    const struct sm_hparams *h = &r->m->h;
    size_t block = SM_ATTEND_MAX / (size_t)(h->n_head / h->n_head_kv), item = 0;
    size_t head_bytes = r->n_pages * 2 * r->part_bytes;
    for (int layer = 0; layer < h->n_layer; layer++)
        for (size_t s = 0; s < r->n_seqs; s++)
            /* Long and short blocks fall to all threads alike. */
            for (size_t first = 0; first < r->n_tokens; first += block)
                for (int kv_head = 0; kv_head < h->n_head_kv; kv_head++, item++) {
                    if (item % (size_t)r->n_threads != (size_t)thread) continue;
                    size_t at = (s * (size_t)h->n_layer + (size_t)layer) * (size_t)h->n_head_kv +
                                (size_t)kv_head;
                    attend(r, r->kv + at * head_bytes, first, SM_MIN(block, r->n_tokens - first),
                           thread);
                }
}

static void run_loop(void *arg, int thread, struct sm_work *work) {
    struct run *r = arg;
    size_t begin, end;
    (void)thread;
    while (sm_work_take(work, &begin, &end))
        for (size_t part = begin; part < end; part++) switch (r->loop) {
            case MATRICES: multiply_layers(r, (int)part); break;
            case HEAD: /* in two int8 steps where it is quantized (ops.h) */
                multiply(r, &r->m->head,
                         r->n_seqs * (sm_quants[r->m->head.type].act == SM_ACT_F32 ? 1 : 2), (int)part);
                break;
            case ATTENTION: attend_layers(r, (int)part); break;
            }
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 7) die("usage: loops MODEL.gguf THREADS SEQUENCES TOKENS POSITION ROUNDS");
    struct run r = {.n_threads = atoi(argv[2]), .n_seqs = (size_t)atoi(argv[3]),
                    .n_tokens = (size_t)atoi(argv[4]), .position = (size_t)atoi(argv[5])};
    size_t n_rounds = (size_t)atoi(argv[6]);
    if (r.n_threads < 1 || r.n_seqs < 1 || r.n_tokens < 1 || n_rounds < 1) die("counts begin at 1");
    smallm_error err = {.size = sizeof err};
    smallm_model_params params = {.size = sizeof params};
    struct sm_model *m;
    struct sm_pool *pool;
    if (sm_model_open(argv[1], &params, &m, &err) != SMALLM_OK ||
        sm_pool_new(r.n_threads, &pool, &err) != SMALLM_OK)
        die(err.message);
    r.m = m;
    r.tiles = allocate((size_t)r.n_threads * sizeof *r.tiles);
    r.scratch = allocate((size_t)r.n_threads * sizeof *r.scratch);
    for (int i = 0; i < r.n_threads; i++) {
        r.tiles[i] = allocate(2 * TILE_FLOATS * sizeof(float));
        memset(r.tiles[i], 0, 2 * TILE_FLOATS * sizeof(float));
        r.scratch[i] = allocate(SM_SCRATCH_BYTES);
    }
    r.part_bytes = sm_round_up(sm_kv_part_bytes(SMALLM_KV_F16, (size_t)m->h.head), SM_ALIGN);
    r.n_pages = (r.position + r.n_tokens + SM_PAGE - 1) / SM_PAGE;
    size_t kv_bytes = r.n_seqs * (size_t)m->h.n_layer * (size_t)m->h.n_head_kv * r.n_pages * 2 *
                      r.part_bytes;
    r.kv = allocate(kv_bytes);
    memset(r.kv, 0x3c, kv_bytes); /* small positive numbers */
    r.n_threads = 1; /* one warm-up pass on one thread prepares every activation there is */
    multiply_layers(&r, 0);
    multiply(&r, &m->head, 2 * r.n_seqs, 0);
    multiply(&r, &m->head, r.n_seqs, 0);
    r.n_threads = atoi(argv[2]);

    static const char *const names[N_LOOPS] = {"matrices", "head", "attention"};
    double *seconds = allocate(n_rounds * N_LOOPS * sizeof *seconds);
    uint64_t start = sm_clock_ns();
    /* In turn, as in a pass: each finds the caches as the others left them. */
    for (size_t i = 0; i < n_rounds; i++)
        for (r.loop = 0; r.loop < N_LOOPS; r.loop++) {
            uint64_t begin = sm_clock_ns();
            sm_pool_run(pool, (size_t)r.n_threads, 1, run_loop, &r);
            seconds[(size_t)r.loop * n_rounds + i] = (double)(sm_clock_ns() - begin) * 1e-9;
        }
    double mean = (double)(sm_clock_ns() - start) * 1e-9 / (double)n_rounds;
    for (size_t i = 0; i < N_LOOPS; i++) {
        qsort(seconds + i * n_rounds, n_rounds, sizeof *seconds, ascending);
        printf("%s\"%s\": %.9f", i == 0 ? "{" : ", ", names[i], seconds[i * n_rounds + n_rounds / 2]);
    }
    printf(", \"mean\": %.9f}\n", mean);
    sm_pool_free(pool);
    sm_model_free(m);
    return 0;
}
