/* Loading: judge everything in the file, bind every tensor once, then pack in parallel.
 *
 * Nothing is read of the weights until hyperparameters, tokenizer, names, types and shapes have
 * been accepted.  Packing goes straight from pread into panels, at most READ_BYTES per thread at a
 * time, so the peak is the packed size and little more. */
#include "model.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>

#include "cpu.h"
#include "mathx.h"
#include "os.h"
#include "threads.h"

#define PI 3.14159265358979323846
#define TYPES_MAX 1024 /* kinds of texts */
#define READ_BYTES ((size_t)1 << 18) /* stays in a core's cache between reading and packing */

enum need {
    REQUIRED,
    OPTIONAL,
    ABSENT /* a tensor of this name stays unbound, which refuses the load */
};
#define IF(condition) ((condition) ? REQUIRED : ABSENT)
#define BIAS_IF(rule) (arch->bias >= (rule) ? REQUIRED : OPTIONAL)
#define BIAS BIAS_IF(SM_BIAS_LAYERS)
#define BIAS_QKV BIAS_IF(SM_BIAS_QKV)
#define GATED (h->ffn < SM_FFN_GELU) /* arch.h has the gated kinds first */
#define EXPERTS (h->n_expert > 0)
#define DENSE (!EXPERTS && h->n_ff > 0)
#define ATTENDS (layer->plan.mixer == SM_MIXER_ATTENTION)
#define CONVOLVES (layer->plan.mixer == SM_MIXER_CONV)
#define SCANS (layer->plan.mixer == SM_MIXER_SSM)
#define CROSSES (arch->has_encoder && index < h->n_layer)
#define DISTANCES                                                                    \
    (!arch->biased_distances ? ABSENT : index == 0 || index == h->n_layer ? REQUIRED : OPTIONAL)
#define SHARED (h->n_ff_shared > 0)
#define WEIGHED (arch->norm != SM_NORM_LAYER_BARE)
#define NORMS_BEFORE (WEIGHED && (arch->norms == SM_NORMS_BEFORE || arch->norms == SM_NORMS_AROUND))
#define NORMS_AFTER (arch->norms == SM_NORMS_AFTER || arch->norms == SM_NORMS_AROUND)
#define NORMS_OF_SUM (arch->norms == SM_NORMS_OF_SUM)
#define NORM_OF_EMBEDDINGS (NORMS_OF_SUM || arch->embed_norm)
#define HAS(suffix) has_tensor(l, index, suffix)
/* Norms of single heads are there for q and k, or for neither. */
#define QK_NORM(other)                                                               \
    (!ATTENDS || arch->qk_norm == SM_QK_NORM_NONE ? ABSENT                            \
     : arch->qk_norm != SM_QK_NORM_HEADS || HAS(other) ? REQUIRED : OPTIONAL)
#define FFN_NORM                                                                     \
    (!NORMS_BEFORE || !(DENSE || EXPERTS) || arch->parallel == SM_PARALLEL_SHARED ? ABSENT \
     : arch->parallel == SM_PARALLEL_SECOND ? IF(SECOND)                                \
     : arch->parallel == SM_PARALLEL_IF_SHARED ? OPTIONAL : REQUIRED)
#define SECOND (arch->parallel == SM_PARALLEL_SECOND && HAS("attn_norm_2.weight"))
#define FUSED (layer->wqkv.n_rows > 0)
#define SPLIT (ATTENDS && !FUSED)

/* One tensor to be read: into a matrix's panels, into a vector, or only judged. */
struct job {
    const struct sm_tensor_info *tensor;
    enum sm_type type;
    struct sm_matrix *matrix; /* or NULL */
    float **vector;           /* or NULL */
    size_t n_rows, k;
    size_t n_experts;         /* 1, or whose rows follow each other */
    size_t rows_per_unit, n_units, first_unit; /* what a thread takes at once; counted over all jobs */
};

struct loader {
    struct sm_model *m;
    struct sm_gguf *g;
    smallm_error *err;
    bool *bound;              /* [tensors of the file] */
    struct job *jobs;         /* [n_jobs], at most one per tensor */
    size_t n_jobs, n_units;
    uint8_t *buffers;         /* [n_threads][buffer_bytes] */
    size_t buffer_bytes;
    _Atomic int status;       /* of the first job that failed */
};

/* ---- binding ----------------------------------------------------------------------------------------- */

/* Finds `name`, checks type and shape [n_experts][rows][k] (rows 1: a vector) and queues its job.
 * *out stays NULL where an optional tensor is missing. */
