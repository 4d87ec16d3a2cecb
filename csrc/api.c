/* The public functions: judge arguments, refuse in a child of fork(), forward.
 *
 * Invariant: nothing behind this file sees a NULL it does not expect, a number out of its range, or
 * an object of another process. */
#include <math.h>

#include "adapter.h"
#include "cpu.h"
#include "engine.h"
#include "os.h"
#include "quantize.h"
#include "threads.h"

#define MAX_LOGPROBS 64
#define MAX_STOP_BYTES ((size_t)1 << 20) /* of all stop strings: each byte costs five */

struct smallm_model {
    int64_t process;
    struct sm_model *model;
};

static int refuse_null(const char *what, smallm_error *err) {
    return sm_fail(err, SMALLM_E_ARGUMENT, "%s is NULL", what);
}

/* What every call on an object begins with. */
static int judge_process(int64_t process, const char *what, smallm_error *err) {
    if (process == sm_process_id()) return SMALLM_OK;
    return sm_fail(err, SMALLM_E_FORKED,
                   "this %s belongs to process %lld, and a child of fork() cannot use it: open the "
                   "model after the fork",
                   what, (long long)process);
}
static int judge_model(const smallm_model *m, smallm_error *err) {
    return m ? judge_process(m->process, "model", err) : refuse_null("model", err);
}
static int judge_adapter(const smallm_adapter *a, smallm_error *err) {
    return a ? judge_process(a->process, "adapter", err) : refuse_null("adapter", err);
}
static int judge_engine(const smallm_engine *e, smallm_error *err) {
    return e ? judge_process(sm_engine_process(e), "engine", err) : refuse_null("engine", err);
}
static int judge_request(const smallm_request *r, smallm_error *err) {
    return r ? judge_process(sm_request_process(r), "request", err) : refuse_null("request", err);
}

static int judge_range(const char *what, int64_t value, int64_t low, int64_t high,
                       const char *why, smallm_error *err) {
    if (value >= low && value <= high) return SMALLM_OK;
    return sm_fail(err, SMALLM_E_ARGUMENT, "%s is %lld; allowed are %lld to %lld%s", what,
                   (long long)value, (long long)low, (long long)high, why);
}

/* 0 becomes the default count. */
static int resolve_threads(int32_t *n_threads, smallm_error *err) {
    int rc = judge_range("n_threads", *n_threads, 0, SM_MAX_THREADS, " (0: the default)", err);
    if (rc != SMALLM_OK || *n_threads != 0) return rc;
    int n;
    rc = sm_cpu_default_threads(&n, err);
    if (rc == SMALLM_OK) *n_threads = n;
    return rc;
}

const char *smallm_version(void) { return SMALLM_VERSION; }

int smallm_cpu(smallm_cpu_info *out, smallm_error *err) {
    if (!out) return refuse_null("out", err);
    const struct sm_kernels *kernels;
    int n_threads, rc = sm_kernels_get(&kernels, err);
    if (rc == SMALLM_OK) rc = sm_cpu_default_threads(&n_threads, err);
    if (rc != SMALLM_OK) return rc;
    smallm_cpu_info info = {.n_threads = n_threads, .total_memory = sm_memory_total()};
    strncpy(info.isa, kernels->name, sizeof info.isa - 1);
    sm_kernels_available(info.available, sizeof info.available);
    sm_cpu_brand(info.brand);
    struct sm_cores cores;
    sm_cores_get(&cores);
    info.n_logical = cores.n_logical;
    return sm_write_struct(out, &info, sizeof info, "smallm_cpu_info", err);
}

/* ---- models ---------------------------------------------------------------------------------- */

int smallm_model_open(const char *path, const smallm_model_params *params, smallm_model **out,
                      smallm_error *err) {
    if (!out) return refuse_null("out", err);
    *out = NULL;
    if (!path) return refuse_null("path", err);
    smallm_model_params p;
    int rc = sm_read_struct(&p, sizeof p, params, "smallm_model_params", err);
    if (rc == SMALLM_OK) rc = resolve_threads(&p.n_threads, err);
    if (rc != SMALLM_OK) return rc;
    smallm_model *m = sm_calloc(1, sizeof *m);
    if (!m) return sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
    m->process = sm_process_id();
    rc = sm_model_open(path, &p, &m->model, err);
    if (rc != SMALLM_OK) {
        sm_free(m);
        return rc;
    }
    *out = m;
    return SMALLM_OK;
}

void smallm_model_free(smallm_model *model) {
    if (judge_model(model, NULL) != SMALLM_OK) return;
    sm_model_free(model->model);
    sm_free(model);
}

