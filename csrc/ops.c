/* Phases over the pool: prepare activations, multiply panels, finish rows. */
#include "ops.h"

#include <math.h>

#include "os.h"

/* Floats of finished rows a thread keeps before it hands them on: 256 KB, inside L2. */
#define TILE_FLOATS ((size_t)65536)
/* What a thread takes at once: little enough that the last to finish is not late. */
#define PANELS_AT_ONCE 8 /* two fours of a GEMV, whole pairs of a GEMM */
#define TOKENS_AT_ONCE 4
#define COLUMNS_AT_ONCE 64 /* of statistics: whole cache lines of a row */

/* Tokens that go through an adapter's A together: as many as a thread's own activations hold. */
#define LOW_TOKENS (SM_FEW - 1)

_Static_assert(TILE_FLOATS <= SM_LOCAL_FLOATS, "what an adapter adds to a tile has its place");
_Static_assert(SM_PANEL_ROWS == SM_PEAK && 32 % SM_PANEL_ROWS == 0, "a panel is a peak and within a word");

/* What a thread does, and since when (sm_clock_ns). */
struct watch {
    enum sm_timer timer;
    uint64_t since;
    struct sm_timers sum;
};

/* One thread's own memory. */
struct local {
    struct watch *watch; /* NULL: nobody asks */
    uint8_t *scratch;   /* SM_SCRATCH_BYTES, for kernels */
    float *own;         /* [SM_LOCAL_FLOATS], for sm_ops_each, and for what adapters add to a tile */
    float *row;         /* [k_max], room for a source's row before it is prepared */
    float *tile[2];     /* [TILE_FLOATS] products before their epilogue */
    uint8_t *acts[SM_ACT_COUNT]; /* activations of fewer than SM_FEW tokens */
};

struct sm_ops {
    struct sm_pool *pool;
    const struct sm_kernels *kernels;
    size_t n_tokens, k_max;
    uint8_t *acts[SM_ACT_COUNT]; /* activations of n_tokens tokens, shared */
    struct local *locals;        /* [n_threads] */
    struct watch *watches;       /* [n_threads], or NULL */
    int n_threads;
    uint8_t *memory;
    size_t n_bytes;
    float *low;                  /* [SM_PRODUCTS_MAX][n_tokens][low_stride] what A gave, scaled */
    size_t low_stride;           /* a multiple of 32, at least the rank reserved */
    const struct sm_adaptation *adaptations; /* [n] of the pass, or NULL */
    struct sm_statistics *statistics; /* or NULL */
    float *seen;                 /* [n_tokens][k_max] rows before they are added to the statistics */
    const atomic_bool *cancel;
    _Atomic int status;
};

int sm_ops_new(int n_threads, size_t n_tokens, size_t k_max, const struct sm_kernels *kernels, bool timed,
               struct sm_statistics *statistics, struct sm_ops **out, smallm_error *err) {
    *out = NULL;
    struct sm_ops *o = sm_calloc(1, sizeof *o);
    if (o == NULL) return sm_fail(err, SMALLM_E_MEMORY, "no memory for scratch");
    o->kernels = kernels;
    o->n_threads = n_threads;
    o->n_tokens = n_tokens;
    o->k_max = sm_round_up(k_max, 256);
    o->statistics = statistics;
    int status = sm_pool_new(n_threads, &o->pool, err);
    if (status != SMALLM_OK) goto fail;
    status = SMALLM_E_MEMORY;
    o->locals = sm_calloc((size_t)n_threads, sizeof o->locals[0]);
    if (o->locals == NULL) goto fail;
    if (timed) {
        o->watches = sm_calloc((size_t)n_threads, sizeof o->watches[0]);
        if (o->watches == NULL) goto fail;
        for (int i = 0; i < n_threads; i++) o->locals[i].watch = &o->watches[i];
    }

    size_t shared[SM_ACT_COUNT], own[SM_ACT_COUNT], per_thread = 0;
    for (int a = 0; a < SM_ACT_COUNT; a++) {
        shared[a] = sm_round_up(sm_acts_bytes((enum sm_act)a, n_tokens, o->k_max), SM_ALIGN);
        own[a] = sm_round_up(sm_acts_bytes((enum sm_act)a, SM_FEW - 1, o->k_max), SM_ALIGN);
        o->n_bytes += shared[a];
        per_thread += own[a];
    }
    const size_t floats[] = {SM_LOCAL_FLOATS, o->k_max, TILE_FLOATS, TILE_FLOATS};
    per_thread += SM_SCRATCH_BYTES;
    for (size_t i = 0; i < SM_COUNT(floats); i++) per_thread += floats[i] * sizeof(float);
    per_thread = sm_round_up(per_thread, 4096); /* threads do not share pages */
    o->n_bytes += (size_t)n_threads * per_thread;
    size_t seen = statistics != NULL ? n_tokens * o->k_max * sizeof o->seen[0] : 0;
    o->n_bytes += seen;
    o->memory = sm_alloc(o->n_bytes);
    if (o->memory == NULL) goto fail;

    uint8_t *at = o->memory;
    o->seen = (float *)(void *)at;
    at += seen;
    for (int a = 0; a < SM_ACT_COUNT; a++) {
        o->acts[a] = at;
        at += shared[a];
    }
    for (int i = 0; i < n_threads; i++) {
        struct local *l = &o->locals[i];
        uint8_t *p = at + (size_t)i * per_thread;
        l->scratch = p;
        p += SM_SCRATCH_BYTES;
        float **parts[] = {&l->own, &l->row, &l->tile[0], &l->tile[1]};
        for (size_t f = 0; f < SM_COUNT(floats); f++) {
            *parts[f] = (float *)(void *)p;
            p += floats[f] * sizeof(float);
        }
        for (int a = 0; a < SM_ACT_COUNT; a++) {
            l->acts[a] = p;
            p += own[a];
        }
    }
    *out = o;
    return SMALLM_OK;
fail:
    if (status == SMALLM_E_MEMORY) sm_fail(err, status, "no memory for %zu bytes of scratch", o->n_bytes);
    sm_ops_free(o);
    return status;
}

