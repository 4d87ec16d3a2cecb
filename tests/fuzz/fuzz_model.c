/* Any keys and shapes as a model: opened, and what opens is run.
 *
 *   cmake -S . -B build-fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DSMALLM_FUZZ=ON
 *         -DSMALLM_SANITIZE=address,undefined,fuzzer-no-link
 *   python tests/goldens.py --heads seeds
 *   build-fuzz/fuzz_model -runs=1000000 corpus seeds
 *
 * An input is a GGUF file up to its tensors' data, which are small numbers made here.  Mutations change
 * whole keys and tensors: values, kinds, shapes, names, the architecture; others come from a second
 * input.  Where the loader then says that a tensor is missing, not known or of another shape, the file
 * is made what the message asks for: keys that contradict every shape of their seed are run, too, and
 * messages have to say enough.
 *
 * A model that opens must give the same bits at once, token by token and after cutting and forking (an
 * encoder in passes of several sizes), and is opened once more with one of its allocations failing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "session.h"

#define MAX_KEYS 96
#define MAX_TENSORS 256
#define MAX_HEAD ((size_t)64 << 10)
#define FILE_BYTES ((size_t)8 << 20) /* tensors that need more lie outside the file */
#define MAX_REPAIRS 160
#define ALIGNMENT 32
#define N_TOKENS 16
#define N_LONG 270 /* of a few texts: more than a chunk of attention */

/* A huge allocation that fails is an error code like any other. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

/* ---- a file as keys and tensors -------------------------------------------------------------- */

struct key {
    struct sm_str name;
    enum sm_gguf_kind kind;
    struct sm_str value; /* as the file has it */
};

struct tensor {
    char name[SM_NAME_MAX];
    uint32_t n_dims, type;
    uint64_t dims[SM_GGUF_MAX_DIMS];
};

struct head {
    struct key keys[MAX_KEYS];
    size_t n_keys;
    struct tensor tensors[MAX_TENSORS];
    size_t n_tensors;
    char pool[8 * MAX_HEAD]; /* what names and values point into, where not into the input */
    size_t n_pool;
};

struct reader {
    const uint8_t *s;
    size_t n, at;
    bool bad;
};

static const uint8_t *take(struct reader *r, uint64_t n) {
    static const uint8_t nothing[8];
    if (r->bad || n > r->n - r->at) {
        r->bad = true;
        return nothing;
    }
    r->at += (size_t)n;
    return r->s + r->at - (size_t)n;
}

static uint32_t take_u32(struct reader *r) {
    uint32_t v;
    memcpy(&v, take(r, sizeof v), sizeof v);
    return v;
}

static uint64_t take_u64(struct reader *r) {
    uint64_t v;
    memcpy(&v, take(r, sizeof v), sizeof v);
    return v;
}

static struct sm_str take_string(struct reader *r) {
    uint64_t n = take_u64(r);
    const uint8_t *s = take(r, n);
    return (struct sm_str){(const char *)s, r->bad ? 0 : (size_t)n};
}