int smallm_model_get_info(const smallm_model *model, smallm_model_info *out, smallm_error *err) {
    int rc = judge_model(model, err);
    if (rc != SMALLM_OK) return rc;
    smallm_model_info info = {0};
    sm_model_get_info(model->model, &info);
    return sm_write_struct(out, &info, sizeof info, "smallm_model_info", err);
}

int smallm_model_metadata(const smallm_model *model, size_t i, const char **key, const char **value,
                          size_t *n_value) {
    int rc = judge_model(model, NULL);
    if (rc != SMALLM_OK) return rc;
    if (!key || !value || !n_value) return SMALLM_E_ARGUMENT;
    return sm_model_metadata(model->model, i, key, value, n_value);
}

/* ---- adapters -------------------------------------------------------------------------------- */

int smallm_adapter_open(const smallm_model *model, const char *path,
                        const smallm_adapter_params *params, smallm_adapter **out,
                        smallm_error *err) {
    if (!out) return refuse_null("out", err);
    *out = NULL;
    smallm_adapter_params p;
    int rc = judge_model(model, err);
    if (rc == SMALLM_OK) rc = path ? SMALLM_OK : refuse_null("path", err);
    if (rc == SMALLM_OK) rc = sm_read_struct(&p, sizeof p, params, "smallm_adapter_params", err);
    return rc == SMALLM_OK ? sm_adapter_open(model->model, path, &p, out, err) : rc;
}

void smallm_adapter_free(smallm_adapter *adapter) {
    if (judge_adapter(adapter, NULL) == SMALLM_OK) sm_adapter_drop(adapter);
}

int smallm_adapter_get_info(const smallm_adapter *adapter, smallm_adapter_info *out,
                            smallm_error *err) {
    int rc = judge_adapter(adapter, err);
    if (rc != SMALLM_OK) return rc;
    const smallm_adapter_info info = {.n_bytes = adapter->n_bytes,
                                      .n_matrices = (int32_t)adapter->n_matrices,
                                      .rank = (int32_t)adapter->rank};
    return sm_write_struct(out, &info, sizeof info, "smallm_adapter_info", err);
}

/* ---- text <-> tokens ------------------------------------------------------------------------- */

static int judge_flags(uint32_t flags, uint32_t known, smallm_error *err) {
    if (!(flags & ~known)) return SMALLM_OK;
    return sm_fail(err, SMALLM_E_ARGUMENT, "flags is 0x%x; allowed are the bits of 0x%x",
                   (unsigned)flags, (unsigned)known);
}

int smallm_tokenize(const smallm_model *model, const char *text, size_t n_bytes, uint32_t flags,
                    int32_t *ids, size_t capacity, size_t *n_ids, smallm_error *err) {
    int rc = judge_model(model, err);
    if (rc == SMALLM_OK) rc = judge_flags(flags, SMALLM_ADD_SPECIAL | SMALLM_PARSE_SPECIAL, err);
    if (rc != SMALLM_OK) return rc;
    if (!text && n_bytes > 0) return refuse_null("text", err);
    if (!ids && capacity > 0) return refuse_null("ids", err);
    if (!n_ids) return refuse_null("n_ids", err);
    return sm_tokenizer_encode(sm_model_tokenizer(model->model), text ? text : "", n_bytes, flags,
                               ids, capacity, n_ids, err);
}

int smallm_detokenize(const smallm_model *model, const int32_t *ids, size_t n_ids, uint32_t flags,
                      char *text, size_t capacity, size_t *n_bytes, smallm_error *err) {
    int rc = judge_model(model, err);
    if (rc == SMALLM_OK) rc = judge_flags(flags, SMALLM_SKIP_SPECIAL, err);
    if (rc != SMALLM_OK) return rc;
    if (!ids && n_ids > 0) return refuse_null("ids", err);
    if (!text && capacity > 0) return refuse_null("text", err);
    if (!n_bytes) return refuse_null("n_bytes", err);
    return sm_tokenizer_decode(sm_model_tokenizer(model->model), ids, n_ids, flags, text, capacity,
                               n_bytes, err);
}

/* ---- generating ------------------------------------------------------------------------------ */