static int bind_tensors(struct loader *l, const char *name, enum need need, size_t n_experts,
                        size_t rows, size_t k, struct job **out) {
    const char *path = sm_gguf_path(l->g);
    *out = NULL;
    if (need == ABSENT) return SMALLM_OK;
    const struct sm_tensor_info *t = sm_gguf_find_tensor(l->g, name);
    if (t == NULL) {
        if (need == OPTIONAL) return SMALLM_OK;
        return sm_fail(l->err, SMALLM_E_CORRUPT, "%s: the tensor %s is missing", path, name);
    }
    size_t index = (size_t)(t - sm_gguf_tensor(l->g, 0));
    enum sm_type type = sm_quant_from_gguf(t->gguf_type);
    if (type == SM_TYPE_COUNT) {
        const char *type_name = sm_quant_gguf_name(t->gguf_type);
        return sm_fail(l->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor %s has weight format %s (id %u), which this version does not run",
                       path, name, type_name != NULL ? type_name : "unknown", t->gguf_type);
    }
    if (t->dims[0] != k || t->dims[1] != rows || t->dims[2] != n_experts || t->dims[3] != 1)
        return sm_fail(l->err, SMALLM_E_CORRUPT,
                       "%s: the tensor %s has shape [%llu, %llu, %llu, %llu]; the file's sizes ask for "
                       "[%zu, %zu, %zu]", path, name, (unsigned long long)t->dims[0],
                       (unsigned long long)t->dims[1], (unsigned long long)t->dims[2],
                       (unsigned long long)t->dims[3], k, rows, n_experts);
    l->bound[index] = true;
    struct job *job = &l->jobs[l->n_jobs++];
    size_t row_bytes = sm_row_bytes(type, k);
    rows *= n_experts;
    *job = (struct job){.tensor = t, .type = type, .n_rows = rows, .k = k, .n_experts = n_experts};
    job->rows_per_unit = SM_MAX(READ_BYTES / (row_bytes * SM_PANEL_ROWS), 1) * SM_PANEL_ROWS;
    job->n_units = (rows + job->rows_per_unit - 1) / job->rows_per_unit;
    job->first_unit = l->n_units;
    l->n_units += job->n_units;
    l->buffer_bytes = SM_MAX(l->buffer_bytes, SM_MIN(job->rows_per_unit, rows) * row_bytes);
    l->m->info.n_params += rows * k;
    *out = job;
    return SMALLM_OK;
}

static int bind_tensor(struct loader *l, const char *name, enum need need, size_t rows, size_t k,
                       struct job **out) {
    return bind_tensors(l, name, need, 1, rows, k, out);
}

static int bind_matrices(struct loader *l, const char *name, enum need need, size_t n_experts,
                         size_t rows, size_t k, struct sm_matrix *out) {
    struct job *job;
    int status = bind_tensors(l, name, need, n_experts, rows, k, &job);
    if (status != SMALLM_OK || job == NULL) return status;
    job->matrix = out;
    *out = (struct sm_matrix){.type = job->type, .n_rows = job->n_rows, .k = k,
                              .n_panels = (job->n_rows + SM_PANEL_ROWS - 1) / SM_PANEL_ROWS,
                              .panel_bytes = sm_panel_bytes(job->type, k)};
    return SMALLM_OK;
}

static int bind_matrix(struct loader *l, const char *name, enum need need, size_t rows, size_t k,
                       struct sm_matrix *out) {
    return bind_matrices(l, name, need, 1, rows, k, out);
}

/* Tells the matrix of a layer from all others. */
static void name_matrix(struct loader *l, const char *name, size_t n_experts, struct sm_matrix *matrix) {
    struct sm_model *m = l->m;
    struct sm_named_matrix *named = &m->matrices[m->n_matrices++];
    named->matrix = matrix;
    named->n_experts = n_experts;
    snprintf(named->name, sizeof named->name, "%s", name);
    matrix->id = m->n_matrices;
}

/* Whole panels for every expert: their rows are a multiple of a panel's. */
static int bind_experts(struct loader *l, const char *name, enum need need, size_t n_experts,
                        size_t rows, size_t k, struct sm_matrix *out) {
    int status = bind_matrices(l, name, need, n_experts, rows, k, out);
    if (status != SMALLM_OK || out->n_rows == 0) return status;
    name_matrix(l, name, n_experts, out);
    if (rows % SM_PANEL_ROWS == 0) return SMALLM_OK;
    return sm_fail(l->err, SMALLM_E_UNSUPPORTED,
                   "%s: the tensor %s has %zu rows for each expert; allowed are multiples of %d",
                   sm_gguf_path(l->g), name, rows, SM_PANEL_ROWS);
}

static int bind_rows(struct loader *l, const char *name, enum need need, size_t rows, size_t length,
                     float **out) {
    struct job *job;
    int status = bind_tensor(l, name, need, rows, length, &job);
    if (job != NULL) job->vector = out;
    return status;
}

static int bind_vector(struct loader *l, const char *name, enum need need, size_t length,
                       float **out) {
    return bind_rows(l, name, need, 1, length, out);
}

/* As bind_matrix, for a matrix of a layer: adapters may change it, and it may have a scale. */
static int bind_layer_matrix(struct loader *l, const char *name, enum need need, size_t rows, size_t k,
                             struct sm_matrix *out) {
    int status = bind_matrix(l, name, need, rows, k, out);
    if (status != SMALLM_OK || out->n_rows == 0) return status;
    name_matrix(l, name, 0, out);
    char scale[SM_NAME_MAX];
    snprintf(scale, sizeof scale, "%.*s.scale", (int)(strrchr(name, '.') - name), name);
    return bind_vector(l, scale, OPTIONAL, 1, &out->scale);
}

static void layer_name(const struct loader *l, int layer, const char *suffix, char *out) {
    const char *stack = !l->m->arch->has_encoder ? "" : layer < l->m->h.n_layer ? "dec." : "enc.";
    int i = layer < l->m->h.n_layer ? layer : layer - l->m->h.n_layer;
    snprintf(out, SM_NAME_MAX, "%sblk.%d.%s", stack, i, suffix);
}

static bool has_tensor(const struct loader *l, int layer, const char *suffix) {
    char name[SM_NAME_MAX];
    layer_name(l, layer, suffix, name);
    return sm_gguf_find_tensor(l->g, name) != NULL;
}

