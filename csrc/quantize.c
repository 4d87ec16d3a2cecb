/* A phase whose items are rows; a thread takes a row piece by piece. */
#include "quantize.h"

#include <stdatomic.h>

#include "quants/fit.h"
#include "threads.h"

#define PIECE ((size_t)4096) /* values: whole blocks of any format, and they stay in the first cache */
#define ROWS_AT_ONCE 4

struct phase {
    const struct sm_rows *rows;
    sm_quantize_fn *quantize;
    float *room;           /* [n_threads][PIECE] */
    float *weights;        /* [n_cols], or NULL */
    atomic_size_t bad_row; /* the first that cannot be written; n_rows: none */
};

/* The first of n values from `first` on of a row that cannot be written, or n_cols.  With values x
 * and where they were written. */
static size_t find_bad(const struct phase *p, const float *x, const uint8_t *out, size_t first, size_t n) {
    const struct sm_rows *r = p->rows;
    const struct sm_quant *to = &sm_quants[r->to];
    for (size_t i = 0; i < n; i++) {
        bool held = to->block_size == 1 || (x[i] <= SM_FIT_MAX && x[i] >= -SM_FIT_MAX);
        if (!(x[i] - x[i] == 0) || !held) return first + i;
    }
    size_t n_blocks = n / to->block_size, bad = to->find_nonfinite(out, n_blocks);
    if (bad == n_blocks) return r->n_cols;
    size_t most = bad * to->block_size; /* its greatest value */
    for (size_t i = most; i < (bad + 1) * to->block_size; i++)
        if (x[i] * x[i] > x[most] * x[most]) most = i;
    return first + most;
}

/* Writes a row; the first column that cannot be, or n_cols, and its value in *value. */
static size_t write_row(const struct phase *p, size_t row, float *room, float *value) {
    const struct sm_rows *r = p->rows;
    const struct sm_quant *from = &sm_quants[r->from], *to = &sm_quants[r->to];
    const uint8_t *in = (const uint8_t *)r->in + row * sm_row_bytes(r->from, r->n_cols);
    uint8_t *out = (uint8_t *)r->out + row * sm_row_bytes(r->to, r->n_cols);
    for (size_t first = 0, n; first < r->n_cols; first += n) {
        n = SM_MIN(PIECE, r->n_cols - first);
        from->dequantize(in, room, n / from->block_size);
        bool fits = true; /* quantizers want values that are finite and not too large */
        for (size_t i = 0; i < n && to->block_size > 1; i++)
            fits &= room[i] <= SM_FIT_MAX && room[i] >= -SM_FIT_MAX;
        if (fits) p->quantize(room, p->weights ? p->weights + first : NULL, out, n / to->block_size);
        size_t bad = find_bad(p, room, out, first, n);
        if (bad < r->n_cols) {
            *value = room[bad - first];
            return bad;
        }
        in += sm_row_bytes(r->from, n);
        out += sm_row_bytes(r->to, n);
    }
    return r->n_cols;
}

static void write_phase(void *arg, int thread, struct sm_work *work) {
    struct phase *p = arg;
    size_t begin, end;
    float value;
    while (sm_work_take(work, &begin, &end))
        for (size_t row = begin; row < end; row++) {
            if (write_row(p, row, p->room + (size_t)thread * PIECE, &value) == p->rows->n_cols) continue;
            size_t known = atomic_load(&p->bad_row);
            while (row < known && !atomic_compare_exchange_weak(&p->bad_row, &known, row)) {}
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
    struct phase p = {.rows = rows, .quantize = sm_quantizer(rows->to)};
    struct sm_pool *pool = NULL;
    atomic_init(&p.bad_row, rows->n_rows);
    int status = sm_pool_new(n_threads, &pool, err);
    if (status != SMALLM_OK) goto fail;
    status = SMALLM_E_MEMORY;
    p.room = sm_alloc((size_t)n_threads * PIECE * sizeof *p.room);
    if (rows->importance) p.weights = sm_calloc(rows->n_cols, sizeof *p.weights);
    if (!p.room || (rows->importance && !p.weights)) {
        sm_fail(err, status, "no memory for quantizing rows of %zu values", rows->n_cols);
        goto fail;
    }
    if (p.weights && !weigh(rows->importance, rows->n_cols, p.weights)) {
        sm_free(p.weights);
        p.weights = NULL;
    }
    sm_pool_run(pool, rows->n_rows, ROWS_AT_ONCE, write_phase, &p);
    status = SMALLM_OK;
    size_t row = atomic_load(&p.bad_row);
    if (row < rows->n_rows) {
        float value = 0;
        size_t column = write_row(&p, row, p.room, &value);
        bool finite = value - value == 0;
        status = finite ? SMALLM_E_UNSUPPORTED : SMALLM_E_CORRUPT;
        sm_fail(err, status, finite ? "row %zu, column %zu: the value %g is beyond what %s holds"
                                    : "row %zu, column %zu: the value is %g, not a finite number",
                row, column, (double)value, sm_quants[rows->to].name);
    }
fail:
    sm_pool_free(pool);
    sm_free(p.room);
    sm_free(p.weights);
    return status;
}