void sm_ops_free(struct sm_ops *o) {
    if (o == NULL) return;
    sm_pool_free(o->pool);
    sm_free(o->locals);
    sm_free(o->watches);
    sm_free(o->low);
    sm_free(o->memory);
    sm_free(o);
}

uint64_t sm_ops_bytes(const struct sm_ops *o) { return o->n_bytes; }

static size_t low_bytes(const struct sm_ops *o, size_t stride) {
    return SM_PRODUCTS_MAX * o->n_tokens * stride * sizeof o->low[0];
}

uint64_t sm_ops_reserve_bytes(const struct sm_ops *o, size_t rank) {
    size_t stride = sm_round_up(rank, SM_SLAB);
    return stride > o->low_stride ? low_bytes(o, stride) - low_bytes(o, o->low_stride) : 0;
}

int sm_ops_reserve(struct sm_ops *o, size_t rank, smallm_error *err) {
    size_t more = (size_t)sm_ops_reserve_bytes(o, rank);
    if (more == 0) return SMALLM_OK;
    size_t stride = sm_round_up(rank, SM_SLAB);
    float *low = sm_alloc(low_bytes(o, stride));
    if (low == NULL)
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for an adapter of rank %zu", rank);
    o->n_bytes += more;
    sm_free(o->low);
    o->low = low;
    o->low_stride = stride;
    return SMALLM_OK;
}

/* From now on the thread does `timer`. */
static void turn_to(struct local *l, enum sm_timer timer) {
    struct watch *w = l->watch;
    if (w == NULL) return;
    uint64_t now = sm_clock_ns();
    w->sum.ns[w->timer] += now - w->since;
    w->since = now;
    w->timer = timer;
}

/* Between passes and between phases nobody but the pass's thread touches a watch. */
void sm_ops_begin(struct sm_ops *o, const atomic_bool *cancel, const struct sm_adaptation *adaptations) {
    o->cancel = cancel;
    o->adaptations = adaptations;
    atomic_store(&o->status, SMALLM_OK);
    uint64_t now = o->watches != NULL ? sm_clock_ns() : 0;
    for (int i = 0; i < o->n_threads && o->watches != NULL; i++)
        o->watches[i] = (struct watch){.timer = i == 0 ? SM_TIMER_SERIAL : SM_TIMER_WAIT, .since = now};
}

void sm_ops_end(struct sm_ops *o, struct sm_timers *timers) {
    for (int i = 0; i < o->n_threads && o->watches != NULL; i++) {
        turn_to(&o->locals[i], SM_TIMER_WAIT);
        for (int t = 0; t < SM_TIMER_COUNT; t++) timers->ns[t] += o->watches[i].sum.ns[t];
    }
}

void sm_ops_fail(struct sm_ops *o, int status) {
    int none = SMALLM_OK;
    atomic_compare_exchange_strong(&o->status, &none, status);
}

int sm_ops_status(struct sm_ops *o) { return atomic_load_explicit(&o->status, memory_order_relaxed); }

static bool is_cancelled(const struct sm_ops *o) {
    return o->cancel != NULL && atomic_load_explicit(o->cancel, memory_order_relaxed);
}

static void run_phase(struct sm_ops *o, size_t n, size_t grain, sm_phase_fn *fn, void *arg) {
    if (is_cancelled(o)) sm_ops_fail(o, SMALLM_E_CANCELLED);
    if (sm_ops_status(o) != SMALLM_OK) return;
    sm_pool_run(o->pool, n, grain, fn, arg);
    turn_to(&o->locals[0], SM_TIMER_SERIAL);
}

/* ---- sources --------------------------------------------------------------------------------------------- */

static const float *row_plain(const struct sm_source *s, size_t t, float *room) {
    (void)room;
    return s->x + t * s->stride;
}

static const float *row_rms_norm(const struct sm_source *s, size_t t, float *room) {
    s->kernels->rms_norm(room, s->x + t * s->stride, s->weight, s->k, s->eps);
    return room;
}

struct sm_source sm_source_rows(const float *x, size_t stride, size_t k) {
    return (struct sm_source){.row = row_plain, .x = x, .stride = stride, .k = k};
}

struct sm_source sm_source_rms_norm(const struct sm_kernels *kernels, const float *x, size_t stride,
                                    size_t k, const float *weight, float eps) {
    return (struct sm_source){.row = row_rms_norm, .kernels = kernels, .x = x, .stride = stride,
                              .k = k, .weight = weight, .eps = eps};
}

static const float *row_rms_norm_of(const struct sm_source *s, size_t t, float *room) {
    const struct sm_source *of = s->context;
    s->kernels->rms_norm(room, of->row(of, t, room), s->weight, s->k, s->eps);
    return room;
}

struct sm_source sm_source_rms_norm_of(const struct sm_kernels *kernels, const struct sm_source *of,
                                       const float *weight, float eps) {
    return (struct sm_source){.row = row_rms_norm_of, .kernels = kernels, .context = of, .k = of->k,
                              .weight = weight, .eps = eps};
}

static const float *row_layer_norm(const struct sm_source *s, size_t t, float *room) {
    s->kernels->layer_norm(room, s->x + t * s->stride, s->weight, s->bias, s->k, s->eps);
    return room;
}

struct sm_source sm_source_layer_norm(const struct sm_kernels *kernels, const float *x, size_t stride,
                                      size_t k, const float *weight, const float *bias, float eps) {
    return (struct sm_source){.row = row_layer_norm, .kernels = kernels, .x = x, .stride = stride,
                              .k = k, .weight = weight, .bias = bias, .eps = eps};
}

/* ---- products -------------------------------------------------------------------------------------------- */