static int bind_layer(struct loader *l, int index, struct sm_layer *layer) {
    const struct sm_hparams *h = &l->m->h;
    const struct sm_arch *arch = l->m->arch;
    char name[SM_NAME_MAX];
    int status;
    layer->plan = sm_arch_plan(arch, h, index);
#define SM_VECTOR(field, suffix, need, length)                                       \
    layer_name(l, index, suffix, name);                                              \
    status = bind_vector(l, name, need, (size_t)(length), &layer->field);            \
    if (status != SMALLM_OK) return status;
#define SM_ROWS(field, suffix, need, rows, columns)                                  \
    layer_name(l, index, suffix, name);                                              \
    status = bind_rows(l, name, need, (size_t)(rows), (size_t)(columns), &layer->field); \
    if (status != SMALLM_OK) return status;
#define SM_MATRIX(field, suffix, need, rows, columns)                                \
    layer_name(l, index, suffix, name);                                              \
    status = bind_layer_matrix(l, name, need, (size_t)(rows), (size_t)(columns), &layer->field); \
    if (status != SMALLM_OK) return status;
#define SM_EXPERTS(field, suffix, need, n, rows, columns)                            \
    layer_name(l, index, suffix, name);                                              \
    status = bind_experts(l, name, need, (size_t)(n), (size_t)(rows), (size_t)(columns), \
                          &layer->field);                                            \
    if (status != SMALLM_OK) return status;
#include "tensors.def"
#undef SM_VECTOR
#undef SM_ROWS
#undef SM_MATRIX
#undef SM_EXPERTS
    layer->parallel = arch->parallel == SM_PARALLEL_SHARED || arch->parallel == SM_PARALLEL_SECOND ||
                      (arch->parallel == SM_PARALLEL_KEY && h->parallel) ||
                      (arch->parallel == SM_PARALLEL_IF_SHARED && !HAS("ffn_norm.weight"));
    if (FUSED && ((h->n_head * h->head) % SM_PANEL_ROWS != 0 ||
                  (h->n_head_kv * h->head) % SM_PANEL_ROWS != 0))
        return sm_fail(l->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor blk.%d.attn_qkv.weight holds %d rows of q and %d of k; allowed "
                       "are multiples of %d", sm_gguf_path(l->g), index, h->n_head * h->head,
                       h->n_head_kv * h->head, SM_PANEL_ROWS);
    if (layer->w_gate_up.n_rows > 0 && h->n_ff % SM_PANEL_ROWS != 0)
        return sm_fail(l->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor blk.%d.ffn_up.weight holds %d rows of the gate; allowed are "
                       "multiples of %d", sm_gguf_path(l->g), index, h->n_ff, SM_PANEL_ROWS);
    return SMALLM_OK;
}