/* Bytes of a scalar; 0: not one of fixed size. */
static size_t kind_bytes(uint32_t kind) {
    static const uint8_t bytes[SM_GGUF_KIND_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kind < SM_GGUF_KIND_COUNT ? bytes[kind] : 0;
}

static void skip_value(struct reader *r, uint32_t kind) {
    if (kind == SM_GGUF_STRING) {
        take_string(r);
    } else if (kind == SM_GGUF_ARRAY) {
        uint32_t of = take_u32(r);
        uint64_t n = take_u64(r);
        if (of == SM_GGUF_STRING)
            for (uint64_t i = 0; i < n && !r->bad; i++) take_string(r);
        else if (kind_bytes(of) == 0 || n > r->n) r->bad = true;
        else take(r, n * kind_bytes(of));
    } else if (kind_bytes(kind) == 0) {
        r->bad = true;
    } else {
        take(r, kind_bytes(kind));
    }
}

/* false: not a file that this can change part by part. */
static bool parse(struct head *h, const uint8_t *s, size_t n) {
    struct reader r = {s, n, 0, false};
    h->n_keys = h->n_tensors = h->n_pool = 0;
    if (memcmp(take(&r, 4), "GGUF", 4) != 0 || take_u32(&r) != 3) return false;
    uint64_t n_tensors = take_u64(&r), n_keys = take_u64(&r);
    if (n_tensors > MAX_TENSORS || n_keys > MAX_KEYS) return false;
    for (; h->n_keys < n_keys && !r.bad; h->n_keys++) {
        struct key *k = &h->keys[h->n_keys];
        k->name = take_string(&r);
        k->kind = (enum sm_gguf_kind)take_u32(&r);
        size_t at = r.at;
        skip_value(&r, k->kind);
        k->value = (struct sm_str){(const char *)s + at, r.at - at};
        if (k->name.n > 200) return false;
    }
    for (; h->n_tensors < n_tensors && !r.bad; h->n_tensors++) {
        struct tensor *t = &h->tensors[h->n_tensors];
        struct sm_str name = take_string(&r);
        if (name.n >= sizeof t->name) return false;
        *t = (struct tensor){.n_dims = take_u32(&r)};
        memcpy(t->name, name.s, name.n);
        if (t->n_dims > SM_GGUF_MAX_DIMS) return false;
        for (uint32_t d = 0; d < t->n_dims; d++) t->dims[d] = take_u64(&r);
        t->type = take_u32(&r);
        take_u64(&r);
    }
    return !r.bad;
}

static size_t put(uint8_t *out, size_t at, const void *p, size_t n) {
    if (at + n <= MAX_HEAD) memcpy(out + at, p, n);
    return at + n;
}

static size_t put_u32(uint8_t *out, size_t at, uint32_t v) { return put(out, at, &v, sizeof v); }
static size_t put_u64(uint8_t *out, size_t at, uint64_t v) { return put(out, at, &v, sizeof v); }

static uint64_t tensor_bytes(const struct tensor *t) {
    enum sm_type type = sm_quant_from_gguf(t->type);
    uint64_t rows = 1;
    for (uint32_t d = 1; d < t->n_dims; d++) rows = SM_MIN(rows * SM_MIN(t->dims[d], FILE_BYTES), FILE_BYTES);
    if (type == SM_TYPE_COUNT || t->n_dims == 0) return ALIGNMENT;
    return rows * sm_row_bytes(type, (size_t)SM_MIN(t->dims[0], FILE_BYTES));
}

/* The file up to the data, into out [MAX_HEAD]; 0: too large. */
static size_t write_head(const struct head *h, uint8_t *out) {
    size_t at = put(out, 0, "GGUF", 4);
    at = put_u32(out, at, 3);
    at = put_u64(out, at, h->n_tensors);
    at = put_u64(out, at, h->n_keys);
    for (size_t i = 0; i < h->n_keys; i++) {
        at = put_u64(out, at, h->keys[i].name.n);
        at = put(out, at, h->keys[i].name.s, h->keys[i].name.n);
        at = put_u32(out, at, h->keys[i].kind);
        at = put(out, at, h->keys[i].value.s, h->keys[i].value.n);
    }
    uint64_t offset = 0;
    for (size_t i = 0; i < h->n_tensors; i++) {
        const struct tensor *t = &h->tensors[i];
        at = put_u64(out, at, strlen(t->name));
        at = put(out, at, t->name, strlen(t->name));
        at = put_u32(out, at, t->n_dims);
        for (uint32_t d = 0; d < t->n_dims; d++) at = put_u64(out, at, t->dims[d]);
        at = put_u32(out, at, t->type);
        at = put_u64(out, at, offset);
        offset += sm_round_up((size_t)tensor_bytes(t), ALIGNMENT);
    }
    return at <= MAX_HEAD ? at : 0;
}

/* ---- the file in memory ---------------------------------------------------------------------- */

static int fd = -1;
static char path[64];
static uint8_t *data; /* [FILE_BYTES] */

/* Floats of both signs around 1 / 8 that are small float16 numbers, too, and quantized scales. */
static float number(size_t i) {
    uint32_t x = (uint32_t)i * 2654435761u;
    return ((float)(x >> 24) - 127.5f) * (1.0f / 512);
}

static void open_file(void) {
    fd = memfd_create("model", 0);
    CHECK(fd >= 0 && ftruncate(fd, FILE_BYTES) == 0);
    data = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(data != MAP_FAILED);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
}

static void fill(size_t begin, size_t end) {
    for (size_t i = begin / sizeof(float); i < end / sizeof(float); i++) {
        float value = number(i);
        memcpy(data + i * sizeof value, &value, sizeof value);
    }
}

static size_t n_written = FILE_BYTES; /* of the file, that are not numbers */

static void write_file(const uint8_t *s, size_t n) {
    memcpy(data, s, n);
    size_t begin = sm_round_up(n, ALIGNMENT);
    memset(data + n, 0, begin - n);
    if (n_written > begin) fill(begin, n_written);
    n_written = begin;
}

static int open_model(struct sm_model **m, smallm_error *err) {
    static const smallm_model_params params = {.size = sizeof params, .n_threads = 1};
    *err = (smallm_error){.size = sizeof *err};
    int status = sm_model_open(path, &params, m, err);
    CHECK(status == SMALLM_OK || (err->code == status && err->message[0] != '\0'));
    CHECK((*m != NULL) == (status == SMALLM_OK));
    return status;
}

/* ---- what the message asks for --------------------------------------------------------------- */

static struct tensor *find(struct head *h, const char *name) {
    for (size_t i = 0; i < h->n_tensors; i++)
        if (strcmp(h->tensors[i].name, name) == 0) return &h->tensors[i];
    return NULL;
}

static bool repair(struct head *h, const char *message) {
    char name[SM_NAME_MAX], rest[16];
    const char *at = strstr(message, ": the tensor ");
    if (at == NULL || sscanf(at, ": the tensor %63s %15[a-z ]", name, rest) != 2) return false;
    struct tensor *t = find(h, name);
    if (strcmp(rest, "is missing") == 0) {
        CHECK(t == NULL);
        if (h->n_tensors == MAX_TENSORS) return false;
        t = &h->tensors[h->n_tensors++];
        *t = (struct tensor){.n_dims = 1, .dims = {1}};
        memcpy(t->name, name, sizeof name);
        return true;
    }
    if (t == NULL) return false; /* not a name that can be printed */
    if (strncmp(rest, "is not one", 10) == 0) {
        *t = h->tensors[--h->n_tensors];
        return true;
    }
    unsigned long long dims[3];
    at = strstr(at, "ask for [");
    if (strncmp(rest, "has shape", 9) != 0 || at == NULL) return false;
    CHECK(sscanf(at, "ask for [%llu, %llu, %llu]", &dims[0], &dims[1], &dims[2]) == 3);
    bool same = t->n_dims == 3;
    for (int d = 0; d < 3; d++) same = same && t->dims[d] == dims[d];
    CHECK(!same);
    t->n_dims = 3;
    for (int d = 0; d < 3; d++) t->dims[d] = dims[d];
    enum sm_type type = sm_quant_from_gguf(t->type);
    if (type != SM_TYPE_COUNT && dims[0] % sm_quants[type].block_size != 0) t->type = 0; /* F32 */
    return true;
}

/* ---- running --------------------------------------------------------------------------------- */

static uint32_t hash(const uint8_t *s, size_t n) {
    uint32_t x = 2166136261u;
    for (size_t i = 0; i < n; i++) x = (x ^ s[i]) * 16777619u;
    return x ^ x >> 15;
}

struct run {
    struct sm_session *session;
    size_t n_vocab;
    int32_t tokens[N_LONG];
    int n_batch;
    struct sm_seq *source; /* of models with an encoder, else NULL */
};

/* Tokens from .. to - 1 of the text, n_at_once in a pass; the last one's logits. */
static int feed(const struct run *r, struct sm_seq *seq, int from, int to, int n_at_once, float *logits) {
    smallm_error err = {.size = sizeof err};
    for (int at = from, n; at < to; at += n) {
        n = SM_MIN(n_at_once, to - at);
        CHECK(sm_seq_length(seq) == at);
        const struct sm_span span = {.seq = seq, .tokens = r->tokens + at, .n = n, .logits = logits,
                                     .encodes = seq == r->source,
                                     .source = seq == r->source ? NULL : r->source,
                                     .want = at + n == to && seq != r->source ? SM_WANT_LAST
                                                                               : SM_WANT_NONE};
        int status = sm_session_run(r->session, &span, 1, NULL, &err);
        CHECK(sm_seq_length(seq) == (status == SMALLM_OK ? at + n : at));
        if (status == SMALLM_OK) continue;
        CHECK(err.code == status && err.message[0] != '\0');
        CHECK(status == SMALLM_E_NUMERIC || status == SMALLM_E_MEMORY || status == SMALLM_E_BUDGET);
        return status;
    }
    return SMALLM_OK;
}

/* States [n_ctx][n_embd] of all tokens of a text that an encoder reads n_texts times in one pass. */
static int encode(const struct sm_model *m, const struct sm_session_params *params, const int32_t *tokens,
                  int n_texts, float *const *states) {
    smallm_error err = {.size = sizeof err};
    struct sm_session *session;
    struct sm_span spans[2];
    int status = sm_session_new(m, params, &session, &err);
    for (int i = 0; i < n_texts && status == SMALLM_OK; i++) {
        spans[i] = (struct sm_span){.tokens = tokens, .n = params->n_ctx, .want = SM_WANT_HIDDEN,
                                    .logits = states[i]};
        CHECK(sm_seq_new(session, &spans[i].seq, &err) == SMALLM_OK);
    }
    if (status == SMALLM_OK) {
        status = sm_session_run(session, spans, n_texts, NULL, &err);
        for (int i = 0; i < n_texts; i++) {
            CHECK(sm_seq_length(spans[i].seq) == (status == SMALLM_OK ? params->n_ctx : 0));
            sm_seq_free(session, spans[i].seq);
        }
        sm_session_free(session);
    }
    CHECK(status == SMALLM_OK || status == SMALLM_E_NUMERIC || status == SMALLM_E_MEMORY ||
          status == SMALLM_E_BUDGET);
    return status;
}

/* An encoder: the same bits in a pass that the text is too long for, and twice in one that holds both. */
static void run_encoder(const struct sm_model *m, struct sm_session_params params, const int32_t *tokens) {
    size_t n_bytes = (size_t)params.n_ctx * (size_t)m->h.n_embd * sizeof(float);
    float *states[3];
    for (int i = 0; i < 3; i++) CHECK((states[i] = calloc(1, n_bytes)) != NULL);
    int alone = encode(m, &params, tokens, 1, states);
    params.n_batch = 2 * params.n_ctx;
    int both = encode(m, &params, tokens, 2, states + 1);
    if (alone == SMALLM_E_NUMERIC || both == SMALLM_E_NUMERIC)
        CHECK(alone == both || alone == SMALLM_E_BUDGET || both == SMALLM_E_BUDGET);
    for (int i = 1; i < 3 && alone == SMALLM_OK && both == SMALLM_OK; i++)
        CHECK(memcmp(states[0], states[i], n_bytes) == 0);
    for (int i = 0; i < 3; i++) free(states[i]);
}

static void run_model(const struct sm_model *m, uint32_t seed) {
    smallm_error err = {.size = sizeof err};
    struct run r = {.n_batch = 11};
    int n = seed % 32 == 0 ? N_LONG : N_TOKENS;
    const struct sm_session_params params = {
        .n_threads = 1, .n_ctx = SM_MIN(m->h.n_ctx_train, n), .n_batch = r.n_batch,
        .kv_type = (int)(seed >> 8) % 3, .memory_limit = (uint64_t)256 << 20};
    n = params.n_ctx;
    for (int i = 0; i < n; i++)
        r.tokens[i] = (int32_t)(((seed >> i % 16) + (uint32_t)(i * 7)) % (uint32_t)m->h.n_vocab);
    if (m->arch->is_encoder) {
        run_encoder(m, params, r.tokens);
        return;
    }
    int status = sm_session_new(m, &params, &r.session, &err);
    if (status != SMALLM_OK) {
        CHECK(status == SMALLM_E_BUDGET || status == SMALLM_E_MEMORY);
        return;
    }
    r.n_vocab = (size_t)m->h.n_vocab;
    float *logits[2];
    struct sm_seq *seqs[2], *fork;
    for (int i = 0; i < 2; i++) {
        logits[i] = calloc(r.n_vocab, sizeof(float));
        CHECK(logits[i] != NULL && sm_seq_new(r.session, &seqs[i], &err) == SMALLM_OK);
    }
    if (m->h.n_encoder > 0) {
        CHECK(sm_seq_new(r.session, &r.source, &err) == SMALLM_OK);
        status = feed(&r, r.source, 0, n, n, NULL); /* one pass, whatever n_batch is */
    }
    bool encoded = status == SMALLM_OK;
    if (encoded) status = feed(&r, seqs[0], 0, n, r.n_batch, logits[0]);
    int again = encoded ? feed(&r, seqs[1], 0, n, 1, logits[1]) : status;
    if (status == SMALLM_OK || status == SMALLM_E_NUMERIC) CHECK(again == status);
    if (status == SMALLM_OK && again == status) {
        CHECK(memcmp(logits[0], logits[1], r.n_vocab * sizeof(float)) == 0);
        /* A fork of the first half, and the other sequence cut there, to the end in one batch. */
        CHECK(sm_seq_fork(r.session, seqs[0], n / 2, &fork, &err) == SMALLM_OK);
        sm_seq_rewind(r.session, seqs[1], n / 2);
        struct sm_seq *const both[] = {fork, seqs[1]};
        struct sm_span spans[2];
        for (int i = 0; i < 2 && status == SMALLM_OK; i++) {
            int length = sm_seq_length(both[i]);
            CHECK(length <= n / 2);
            status = feed(&r, both[i], length, n - 1, 7, logits[1]);
            spans[i] = (struct sm_span){.seq = both[i], .tokens = r.tokens + n - 1, .n = 1,
                                        .logits = logits[i], .want = SM_WANT_LAST,
                                        .source = r.source};
        }
        if (status == SMALLM_OK) status = sm_session_run(r.session, spans, 2, NULL, &err);
        CHECK(status == SMALLM_OK || status == SMALLM_E_BUDGET || status == SMALLM_E_MEMORY);
        if (status == SMALLM_OK) CHECK(memcmp(logits[0], logits[1], r.n_vocab * sizeof(float)) == 0);
        sm_seq_free(r.session, fork);
    }
    for (int i = 0; i < 2; i++) {
        sm_seq_free(r.session, seqs[i]);
        free(logits[i]);
    }
    sm_seq_free(r.session, r.source);
    sm_session_free(r.session);
}

static struct head parsed, other; /* too large for the stack */
static uint8_t written[MAX_HEAD];

int LLVMFuzzerTestOneInput(const uint8_t *s, size_t n) {
    smallm_error err;
    struct sm_model *m;
    if (n > MAX_HEAD) return 0;
    if (fd < 0) open_file();
    bool whole = parse(&parsed, s, n);
    size_t size = whole ? write_head(&parsed, written) : n;
    write_file(whole ? written : s, size);
    int status = open_model(&m, &err);
    for (int i = 0; whole && status != SMALLM_OK && i < MAX_REPAIRS && repair(&parsed, err.message); i++) {
        size = write_head(&parsed, written);
        if (size == 0) return 0;
        write_file(written, size);
        status = open_model(&m, &err);
    }
    if (status != SMALLM_OK) return 0;
    uint32_t seed = hash(s, n);
    run_model(m, seed);
    sm_model_free(m);

    if (seed % 8 != 1) return 0;
    sm_test_fail_alloc(0);
    CHECK(open_model(&m, &err) == SMALLM_OK);
    long n_allocs = sm_test_alloc_count();
    sm_model_free(m);
    sm_test_fail_alloc(1 + (long)(seed / 8) % n_allocs);
    CHECK(open_model(&m, &err) == SMALLM_E_MEMORY);
    sm_test_fail_alloc(0);
    return 0;
}

/* ---- mutations ------------------------------------------------------------------------------- */

static uint32_t rng;

static uint32_t below(uint32_t n) {
    rng = rng * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(rng ^ rng >> 16) * n >> 32);
}