struct project {
    struct sm_ops *o;
    const struct sm_source *s;
    const struct sm_product *products;
    size_t n_products, n_listed;   /* n_listed: whose panels are counted; up follows gate */
    size_t first;                  /* the token that the turn begins with */
    size_t n, rows;                /* its tokens; rows of activations: n, or 2 n where fine */
    bool head;                     /* for the timers */
    bool own;                      /* each thread prepares the activations for itself */
    bool fine;                     /* row 2 t is token t, row 2 t + 1 what rounding it lost */
    bool wants[SM_ACT_COUNT];      /* activation formats the products read */
    float *gated;                  /* sm_ops_gated's out: products[0] and [1] are gate and up */
    size_t gated_stride;
    size_t n_low;                  /* panels of A over all products, of the adapter that has most */
    sm_gated_fn *apply_gate;
};

/* rest [k] = x - row `row` of the activations: what rounding lost.  rest may be x. */
static void subtract_row(enum sm_act format, const struct sm_acts *a, size_t row, const float *x,
                         float *rest) {
    const int8_t *q = a->q + row * a->stride;
    const size_t block = format == SM_ACT_Q8_32 ? 32 : 256;
    const float *d = a->d + row * (a->k_pad / block);
    for (size_t first = 0; first < a->k; first += block, d++)
        for (size_t i = first; i < SM_MIN(first + block, a->k); i++) rest[i] = x[i] - *d * (float)q[i];
}

/* Prepares tokens begin .. end - 1 of the source into acts[], in every format wanted. */
static void prepare_tokens(const struct project *p, size_t begin, size_t end, float *room,
                           struct sm_acts acts[SM_ACT_COUNT]) {
    size_t step = p->fine ? 2 : 1;
    for (size_t t = begin; t < end; t++) {
        const float *row = p->s->row(p->s, p->first + t, room);
        for (int a = 0; a < SM_ACT_COUNT; a++) {
            if (!p->wants[a]) continue;
            bool finite = p->o->kernels->prepare[a](&acts[a], step * t, row);
            if (finite && p->fine) {
                subtract_row((enum sm_act)a, &acts[a], step * t, row, room);
                finite = p->o->kernels->prepare[a](&acts[a], step * t + 1, room);
            }
            if (!finite) sm_ops_fail(p->o, SMALLM_E_NUMERIC);
        }
    }
}

static void place_acts(const struct project *p, uint8_t *const *memory,
                       struct sm_acts acts[SM_ACT_COUNT]) {
    for (int a = 0; a < SM_ACT_COUNT; a++)
        if (p->wants[a]) sm_acts_place(&acts[a], (enum sm_act)a, p->rows, p->s->k, memory[a]);
}

static void prepare_phase(void *arg, int thread, struct sm_work *work) {
    const struct project *p = arg;
    struct sm_acts acts[SM_ACT_COUNT];
    place_acts(p, p->o->acts, acts);
    struct local *l = &p->o->locals[thread];
    size_t begin, end;
    turn_to(l, SM_TIMER_PREPARE);
    while (sm_work_take(work, &begin, &end)) prepare_tokens(p, begin, end, l->row, acts);
    turn_to(l, SM_TIMER_WAIT);
}

/* The activations a phase's products read: prepared before, or now. */
static void take_acts(const struct project *p, struct local *l, struct sm_acts acts[SM_ACT_COUNT]) {
    place_acts(p, p->own ? l->acts : p->o->acts, acts);
    if (!p->own) return;
    turn_to(l, SM_TIMER_PREPARE);
    prepare_tokens(p, 0, p->n, l->row, acts);
}

/* Panel `panel` of w; one past the end is what lies behind it. */
static const uint8_t *panel_of(const struct sm_matrix *w, size_t panel) {
    return w->panels + panel * w->panel_bytes;
}

/* Panels first .. first + n_panels - 1 of w for n_rows rows of activations from `row` on into
 * out [n_rows][ld]; then come those at `next`. */
static void multiply_some(const struct project *p, const struct sm_matrix *w,
                          const struct sm_acts *acts, size_t row, size_t n_rows, size_t first,
                          size_t n_panels, const uint8_t *next, struct local *l, float *out,
                          size_t ld) {
    struct sm_matmul m = {
        .out = out, .ld = ld,
        .panels = panel_of(w, first), .panel_bytes = w->panel_bytes,
        .n_panels = n_panels, .next = next, .acts = &acts[sm_quants[w->type].act],
        .first = row, .n_tokens = n_rows, .scratch = l->scratch,
    };
    turn_to(l, p->head ? SM_TIMER_HEAD : SM_TIMER_MATMUL + (enum sm_timer)w->type);
    p->o->kernels->matmul[w->type](&m);
    turn_to(l, SM_TIMER_FINISH);
}

/* The same for all rows, of w with its scale. */
static void multiply(const struct project *p, const struct sm_matrix *w,
                     const struct sm_acts *acts, size_t first, size_t n_panels, const uint8_t *next,
                     struct local *l, float *out, size_t ld) {
    multiply_some(p, w, acts, 0, p->rows, first, n_panels, next, l, out, ld);
    for (size_t t = 0; w->scale != NULL && t < p->rows; t++)
        p->o->kernels->scale(out + t * ld, out + t * ld, *w->scale, n_panels * SM_PANEL_ROWS);
}

/* ---- adapters: tile += B ((A x) * scale), before biases -------------------------------------------------- */

/* What token t of the turn, and those after it, add. */
static const struct sm_adaptation *adaptation_of(const struct project *p, size_t t) {
    return p->o->adaptations + p->first + t;
}

/* The tokens from t on, before end, that have the same adapter. */
static size_t same_adapter(const struct project *p, size_t t, size_t end) {
    const struct sm_adaptation *a = adaptation_of(p, t);
    size_t n = 1;
    while (t + n < end && a[n].adapter == a->adapter) n++;
    return n;
}

/* What A of product i gave for token t: [low_stride]. */
static float *low_of(const struct project *p, size_t i, size_t t) {
    return p->o->low + (i * p->o->n_tokens + t) * p->o->low_stride;
}

