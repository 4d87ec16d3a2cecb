/* Opening an adapter: judge keys, names, types and shapes of all tensors, then pack them.
 *
 * A file is llama.cpp's: general.type "adapter", adapter.type "lora", adapter.lora.alpha, and for a
 * matrix NAME the tensors NAME.lora_a [rank][k] and NAME.lora_b [n_rows][rank] of any format. */
#include "adapter.h"

#include <math.h>
#include <stdio.h>

#include "os.h"

struct opener {
    struct smallm_adapter *a;
    struct sm_gguf *g;
    smallm_error *err;
    double alpha;
    /* One panel's rows, as the file has them and as floats. */
    uint8_t *blocks;
    float *values;
    size_t n_blocks_bytes, n_values; /* the largest */
};

/* ---- keys ---------------------------------------------------------------------------------------- */

static int judge_key(struct opener *o, const char *key, const char *allowed) {
    struct sm_str value = {"", 0};
    bool found;
    int status = sm_gguf_get_string(o->g, key, &value, &found, o->err);
    if (status != SMALLM_OK || sm_str_is(value, allowed)) return status;
    char shown[80];
    return sm_fail(o->err, SMALLM_E_UNSUPPORTED, "%s: %s is \"%s\"; an adapter for this model has \"%s\"",
                   sm_gguf_path(o->g), key, sm_printable(shown, sizeof shown, value.s, value.n), allowed);
}

static int judge_keys(struct opener *o) {
    int status = judge_key(o, "general.type", "adapter");
    if (status == SMALLM_OK) status = judge_key(o, "adapter.type", "lora");
    if (status == SMALLM_OK) status = judge_key(o, "general.architecture", o->a->model->arch->name);
    if (status != SMALLM_OK) return status;
    static const char invocation[] = "adapter.alora.invocation_tokens";
    if (sm_gguf_find(o->g, invocation) != SIZE_MAX)
        return sm_fail(o->err, SMALLM_E_UNSUPPORTED,
                       "%s: %s is there: an adapter that begins at a token within the text, which this "
                       "version does not run", sm_gguf_path(o->g), invocation);
    bool found;
    status = sm_gguf_get_float(o->g, "adapter.lora.alpha", &o->alpha, &found, o->err);
    if (status == SMALLM_OK && !(fabs(o->alpha) < 1e6))
        status = sm_fail(o->err, SMALLM_E_CORRUPT,
                         "%s: adapter.lora.alpha is %g; allowed are magnitudes below 1e6",
                         sm_gguf_path(o->g), o->alpha);
    return status;
}

/* ---- tensors ------------------------------------------------------------------------------------- */

/* The matrix that a tensor's name without its last 7 characters names, or NULL. */
static const struct sm_matrix *find_matrix(const struct opener *o, struct sm_str name) {
    const struct sm_model *m = o->a->model;
    if (name.n <= 7) return NULL;
    name.n -= 7;
    for (size_t i = 0; i < m->n_matrices; i++)
        if (m->matrices[i].n_experts == 0 && sm_str_is(name, m->matrices[i].name))
            return m->matrices[i].matrix;
    return NULL;
}

/* Type and shape [rows][k] of one of a pair. */
static int judge_tensor(struct opener *o, const struct sm_tensor_info *t, size_t rows, size_t k) {
    char shown[96];
    sm_printable(shown, sizeof shown, t->name.s, t->name.n);
    enum sm_type type = sm_quant_from_gguf(t->gguf_type);
    if (type == SM_TYPE_COUNT)
        return sm_fail(o->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor %s has a weight format (id %u) that this version does not run",
                       sm_gguf_path(o->g), shown, t->gguf_type);
    if (t->dims[0] != k || t->dims[1] != rows || t->dims[2] != 1 || t->dims[3] != 1)
        return sm_fail(o->err, SMALLM_E_CORRUPT,
                       "%s: the tensor %s has shape [%llu, %llu, %llu, %llu]; the model's matrix and its "
                       "partner ask for [%zu, %zu]", sm_gguf_path(o->g), shown,
                       (unsigned long long)t->dims[0], (unsigned long long)t->dims[1],
                       (unsigned long long)t->dims[2], (unsigned long long)t->dims[3], k, rows);
    o->n_blocks_bytes = SM_MAX(o->n_blocks_bytes, SM_PANEL_ROWS * sm_row_bytes(type, k));
    o->n_values = SM_MAX(o->n_values, SM_PANEL_ROWS * k);
    return SMALLM_OK;
}