static struct sm_str keep(struct head *h, const void *p, size_t n) {
    if (n > sizeof h->pool - h->n_pool) return (struct sm_str){"", 0};
    h->n_pool += n;
    char *at = h->pool + h->n_pool - n;
    memcpy(at, p, n);
    return (struct sm_str){at, n};
}

/* The rows of arch.c, from the message that lists them. */
static char rows[64][32];
static uint32_t n_rows;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    struct head *h = &parsed;
    static const char text[] = "\1\0\0\0\0\0\0\0?";
    h->keys[0] = (struct key){{"general.architecture", 20}, SM_GGUF_STRING, {text, 9}};
    h->n_keys = 1;
    open_file();
    write_file(written, write_head(h, written));
    smallm_error err;
    struct sm_model *m;
    CHECK(open_model(&m, &err) == SMALLM_E_UNSUPPORTED);
    const char *at = strstr(err.message, "runs: ");
    for (at += 6; n_rows < SM_COUNT(rows) && sscanf(at, "%31[^,]", rows[n_rows]) == 1; n_rows++) {
        at += strlen(rows[n_rows]);
        at += strspn(at, ", ");
    }
    CHECK(n_rows > 20);
    return 0;
}

static bool equals(struct sm_str s, const char *text) {
    return s.n == strlen(text) && memcmp(s.s, text, s.n) == 0;
}