/* A convolution's weights [channels][taps] -> [taps][channels]: what kernels read lies together. */
static int turn_conv(struct loader *l, float *w) {
    size_t taps = (size_t)l->m->h.conv_kernel, width = (size_t)l->m->h.conv_width;
    if (w == NULL) return SMALLM_OK;
    float *file = sm_alloc(taps * width * sizeof *file);
    if (file == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory", sm_gguf_path(l->g));
    memcpy(file, w, taps * width * sizeof *file);
    for (size_t j = 0; j < taps; j++)
        for (size_t i = 0; i < width; i++) w[j * width + i] = file[i * taps + j];
    sm_free(file);
    return SMALLM_OK;
}

/* Rows `row` .. row + n_rows - 1 of a fused tensor and of its bias (or NULL), whole panels. */
static void take_rows(const struct sm_matrix *fused, float *fused_bias, size_t row, int n_rows,
                      struct sm_matrix *part, float **bias) {
    *part = *fused;
    part->n_rows = (size_t)n_rows;
    part->n_panels = (size_t)n_rows / SM_PANEL_ROWS;
    part->panels += row / SM_PANEL_ROWS * fused->panel_bytes;
    if (fused_bias != NULL) *bias = fused_bias + row;
}

/* Once the panels have their places: the parts of fused tensors are ranges of their panels. */
static void split_fused(const struct sm_hparams *h, struct sm_layer *layer) {
    int n_q = h->n_head * h->head, n_kv = h->n_head_kv * h->head;
    if (FUSED) {
        take_rows(&layer->wqkv, layer->bqkv, 0, n_q, &layer->wq, &layer->bq);
        take_rows(&layer->wqkv, layer->bqkv, (size_t)n_q, n_kv, &layer->wk, &layer->bk);
        take_rows(&layer->wqkv, layer->bqkv, (size_t)(n_q + n_kv), n_kv, &layer->wv, &layer->bv);
    }
    if (layer->w_gate_up.n_rows > 0) {
        const struct sm_matrix *both = &layer->w_gate_up;
        take_rows(both, layer->b_gate_up, 0, h->n_ff, &layer->w_gate, &layer->b_gate);
        take_rows(both, layer->b_gate_up, (size_t)h->n_ff, h->n_ff, &layer->w_up, &layer->b_up);
    }
}

/* Factors of rope's frequencies: one for all contexts, or for long and for short ones. */
enum { FACTORS_ALL, FACTORS_LONG, FACTORS_SHORT, N_FACTORS };
static const char *const factor_names[N_FACTORS] = {
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"};

static int bind_factors(struct loader *l, float **factors) {
    const struct sm_hparams *h = &l->m->h;
    bool two = h->long_rope;
    for (int i = FACTORS_LONG; i <= FACTORS_SHORT; i++)
        two = two || sm_gguf_find_tensor(l->g, factor_names[i]) != NULL;
    for (int i = 0; i < N_FACTORS; i++) {
        enum need need = h->n_rope != 1 ? ABSENT : i == FACTORS_ALL ? (two ? ABSENT : OPTIONAL) : IF(two);
        int status = bind_vector(l, factor_names[i], need, (size_t)h->n_rot / 2, &factors[i]);
        if (status != SMALLM_OK) return status;
    }
    l->m->has_short = two;
    return SMALLM_OK;
}

static int bind_all(struct loader *l, float **rope_factors) {
    struct sm_model *m = l->m;
    const struct sm_arch *arch = m->arch;
    size_t n_embd = (size_t)m->h.n_embd, n_vocab = (size_t)m->h.n_vocab;
    int status;
    if (!arch->is_encoder && sm_gguf_find_tensor(l->g, "output.weight") != NULL) {
        struct job *job;
        status = bind_tensor(l, "token_embd.weight", REQUIRED, n_vocab, n_embd, &job);
        if (status != SMALLM_OK) return status;
        m->embeddings = job->tensor;
        status = bind_matrix(l, "output.weight", REQUIRED, n_vocab, n_embd, &m->head);
    } else {
        status = bind_matrix(l, "token_embd.weight", REQUIRED, n_vocab, n_embd, &m->head);
    }
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, "output.bias", arch->is_encoder ? ABSENT : BIAS_IF(SM_BIAS_EVERYWHERE), n_vocab,
                         &m->head_bias);
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, arch->output_norm != NULL ? arch->output_norm : "output_norm.weight",
                         IF(WEIGHED && !NORMS_OF_SUM), n_embd, &m->output_norm);
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, "output_norm.bias", IF(!NORMS_OF_SUM && arch->norm == SM_NORM_LAYER), n_embd,
                         &m->output_norm_b);
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, "token_embd_norm.weight", IF(NORM_OF_EMBEDDINGS), n_embd, &m->embed_norm);
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, "token_embd_norm.bias", IF(NORM_OF_EMBEDDINGS && arch->norm == SM_NORM_LAYER),
                         n_embd, &m->embed_norm_b);
    if (status != SMALLM_OK) return status;
    /* As many rows as the file has: only the first is read. */
    const struct sm_tensor_info *types = sm_gguf_find_tensor(l->g, "token_types.weight");
    uint64_t n_types = types != NULL ? SM_MAX(SM_MIN(types->dims[1], TYPES_MAX), 1) : 1;
    status = bind_rows(l, "token_types.weight", IF(NORMS_OF_SUM), (size_t)n_types, n_embd, &m->types);
    if (status != SMALLM_OK) return status;
    bool learned = arch->rope == SM_ROPE_NONE && m->h.max_alibi == 0 && m->h.n_buckets == 0;
    status = bind_rows(l, "position_embd.weight", IF(learned), (size_t)m->h.n_ctx_train, n_embd, &m->positions);
    if (status != SMALLM_OK) return status;
    status = bind_vector(l, "enc.output_norm.weight", IF(arch->has_encoder), n_embd, &m->encoder_norm);
    if (status != SMALLM_OK) return status;
    status = bind_factors(l, rope_factors);
    for (int i = 0; i < m->h.n_layer + m->h.n_encoder && status == SMALLM_OK; i++)
        status = bind_layer(l, i, &m->layers[i]);
    if (status != SMALLM_OK) return status;
    for (size_t i = 0; i < sm_gguf_n_tensors(l->g); i++) {
        if (l->bound[i]) continue;
        const struct sm_str *name = &sm_gguf_tensor(l->g, i)->name;
        char shown[80];
        return sm_fail(l->err, SMALLM_E_UNSUPPORTED,
                       "%s: the tensor %s is not one that the architecture %s has (layers: %d)",
                       sm_gguf_path(l->g), sm_printable(shown, sizeof shown, name->s, name->n),
                       m->arch->name, m->h.n_layer);
    }
    return SMALLM_OK;
}

/* ---- packing ------------------------------------------------------------------------------------------- */

/* Reads rows first .. first + n - 1 of a job into `buffer`, judges them and puts them in place. */
static int load_rows(const struct loader *l, const struct job *job, size_t first, size_t n,
                     uint8_t *buffer, smallm_error *err) {
    size_t row_bytes = sm_row_bytes(job->type, job->k);
    int status = sm_gguf_read(l->g, job->tensor, first * row_bytes, buffer, n * row_bytes, err);
    if (status != SMALLM_OK) return status;
    const struct sm_quant *quant = &sm_quants[job->type];
    size_t n_blocks = n * row_bytes / quant->block_bytes;
    size_t bad = quant->find_nonfinite(buffer, n_blocks);
    if (bad != n_blocks) {
        char shown[80];
        size_t block = first * (job->k / quant->block_size) + bad;
        return sm_fail(err, SMALLM_E_CORRUPT,
                       "%s: the tensor %s has an infinite or NaN %s in block %zu",
                       sm_gguf_path(l->g),
                       sm_printable(shown, sizeof shown, job->tensor->name.s, job->tensor->name.n),
                       quant->block_size == 1 ? "value" : "scale", block);
    }
    if (job->vector != NULL) {
        quant->dequantize(buffer, *job->vector + first * job->k, n_blocks);
    } else if (job->matrix != NULL) {
        uint8_t *panel = job->matrix->panels + first / SM_PANEL_ROWS * job->matrix->panel_bytes;
        for (size_t r = 0; r < n; r += SM_PANEL_ROWS, panel += job->matrix->panel_bytes)
            sm_panel_pack(job->type, panel, buffer + r * row_bytes, SM_MIN(n - r, SM_PANEL_ROWS),
                          job->k);
    }
    return SMALLM_OK;
}