int smallm_engine_open(const smallm_model *model, const smallm_engine_params *params,
                       smallm_engine **out, smallm_error *err) {
    if (!out) return refuse_null("out", err);
    *out = NULL;
    smallm_engine_params p;
    int rc = judge_model(model, err);
    if (rc == SMALLM_OK) rc = sm_read_struct(&p, sizeof p, params, "smallm_engine_params", err);
    if (rc == SMALLM_OK) rc = resolve_threads(&p.n_threads, err);
    if (rc != SMALLM_OK) return rc;
    smallm_model_info info;
    sm_model_get_info(model->model, &info);
    rc = judge_range("n_ctx", p.n_ctx, 0, info.n_ctx_train, " (the trained length)", err);
    if (rc == SMALLM_OK) rc = judge_range("kv_type", p.kv_type, 0, SMALLM_KV_Q8, "", err);
    if (rc == SMALLM_OK) rc = judge_range("timers", p.timers, 0, 1, "", err);
    if (rc == SMALLM_OK) rc = judge_range("statistics", p.statistics, 0, 1, "", err);
    if (rc != SMALLM_OK) return rc;
    const char *timers = sm_env("SMALLM_TIMERS");
    if (timers != NULL && strcmp(timers, "1") == 0) p.timers = 1;
    if (p.n_ctx == 0) p.n_ctx = info.n_ctx_train;
    if (p.n_batch == 0) p.n_batch = 512;
    return sm_engine_open(model->model, &p, out, err);
}

void smallm_engine_close(smallm_engine *engine) {
    if (judge_engine(engine, NULL) == SMALLM_OK) sm_engine_close(engine);
}

int smallm_engine_get_info(smallm_engine *engine, smallm_engine_info *out, smallm_error *err) {
    int rc = judge_engine(engine, err);
    if (rc != SMALLM_OK) return rc;
    smallm_engine_info info;
    sm_engine_get_info(engine, &info);
    return sm_write_struct(out, &info, sizeof info, "smallm_engine_info", err);
}

int smallm_engine_timer(smallm_engine *engine, size_t i, smallm_timer *out, smallm_error *err) {
    int rc = judge_engine(engine, err);
    if (rc != SMALLM_OK) return rc;
    smallm_timer timer = {.size = sizeof timer};
    if (!sm_engine_timer(engine, i, &timer)) return SMALLM_DONE;
    return sm_write_struct(out, &timer, sizeof timer, "smallm_timer", err);
}

int smallm_engine_statistic(smallm_engine *engine, size_t i, smallm_statistic *out, double *squares,
                            uint64_t *counts, smallm_error *err) {
    int rc = judge_engine(engine, err);
    smallm_statistic statistic = {.size = sizeof statistic};
    if (rc == SMALLM_OK) rc = sm_engine_statistic(engine, i, &statistic, squares, counts, err);
    return rc == SMALLM_OK ? sm_write_struct(out, &statistic, sizeof statistic, "smallm_statistic", err) : rc;
}

static int judge_stops(const smallm_request_params *p, smallm_error *err) {
    if (p->n_stop > 0 && (!p->stop || !p->stop_len))
        return refuse_null(p->stop ? "stop_len" : "stop", err);
    size_t n_bytes = 0;
    for (size_t i = 0; i < p->n_stop; i++) {
        if (!p->stop[i])
            return sm_fail(err, SMALLM_E_ARGUMENT, "stop[%zu] is NULL", i);
        if (p->stop_len[i] == 0)
            return sm_fail(err, SMALLM_E_ARGUMENT, "stop_len[%zu] is 0; a stop string has text", i);
        if (!sm_add(n_bytes, p->stop_len[i], &n_bytes) || n_bytes > MAX_STOP_BYTES)
            return sm_fail(err, SMALLM_E_ARGUMENT,
                           "the first %zu stop strings have more than the %zu bytes allowed in all",
                           i + 1, MAX_STOP_BYTES);
    }
    return SMALLM_OK;
}

static int judge_adaptation(const smallm_request_params *p, const struct sm_model *model,
                            smallm_error *err) {
    if (!p->adapter) {
        if (p->adapter_scale == 0) return SMALLM_OK;
        return sm_fail(err, SMALLM_E_ARGUMENT, "adapter_scale is %g; without an adapter only 0 is allowed",
                       (double)p->adapter_scale);
    }
    int rc = judge_adapter(p->adapter, err);
    if (rc != SMALLM_OK) return rc;
    if (p->adapter->model != model)
        return sm_fail(err, SMALLM_E_ARGUMENT, "the adapter was opened for another model");
    if (!(fabsf(p->adapter_scale) <= 1e6f))
        return sm_fail(err, SMALLM_E_ARGUMENT, "adapter_scale is %g; allowed are -1e6 to 1e6",
                       (double)p->adapter_scale);
    return SMALLM_OK;
}

static int judge_ids(const char *name, const int32_t *ids, size_t n, struct sm_engine_limits limits,
                     smallm_error *err) {
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= limits.n_vocab)
            return sm_fail(err, SMALLM_E_ARGUMENT, "%s[%zu] is %d; allowed are 0 to %d", name, i,
                           (int)ids[i], (int)limits.n_vocab - 1);
    }
    return SMALLM_OK;
}