/* What the keys of the file begin with. */
static struct sm_str architecture(const struct head *h) {
    for (size_t i = 0; i < h->n_keys; i++)
        if (equals(h->keys[i].name, "general.architecture") && h->keys[i].kind == SM_GGUF_STRING)
            return (struct sm_str){h->keys[i].value.s + 8, h->keys[i].value.n - 8};
    return (struct sm_str){"", 0};
}

/* The key's name without the architecture; NULL: it is not the architecture's. */
static const char *suffix(struct sm_str arch, const struct key *k, size_t *n) {
    if (k->name.n <= arch.n + 1 || memcmp(k->name.s, arch.s, arch.n) != 0 || k->name.s[arch.n] != '.')
        return NULL;
    *n = k->name.n - arch.n - 1;
    return k->name.s + arch.n + 1;
}

static struct sm_str named(struct head *h, struct sm_str arch, const char *name, size_t n) {
    char full[300];
    size_t size = (size_t)snprintf(full, sizeof full, "%.*s.%.*s", (int)arch.n, arch.s, (int)n, name);
    return keep(h, full, SM_MIN(size, sizeof full - 1));
}

static struct sm_str integer_value(struct head *h, uint64_t v, enum sm_gguf_kind kind) {
    return keep(h, &v, kind_bytes(kind));
}