static size_t n_low_panels(const struct sm_lora *lora) {
    return lora != NULL ? (lora->rank + SM_PANEL_ROWS - 1) / SM_PANEL_ROWS : 0;
}

/* Panel `panel`, counted over the products, of the A of tokens t .. t + n - 1, which are rows first ..
 * first + n - 1 of acts. */
static void lower_panel(const struct project *p, size_t panel, size_t t, size_t n,
                        const struct sm_acts *acts, size_t first, struct local *l) {
    const struct sm_adaptation *a = adaptation_of(p, t); /* [n] */
    const struct sm_kernels *k = p->o->kernels;
    for (size_t i = 0; i < p->n_products; i++) {
        const struct sm_lora *lora = sm_adapter_lora(a->adapter, p->products[i].w);
        size_t n_panels = n_low_panels(lora);
        if (panel >= n_panels) {
            panel -= n_panels;
            continue;
        }
        const struct sm_matmul m = {
            .out = l->tile[0], .ld = SM_PANEL_ROWS,
            .panels = lora->a + panel * lora->a_bytes, .panel_bytes = lora->a_bytes, .n_panels = 1,
            .acts = acts, .first = first, .n_tokens = n, .scratch = l->scratch,
        };
        k->matmul[SM_TYPE_F32](&m);
        for (size_t j = 0; j < n; j++) {
            float *low = low_of(p, i, t + j) + panel * SM_PANEL_ROWS;
            k->scale(low, l->tile[0] + j * SM_PANEL_ROWS, a[j].scale * lora->scale, SM_PANEL_ROWS);
            bool odd_end = panel + 1 == n_panels && n_panels % 2 != 0; /* B reads whole slabs */
            if (odd_end) memset(low + SM_PANEL_ROWS, 0, SM_PANEL_ROWS * sizeof low[0]);
        }
        return;
    }
}

/* An item is LOW_TOKENS tokens and a panel of A. */
static void lower_phase(void *arg, int thread, struct sm_work *work) {
    const struct project *p = arg;
    struct local *l = &p->o->locals[thread];
    struct sm_acts acts;
    size_t item, end, prepared = SIZE_MAX;
    sm_acts_place(&acts, SM_ACT_F32, LOW_TOKENS, p->s->k, l->acts[SM_ACT_F32]);
    turn_to(l, SM_TIMER_MATMUL + (enum sm_timer)SM_TYPE_F32);
    while (sm_work_take(work, &item, &end)) {
        for (; item < end; item++) {
            size_t first = item / p->n_low * LOW_TOKENS, last = SM_MIN(first + LOW_TOKENS, p->n);
            for (size_t t = first, n; t < last; t += n) {
                n = same_adapter(p, t, last);
                if (adaptation_of(p, t)->adapter == NULL) continue;
                for (size_t j = first; j < last && prepared != first; j++) {
                    const float *row = p->s->row(p->s, p->first + j, l->row);
                    if (!p->o->kernels->prepare[SM_ACT_F32](&acts, j - first, row))
                        sm_ops_fail(p->o, SMALLM_E_NUMERIC);
                }
                prepared = first;
                lower_panel(p, item % p->n_low, t, n, &acts, t - first, l);
            }
        }
    }
    turn_to(l, SM_TIMER_WAIT);
}

static void lower(struct project *p) {
    for (size_t t = 0, n; p->o->adaptations != NULL && t < p->n; t += n) {
        size_t n_low = 0;
        n = same_adapter(p, t, p->n);
        for (size_t i = 0; i < p->n_products; i++)
            n_low += n_low_panels(sm_adapter_lora(adaptation_of(p, t)->adapter, p->products[i].w));
        p->n_low = SM_MAX(p->n_low, n_low);
    }
    size_t n_blocks = (p->n + LOW_TOKENS - 1) / LOW_TOKENS;
    if (p->n_low > 0) run_phase(p->o, n_blocks * p->n_low, p->n < SM_FEW ? 1 : p->n_low, lower_phase, p);
}

/* tile [n][ld] += what adapters add to n_panels panels of product i. */
static void add_adapters(const struct project *p, size_t i, size_t panel, size_t n_panels, size_t ld,
                         float *tile, struct local *l) {
    const struct sm_matrix *w = p->products[i].w;
    const size_t width = n_panels * SM_PANEL_ROWS;
    const size_t n_rows = SM_MIN(width, w->n_rows - panel * SM_PANEL_ROWS);
    for (size_t t = 0, n; p->n_low > 0 && t < p->n; t += n) {
        n = same_adapter(p, t, p->n);
        const struct sm_lora *lora = sm_adapter_lora(adaptation_of(p, t)->adapter, w);
        if (lora == NULL) continue;
        const struct sm_acts acts = {.k = lora->rank, .k_pad = sm_act_pad(SM_ACT_F32, lora->rank),
                                     .stride = p->o->low_stride, .f = low_of(p, i, t)};
        size_t place = (size_t)(w->panels - lora->of) / w->panel_bytes + panel;
        const struct sm_matmul m = {
            .out = l->own, .ld = width,
            .panels = lora->b + place * lora->b_bytes, .panel_bytes = lora->b_bytes,
            .n_panels = n_panels, .acts = &acts, .n_tokens = n, .scratch = l->scratch,
        };
        p->o->kernels->matmul[SM_TYPE_F32](&m);
        for (size_t j = 0; j < n; j++) p->o->kernels->add(tile + (t + j) * ld, l->own + j * width, n_rows);
    }
}

/* ---- statistics ------------------------------------------------------------------------------------------ */

/* Rows of a source, from `row` on, that some matrices are multiplied with, by groups: first[g] - first[0] ..
 * first[g + 1] - first[0] - 1 of them are those of expert from + g. */
struct observation {
    struct sm_ops *o;
    const struct sm_source *s;
    size_t row;
    const size_t *first;   /* [n_groups + 1] */
    size_t n_groups, from;
    struct sm_sums *sums[SM_PRODUCTS_MAX]; /* [n_sums] */
    size_t n_sums;
};