static void load_phase(void *arg, int thread, struct sm_work *work) {
    struct loader *l = arg;
    uint8_t *buffer = l->buffers + (size_t)thread * l->buffer_bytes;
    struct job *job = l->jobs;
    size_t unit, end;
    while (atomic_load(&l->status) == SMALLM_OK && sm_work_take(work, &unit, &end)) {
        if (unit < job->first_unit) job = l->jobs; /* another thread's share */
        while (unit - job->first_unit >= job->n_units) job++;
        size_t first = (unit - job->first_unit) * job->rows_per_unit;
        smallm_error err = {.size = sizeof err};
        int status = load_rows(l, job, first, SM_MIN(job->rows_per_unit, job->n_rows - first), buffer,
                               &err);
        int none = SMALLM_OK;
        if (status != SMALLM_OK && atomic_compare_exchange_strong(&l->status, &none, status))
            sm_fail(l->err, status, "%s", err.message);
    }
}

/* Lays all panels and vectors out in two allocations. */
static int allocate_weights(struct loader *l, uint64_t memory_limit) {
    struct sm_model *m = l->m;
    size_t panel_bytes = 0, n_floats = 0;
    for (size_t j = 0; j < l->n_jobs; j++) {
        const struct job *job = &l->jobs[j];
        if (job->vector != NULL)
            n_floats += sm_round_up(job->n_rows * job->k, SM_ALIGN / sizeof(float));
        size_t bytes = 0;
        if (job->matrix != NULL &&
            (!sm_mul(job->matrix->n_panels, job->matrix->panel_bytes, &bytes) ||
             !sm_add(panel_bytes, bytes, &panel_bytes)))
            return sm_fail(l->err, SMALLM_E_MEMORY, "%s: the packed weights exceed the address space",
                           sm_gguf_path(l->g));
    }
    m->info.n_packed_bytes = (uint64_t)panel_bytes + n_floats * sizeof(float);
    if (memory_limit != 0 && m->info.n_packed_bytes > memory_limit)
        return sm_fail(l->err, SMALLM_E_BUDGET,
                       "%s: the packed weights need %llu bytes; memory_limit is %llu",
                       sm_gguf_path(l->g), (unsigned long long)m->info.n_packed_bytes,
                       (unsigned long long)memory_limit);
    m->panels = sm_alloc(panel_bytes);
    m->vectors = sm_alloc(n_floats * sizeof(float));
    if (m->panels == NULL || m->vectors == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory for %llu bytes of packed weights",
                       sm_gguf_path(l->g), (unsigned long long)m->info.n_packed_bytes);
    uint8_t *panel = m->panels;
    float *vector = m->vectors;
    for (size_t j = 0; j < l->n_jobs; j++) {
        const struct job *job = &l->jobs[j];
        if (job->matrix != NULL) {
            job->matrix->panels = panel;
            panel += job->matrix->n_panels * job->matrix->panel_bytes;
        }
        if (job->vector != NULL) {
            *job->vector = vector;
            vector += sm_round_up(job->n_rows * job->k, SM_ALIGN / sizeof(float));
        }
    }
    return SMALLM_OK;
}

static int pack_all(struct loader *l, int n_threads, uint64_t memory_limit) {
    int status = allocate_weights(l, memory_limit);
    if (status != SMALLM_OK) return status;
    l->buffer_bytes = sm_round_up(l->buffer_bytes, SM_ALIGN);
    l->buffers = sm_alloc((size_t)n_threads * l->buffer_bytes);
    if (l->buffers == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory for the read buffers",
                       sm_gguf_path(l->g));
    struct sm_pool *pool;
    status = sm_pool_new(n_threads, &pool, l->err);
    if (status != SMALLM_OK) return status;
    sm_pool_run(pool, l->n_units, 1, load_phase, l);
    sm_pool_free(pool);
    return atomic_load(&l->status);
}

/* ---- what the model tells about itself --------------------------------------------------------------- */