static uint64_t any_integer(uint64_t now) {
    static const uint64_t values[] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 255,
        256, 257, 511, 512, 513, 1023, 1024, 1025, 4096, 65535, 65536, 65537, 1 << 18, (1 << 18) + 1,
        1 << 24, (1 << 24) + 1, INT32_MAX, 1u << 31, UINT32_MAX, (uint64_t)1 << 32, INT64_MAX,
        (uint64_t)1 << 63, UINT64_MAX,
    };
    switch (below(8)) {
    case 0: return now + 1;
    case 1: return now - 1;
    case 2: return now * 2;
    case 3: return now / 2;
    case 4: return below(20) * 4;
    default: return values[below(below(2) ? SM_COUNT(values) : 28)];
    }
}

static double any_float(double now) {
    static const double values[] = {
        0, -0.0, 1, -1, 0.5, 2, 1e-45, -1e-45, 1e-38, 1e-30, 1e-12, 1e-6, 1e-5, 1e-3, 0.1, 10, 50, 1e3, 1e4,
        1e6, 1.0000001, 1e12, 1e30, 3.4e38, 1e300, (double)INFINITY, (double)-INFINITY, (double)NAN,
    };
    switch (below(4)) {
    case 0: return now * 2;
    case 1: return now / 3;
    default: return values[below(SM_COUNT(values))];
    }
}