static void copy_phase(void *arg, int thread, struct sm_work *work) {
    const struct observation *ob = arg;
    struct local *l = &ob->o->locals[thread];
    size_t begin, end, k = ob->s->k;
    turn_to(l, SM_TIMER_PREPARE);
    while (sm_work_take(work, &begin, &end))
        for (; begin < end; begin++) {
            float *to = ob->o->seen + begin * k;
            const float *row = ob->s->row(ob->s, ob->row + begin, to);
            if (row != to) memcpy(to, row, k * sizeof *row);
        }
    turn_to(l, SM_TIMER_WAIT);
}

/* sums_c += x_tc^2 for COLUMNS_AT_ONCE columns, token after token. */
static void square_phase(void *arg, int thread, struct sm_work *work) {
    const struct observation *ob = arg;
    struct local *l = &ob->o->locals[thread];
    const size_t k = ob->s->k;
    size_t item, end;
    turn_to(l, SM_TIMER_PREPARE);
    while (sm_work_take(work, &item, &end)) {
        for (; item < end; item++) {
            const size_t column = item * COLUMNS_AT_ONCE, n = SM_MIN(COLUMNS_AT_ONCE, k - column);
            for (size_t i = 0; i < ob->n_sums * ob->n_groups; i++) {
                const size_t g = i / ob->n_sums;
                double *to = ob->sums[i % ob->n_sums]->squares + (ob->from + g) * k + column;
                for (size_t t = ob->first[g]; t < ob->first[g + 1]; t++) {
                    const float *x = ob->o->seen + (t - ob->first[0]) * k + column;
                    for (size_t c = 0; c < n; c++) to[c] += (double)x[c] * (double)x[c];
                }
            }
        }
    }
    turn_to(l, SM_TIMER_WAIT);
}

/* Adds to the statistics of w, where it has an id and what it reads has not been added yet. */
static void add_sums(struct observation *ob, const struct sm_matrix *w) {
    if (w->id == 0) return;
    struct sm_sums *sums = &ob->o->statistics->of[w->id - 1];
    for (size_t i = 0; i < ob->n_sums; i++)
        if (ob->sums[i] == sums) return; /* parts of one tensor */
    ob->sums[ob->n_sums++] = sums;
}