static int judge_source(const smallm_request_params *p, struct sm_engine_limits limits,
                        smallm_error *err) {
    if (p->n_source > 0 && !p->source) return refuse_null("source", err);
    if (!limits.has_encoder) {
        if (p->n_source == 0) return SMALLM_OK;
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "n_source is %zu; a model without an encoder takes none", p->n_source);
    }
    if (p->n_source == 0)
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "n_source is 0; the model's encoder reads at least 1 token");
    if (p->n_source > (size_t)limits.n_ctx)
        return sm_fail(err, SMALLM_E_CONTEXT, "the source has %zu tokens; the context holds %d",
                       p->n_source, (int)limits.n_ctx);
    return judge_ids("source", p->source, p->n_source, limits, err);
}

/* An encoder sees a text as a whole, and gives nothing but an embedding. */
static int judge_encoded(const smallm_request_params *p, smallm_error *err) {
    if (!p->embedding)
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "the model is an encoder: it gives embeddings, no text and no logits");
    if (p->n_chunk > 0 && p->n_tokens > (size_t)p->n_chunk)
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "n_chunk is %d; an encoder runs the text's %zu tokens in one pass; allowed is 0",
                       (int)p->n_chunk, p->n_tokens);
    return SMALLM_OK;
}

static int judge_embedding(const smallm_request_params *p, struct sm_engine_limits limits,
                           smallm_error *err) {
    if (limits.has_encoder)
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "the model is an encoder-decoder: it gives text, and no embeddings");
    if (p->logits)
        return sm_fail(err, SMALLM_E_ARGUMENT, "logits and embedding are both given; allowed is one");
    return judge_range("max_tokens", p->max_tokens, 0, 0, " with an embedding", err);
}

static int judge_submit(const smallm_request_params *p, struct sm_engine_limits limits,
                        smallm_error *err) {
    if (p->n_tokens == 0)
        return sm_fail(err, SMALLM_E_ARGUMENT, "n_tokens is 0; a prompt has at least 1 token");
    if (!p->tokens) return refuse_null("tokens", err);
    if (p->n_tokens > (size_t)limits.n_ctx)
        return sm_fail(err, SMALLM_E_CONTEXT, "the prompt has %zu tokens; the context holds %d",
                       p->n_tokens, (int)limits.n_ctx);
    int rc = judge_ids("tokens", p->tokens, p->n_tokens, limits, err);
    if (rc == SMALLM_OK && p->embedding) rc = judge_embedding(p, limits, err);
    if (rc == SMALLM_OK) rc = judge_source(p, limits, err);
    if (rc == SMALLM_OK && p->n_logits > p->n_tokens)
        rc = sm_fail(err, SMALLM_E_ARGUMENT, "n_logits is %zu; allowed is 0 .. n_tokens, %zu", p->n_logits,
                     p->n_tokens);
    if (rc == SMALLM_OK) rc = judge_range("max_tokens", p->max_tokens, 0, INT32_MAX, "", err);
    if (rc == SMALLM_OK)
        rc = judge_range("n_logprobs", p->n_logprobs, -1, MAX_LOGPROBS, " (-1: none)", err);
    if (rc == SMALLM_OK)
        rc = judge_range("n_chunk", p->n_chunk, 0, limits.n_batch, " (n_batch)", err);
    if (rc == SMALLM_OK && limits.is_encoder) rc = judge_encoded(p, err);
    if (rc == SMALLM_OK) rc = judge_adaptation(p, limits.model, err);
    return rc == SMALLM_OK ? judge_stops(p, err) : rc;
}

int smallm_engine_submit(smallm_engine *engine, const smallm_request_params *params,
                         smallm_request **out, smallm_error *err) {
    if (!out) return refuse_null("out", err);
    *out = NULL;
    smallm_request_params p;
    int rc = judge_engine(engine, err);
    if (rc != SMALLM_OK) return rc;
    if (!params) return refuse_null("params", err);
    rc = sm_read_struct(&p, sizeof p, params, "smallm_request_params", err);
    if (rc == SMALLM_OK) rc = judge_submit(&p, sm_engine_get_limits(engine), err);
    return rc == SMALLM_OK ? sm_engine_submit(engine, &p, out, err) : rc;
}