static struct sm_str string_value(struct head *h, const char *text) {
    char buf[64];
    uint64_t n = strlen(text);
    memcpy(buf, &n, sizeof n);
    memcpy(buf + sizeof n, text, n);
    return keep(h, buf, sizeof n + n);
}

/* Another value of a kind that is used for such, or now and then of another kind. */
static void change_value(struct head *h, struct key *k) {
    static const char *const strings[] = {"none", "linear", "yarn", "longrope", "su", "", "model", "adapter"};
    static const enum sm_gguf_kind kinds[] = {SM_GGUF_U32, SM_GGUF_I32, SM_GGUF_U64, SM_GGUF_I64,
                                              SM_GGUF_U8, SM_GGUF_I16, SM_GGUF_F32, SM_GGUF_F64,
                                              SM_GGUF_BOOL, SM_GGUF_STRING};
    enum sm_gguf_kind old = k->kind;
    if (below(16) == 0) k->kind = kinds[below(SM_COUNT(kinds))];
    uint64_t now = 0;
    if (kind_bytes(old) == k->value.n && k->value.n <= sizeof now) memcpy(&now, k->value.s, k->value.n);
    if (k->kind == SM_GGUF_F32) {
        float f;
        uint32_t low = (uint32_t)now;
        memcpy(&f, &low, sizeof f);
        double wanted = any_float((double)f);
        f = wanted > 3.4e38 ? INFINITY : wanted < -3.4e38 ? -INFINITY : (float)wanted;
        k->value = keep(h, &f, sizeof f);
    } else if (k->kind == SM_GGUF_F64) {
        double d = any_float(1);
        k->value = keep(h, &d, sizeof d);
    } else if (k->kind == SM_GGUF_BOOL) {
        k->value = integer_value(h, below(2), SM_GGUF_BOOL);
    } else if (k->kind == SM_GGUF_STRING) {
        k->value = string_value(h, below(3) ? strings[below(SM_COUNT(strings))] : rows[below(n_rows)]);
    } else if (kind_bytes(k->kind) > 0) {
        k->value = integer_value(h, any_integer(now), k->kind);
    } else if (old != SM_GGUF_ARRAY) {
        k->kind = SM_GGUF_U32;
        k->value = integer_value(h, any_integer(0), SM_GGUF_U32);
    }
}