static size_t n_panels_of(size_t rows) { return (rows + SM_PANEL_ROWS - 1) / SM_PANEL_ROWS; }

/* Judges tensor `index` and its partner; the pair's sizes are kept with its A. */
static int bind_tensor(struct opener *o, size_t index, size_t *n_bytes) {
    const char *path = sm_gguf_path(o->g);
    const struct sm_tensor_info *t = sm_gguf_tensor(o->g, index);
    const struct sm_matrix *w = find_matrix(o, t->name);
    char shown[96], partner[96];
    sm_printable(shown, sizeof shown, t->name.s, t->name.n);
    const char *kind = w != NULL ? t->name.s + t->name.n - 7 : "";
    bool is_a = w != NULL && memcmp(kind, ".lora_a", 7) == 0;
    if (w == NULL || (!is_a && memcmp(kind, ".lora_b", 7) != 0))
        return sm_fail(o->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor %s is not a .lora_a or .lora_b of a matrix of this model's layers",
                       path, shown);
    /* The matrix's name is short, so that nothing of it was replaced or cut. */
    snprintf(partner, sizeof partner, "%.*s%c", (int)SM_MIN(t->name.n - 1, sizeof partner - 2), shown,
             is_a ? 'b' : 'a');
    const struct sm_tensor_info *other = sm_gguf_find_tensor(o->g, partner);
    if (other == NULL)
        return sm_fail(o->err, SMALLM_E_CORRUPT, "%s: the tensor %s is there, but not %s", path, shown,
                       partner);
    if (!is_a) return SMALLM_OK;
    if (t->dims[1] < 1 || t->dims[1] > SM_RANK_MAX)
        return sm_fail(o->err, SMALLM_E_UNSUPPORTED, "%s: the tensor %s has rank %llu; allowed are 1 to %d",
                       path, shown, (unsigned long long)t->dims[1], SM_RANK_MAX);
    size_t rank = (size_t)t->dims[1];
    int status = judge_tensor(o, t, rank, w->k);
    if (status == SMALLM_OK) status = judge_tensor(o, other, w->n_rows, rank);
    if (status != SMALLM_OK) return status;

    struct sm_lora *lora = &o->a->loras[w->id];
    *lora = (struct sm_lora){.rank = rank, .of = w->panels,
                             .scale = o->alpha != 0 ? (float)(o->alpha / (double)rank) : 1,
                             .a_bytes = sm_panel_bytes(SM_TYPE_F32, w->k),
                             .b_bytes = sm_panel_bytes(SM_TYPE_F32, rank)};
    size_t bytes_a, bytes_b;
    if (!sm_mul(n_panels_of(rank), lora->a_bytes, &bytes_a) ||
        !sm_mul(w->n_panels, lora->b_bytes, &bytes_b) || !sm_add(*n_bytes, bytes_a, n_bytes) ||
        !sm_add(*n_bytes, bytes_b, n_bytes))
        return sm_fail(o->err, SMALLM_E_MEMORY, "%s: the matrices exceed the address space", path);
    o->a->n_matrices++;
    o->a->rank = SM_MAX(o->a->rank, rank);
    return SMALLM_OK;
}

/* Reads a tensor [rows][k] into panels. */
static int pack(struct opener *o, const struct sm_tensor_info *t, size_t rows, size_t k, uint8_t *panels) {
    enum sm_type type = sm_quant_from_gguf(t->gguf_type);
    const struct sm_quant *quant = &sm_quants[type];
    size_t row_bytes = sm_row_bytes(type, k), panel_bytes = sm_panel_bytes(SM_TYPE_F32, k);
    for (size_t row = 0; row < rows; row += SM_PANEL_ROWS, panels += panel_bytes) {
        size_t n = SM_MIN(rows - row, SM_PANEL_ROWS), n_blocks = n * row_bytes / quant->block_bytes;
        int status = sm_gguf_read(o->g, t, row * row_bytes, o->blocks, n * row_bytes, o->err);
        if (status != SMALLM_OK) return status;
        size_t bad = quant->find_nonfinite(o->blocks, n_blocks);
        if (bad != n_blocks) {
            char shown[96];
            return sm_fail(o->err, SMALLM_E_CORRUPT,
                           "%s: the tensor %s has an infinite or NaN %s in row %zu", sm_gguf_path(o->g),
                           sm_printable(shown, sizeof shown, t->name.s, t->name.n),
                           quant->block_size == 1 ? "value" : "scale",
                           row + bad / (k / quant->block_size));
        }
        quant->dequantize(o->blocks, o->values, n_blocks);
        sm_panel_pack(SM_TYPE_F32, panels, o->values, n, k);
    }
    return SMALLM_OK;
}