int smallm_request_next(smallm_request *request, int32_t timeout_ms, smallm_chunk *out,
                        smallm_error *err) {
    int rc = judge_request(request, err);
    if (rc == SMALLM_OK) rc = judge_range("timeout_ms", timeout_ms, 0, INT32_MAX, "", err);
    /* Written before anything is taken from the queue: a bad `out` loses no chunk. */
    smallm_chunk chunk = {.token = -1, .text = ""};
    if (rc == SMALLM_OK) rc = sm_write_struct(out, &chunk, sizeof chunk, "smallm_chunk", err);
    if (rc != SMALLM_OK) return rc;
    rc = sm_request_next(request, timeout_ms, &chunk, err);
    sm_write_struct(out, &chunk, sizeof chunk, "smallm_chunk", NULL);
    return rc;
}

void smallm_request_cancel(smallm_request *request) {
    if (judge_request(request, NULL) == SMALLM_OK) sm_request_cancel(request);
}

int smallm_request_get_stats(smallm_request *request, smallm_request_stats *out,
                             smallm_error *err) {
    int rc = judge_request(request, err);
    if (rc != SMALLM_OK) return rc;
    smallm_request_stats stats;
    sm_request_get_stats(request, &stats);
    return sm_write_struct(out, &stats, sizeof stats, "smallm_request_stats", err);
}

void smallm_request_free(smallm_request *request) {
    if (judge_request(request, NULL) == SMALLM_OK) sm_request_free(request);
}

/* ---- weight formats -------------------------------------------------------------------------- */

int smallm_get_format(size_t i, smallm_format *out, smallm_error *err) {
    if (!out) return refuse_null("out", err);
    if (i >= SM_TYPE_COUNT) return SMALLM_DONE;
    const struct sm_quant *q = &sm_quants[i];
    smallm_format f = {.id = q->gguf_id, .n_block_values = (int32_t)q->block_size,
                       .n_block_bytes = (int32_t)q->block_bytes,
                       .writable = sm_writer((enum sm_type)i) != NULL};
    strncpy(f.name, q->name, sizeof f.name - 1);
    return sm_write_struct(out, &f, sizeof f, "smallm_format", err);
}

static int judge_rows(const char *what, enum sm_type t, uint32_t id, const void *data, size_t n_bytes,
                      const smallm_quantize_params *p, smallm_error *err) {
    if (t == SM_TYPE_COUNT)
        return sm_fail(err, SMALLM_E_UNSUPPORTED, "%s is the weight format %u, which is unknown", what, id);
    const struct sm_quant *q = &sm_quants[t];
    if (!data) return refuse_null(what, err);
    size_t n;
    if (p->n_cols % q->block_size != 0)
        return sm_fail(err, SMALLM_E_ARGUMENT, "n_cols is %zu; rows of %s are multiples of %u", p->n_cols,
                       q->name, q->block_size);
    if (!sm_mul(p->n_cols, p->n_rows, &n) || !sm_mul(n / q->block_size, q->block_bytes, &n) || n != n_bytes)
        return sm_fail(err, SMALLM_E_ARGUMENT, "%s has %zu bytes, which is not %zu rows of %zu values of %s",
                       what, n_bytes, p->n_rows, p->n_cols, q->name);
    return SMALLM_OK;
}

int smallm_quantize(const smallm_quantize_params *params, smallm_error *err) {
    if (!params) return refuse_null("params", err);
    smallm_quantize_params p;
    int rc = sm_read_struct(&p, sizeof p, params, "smallm_quantize_params", err);
    if (rc == SMALLM_OK) rc = resolve_threads(&p.n_threads, err);
    if (rc != SMALLM_OK) return rc;
    struct sm_rows rows = {.from = sm_quant_from_gguf(p.from), .to = sm_quant_from_gguf(p.to), .in = p.in,
                           .out = p.out, .n_rows = p.n_rows, .n_cols = p.n_cols,
                           .importance = p.importance};
    rc = judge_rows("in", rows.from, p.from, p.in, p.n_in, &p, err);
    if (rc == SMALLM_OK) rc = judge_rows("out", rows.to, p.to, p.out, p.n_out, &p, err);
    if (rc != SMALLM_OK) return rc;
    if (!sm_writer(rows.to))
        return sm_fail(err, SMALLM_E_UNSUPPORTED, "this version reads %s but does not write it",
                       sm_quants[rows.to].name);
    for (size_t i = 0; p.importance && i < p.n_cols; i++)
        if (!(p.importance[i] >= 0 && p.importance[i] <= 3e38f))
            return sm_fail(err, SMALLM_E_ARGUMENT, "importance[%zu] is %g; allowed are finite numbers >= 0", i,
                           (double)p.importance[i]);
    return sm_quantize_rows(&rows, p.n_threads, err);
}