/* An array for each layer, or of nearly as many values. */
static void make_array(struct head *h, struct key *k) {
    static const enum sm_gguf_kind kinds[] = {SM_GGUF_U32, SM_GGUF_I32, SM_GGUF_BOOL, SM_GGUF_F32,
                                              SM_GGUF_U64, SM_GGUF_U8};
    static const size_t counts[] = {0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7};
    uint8_t bytes[128];
    uint32_t of = kinds[below(SM_COUNT(kinds))], size = (uint32_t)kind_bytes(of);
    uint64_t n = counts[below(SM_COUNT(counts))];
    memcpy(bytes, &of, sizeof of);
    memcpy(bytes + sizeof of, &n, sizeof n);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t v = of == SM_GGUF_BOOL ? below(2) : below(3) ? below(5) : any_integer(2);
        memcpy(bytes + 12 + i * size, &v, size);
    }
    k->kind = SM_GGUF_ARRAY;
    k->value = keep(h, bytes, 12 + (size_t)n * size);
}

/* Keys that no seed has. */
static const char *const rare[] = {
    "expert_group_count", "expert_gating_func", "expert_weights_norm", "expert_weights_scale",
    "rope.scale_linear", "rope.freq_base_swa", "rope.scaling.yarn_ext_factor", "attention.clamp_kqv",
    "attention.temperature_scale", "router_logit_softcapping", "attention.causal", "attention.scale",
    "attention.max_alibi_bias", "attention.key_length", "attention.value_length", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.dimension_count", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "expert_count", "expert_used_count", "shortconv.l_cache",
    "ssm.inner_size", "ssm.conv_kernel", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count",
    "use_parallel_residual", "embedding_scale", "residual_scale", "vocab_size",
};

static void add_key(struct head *h, struct sm_str arch) {
    if (h->n_keys == MAX_KEYS) return;
    const char *name = rare[below(SM_COUNT(rare))];
    static const enum sm_gguf_kind kinds[] = {SM_GGUF_U32, SM_GGUF_U32, SM_GGUF_F32, SM_GGUF_BOOL};
    struct key *k = &h->keys[h->n_keys++];
    *k = (struct key){named(h, arch, name, strlen(name)), kinds[below(SM_COUNT(kinds))], {"", 0}};
    if (below(6) == 0) make_array(h, k);
    else change_value(h, k);
}

static void change_architecture(struct head *h, struct sm_str arch) {
    const char *row = rows[below(n_rows)];
    struct sm_str to = {row, strlen(row)};
    for (size_t i = 0; i < h->n_keys; i++) {
        size_t n;
        const char *name = suffix(arch, &h->keys[i], &n);
        if (name != NULL) h->keys[i].name = named(h, to, name, n);
        else if (equals(h->keys[i].name, "general.architecture")) h->keys[i].value = string_value(h, row);
    }
}