static int copy_metadata(struct loader *l) {
    struct sm_model *m = l->m;
    size_t n = 0, n_text = 0;
    for (size_t i = 0; i < sm_gguf_n_keys(l->g); i++) {
        long length = sm_gguf_format(l->g, i, NULL, 0);
        if (length < 0) continue;
        n++;
        n_text += sm_gguf_key(l->g, i).n + 1 + (size_t)length + 1;
    }
    m->metadata = sm_alloc(n * sizeof m->metadata[0] + n_text);
    if (m->metadata == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory for the metadata", sm_gguf_path(l->g));
    char *text = (char *)(m->metadata + n);
    for (size_t i = 0; i < sm_gguf_n_keys(l->g); i++) {
        long length = sm_gguf_format(l->g, i, NULL, 0);
        if (length < 0) continue;
        struct sm_str key = sm_gguf_key(l->g, i);
        struct sm_metadata *entry = &m->metadata[m->n_metadata++];
        memcpy(text, key.s, key.n);
        text[key.n] = 0;
        entry->key = text;
        text += key.n + 1;
        entry->value = text;
        entry->n_value = (size_t)length;
        sm_gguf_format(l->g, i, text, (size_t)length + 1);
        text += length + 1;
    }
    return SMALLM_OK;
}

/* "Q4_1 69 %, Q8_0 31 %": the matrices' formats by bytes, largest first. */
static void describe_formats(const struct loader *l, char *out, size_t cap) {
    uint64_t bytes[SM_TYPE_COUNT] = {0}, all = 0;
    for (size_t j = 0; j < l->n_jobs; j++) {
        if (l->jobs[j].vector != NULL) continue;
        bytes[l->jobs[j].type] += l->jobs[j].tensor->n_bytes;
        all += l->jobs[j].tensor->n_bytes;
    }
    size_t used = 0;
    out[0] = 0;
    for (;;) {
        size_t best = 0;
        for (size_t t = 1; t < SM_TYPE_COUNT; t++)
            if (bytes[t] > bytes[best]) best = t;
        if (bytes[best] == 0 || used + 32 > cap) return;
        used += (size_t)snprintf(out + used, cap - used, "%s%s %.0f %%", used == 0 ? "" : ", ",
                                 sm_quants[best].name, 100.0 * (double)bytes[best] / (double)all);
        bytes[best] = 0;
    }
}

/* Whether w is read once for the encoder's text, and not to decode. */
static bool is_of_source(const struct sm_model *m, const struct sm_matrix *w) {
    for (int i = 0; i < m->h.n_layer && m->h.n_encoder > 0; i++)
        if (w == &m->layers[i].cross_k || w == &m->layers[i].cross_v) return true;
    uintptr_t begin = (uintptr_t)(m->layers + m->h.n_layer), at = (uintptr_t)w;
    return at >= begin && at < begin + (size_t)m->h.n_encoder * sizeof m->layers[0];
}

static void describe(const struct loader *l) {
    struct sm_model *m = l->m;
    const struct sm_hparams *h = &m->h;
    smallm_model_info *info = &m->info;
    struct sm_tokenizer_info t;
    sm_tokenizer_get_info(m->tokenizer, &t);
    snprintf(info->architecture, sizeof info->architecture, "%s", m->arch->name);
    snprintf(info->tokenizer, sizeof info->tokenizer, "%s", t.model);
    snprintf(info->pre_tokenizer, sizeof info->pre_tokenizer, "%s", t.pre);
    describe_formats(l, info->formats, sizeof info->formats);
    info->n_file_bytes = sm_gguf_data_bytes(l->g);
    for (size_t j = 0; j < l->n_jobs; j++) {
        const struct job *job = &l->jobs[j];
        if (job->matrix == NULL) continue;
        if (is_of_source(m, job->matrix)) continue;
        size_t bytes = job->matrix->n_panels * job->matrix->panel_bytes;
        info->n_token_bytes += job->n_experts > 1 ? bytes / job->n_experts * (size_t)h->n_used : bytes;
    }
    info->n_vocab = h->n_vocab;
    info->n_ctx_train = h->n_ctx_train;
    info->n_embd = h->n_embd;
    info->n_layer = h->n_layer + h->n_encoder;
    info->n_head = h->n_head;
    info->n_head_kv = h->n_head_kv;
    info->n_ff = h->n_ff;
    info->decoder_start = h->decoder_start;
    info->head_size = h->head;
    info->bos = t.bos;
    info->eos = t.eos;
    info->eot = t.eot;
    info->add_bos = t.add_bos;
    info->add_eos = t.add_eos;
}

/* ---- opening --------------------------------------------------------------------------------------------- */

static bool is_scaled(const struct sm_model *m, int table) {
    return table == 0 || !m->arch->plain_windows;
}

/* What the file's scaling makes of pair i's frequency in a table of angles.  yarn's `begin` and `end`
 * are the pairs that turn `fast` and `slow` times within the original context. */
static double scale_rope(const struct sm_model *m, int table, int i) {
    const struct sm_hparams *h = &m->h;
    if (!h->yarn.used || !is_scaled(m, table)) return h->rope_scale[table];
    const double pairs = h->n_rot / (2 * sm_log(h->rope_base[table])), turn = 2 * PI;
    double begin = pairs * sm_log(h->yarn.context / (h->yarn.fast * turn));
    double end = pairs * sm_log(h->yarn.context / (h->yarn.slow * turn));
    if (!m->arch->yarn_exact) {
        begin = floor(begin);
        end = ceil(end);
    }
    begin = SM_MAX(begin, 0);
    end = SM_MIN(end, h->n_rot - 1);
    if (end == begin) end += 0.001;
    double mixed = SM_MIN(SM_MAX((i - begin) / (end - begin), 0), 1);
    return mixed * h->rope_scale[table] + (1 - mixed);
}

/* One table of frequencies, or those of all layers' tables; factors [n_rot / 2] or NULL. */
static int make_freqs(struct loader *l, const char *name, const float *factors, double *out) {
    const struct sm_hparams *h = &l->m->h;
    int n = h->n_rot / 2;
    for (int i = 0; i < n; i++) {
        double factor = factors != NULL ? (double)factors[i] : 1;
        if (!(factor > 1e-6 && factor < 1e6))
            return sm_fail(l->err, SMALLM_E_CORRUPT, "%s: %s[%d] is %g; allowed are 1e-6 to 1e6",
                           sm_gguf_path(l->g), name, i, factor);
        for (int t = 0; t < h->n_rope; t++)
            out[t * n + i] = scale_rope(l->m, t, i) / factor * sm_pow(h->rope_base[t], -2.0 * i / h->n_rot);
    }
    return SMALLM_OK;
}

static int make_rope_freqs(struct loader *l, float *const *factors) {
    struct sm_model *m = l->m;
    int n = m->h.n_rot / 2, all = m->has_short ? FACTORS_LONG : FACTORS_ALL;
    m->rope_freqs = sm_calloc((size_t)((m->h.n_rope + m->has_short) * n), sizeof m->rope_freqs[0]);
    if (m->rope_freqs == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory", sm_gguf_path(l->g));
    double magnitude = m->h.rope_magnitude, stretch = -0.1 * sm_log(SM_MIN(m->h.rope_scale[0], 1));
    const struct sm_yarn *yarn = &m->h.yarn;
    if (yarn->used) {
        magnitude *= yarn->magnitude != 0 ? yarn->magnitude : 1 + stretch;
        magnitude /= 1 + yarn->log_multiplier * stretch;
    }
    for (int t = 0; t < m->h.n_rope; t++) m->rope_magnitude[t] = is_scaled(m, t) ? magnitude : 1;
    int status = make_freqs(l, factor_names[all], factors[all], m->rope_freqs);
    if (status != SMALLM_OK || !m->has_short) return status;
    return make_freqs(l, factor_names[FACTORS_SHORT], factors[FACTORS_SHORT], m->rope_freqs + n);
}

/* Norms without weights are those with weights of 1. */
static int make_ones(struct loader *l) {
    struct sm_model *m = l->m;
    if (m->arch->norm != SM_NORM_LAYER_BARE) return SMALLM_OK;
    m->ones = sm_calloc((size_t)m->h.n_embd, sizeof m->ones[0]);
    if (m->ones == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory", sm_gguf_path(l->g));
    for (int i = 0; i < m->h.n_embd; i++) m->ones[i] = 1;
    for (int i = 0; i < m->h.n_layer; i++) m->layers[i].attn_norm = m->layers[i].ffn_norm = m->ones;
    m->output_norm = m->ones;
    return SMALLM_OK;
}

/* With a power of two of heads, head i has 2^(-max (i + 1) / n); the heads beyond one have those of
 * twice as many heads that lie between. */
static int make_slopes(struct loader *l) {
    struct sm_model *m = l->m;
    if (m->h.max_alibi == 0) return SMALLM_OK;
    m->slopes = sm_calloc((size_t)m->h.n_head, sizeof m->slopes[0]);
    if (m->slopes == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory", sm_gguf_path(l->g));
    int whole = 1;
    while (2 * whole <= m->h.n_head) whole *= 2;
    for (int i = 0; i < m->h.n_head; i++) {
        double step = i < whole ? i + 1 : i - whole + 0.5;
        m->slopes[i] = (float)sm_pow(2, -m->h.max_alibi * step / whole);
    }
    return SMALLM_OK;
}

/* The bucket of keys at `distance` from the query.  Near ones have their own, farther ones share
 * those that are left, in steps that grow; keys after the query have half of all. */
static int bucket_of(int n_buckets, bool after, int distance) {
    int first = 0;
    if (after) {
        n_buckets /= 2;
        first = distance > 0 ? n_buckets : 0;
    }
    int n = distance < 0 ? -distance : after ? distance : 0, near = n_buckets / 2;
    if (n < near) return first + n;
    double step = sm_log((double)n / near) / sm_log((double)SM_FAR / near) * (n_buckets - near);
    return first + SM_MIN(near + (int)(step + 1e-9), n_buckets - 1); /* whole steps end in it */
}

/* A row of biases for each head of the layers that have their own; the others share the row of the
 * first layer of their stack. */
static int make_biases(struct loader *l) {
    struct sm_model *m = l->m;
    int n_layer = m->h.n_layer + m->h.n_encoder;
    size_t n_head = (size_t)m->h.n_head, n = 0;
    for (int i = 0; i < n_layer; i++) n += m->layers[i].distances != NULL;
    if (n == 0) return SMALLM_OK;
    m->biases = sm_calloc(n * n_head, SM_DISTANCES * sizeof m->biases[0]);
    if (m->biases == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory", sm_gguf_path(l->g));
    float *next = m->biases;
    for (int i = 0; i < n_layer; i++) {
        struct sm_layer *layer = &m->layers[i];
        bool encodes = i >= m->h.n_layer;
        layer->biases = m->layers[encodes ? m->h.n_layer : 0].biases;
        if (layer->distances == NULL) continue;
        layer->biases = next;
        for (size_t head = 0; head < n_head; head++)
            for (int d = 0; d < SM_DISTANCES; d++) {
                int bucket = bucket_of(m->h.n_buckets, encodes, d - SM_FAR - SM_CHUNK);
                *next++ = layer->distances[(size_t)bucket * n_head + head];
            }
    }
    return SMALLM_OK;
}

static int open_file(struct loader *l, const smallm_model_params *params) {
    struct sm_model *m = l->m;
    int n_threads = params->n_threads;
    int status = n_threads == 0 ? sm_cpu_default_threads(&n_threads, l->err) : SMALLM_OK;
    if (status != SMALLM_OK) return status;
    status = sm_kernels_get(&m->kernels, l->err);
    if (status != SMALLM_OK) return status;
    status = sm_arch_find(l->g, &m->arch, l->err);
    if (status != SMALLM_OK) return status;
    status = sm_arch_read(m->arch, l->g, &m->h, l->err);
    if (status != SMALLM_OK) return status;
    status = sm_tokenizer_new(l->g, &m->tokenizer, l->err);
    if (status != SMALLM_OK) return status;
    int n_tokens = sm_tokenizer_n_vocab(m->tokenizer);
    if (m->h.n_vocab != 0 && m->h.n_vocab != n_tokens)
        return sm_fail(l->err, SMALLM_E_CORRUPT, "%s: %s.vocab_size is %d; the tokenizer has %d tokens",
                       sm_gguf_path(l->g), m->arch->name, m->h.n_vocab, n_tokens);
    m->h.n_vocab = n_tokens;
    if (m->h.decoder_start >= n_tokens)
        return sm_fail(l->err, SMALLM_E_CORRUPT,
                       "%s: %s.decoder_start_token_id is %d; allowed are 0 to %d", sm_gguf_path(l->g),
                       m->arch->name, m->h.decoder_start, n_tokens - 1);

    size_t n_tensors = sm_gguf_n_tensors(l->g);
    l->bound = sm_calloc(n_tensors, sizeof l->bound[0]);
    l->jobs = sm_calloc(n_tensors, sizeof l->jobs[0]);
    m->layers = sm_calloc((size_t)(m->h.n_layer + m->h.n_encoder), sizeof m->layers[0]);
    m->matrices = sm_calloc(n_tensors, sizeof m->matrices[0]);
    if (l->bound == NULL || l->jobs == NULL || m->layers == NULL || m->matrices == NULL)
        return sm_fail(l->err, SMALLM_E_MEMORY, "%s: no memory for the tensor table",
                       sm_gguf_path(l->g));
    float *rope_factors[N_FACTORS] = {NULL};
    status = bind_all(l, rope_factors);
    if (status != SMALLM_OK) return status;
    status = pack_all(l, n_threads, params->memory_limit);
    if (status != SMALLM_OK) return status;
    for (int i = 0; i < m->h.n_layer + m->h.n_encoder && status == SMALLM_OK; i++) {
        split_fused(&m->h, &m->layers[i]);
        status = turn_conv(l, m->layers[i].plan.mixer == SM_MIXER_SSM ? m->layers[i].ssm_conv
                                                                       : m->layers[i].conv);
    }
    if (status != SMALLM_OK) return status;
    status = make_rope_freqs(l, rope_factors);
    if (status != SMALLM_OK) return status;
    status = make_ones(l);
    if (status != SMALLM_OK) return status;
    status = make_slopes(l);
    if (status != SMALLM_OK) return status;
    status = make_biases(l);
    if (status != SMALLM_OK) return status;
    status = copy_metadata(l);
    if (status != SMALLM_OK) return status;
    describe(l);
    if (m->embeddings != NULL) { /* rows are read while running */
        m->file = l->g;
        l->g = NULL;
    }
    return SMALLM_OK;
}

int sm_model_open(const char *path, const smallm_model_params *params, struct sm_model **out,
                  smallm_error *err) {
    uint64_t begin = sm_clock_ns();
    *out = NULL;
    struct loader l = {.err = err};
    l.m = sm_calloc(1, sizeof *l.m);
    if (l.m == NULL) return sm_fail(err, SMALLM_E_MEMORY, "%s: no memory", path);
    int status = sm_gguf_open(path, &l.g, err);
    if (status == SMALLM_OK) status = open_file(&l, params);
    sm_gguf_close(l.g);
    sm_free(l.bound);
    sm_free(l.jobs);
    sm_free(l.buffers);
    if (status != SMALLM_OK) {
        sm_model_free(l.m);
        return status;
    }
    l.m->info.load_s = (double)(sm_clock_ns() - begin) * 1e-9;
    *out = l.m;
    return SMALLM_OK;
}

void sm_model_free(struct sm_model *m) {
    if (m == NULL) return;
    sm_tokenizer_free(m->tokenizer);
    sm_gguf_close(m->file);
    sm_free(m->layers);
    sm_free(m->matrices);
    sm_free(m->rope_freqs);
    sm_free(m->ones);
    sm_free(m->slopes);
    sm_free(m->biases);
    sm_free(m->panels);
    sm_free(m->vectors);
    sm_free(m->metadata);
    sm_free(m);
}

int sm_model_embed(const struct sm_model *m, int32_t id, float *out, smallm_error *err) {
    size_t n_embd = (size_t)m->h.n_embd, row = (size_t)id;
    if (m->embeddings == NULL) {
        const struct sm_matrix *w = &m->head;
        sm_panel_row(w->type, w->panels + row / SM_PANEL_ROWS * w->panel_bytes,
                     row % SM_PANEL_ROWS, n_embd, out);
        return SMALLM_OK;
    }
    enum sm_type type = sm_quant_from_gguf(m->embeddings->gguf_type);
    const struct sm_quant *quant = &sm_quants[type];
    size_t row_bytes = sm_row_bytes(type, n_embd);
    uint8_t blocks[4096];
    size_t step = sizeof blocks / quant->block_bytes * quant->block_bytes;
    for (size_t at = 0; at < row_bytes; at += step) {
        size_t n = SM_MIN(step, row_bytes - at), n_blocks = n / quant->block_bytes;
        int status = sm_gguf_read(m->file, m->embeddings, row * row_bytes + at, blocks, n, err);
        if (status != SMALLM_OK) return status;
        quant->dequantize(blocks, out + at / quant->block_bytes * quant->block_size, n_blocks);
    }
    return SMALLM_OK;
}

const struct sm_tokenizer *sm_model_tokenizer(const struct sm_model *m) { return m->tokenizer; }

void sm_model_get_info(const struct sm_model *m, smallm_model_info *out) { *out = m->info; }

int sm_model_metadata(const struct sm_model *m, size_t i, const char **key, const char **value,
                      size_t *n_value) {
    if (i >= m->n_metadata) return SMALLM_DONE;
    *key = m->metadata[i].key;
    *value = m->metadata[i].value;
    *n_value = m->metadata[i].n_value;
    return SMALLM_OK;
}