static void observe(struct observation *ob) {
    if (ob->n_sums == 0) return;
    size_t n_rows = ob->first[ob->n_groups] - ob->first[0];
    run_phase(ob->o, n_rows, TOKENS_AT_ONCE, copy_phase, ob);
    run_phase(ob->o, (ob->s->k + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE, 1, square_phase, ob);
    for (size_t i = 0; i < ob->n_sums * ob->n_groups; i++) {
        const size_t g = i / ob->n_sums;
        ob->sums[i % ob->n_sums]->counts[ob->from + g] += ob->first[g + 1] - ob->first[g];
    }
}

static void observe_project(const struct project *p) {
    const size_t first[] = {0, p->n};
    struct observation ob = {.o = p->o, .s = p->s, .row = p->first, .first = first, .n_groups = 1};
    for (size_t i = 0; i < p->n_products; i++) add_sums(&ob, p->products[i].w);
    observe(&ob);
}

/* ---- finishing ------------------------------------------------------------------------------------------- */

/* tile [n][ld] += the product's bias, for rows row .. row + n_rows - 1. */
static void add_bias(const struct project *p, const struct sm_product *product, size_t row,
                     size_t n_rows, size_t ld, float *tile) {
    if (product->bias == NULL) return;
    for (size_t t = 0; t < p->n; t++)
        p->o->kernels->add(tile + t * ld, product->bias + row, n_rows);
}

static bool is_scaled(const struct sm_product *product) {
    return product->scale != 0 && product->scale != 1;
}

/* Hands a tile's rows row .. row + n_rows - 1 on to the product's destination. */
static void finish(const struct project *p, const struct sm_product *product, size_t row,
                   size_t n_rows, size_t ld, float *tile) {
    const struct sm_kernels *k = p->o->kernels;
    for (size_t t = 0; t < p->n && p->fine; t++) {
        float *sum = tile + t * ld, *coarse = tile + 2 * t * ld, *rest = coarse + ld;
        for (size_t r = 0; r < n_rows; r++) sum[r] = coarse[r] + rest[r];
    }
    add_bias(p, product, row, n_rows, ld, tile);
    if (is_scaled(product)) k->scale(tile, tile, product->scale, p->n * ld);
    if (product->cap != 0) k->softcap(tile, tile, product->cap, p->n * ld);
    for (size_t t = 0; t < p->n; t++) {
        float *out = product->rows != NULL ? product->rows[t] : product->out + t * product->stride;
        if (product->add)
            k->add(out + row, tile + t * ld, n_rows);
        else if (product->apply != NULL)
            product->apply(out + row, tile + t * ld, n_rows);
        else
            memcpy(out + row, tile + t * ld, n_rows * sizeof(float));
        if (product->peaks != NULL && product->peaks[t] != NULL)
            k->peaks(product->peaks[t] + row / SM_PEAK, out + row, n_rows);
    }
}

static void finish_gated(const struct project *p, size_t row, size_t n_rows, size_t ld,
                         float *gate, float *up) {
    add_bias(p, &p->products[0], row, n_rows, ld, gate);
    add_bias(p, &p->products[1], row, n_rows, ld, up);
    for (size_t t = 0; t < p->n; t++)
        p->apply_gate(p->gated + t * p->gated_stride + row, gate + t * ld, up + t * ld, n_rows);
}

/* Some panels of one product (of gate and up together), n_rows rows of the matrix from `row` on. */
static void run_tile(const struct project *p, const struct sm_product *product,
                     const struct sm_acts *acts, size_t panel, size_t n_panels, struct local *l) {
    const size_t row = panel * SM_PANEL_ROWS, ld = n_panels * SM_PANEL_ROWS;
    const size_t n_rows = SM_MIN(ld, product->w->n_rows - row);
    const uint8_t *next = panel_of(product->w, panel + n_panels);
    const size_t index = (size_t)(product - p->products);
    float *gate = l->tile[0], *up = l->tile[1];
    if (p->gated != NULL) {
        const struct sm_matrix *w_up = p->products[1].w;
        multiply(p, product->w, acts, panel, n_panels, panel_of(w_up, panel), l, gate, ld);
        multiply(p, w_up, acts, panel, n_panels, next, l, up, ld);
        add_adapters(p, 0, panel, n_panels, ld, gate, l);
        add_adapters(p, 1, panel, n_panels, ld, up, l);
        finish_gated(p, row, n_rows, ld, gate, up);
        return;
    }
    /* Where nothing is between the sums and their place they go there at once; but of many tokens a kernel
     * writes a line each, at distances that put most of them into the same few sets of the caches. */
    bool as_is = !product->add && product->apply == NULL && p->rows < SM_FEW && !p->fine &&
                 product->rows == NULL && !is_scaled(product);
    if (as_is && n_rows == ld) {
        float *out = product->out + row;
        multiply(p, product->w, acts, panel, n_panels, next, l, out, product->stride);
        add_adapters(p, index, panel, n_panels, product->stride, out, l);
        add_bias(p, product, row, n_rows, product->stride, out);
    } else {
        multiply(p, product->w, acts, panel, n_panels, next, l, gate, ld);
        add_adapters(p, index, panel, n_panels, ld, gate, l);
        finish(p, product, row, n_rows, ld, gate);
    }
}

/* Whether some token asks for a row of the panel. */
static bool is_asked_for(const struct project *p, const struct sm_product *product, size_t panel) {
    const size_t row = panel * SM_PANEL_ROWS;
    for (size_t t = 0; t < p->n; t++) {
        const uint32_t *allowed = product->allowed[t];
        if (allowed == NULL || (allowed[row / 32] >> row % 32 & 0xffff) != 0) return true;
    }
    return false;
}

static void fill_panels(const struct project *p, const struct sm_product *product, size_t panel,
                        size_t n_panels) {
    const size_t row = panel * SM_PANEL_ROWS;
    const size_t end = SM_MIN(row + n_panels * SM_PANEL_ROWS, product->w->n_rows);
    for (size_t t = 0; t < p->n; t++) {
        for (size_t r = row; r < end; r++) product->rows[t][r] = -INFINITY;
        for (size_t i = 0; product->peaks[t] != NULL && i < n_panels; i++)
            product->peaks[t][panel + i] = -INFINITY;
    }
}

/* Panels that a tile holds for n tokens, at most n_panels: even where possible, as kernels like it. */
static size_t tile_panels(size_t n, size_t n_panels) {
    size_t step = TILE_FLOATS / (n * SM_PANEL_ROWS);
    if (step > 2) step -= step % 2;
    return SM_MIN(step, n_panels);
}

/* The panels from begin on, before end, that are all asked for, or all not. */
static size_t run_length(const struct project *p, const struct sm_product *product, size_t begin,
                         size_t end, bool *asked_for) {
    *asked_for = product->allowed == NULL || is_asked_for(p, product, begin);
    size_t i = product->allowed == NULL ? end : begin + 1;
    while (i < end && is_asked_for(p, product, i) == *asked_for) i++;
    return i - begin;
}

/* A thread's panels begin .. end - 1 of one product. */
static void run_panels(const struct project *p, const struct sm_product *product,
                       const struct sm_acts *acts, size_t begin, size_t end, struct local *l) {
    bool asked_for;
    for (size_t i = begin, n; i < end; i += n) {
        n = run_length(p, product, i, i + tile_panels(p->rows, end - i), &asked_for);
        if (asked_for) run_tile(p, product, acts, i, n, l);
        else fill_panels(p, product, i, n);
    }
}

static void product_phase(void *arg, int thread, struct sm_work *work) {
    const struct project *p = arg;
    struct local *l = &p->o->locals[thread];
    struct sm_acts acts[SM_ACT_COUNT];
    size_t begin, end;
    take_acts(p, l, acts);
    while (sm_work_take(work, &begin, &end)) {
        size_t base = 0;
        for (size_t i = 0; i < p->n_listed; i++) {
            size_t n = p->products[i].w->n_panels;
            size_t from = SM_MAX(begin, base), to = SM_MIN(end, base + n);
            if (from < to) run_panels(p, &p->products[i], acts, from - base, to - base, l);
            base += n;
        }
    }
    turn_to(l, SM_TIMER_WAIT);
}

static void run_turn(struct project *p) {
    p->rows = p->fine ? 2 * p->n : p->n;
    if (p->o->statistics != NULL) observe_project(p);
    if (!p->head) lower(p);
    for (size_t i = 0; i < p->n_products; i++) p->wants[sm_quants[p->products[i].w->type].act] = true;
    p->own = p->rows < SM_FEW;
    if (!p->own) run_phase(p->o, p->n, TOKENS_AT_ONCE, prepare_phase, p);
    /* One range of panels over all products, so that small matrices do not round a thread away. */
    p->n_listed = p->gated != NULL ? 1 : p->n_products;
    size_t n_panels = 0;
    for (size_t i = 0; i < p->n_listed; i++) n_panels += p->products[i].w->n_panels;
    run_phase(p->o, n_panels, PANELS_AT_ONCE, product_phase, p);
}

/* The product from token t on. */
static struct sm_product product_from(const struct sm_product *product, size_t t) {
    struct sm_product part = *product;
    if (part.out != NULL) part.out += t * part.stride;
    if (part.rows != NULL) part.rows += t;
    if (part.peaks != NULL) part.peaks += t;
    if (part.allowed != NULL) part.allowed += t;
    return part;
}

/* All tokens: in a turn as many as the shared activations have rows for. */
static void run_project(const struct project *all) {
    size_t most = all->fine ? SM_MAX(all->o->n_tokens / 2, 1) : all->o->n_tokens;
    for (size_t t = 0; t < all->n; t += most) {
        struct project p = *all;
        struct sm_product parts[SM_PRODUCTS_MAX];
        for (size_t i = 0; i < all->n_products; i++) parts[i] = product_from(&all->products[i], t);
        p.products = parts;
        if (p.gated != NULL) p.gated += t * p.gated_stride;
        p.first = t;
        p.n = SM_MIN(most, all->n - t);
        run_turn(&p);
    }
}

void sm_ops_project(struct sm_ops *o, size_t n, const struct sm_source *s,
                    const struct sm_product *products, size_t n_products) {
    const struct project p = {.o = o, .s = s, .products = products, .n_products = n_products, .n = n};
    run_project(&p);
}

void sm_ops_project_fine(struct sm_ops *o, size_t n, const struct sm_source *s,
                         const struct sm_product *product) {
    bool fine = sm_quants[product->w->type].act != SM_ACT_F32; /* else nothing is rounded */
    const struct project p = {.o = o, .s = s, .products = product, .n_products = 1, .n = n,
                              .fine = fine, .head = true};
    run_project(&p);
}

void sm_ops_gated(struct sm_ops *o, size_t n, const struct sm_source *s, const struct sm_product *gate,
                  const struct sm_product *up, sm_gated_fn *gated, float *out, size_t stride) {
    const struct sm_product both[2] = {*gate, *up};
    const struct project p = {.o = o, .s = s, .products = both, .n_products = 2, .n = n, .gated = out,
                              .gated_stride = stride, .apply_gate = gated};
    run_project(&p);
}

/* ---- experts ----------------------------------------------------------------------------------------------- */

/* One half of a round of sm_ops_experts: the hidden rows, or the way back. */
struct feed {
    struct project p; /* its rows are tokens (hidden rows, own), or the round's slots */
    const struct sm_source *tokens;
    const struct sm_experts *e;
    const struct sm_routing *r;
    size_t begin, n_slots; /* the round: slots begin .. begin + n_slots - 1, of the experts */
    size_t from, to;       /* from .. to - 1, */
    const uint16_t *active; /* [n_active] of which these have tokens in it, ascending */
    size_t n_active;
    float *h;              /* [n_slots][n_ff] */
    float *out;            /* [n][stride] */
    size_t stride;
};

/* The slots of expert e. */
static size_t first_slot(const struct feed *f, size_t e) { return f->r->first[e]; }
static size_t end_slot(const struct feed *f, size_t e) { return f->r->first[e + 1]; }

/* What the round's slot `slot` reads: its token's row. */
static const float *row_of_slot(const struct sm_source *s, size_t slot, float *room) {
    const struct feed *f = s->context;
    return f->tokens->row(f->tokens, f->r->tokens[f->begin + slot], room);
}

/* tile [n][ld] += bias[at .. at + ld - 1], where there is one. */
static void add_expert_bias(const struct feed *f, const float *bias, size_t at, size_t n, size_t ld,
                            float *tile) {
    for (size_t t = 0; t < n && bias != NULL; t++) f->p.o->kernels->add(tile + t * ld, bias + at, ld);
}

/* h of one expert: n_panels panels from `panel` on of gate and of up, for all its tokens. */
static void run_hidden(const struct feed *f, const struct sm_acts *acts, size_t e, size_t panel,
                       size_t n_panels, struct local *l) {
    const struct sm_matrix *w_gate = f->e->gate, *w_up = f->e->up;
    const size_t n_ff = f->e->n_ff, all = n_ff / SM_PANEL_ROWS;
    /* A row of activations is a token: those of an expert do not lie together. */
    const size_t at_once = f->p.own ? 1 : end_slot(f, e) - first_slot(f, e);
    float *gate = l->tile[0], *up = l->tile[1];
    for (size_t i = panel, n; i < panel + n_panels; i += n) {
        n = tile_panels(at_once, panel + n_panels - i);
        const size_t at = e * all + i, row = i * SM_PANEL_ROWS, ld = n * SM_PANEL_ROWS;
        for (size_t slot = first_slot(f, e); slot < end_slot(f, e); slot += at_once) {
            size_t first = f->p.own ? f->r->tokens[slot] : slot - f->begin;
            multiply_some(&f->p, w_gate, acts, first, at_once, at, n, panel_of(w_up, at), l, gate, ld);
            multiply_some(&f->p, w_up, acts, first, at_once, at, n, panel_of(w_gate, at + n), l, up, ld);
            add_expert_bias(f, f->e->b_gate, e * n_ff + row, at_once, ld, gate);
            add_expert_bias(f, f->e->b_up, e * n_ff + row, at_once, ld, up);
            for (size_t t = 0; t < at_once; t++)
                f->e->gated(f->h + (slot - f->begin + t) * n_ff + row, gate + t * ld, up + t * ld, ld);
        }
    }
}

static void hidden_phase(void *arg, int thread, struct sm_work *work) {
    const struct feed *f = arg;
    struct local *l = &f->p.o->locals[thread];
    struct sm_acts acts[SM_ACT_COUNT];
    const size_t all = f->e->n_ff / SM_PANEL_ROWS; /* panels of one expert */
    size_t begin, end;
    take_acts(&f->p, l, acts);
    while (sm_work_take(work, &begin, &end))
        for (size_t i = begin, n; i < end; i += n) {
            n = SM_MIN(all - i % all, end - i);
            run_hidden(f, acts, f->active[i / all], i % all, n, l);
        }
    turn_to(l, SM_TIMER_WAIT);
}

/* out += weight * (W_down h + b): the panels begin .. end - 1 of every expert, ascending, so that
 * nobody else adds to these rows and the order of additions is always the same. */
static void run_down(const struct feed *f, const struct sm_acts *acts, size_t begin, size_t end,
                     struct local *l) {
    const struct sm_matrix *w = f->e->down;
    const size_t all = f->e->n_embd / SM_PANEL_ROWS;
    float *tile = l->tile[0];
    for (size_t a = 0; a < f->n_active; a++) {
        const size_t e = f->active[a], slot = first_slot(f, e), n_slots = end_slot(f, e) - slot;
        const size_t following = a + 1 < f->n_active ? f->active[a + 1] * all + begin : e * all + end;
        for (size_t i = begin, n; i < end; i += n) {
            n = tile_panels(n_slots, end - i);
            const size_t at = e * all + i, row = i * SM_PANEL_ROWS, ld = n * SM_PANEL_ROWS;
            multiply_some(&f->p, w, acts, slot - f->begin, n_slots, at, n,
                          panel_of(w, i + n < end ? at + n : following), l, tile, ld);
            add_expert_bias(f, f->e->b_down, e * f->e->n_embd + row, n_slots, ld, tile);
            for (size_t t = 0; t < n_slots; t++)
                f->p.o->kernels->add_scaled(f->out + f->r->tokens[slot + t] * f->stride + row,
                                            tile + t * ld, f->r->weights[slot + t], ld);
        }
    }
}

static void down_phase(void *arg, int thread, struct sm_work *work) {
    const struct feed *f = arg;
    struct local *l = &f->p.o->locals[thread];
    struct sm_acts acts[SM_ACT_COUNT];
    size_t begin, end;
    take_acts(&f->p, l, acts);
    while (sm_work_take(work, &begin, &end)) run_down(f, acts, begin, end, l);
    turn_to(l, SM_TIMER_WAIT);
}

/* Whether a thread's own memory holds the activations of n rows. */
static bool fits_own(const struct project *p, size_t n) {
    for (int a = 0; a < SM_ACT_COUNT; a++)
        if (p->wants[a] && sm_acts_bytes((enum sm_act)a, n, p->s->k) >
                               sm_acts_bytes((enum sm_act)a, SM_FEW - 1, p->o->k_max))
            return false;
    return true;
}

/* Adds what the round's slots read to the statistics of some of the matrices. */
static void observe_slots(const struct feed *f, const struct sm_source *s, const struct sm_matrix *w,
                          const struct sm_matrix *other) {
    struct observation ob = {.o = f->p.o, .s = s, .first = f->r->first + f->from,
                             .n_groups = f->to - f->from, .from = f->from};
    if (f->p.o->statistics == NULL) return;
    add_sums(&ob, w);
    if (other != NULL) add_sums(&ob, other);
    observe(&ob);
}

/* One round: the tokens of the active experts through all three matrices. */
static void run_round(struct feed *f, size_t n) {
    struct sm_ops *o = f->p.o;
    const struct sm_source slots = {.row = row_of_slot, .context = f, .k = f->tokens->k};
    const bool few = n < SM_FEW; /* then the activations are the tokens', not the slots' */
    observe_slots(f, &slots, f->e->gate, f->e->up);
    f->p = (struct project){.o = o, .s = few ? f->tokens : &slots, .n = few ? n : f->n_slots,
                            .own = few};
    f->p.rows = f->p.n;
    f->p.wants[sm_quants[f->e->gate->type].act] = f->p.wants[sm_quants[f->e->up->type].act] = true;
    if (!few) run_phase(o, f->n_slots, TOKENS_AT_ONCE, prepare_phase, &f->p);
    run_phase(o, f->n_active * (f->e->n_ff / SM_PANEL_ROWS), PANELS_AT_ONCE, hidden_phase, f);

    const struct sm_source hidden = sm_source_rows(f->h, f->e->n_ff, f->e->n_ff);
    observe_slots(f, &hidden, f->e->down, NULL);
    f->p = (struct project){.o = o, .s = &hidden, .n = f->n_slots, .rows = f->n_slots};
    f->p.wants[sm_quants[f->e->down->type].act] = true;
    f->p.own = fits_own(&f->p, f->n_slots);
    if (!f->p.own) run_phase(o, f->n_slots, TOKENS_AT_ONCE, prepare_phase, &f->p);
    run_phase(o, f->e->n_embd / SM_PANEL_ROWS, PANELS_AT_ONCE / 2, down_phase, f);
}

void sm_ops_experts(struct sm_ops *o, size_t n, const struct sm_source *s,
                    const struct sm_experts *experts, const struct sm_routing *routing, float *h,
                    float *out, size_t stride) {
    uint16_t active[SM_EXPERTS_MAX];
    for (size_t e = 0; e < experts->n;) {
        struct feed f = {.p = {.o = o}, .tokens = s, .e = experts, .r = routing,
                         .begin = routing->first[e], .from = e, .active = active, .h = h, .out = out,
                         .stride = stride};
        /* An expert has at most n tokens: each round has at least one. */
        for (; e < experts->n && routing->first[e + 1] - f.begin <= o->n_tokens; e++)
            if (end_slot(&f, e) > first_slot(&f, e)) active[f.n_active++] = (uint16_t)e;
        f.n_slots = routing->first[e] - f.begin;
        f.to = e;
        if (f.n_active > 0) run_round(&f, n);
    }
}

/* ---- items ------------------------------------------------------------------------------------------------- */

struct each {
    struct sm_ops *o;
    sm_item_fn *run;
    void *context;
    enum sm_timer timer;
};

static void each_phase(void *arg, int thread, struct sm_work *work) {
    struct each *e = arg;
    struct local *l = &e->o->locals[thread];
    size_t item, end;
    turn_to(l, e->timer);
    while (sm_work_take(work, &item, &end)) {
        /* Attention within a long text takes a second and more. */
        if (is_cancelled(e->o)) sm_ops_fail(e->o, SMALLM_E_CANCELLED);
        else e->run(e->context, item, l->scratch, l->own);
    }
    turn_to(l, SM_TIMER_WAIT);
}

void sm_ops_each(struct sm_ops *o, enum sm_timer timer, size_t n, sm_item_fn *run, void *context) {
    struct each e = {.o = o, .run = run, .context = context, .timer = timer};
    run_phase(o, n, 1, each_phase, &e);
}