/* A key of the architecture, mostly; those of the tokenizer have a fuzzer of their own. */
static struct key *any_key(struct head *h, struct sm_str arch) {
    struct key *k = &h->keys[0];
    size_t n;
    for (int i = 0; i < 8; i++) {
        k = &h->keys[below((uint32_t)h->n_keys)];
        if (suffix(arch, k, &n) != NULL) return k;
    }
    return k;
}

static void change_tensor(struct head *h) {
    struct tensor *t = &h->tensors[below((uint32_t)h->n_tensors)];
    switch (below(6)) {
    case 0: *t = h->tensors[--h->n_tensors]; break;
    case 1:
        if (t->n_dims > 0) t->dims[below(t->n_dims)] = any_integer(t->dims[0]);
        break;
    case 2: t->type = below(40); break;
    case 3: t->n_dims = below(5); break;
    case 4: /* of another layer */
        if (t->name[0] == 'b') t->name[4] = (char)('0' + below(10));
        break;
    default: /* a bias in place of a weight */
        if (h->n_tensors < MAX_TENSORS && strlen(t->name) > 7) {
            struct tensor *copy = &h->tensors[h->n_tensors++];
            *copy = *t;
            memcpy(copy->name + strlen(copy->name) - 6, "bias\0", 6);
        }
    }
}

static void mutate(struct head *h) {
    struct sm_str arch = architecture(h);
    if (h->n_keys == 0) return;
    switch (below(12)) {
    case 0: {
        struct key *k = any_key(h, arch);
        *k = h->keys[--h->n_keys];
        break;
    }
    case 1:
    case 2: add_key(h, arch); break;
    case 3: change_architecture(h, arch); break;
    case 4: make_array(h, any_key(h, arch)); break;
    case 5:
        if (h->n_tensors > 0) change_tensor(h);
        break;
    default: change_value(h, any_key(h, arch)); break;
    }
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *s, size_t n, size_t max_size, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b, uint8_t *out,
                                 size_t max_size, unsigned seed);

static size_t finish(const struct head *h, uint8_t *out, size_t max_size, size_t otherwise) {
    size_t n = write_head(h, written);
    if (n == 0 || n > max_size) return otherwise;
    memcpy(out, written, n);
    return n;
}

size_t LLVMFuzzerCustomMutator(uint8_t *s, size_t n, size_t max_size, unsigned seed) {
    rng = seed;
    if (below(64) == 0 || !parse(&parsed, s, n)) return LLVMFuzzerMutate(s, n, max_size);
    for (uint32_t i = 1 + below(4); i > 0; i--) mutate(&parsed);
    return finish(&parsed, s, max_size, n);
}

/* Some of b's keys and tensors in a. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b, uint8_t *out,
                                 size_t max_size, unsigned seed) {
    rng = seed;
    if (!parse(&parsed, a, n_a) || !parse(&other, b, n_b)) return 0;
    struct sm_str arch = architecture(&parsed), from = architecture(&other);
    uint32_t one_in = 1 + below(6);
    for (size_t i = 0; i < other.n_keys; i++) {
        size_t n;
        const char *name = suffix(from, &other.keys[i], &n);
        if (name == NULL || below(one_in) != 0) continue;
        struct key k = other.keys[i];
        k.name = named(&parsed, arch, name, n);
        size_t at = 0;
        while (at < parsed.n_keys && (parsed.keys[at].name.n != k.name.n ||
                                      memcmp(parsed.keys[at].name.s, k.name.s, k.name.n) != 0))
            at++;
        if (at == MAX_KEYS) continue;
        parsed.keys[at] = k;
        if (at == parsed.n_keys) parsed.n_keys++;
    }
    for (size_t i = 0; i < other.n_tensors && parsed.n_tensors < MAX_TENSORS; i++) {
        if (below(2 * one_in) != 0 || find(&parsed, other.tensors[i].name) != NULL) continue;
        parsed.tensors[parsed.n_tensors++] = other.tensors[i];
    }
    return finish(&parsed, out, max_size, 0);
}
