/* A phase whose items are pieces of all values, which go from row to row. */
#include "quantize.h"

#include <float.h>
#include <stdatomic.h>

#include "kernels/kernels.h"
#include "threads.h"

#define PIECE ((size_t)4096)     /* values: whole blocks of any format, and they stay in the near caches */
#define BLOCKS ((size_t)16)      /* fitted at once */
#define PIECES_AT_ONCE 4

struct room { /* a thread's own */
    float x[PIECE], weights[PIECE];
    struct sm_codes codes[BLOCKS];
};

struct phase {
    const struct sm_rows *rows;
    const struct sm_kernels *kernels;
    const struct sm_writer *writer;
    size_t n_values;
    struct room *room;     /* [n_threads] */
    float *weights;        /* [n_cols], or NULL */
    atomic_size_t bad;     /* the first value that cannot be written; n_values: none */
};

/* The first of n values x that is not finite, or larger than is fitted; n: there is none. */
static size_t find_unfit(const struct phase *p, const float *x, size_t n) {
    const float limit = p->writer->store ? FLT_MAX : SM_FIT_MAX;
    int32_t most = 0, allowed; /* sizes are ordered like their bits, NaN above infinity */
    memcpy(&allowed, &limit, sizeof allowed);
    for (size_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    if (most <= allowed) return n;
    size_t i = 0;
    while (x[i] <= limit && x[i] >= -limit) i++;
    return i;
}

/* The first of n values x that what was written for them cannot hold; n: there is none. */
static size_t find_beyond(const struct phase *p, const float *x, const uint8_t *out, size_t n) {
    const struct sm_quant *to = &sm_quants[p->rows->to];
    size_t n_blocks = n / to->block_size, bad = to->find_nonfinite(out, n_blocks);
    if (bad == n_blocks) return n;
    size_t most = bad * to->block_size; /* the greatest of its block */
    for (size_t i = most; i < (bad + 1) * to->block_size; i++)
        if (x[i] * x[i] > x[most] * x[most]) most = i;
    return most;
}

/* The weights of n values from `first` on, or NULL. */
static const float *weights_of(const struct phase *p, float *room, size_t first, size_t n) {
    if (!p->weights) return NULL;
    for (size_t i = 0, some, n_cols = p->rows->n_cols; i < n; i += some) {
        size_t column = (first + i) % n_cols;
        some = SM_MIN(n_cols - column, n - i);
        memcpy(room + i, p->weights + column, some * sizeof *room);
    }
    return room;
}

/* Writes n values x as blocks. */
static void write_blocks(const struct phase *p, struct room *room, size_t first, size_t n, uint8_t *out) {
    const enum sm_type to = p->rows->to;
    const size_t block = sm_quants[to].block_size;
    const float *x = room->x, *w = weights_of(p, room->weights, first, n);
    for (size_t left = n / block, some; left > 0; left -= some) {
        some = SM_MIN(left, BLOCKS);
        p->kernels->fit(to, x, w, some, room->codes);
        p->writer->put(room->codes, out, some);
        x += some * block;
        if (w) w += some * block;
        out += some * sm_quants[to].block_bytes;
    }
}

/* Writes a piece; the first value of it that cannot be, or n_values, and what it is in *value. */
static size_t write_piece(const struct phase *p, size_t piece, struct room *room, float *value) {
    const struct sm_rows *r = p->rows;
    const struct sm_quant *from = &sm_quants[r->from];
    size_t first = piece * PIECE, n = SM_MIN(PIECE, p->n_values - first);
    const uint8_t *in = (const uint8_t *)r->in + sm_row_bytes(r->from, first);
    uint8_t *out = (uint8_t *)r->out + sm_row_bytes(r->to, first);
    float *x = room->x;
    from->dequantize(in, x, n / from->block_size);
    size_t bad = find_unfit(p, x, n);
    if (bad == n) {
        if (p->writer->store)
            p->writer->store(x, out, n);
        else
            write_blocks(p, room, first, n, out);
        bad = find_beyond(p, x, out, n);
    }
    if (bad == n) return p->n_values;
    *value = x[bad];
    return first + bad;
}

static void write_phase(void *arg, int thread, struct sm_work *work) {
    struct phase *p = arg;
    size_t begin, end;
    float value;
    while (sm_work_take(work, &begin, &end))
        for (size_t piece = begin; piece < end; piece++) {
            size_t bad = write_piece(p, piece, &p->room[thread], &value), known = atomic_load(&p->bad);
            while (bad < known && !atomic_compare_exchange_weak(&p->bad, &known, bad)) {}
        }
}

/* Importance as weights of mean 1 that are never zero: a column that was never seen to matter still
 * has values to choose among.  False: all are alike. */
static bool weigh(const float *importance, size_t n, float *weights) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += importance[i];
    if (!(sum > 0)) return false;
    double factor = (double)n / sum;
    for (size_t i = 0; i < n; i++) weights[i] = (float)(importance[i] * factor + 0x1p-14);
    return true;
}

int sm_quantize_rows(const struct sm_rows *rows, int n_threads, smallm_error *err) {
    struct phase p = {.rows = rows, .writer = sm_writer(rows->to), .n_values = rows->n_rows * rows->n_cols};
    struct sm_pool *pool = NULL;
    atomic_init(&p.bad, p.n_values);
    int status = sm_kernels_get(&p.kernels, err);
    if (status == SMALLM_OK) status = sm_pool_new(n_threads, &pool, err);
    if (status != SMALLM_OK) goto fail;
    status = SMALLM_E_MEMORY;
    p.room = sm_alloc((size_t)n_threads * sizeof *p.room);
    if (rows->importance) p.weights = sm_calloc(rows->n_cols, sizeof *p.weights);
    if (!p.room || (rows->importance && !p.weights)) {
        sm_fail(err, status, "no memory for quantizing rows of %zu values", rows->n_cols);
        goto fail;
    }
    if (p.weights && !weigh(rows->importance, rows->n_cols, p.weights)) {
        sm_free(p.weights);
        p.weights = NULL;
    }
    sm_pool_run(pool, (p.n_values + PIECE - 1) / PIECE, PIECES_AT_ONCE, write_phase, &p);
    status = SMALLM_OK;
    size_t bad = atomic_load(&p.bad);
    if (bad < p.n_values) {
        float value = 0;
        write_piece(&p, bad / PIECE, p.room, &value);
        bool finite = value - value == 0;
        status = finite ? SMALLM_E_UNSUPPORTED : SMALLM_E_CORRUPT;
        sm_fail(err, status, finite ? "row %zu, column %zu: the value %g is beyond what %s holds"
                                    : "row %zu, column %zu: the value is %g, not a finite number",
                bad / rows->n_cols, bad % rows->n_cols, (double)value, sm_quants[rows->to].name);
    }
fail:
    sm_pool_free(pool);
    sm_free(p.room);
    sm_free(p.weights);
    return status;
}