static int pack_all(struct opener *o) {
    uint8_t *at = o->a->panels;
    for (size_t i = 0; i < sm_gguf_n_tensors(o->g); i++) {
        const struct sm_tensor_info *t = sm_gguf_tensor(o->g, i);
        const struct sm_matrix *w = find_matrix(o, t->name);
        struct sm_lora *lora = &o->a->loras[w->id];
        bool is_a = t->name.s[t->name.n - 1] == 'a';
        size_t rows = is_a ? lora->rank : w->n_rows, k = is_a ? w->k : lora->rank;
        if (is_a) lora->a = at;
        else lora->b = at;
        int status = pack(o, t, rows, k, at);
        if (status != SMALLM_OK) return status;
        at += n_panels_of(rows) * (is_a ? lora->a_bytes : lora->b_bytes);
    }
    return SMALLM_OK;
}

static int open_file(struct opener *o, const smallm_adapter_params *params) {
    struct smallm_adapter *a = o->a;
    const char *path = sm_gguf_path(o->g);
    int status = judge_keys(o);
    if (status != SMALLM_OK) return status;
    size_t n_bytes = 0;
    a->n_loras = a->model->n_matrices + 1;
    a->loras = sm_calloc(a->n_loras, sizeof a->loras[0]);
    if (a->loras == NULL) return sm_fail(o->err, SMALLM_E_MEMORY, "%s: no memory", path);
    for (size_t i = 0; i < sm_gguf_n_tensors(o->g) && status == SMALLM_OK; i++)
        status = bind_tensor(o, i, &n_bytes);
    if (status != SMALLM_OK) return status;
    if (a->n_matrices == 0)
        return sm_fail(o->err, SMALLM_E_CORRUPT, "%s: the adapter has no tensors", path);
    a->n_bytes = n_bytes;
    if (params->memory_limit != 0 && n_bytes > params->memory_limit)
        return sm_fail(o->err, SMALLM_E_BUDGET, "%s: the adapter needs %zu bytes; memory_limit is %llu",
                       path, n_bytes, (unsigned long long)params->memory_limit);
    a->panels = sm_alloc(n_bytes);
    o->blocks = sm_alloc(o->n_blocks_bytes);
    o->values = sm_alloc(o->n_values * sizeof o->values[0]);
    if (a->panels == NULL || o->blocks == NULL || o->values == NULL)
        return sm_fail(o->err, SMALLM_E_MEMORY, "%s: no memory for %zu bytes of the adapter", path, n_bytes);
    return pack_all(o);
}

int sm_adapter_open(const struct sm_model *model, const char *path,
                    const smallm_adapter_params *params, struct smallm_adapter **out,
                    smallm_error *err) {
    *out = NULL;
    struct opener o = {.err = err, .a = sm_calloc(1, sizeof *o.a)};
    if (o.a == NULL) return sm_fail(err, SMALLM_E_MEMORY, "%s: no memory", path);
    o.a->process = sm_process_id();
    o.a->model = model;
    atomic_init(&o.a->n_holders, 1);
    int status = sm_gguf_open(path, &o.g, err);
    if (status == SMALLM_OK) status = open_file(&o, params);
    sm_gguf_close(o.g);
    sm_free(o.blocks);
    sm_free(o.values);
    if (status != SMALLM_OK) {
        sm_adapter_drop(o.a);
        return status;
    }
    *out = o.a;
    return SMALLM_OK;
}

void sm_adapter_hold(struct smallm_adapter *a) {
    if (a != NULL) atomic_fetch_add(&a->n_holders, 1);
}

void sm_adapter_drop(struct smallm_adapter *a) {
    if (a == NULL || atomic_fetch_sub(&a->n_holders, 1) != 1) return;
    sm_free(a->loras);
    sm_free(a->panels);
    sm_free(a);
}
