/* Reads GGUF headers through a window over pread and keeps what they say.
 *
 * Owns: the files, an arena with every name, string and array, the tables of keys and tensors.
 * Invariants: a count is checked against the bytes left in the file, at the least size one item can
 * have, before memory is asked for; tables grow as items are read.  Tables are searched by a sorted
 * index, so no choice of names makes a lookup slow. */
#include "gguf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "os.h"
#include "quants/quants.h"

#define MAX_KEY_BYTES 65535 /* the format's own limits */
#define MAX_NAME_BYTES 64
#define MIN_KEY_BYTES (8 + 1 + 4 + 1)          /* length, name, kind, value */
#define MIN_TENSOR_BYTES (8 + 1 + 4 + 8 + 4 + 8) /* length, name, n_dims, a dim, type, offset */
#define DEFAULT_ALIGNMENT 32
#define MIN_ALIGNMENT 8
#define MAX_ALIGNMENT (1 << 20)
#define MAX_PARTS 99999 /* five digits in the name */

#define WINDOW_BYTES ((size_t)256 << 10)
#define CHUNK_BYTES ((size_t)16 << 10)
#define CHUNK_MAX_BYTES ((size_t)4 << 20)

struct chunk { /* of the arena; its memory follows */
    struct chunk *next;
    size_t n, cap;
};

struct entry {
    struct sm_str key;
    enum sm_gguf_kind kind;
    union {
        uint64_t bits; /* numbers: the file's bytes, zero-extended */
        struct sm_str string;
        struct sm_gguf_array array;
    };
};

struct table { /* the keys of one file */
    struct entry *entries; /* [n] in file order */
    size_t n, cap;
    size_t *sorted; /* [n] indices by name */
};

struct sm_gguf {
    struct chunk *chunks; /* newest first */
    struct table keys;    /* the first part's */
    struct sm_tensor_info *tensors; /* [n_tensors] in file order, part after part */
    size_t n_tensors, tensors_cap;
    size_t *sorted; /* [n_tensors] indices by name */
    struct sm_file **parts; /* [n_parts] */
    size_t n_parts, parts_cap;
    uint64_t data_bytes;
};

/* ---- arena ---------------------------------------------------------------------------------- */

/* n bytes aligned to 8, or NULL. */
static void *arena_alloc(struct sm_gguf *g, size_t n) {
    const size_t head = sizeof(struct chunk);
    struct chunk *c = g->chunks;
    if (n > SIZE_MAX / 2) return NULL;
    n = sm_round_up(n, 8);
    if (!c || n > c->cap - c->n) {
        size_t cap = c ? SM_MIN(c->cap * 2, CHUNK_MAX_BYTES) : CHUNK_BYTES;
        cap = SM_MAX(cap, n);
        struct chunk *fresh = sm_alloc(head + cap);
        if (!fresh) return NULL;
        *fresh = (struct chunk){c, 0, cap};
        g->chunks = c = fresh;
    }
    void *p = (char *)c + head + c->n;
    c->n += n;
    return p;
}

/* ---- sorted indices ------------------------------------------------------------------------- */

typedef int compare_fn(const void *table, size_t a, size_t b);

/* Heapsort: n log n whatever the order, and no memory. */
static void sort(size_t *index, size_t n, compare_fn *compare, const void *table) {
    for (size_t i = 0; i < n; i++) index[i] = i;
    for (size_t start = n / 2, end = n; end > 1;) {
        if (start > 0) {
            start--;
        } else {
            size_t last = index[--end];
            index[end] = index[0];
            index[0] = last;
        }
        for (size_t root = start, child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && compare(table, index[child], index[child + 1]) < 0) child++;
            if (compare(table, index[root], index[child]) >= 0) break;
            size_t t = index[root];
            index[root] = index[child];
            index[child] = t;
        }
    }
}

static int compare_strings(struct sm_str a, struct sm_str b) {
    int order = memcmp(a.s, b.s, SM_MIN(a.n, b.n));
    return order ? order : (a.n > b.n) - (a.n < b.n);
}
static int compare_keys(const void *table, size_t a, size_t b) {
    const struct entry *e = table;
    return compare_strings(e[a].key, e[b].key);
}
static int compare_names(const void *table, size_t a, size_t b) {
    const struct sm_tensor_info *t = table;
    return compare_strings(t[a].name, t[b].name);
}
static int compare_offsets(const void *table, size_t a, size_t b) {
    const struct sm_tensor_info *x = (const struct sm_tensor_info *)table + a;
    const struct sm_tensor_info *y = (const struct sm_tensor_info *)table + b;
    if (x->part != y->part) return x->part < y->part ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static size_t find_key(const struct table *t, const char *key) {
    struct sm_str want = {key, strlen(key)};
    size_t low = 0, high = t->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_strings(want, t->entries[t->sorted[middle]].key);
        if (order == 0) return t->sorted[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return SIZE_MAX;
}

/* ---- reader --------------------------------------------------------------------------------- */

struct reader {
    struct sm_gguf *g;
    const struct sm_file *file;
    uint64_t at, size; /* position in the file, its size */
    uint8_t *window;   /* [WINDOW_BYTES] a copy of the bytes from `low` on */
    uint64_t low;
    size_t n_window;
    const char *noun; /* what is being read, for messages: "key" or "tensor", */
    size_t index;     /* its number, */
    struct sm_str name; /* and its name once that is known (n > 0) */
    smallm_error *err;
};

/* "file: key "name": ..." or, before the name is known, "file: key 3: ..." */
static int fail_at(const struct reader *r, int code, const char *fmt, ...) SM_PRINTF(3, 4);
static int fail_at(const struct reader *r, int code, const char *fmt, ...) {
    char detail[400], name[100];
    va_list args;
    va_start(args, fmt);
    vsnprintf(detail, sizeof detail, fmt, args);
    va_end(args);
    const char *path = sm_file_path(r->file);
    if (!r->noun) return sm_fail(r->err, code, "%s: %s", path, detail);
    if (r->name.n == 0) {
        return sm_fail(r->err, code, "%s: %s %zu: %s", path, r->noun, r->index, detail);
    }
    sm_printable(name, sizeof name, r->name.s, r->name.n);
    return sm_fail(r->err, code, "%s: %s \"%s\": %s", path, r->noun, name, detail);
}

static int no_memory(const struct reader *r) {
    return fail_at(r, SMALLM_E_MEMORY, "out of memory");
}

static uint64_t left(const struct reader *r) { return r->size - r->at; }

/* Copies the next n bytes to dst. */
static int take(struct reader *r, void *dst, size_t n) {
    if (n > left(r)) {
        return fail_at(r, SMALLM_E_CORRUPT,
                       "%zu bytes wanted at %llu, but the file ends at %llu: is it cut short?", n,
                       (unsigned long long)r->at, (unsigned long long)r->size);
    }
    uint8_t *to = dst;
    while (n > 0) {
        uint64_t offset = r->at - r->low;
        if (offset >= r->n_window) {
            if (n >= WINDOW_BYTES) {
                int rc = sm_file_read(r->file, r->at, to, n, r->err);
                if (rc == SMALLM_OK) r->at += n;
                return rc;
            }
            r->low = r->at;
            r->n_window = 0;
            size_t want = (size_t)SM_MIN(left(r), (uint64_t)WINDOW_BYTES);
            int rc = sm_file_read(r->file, r->low, r->window, want, r->err);
            if (rc != SMALLM_OK) return rc;
            r->n_window = want;
            offset = 0;
        }
        size_t m = SM_MIN(n, r->n_window - (size_t)offset);
        memcpy(to, r->window + offset, m);
        to += m;
        n -= m;
        r->at += m;
    }
    return SMALLM_OK;
}

static int take_u32(struct reader *r, uint32_t *out) { return take(r, out, sizeof *out); }
static int take_u64(struct reader *r, uint64_t *out) { return take(r, out, sizeof *out); }

/* A count of items of at least `least` bytes each. */
static int take_count(struct reader *r, const char *what, size_t least, size_t *out) {
    uint64_t n;
    int rc = take_u64(r, &n);
    if (rc != SMALLM_OK) return rc;
    if (n > left(r) / least || n > SIZE_MAX) {
        return fail_at(r, SMALLM_E_CORRUPT,
                       "claims %llu %s, but the %llu bytes left in the file hold at most %llu",
                       (unsigned long long)n, what, (unsigned long long)left(r),
                       (unsigned long long)(left(r) / least));
    }
    *out = (size_t)n;
    return SMALLM_OK;
}

static int take_string(struct reader *r, struct sm_str *out) {
    size_t n = 0;
    int rc = take_count(r, "bytes of text", 1, &n);
    if (rc != SMALLM_OK) return rc;
    char *s = arena_alloc(r->g, n);
    if (!s) return no_memory(r);
    *out = (struct sm_str){s, n};
    return take(r, s, n);
}

/* The name of a key or tensor: 1 .. limit bytes, no NUL. */
static int take_name(struct reader *r, size_t limit, struct sm_str *out) {
    struct sm_str s;
    r->name.n = 0;
    int rc = take_string(r, &s);
    if (rc != SMALLM_OK) return rc;
    if (s.n == 0 || s.n > limit) {
        return fail_at(r, SMALLM_E_CORRUPT, "its name has %zu bytes; allowed are 1 to %zu", s.n,
                       limit);
    }
    if (memchr(s.s, 0, s.n)) return fail_at(r, SMALLM_E_CORRUPT, "its name holds a NUL byte");
    *out = r->name = s;
    return SMALLM_OK;
}

/* ---- metadata ------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    size_t bytes; /* of one value; for strings and arrays the least */
} kinds[SM_GGUF_KIND_COUNT] = {
    [SM_GGUF_U8] = {"uint8", 1},     [SM_GGUF_I8] = {"int8", 1},
    [SM_GGUF_U16] = {"uint16", 2},   [SM_GGUF_I16] = {"int16", 2},
    [SM_GGUF_U32] = {"uint32", 4},   [SM_GGUF_I32] = {"int32", 4},
    [SM_GGUF_F32] = {"float32", 4},  [SM_GGUF_BOOL] = {"bool", 1},
    [SM_GGUF_STRING] = {"string", 8}, [SM_GGUF_ARRAY] = {"array", 12},
    [SM_GGUF_U64] = {"uint64", 8},   [SM_GGUF_I64] = {"int64", 8},
    [SM_GGUF_F64] = {"float64", 8},
};

const char *sm_gguf_kind_name(enum sm_gguf_kind kind) { return kinds[kind].name; }

static int take_kind(struct reader *r, enum sm_gguf_kind *out) {
    uint32_t kind;
    int rc = take_u32(r, &kind);
    if (rc != SMALLM_OK) return rc;
    if (kind >= SM_GGUF_KIND_COUNT) {
        return fail_at(r, SMALLM_E_CORRUPT, "its value is of kind %u; allowed are 0 to %d",
                       (unsigned)kind, SM_GGUF_KIND_COUNT - 1);
    }
    *out = (enum sm_gguf_kind)kind;
    return SMALLM_OK;
}

static int judge_bools(const struct reader *r, const uint8_t *values, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (values[i] > 1) {
            return fail_at(r, SMALLM_E_CORRUPT, "a bool is %d; allowed are 0 and 1", values[i]);
        }
    }
    return SMALLM_OK;
}

static int take_array(struct reader *r, int depth, struct sm_gguf_array *out) {
    int rc;
    if (depth > SM_GGUF_MAX_NESTING) {
        return fail_at(r, SMALLM_E_CORRUPT, "arrays are nested deeper than %d",
                       SM_GGUF_MAX_NESTING);
    }
    if ((rc = take_kind(r, &out->kind)) != SMALLM_OK) return rc;
    const size_t least = kinds[out->kind].bytes;
    if ((rc = take_count(r, "elements", least, &out->n)) != SMALLM_OK) return rc;
    size_t size = out->kind == SM_GGUF_STRING ? sizeof(struct sm_str)
                : out->kind == SM_GGUF_ARRAY  ? sizeof(struct sm_gguf_array) : least;
    size_t bytes;
    void *data = sm_mul(out->n, size, &bytes) ? arena_alloc(r->g, bytes) : NULL;
    if (!data) return no_memory(r);
    out->data = data;
    if (out->kind == SM_GGUF_STRING) {
        struct sm_str *strings = data;
        for (size_t i = 0; i < out->n; i++) {
            if ((rc = take_string(r, &strings[i])) != SMALLM_OK) return rc;
        }
    } else if (out->kind == SM_GGUF_ARRAY) {
        struct sm_gguf_array *arrays = data;
        for (size_t i = 0; i < out->n; i++) {
            if ((rc = take_array(r, depth + 1, &arrays[i])) != SMALLM_OK) return rc;
        }
    } else {
        rc = take(r, data, bytes);
        if (rc == SMALLM_OK && out->kind == SM_GGUF_BOOL) rc = judge_bools(r, data, out->n);
    }
    return rc;
}

static int take_entry(struct reader *r, struct entry *e) {
    int rc = take_name(r, MAX_KEY_BYTES, &e->key);
    if (rc != SMALLM_OK) return rc;
    if ((rc = take_kind(r, &e->kind)) != SMALLM_OK) return rc;
    if (e->kind == SM_GGUF_STRING) return take_string(r, &e->string);
    if (e->kind == SM_GGUF_ARRAY) return take_array(r, 1, &e->array);
    uint8_t bytes[8] = {0};
    rc = take(r, bytes, kinds[e->kind].bytes);
    memcpy(&e->bits, bytes, sizeof bytes);
    if (rc == SMALLM_OK && e->kind == SM_GGUF_BOOL) rc = judge_bools(r, bytes, 1);
    return rc;
}

/* On failure *t may hold entries, which the caller frees. */
static int take_table(struct reader *r, size_t n, struct table *t) {
    int rc;
    r->noun = "key";
    for (r->index = 0; r->index < n; r->index++) {
        r->name.n = 0;
        if (!sm_grow(&t->entries, &t->cap, t->n + 1, sizeof *t->entries)) return no_memory(r);
        if ((rc = take_entry(r, &t->entries[t->n])) != SMALLM_OK) return rc;
        t->n++;
    }
    r->noun = NULL;
    t->sorted = sm_calloc(t->n, sizeof *t->sorted);
    if (!t->sorted) return no_memory(r);
    sort(t->sorted, t->n, compare_keys, t->entries);
    for (size_t i = 1; i < t->n; i++) {
        if (compare_keys(t->entries, t->sorted[i - 1], t->sorted[i]) == 0) {
            r->noun = "key";
            r->name = t->entries[t->sorted[i]].key;
            return fail_at(r, SMALLM_E_CORRUPT, "occurs twice");
        }
    }
    return SMALLM_OK;
}

static void free_table(struct table *t) {
    sm_free(t->entries);
    sm_free(t->sorted);
}

static bool is_integer(enum sm_gguf_kind kind) {
    return kind != SM_GGUF_F32 && kind != SM_GGUF_F64 && kind != SM_GGUF_BOOL &&
           kind != SM_GGUF_STRING && kind != SM_GGUF_ARRAY;
}

static int64_t integer(enum sm_gguf_kind kind, uint64_t bits) {
    switch (kind) {
    case SM_GGUF_I8: return (int8_t)bits;
    case SM_GGUF_I16: return (int16_t)bits;
    case SM_GGUF_I32: return (int32_t)bits;
    default: return (int64_t)bits;
    }
}

static double number(enum sm_gguf_kind kind, uint64_t bits) {
    double d;
    float f;
    uint32_t low = (uint32_t)bits;
    switch (kind) {
    case SM_GGUF_F64: memcpy(&d, &bits, sizeof d); return d;
    case SM_GGUF_F32: memcpy(&f, &low, sizeof f); return (double)f;
    case SM_GGUF_U64: return (double)bits;
    default: return (double)integer(kind, bits);
    }
}

static int fail_kind(const char *path, const struct entry *e, const char *wanted,
                     smallm_error *err) {
    char name[100];
    sm_printable(name, sizeof name, e->key.s, e->key.n);
    return sm_fail(err, SMALLM_E_CORRUPT, "%s: key \"%s\" is of kind %s; allowed is %s", path, name,
                   kinds[e->kind].name, wanted);
}

static int get_int(const struct table *t, const char *path, const char *key, int64_t *out,
                   bool *found, smallm_error *err) {
    size_t i = find_key(t, key);
    *found = i != SIZE_MAX;
    if (!*found) return SMALLM_OK;
    const struct entry *e = &t->entries[i];
    if (!is_integer(e->kind)) return fail_kind(path, e, "an integer", err);
    if (e->kind == SM_GGUF_U64 && e->bits > INT64_MAX) {
        return sm_fail(err, SMALLM_E_CORRUPT, "%s: key \"%s\" is %llu; allowed is at most %lld",
                       path, key, (unsigned long long)e->bits, (long long)INT64_MAX);
    }
    *out = integer(e->kind, e->bits);
    return SMALLM_OK;
}

/* ---- tensors -------------------------------------------------------------------------------- */

/* Checks the shape and sets n_bytes; `offset` is still the file's, relative to the data. */
static int judge_shape(const struct reader *r, struct sm_tensor_info *t) {
    uint64_t n = 1;
    for (int d = 0; d < t->n_dims; d++) {
        uint64_t dim = t->dims[d];
        if (dim == 0) return fail_at(r, SMALLM_E_CORRUPT, "dimension %d is 0", d);
        if (dim > (uint64_t)INT64_MAX / n) {
            return fail_at(r, SMALLM_E_CORRUPT, "dimension %d is %llu: more than 2^63 values", d,
                           (unsigned long long)dim);
        }
        n *= dim;
    }
    enum sm_type type = sm_quant_from_gguf(t->gguf_type);
    if (type == SM_TYPE_COUNT) return SMALLM_OK; /* whoever binds the tensor refuses it */
    const struct sm_quant *q = &sm_quants[type];
    if (t->dims[0] % q->block_size != 0) {
        return fail_at(r, SMALLM_E_CORRUPT, "rows have %llu values; %s allows multiples of %u",
                       (unsigned long long)t->dims[0], q->name, (unsigned)q->block_size);
    }
    n /= q->block_size;
    if (n > r->size / q->block_bytes) {
        return fail_at(r, SMALLM_E_CORRUPT,
                       "has %llu blocks of %u bytes (%s), but the file only %llu bytes: is it "
                       "cut short?",
                       (unsigned long long)n, (unsigned)q->block_bytes, q->name,
                       (unsigned long long)r->size);
    }
    t->n_bytes = n * q->block_bytes;
    return SMALLM_OK;
}

static int take_tensor(struct reader *r, int part, struct sm_tensor_info *t) {
    *t = (struct sm_tensor_info){.dims = {1, 1, 1, 1}, .part = part};
    int rc = take_name(r, MAX_NAME_BYTES, &t->name);
    if (rc != SMALLM_OK) return rc;
    uint32_t n_dims;
    if ((rc = take_u32(r, &n_dims)) != SMALLM_OK) return rc;
    if (n_dims < 1 || n_dims > SM_GGUF_MAX_DIMS) {
        return fail_at(r, SMALLM_E_CORRUPT, "has %u dimensions; allowed are 1 to %d",
                       (unsigned)n_dims, SM_GGUF_MAX_DIMS);
    }
    t->n_dims = (int)n_dims;
    if ((rc = take(r, t->dims, n_dims * sizeof t->dims[0])) != SMALLM_OK) return rc;
    if ((rc = take_u32(r, &t->gguf_type)) != SMALLM_OK) return rc;
    if ((rc = take_u64(r, &t->offset)) != SMALLM_OK) return rc;
    return judge_shape(r, t);
}

/* Makes offsets absolute, now that the header's end is known. */
static int place_tensors(struct reader *r, struct sm_tensor_info *tensors, size_t n,
                         uint64_t alignment) {
    uint64_t start = (r->at + alignment - 1) / alignment * alignment;
    r->noun = "tensor";
    for (size_t i = 0; i < n; i++) {
        struct sm_tensor_info *t = &tensors[i];
        r->name = t->name;
        if (t->offset % alignment != 0) {
            return fail_at(r, SMALLM_E_CORRUPT,
                           "its offset %llu is no multiple of the alignment %llu",
                           (unsigned long long)t->offset, (unsigned long long)alignment);
        }
        if (start > r->size || t->offset > r->size - start ||
            t->n_bytes > r->size - start - t->offset) {
            return fail_at(r, SMALLM_E_CORRUPT,
                           "its %llu bytes at offset %llu of the data, which begins at %llu, end "
                           "beyond the file's %llu bytes: is it cut short?",
                           (unsigned long long)t->n_bytes, (unsigned long long)t->offset,
                           (unsigned long long)start, (unsigned long long)r->size);
        }
        t->offset += start;
        r->g->data_bytes += t->n_bytes;
    }
    r->noun = NULL;
    return SMALLM_OK;
}

/* ---- one file ------------------------------------------------------------------------------- */

static int take_preamble(struct reader *r, size_t *n_tensors, size_t *n_keys) {
    uint8_t magic[4];
    uint32_t version;
    int rc;
    if (r->size == 0) return fail_at(r, SMALLM_E_CORRUPT, "the file is empty");
    if (r->size < sizeof magic) {
        return fail_at(r, SMALLM_E_CORRUPT, "not a GGUF file: it has only %d bytes", (int)r->size);
    }
    if ((rc = take(r, magic, sizeof magic)) != SMALLM_OK) return rc;
    bool big = memcmp(magic, "FUGG", 4) == 0;
    if (!big && memcmp(magic, "GGUF", 4) != 0) {
        char shown[8];
        return fail_at(r, SMALLM_E_CORRUPT, "not a GGUF file: it begins with \"%s\"",
                       sm_printable(shown, sizeof shown, (const char *)magic, sizeof magic));
    }
    if ((rc = take_u32(r, &version)) != SMALLM_OK) return rc;
    if (big || (version != 0 && (version & 0xFFFF) == 0)) {
        return fail_at(r, SMALLM_E_UNSUPPORTED,
                       "a big-endian GGUF file; allowed are little-endian ones");
    }
    if (version < 2 || version > 3) {
        return fail_at(r, SMALLM_E_UNSUPPORTED, "GGUF version %u; allowed are 2 and 3",
                       (unsigned)version);
    }
    if ((rc = take_count(r, "tensors", MIN_TENSOR_BYTES, n_tensors)) != SMALLM_OK) return rc;
    return take_count(r, "keys", MIN_KEY_BYTES, n_keys);
}

/* Reads part number `part`, already in g->parts, into *keys and g's tensors.  The caller frees
 * *keys in any case. */
static int read_part(struct sm_gguf *g, size_t part, struct table *keys, smallm_error *err) {
    struct reader r = {.g = g, .file = g->parts[part], .err = err};
    size_t n_tensors = 0, n_keys = 0;
    int rc;
    r.size = sm_file_size(r.file);
    r.window = sm_alloc((size_t)SM_MIN(r.size, (uint64_t)WINDOW_BYTES));
    if (!r.window) {
        rc = no_memory(&r);
        goto fail;
    }
    if ((rc = take_preamble(&r, &n_tensors, &n_keys)) != SMALLM_OK) goto fail;
    if ((rc = take_table(&r, n_keys, keys)) != SMALLM_OK) goto fail;

    int64_t alignment = DEFAULT_ALIGNMENT;
    bool found;
    rc = get_int(keys, sm_file_path(r.file), "general.alignment", &alignment, &found, err);
    if (rc != SMALLM_OK) goto fail;
    if (alignment < MIN_ALIGNMENT || alignment > MAX_ALIGNMENT || (alignment & (alignment - 1))) {
        rc = fail_at(&r, SMALLM_E_CORRUPT,
                     "key \"general.alignment\" is %lld; allowed are powers of two from %d to %d",
                     (long long)alignment, MIN_ALIGNMENT, MAX_ALIGNMENT);
        goto fail;
    }

    size_t first = g->n_tensors;
    r.noun = "tensor";
    for (r.index = 0; r.index < n_tensors; r.index++) {
        r.name.n = 0;
        if (!sm_grow(&g->tensors, &g->tensors_cap, g->n_tensors + 1, sizeof *g->tensors)) {
            rc = no_memory(&r);
            goto fail;
        }
        rc = take_tensor(&r, (int)part, &g->tensors[g->n_tensors]);
        if (rc != SMALLM_OK) goto fail;
        g->n_tensors++;
    }
    r.noun = NULL;
    if (n_tensors > 0) {
        rc = place_tensors(&r, g->tensors + first, n_tensors, (uint64_t)alignment);
    }
fail:
    sm_free(r.window);
    return rc;
}

/* ---- split models --------------------------------------------------------------------------- */

/* What a file says of its place among n_parts files; a file that is not split is part 0 of 1. */
struct split {
    int64_t no, n_parts, n_tensors; /* n_tensors -1: not said */
};

static int read_split(const struct table *keys, const char *path, struct split *s,
                      smallm_error *err) {
    bool found;
    int rc;
    *s = (struct split){0, 1, -1};
    if ((rc = get_int(keys, path, "split.count", &s->n_parts, &found, err)) != SMALLM_OK) return rc;
    if (!found || s->n_parts == 0) { /* 0: written by tools that mean "not split" */
        s->n_parts = 1;
        return SMALLM_OK;
    }
    if (s->n_parts < 1 || s->n_parts > MAX_PARTS) {
        return sm_fail(err, SMALLM_E_CORRUPT,
                       "%s: key \"split.count\" is %lld; allowed are 1 to %d", path,
                       (long long)s->n_parts, MAX_PARTS);
    }
    if ((rc = get_int(keys, path, "split.no", &s->no, &found, err)) != SMALLM_OK) return rc;
    if (s->no < 0 || s->no >= s->n_parts) {
        return sm_fail(err, SMALLM_E_CORRUPT,
                       "%s: key \"split.no\" is %lld; allowed are 0 to %lld (split.count is %lld)",
                       path, (long long)s->no, (long long)s->n_parts - 1, (long long)s->n_parts);
    }
    return get_int(keys, path, "split.tensors.count", &s->n_tensors, &found, err);
}

static int add_part(struct sm_gguf *g, struct sm_file *file, smallm_error *err) {
    if (!sm_grow(&g->parts, &g->parts_cap, g->n_parts + 1, sizeof *g->parts)) {
        int rc = sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", sm_file_path(file));
        sm_file_close(file);
        return rc;
    }
    g->parts[g->n_parts++] = file;
    return SMALLM_OK;
}

/* Opens and reads parts 1 .. n_parts - 1, which lie beside the first under the same name with their
 * own number. */
static int read_siblings(struct sm_gguf *g, const struct split *first, smallm_error *err) {
    const char *path = sm_gguf_path(g);
    char suffix[32];
    size_t n_path = strlen(path);
    int n_suffix = snprintf(suffix, sizeof suffix, "-%05d-of-%05d.gguf", 1, (int)first->n_parts);
    if (first->no != 0) {
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "%s: part %lld of a model in %lld files: open its first part instead", path,
                       (long long)first->no + 1, (long long)first->n_parts);
    }
    if (n_path < (size_t)n_suffix || strcmp(path + n_path - n_suffix, suffix) != 0) {
        return sm_fail(err, SMALLM_E_NOT_FOUND,
                       "%s: the first of %lld files: its name has to end in \"%s\" for the others "
                       "to be found beside it",
                       path, (long long)first->n_parts, suffix);
    }
    char *sibling = sm_alloc(n_path + 1);
    if (!sibling) return sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
    memcpy(sibling, path, n_path + 1);
    int rc = SMALLM_OK;
    for (int i = 1; i < first->n_parts && rc == SMALLM_OK; i++) {
        struct table keys = {0};
        struct sm_file *file;
        struct split s;
        snprintf(sibling + n_path - n_suffix, (size_t)n_suffix + 1, "-%05d-of-%05d.gguf", i + 1,
                 (int)first->n_parts);
        if ((rc = sm_file_open(sibling, &file, err)) != SMALLM_OK) break;
        if ((rc = add_part(g, file, err)) != SMALLM_OK) break;
        rc = read_part(g, (size_t)i, &keys, err);
        if (rc == SMALLM_OK) rc = read_split(&keys, sibling, &s, err);
        if (rc == SMALLM_OK && (s.n_parts != first->n_parts || s.no != i)) {
            rc = sm_fail(err, SMALLM_E_CORRUPT,
                         "%s: says it is part %lld of %lld, but its name and the first part say "
                         "%d of %lld",
                         sibling, (long long)s.no + 1, (long long)s.n_parts, i + 1,
                         (long long)first->n_parts);
        }
        free_table(&keys);
    }
    sm_free(sibling);
    return rc;
}

/* ---- the whole ------------------------------------------------------------------------------ */

/* No name twice, no byte in two tensors. */
static int judge_tensors(struct sm_gguf *g, smallm_error *err) {
    const char *path = sm_gguf_path(g);
    const struct sm_tensor_info *t = g->tensors;
    char name[100], other[100];
    g->sorted = sm_calloc(g->n_tensors, sizeof *g->sorted);
    if (!g->sorted) return sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
    sort(g->sorted, g->n_tensors, compare_offsets, t);
    const struct sm_tensor_info *last = NULL; /* of those whose size is known */
    for (size_t i = 0; i < g->n_tensors; i++) {
        const struct sm_tensor_info *b = &t[g->sorted[i]];
        if (last && last->part == b->part && b->offset < last->offset + last->n_bytes) {
            return sm_fail(err, SMALLM_E_CORRUPT,
                           "%s: tensor \"%s\" begins at byte %llu, inside tensor \"%s\", which "
                           "ends at %llu",
                           sm_file_path(g->parts[b->part]),
                           sm_printable(name, sizeof name, b->name.s, b->name.n),
                           (unsigned long long)b->offset,
                           sm_printable(other, sizeof other, last->name.s, last->name.n),
                           (unsigned long long)(last->offset + last->n_bytes));
        }
        if (b->n_bytes > 0) last = b;
    }
    sort(g->sorted, g->n_tensors, compare_names, t);
    for (size_t i = 1; i < g->n_tensors; i++) {
        if (compare_names(t, g->sorted[i - 1], g->sorted[i]) == 0) {
            const struct sm_tensor_info *b = &t[SM_MAX(g->sorted[i - 1], g->sorted[i])];
            return sm_fail(err, SMALLM_E_CORRUPT, "%s: tensor \"%s\" occurs twice",
                           sm_file_path(g->parts[b->part]),
                           sm_printable(name, sizeof name, b->name.s, b->name.n));
        }
    }
    return SMALLM_OK;
}

/* Takes over `file`. */
static int open_file(struct sm_file *file, struct sm_gguf **out, smallm_error *err) {
    int rc;
    struct split split;
    *out = NULL;
    struct sm_gguf *g = sm_calloc(1, sizeof *g);
    if (!g) {
        rc = sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", sm_file_path(file));
        sm_file_close(file);
        return rc;
    }
    if ((rc = add_part(g, file, err)) != SMALLM_OK) goto fail;
    if ((rc = read_part(g, 0, &g->keys, err)) != SMALLM_OK) goto fail;
    const char *path = sm_gguf_path(g);
    if ((rc = read_split(&g->keys, path, &split, err)) != SMALLM_OK) goto fail;
    if (split.n_parts > 1 && (rc = read_siblings(g, &split, err)) != SMALLM_OK) goto fail;
    if (split.n_tensors >= 0 && (uint64_t)split.n_tensors != g->n_tensors) {
        rc = sm_fail(err, SMALLM_E_CORRUPT,
                     "%s: key \"split.tensors.count\" is %lld, but the %zu files hold %zu tensors",
                     path, (long long)split.n_tensors, g->n_parts, g->n_tensors);
        goto fail;
    }
    if ((rc = judge_tensors(g, err)) != SMALLM_OK) goto fail;
    *out = g;
    return SMALLM_OK;
fail:
    sm_gguf_close(g);
    return rc;
}

int sm_gguf_open(const char *path, struct sm_gguf **out, smallm_error *err) {
    struct sm_file *file;
    *out = NULL;
    int rc = sm_file_open(path, &file, err);
    return rc == SMALLM_OK ? open_file(file, out, err) : rc;
}

#ifdef SMALLM_TEST_ALLOC
int sm_gguf_open_memory(const void *bytes, size_t n, struct sm_gguf **out, smallm_error *err) {
    struct sm_file *file;
    *out = NULL;
    int rc = sm_file_from_memory("memory", bytes, n, &file, err);
    return rc == SMALLM_OK ? open_file(file, out, err) : rc;
}
#endif

void sm_gguf_close(struct sm_gguf *g) {
    if (!g) return;
    for (size_t i = 0; i < g->n_parts; i++) sm_file_close(g->parts[i]);
    for (struct chunk *c = g->chunks, *next; c; c = next) {
        next = c->next;
        sm_free(c);
    }
    free_table(&g->keys);
    sm_free(g->parts);
    sm_free(g->tensors);
    sm_free(g->sorted);
    sm_free(g);
}

const char *sm_gguf_path(const struct sm_gguf *g) { return sm_file_path(g->parts[0]); }

/* ---- asking: metadata ----------------------------------------------------------------------- */

size_t sm_gguf_n_keys(const struct sm_gguf *g) { return g->keys.n; }
struct sm_str sm_gguf_key(const struct sm_gguf *g, size_t i) { return g->keys.entries[i].key; }
enum sm_gguf_kind sm_gguf_kind(const struct sm_gguf *g, size_t i) {
    return g->keys.entries[i].kind;
}
size_t sm_gguf_find(const struct sm_gguf *g, const char *key) { return find_key(&g->keys, key); }

static const struct entry *lookup(const struct sm_gguf *g, const char *key, bool *found) {
    size_t i = find_key(&g->keys, key);
    *found = i != SIZE_MAX;
    return *found ? &g->keys.entries[i] : NULL;
}

int sm_gguf_get_int(const struct sm_gguf *g, const char *key, int64_t *out, bool *found,
                    smallm_error *err) {
    return get_int(&g->keys, sm_gguf_path(g), key, out, found, err);
}

int sm_gguf_get_float(const struct sm_gguf *g, const char *key, double *out, bool *found,
                      smallm_error *err) {
    const struct entry *e = lookup(g, key, found);
    if (!e) return SMALLM_OK;
    if (!is_integer(e->kind) && e->kind != SM_GGUF_F32 && e->kind != SM_GGUF_F64) {
        return fail_kind(sm_gguf_path(g), e, "a number", err);
    }
    *out = number(e->kind, e->bits);
    return SMALLM_OK;
}

int sm_gguf_get_bool(const struct sm_gguf *g, const char *key, bool *out, bool *found,
                     smallm_error *err) {
    const struct entry *e = lookup(g, key, found);
    if (!e) return SMALLM_OK;
    if (e->kind != SM_GGUF_BOOL) return fail_kind(sm_gguf_path(g), e, "bool", err);
    *out = e->bits != 0;
    return SMALLM_OK;
}

int sm_gguf_get_string(const struct sm_gguf *g, const char *key, struct sm_str *out, bool *found,
                       smallm_error *err) {
    const struct entry *e = lookup(g, key, found);
    if (!e) return SMALLM_OK;
    if (e->kind != SM_GGUF_STRING) return fail_kind(sm_gguf_path(g), e, "string", err);
    *out = e->string;
    return SMALLM_OK;
}

int sm_gguf_get_array(const struct sm_gguf *g, const char *key, struct sm_gguf_array *out,
                      smallm_error *err) {
    bool found;
    const struct entry *e = lookup(g, key, &found);
    *out = (struct sm_gguf_array){0};
    if (!e) return SMALLM_OK;
    if (e->kind != SM_GGUF_ARRAY) return fail_kind(sm_gguf_path(g), e, "array", err);
    *out = e->array;
    return SMALLM_OK;
}

/* Element i's bytes, zero-extended. */
static uint64_t element(const struct sm_gguf_array *a, size_t i) {
    uint64_t bits = 0;
    size_t n = kinds[a->kind].bytes;
    memcpy(&bits, (const char *)a->data + i * n, n);
    return bits;
}
int64_t sm_gguf_array_int(const struct sm_gguf_array *a, size_t i) {
    return integer(a->kind, element(a, i));
}
double sm_gguf_array_float(const struct sm_gguf_array *a, size_t i) {
    return number(a->kind, element(a, i));
}
struct sm_str sm_gguf_array_string(const struct sm_gguf_array *a, size_t i) {
    return ((const struct sm_str *)a->data)[i];
}

/* The shortest decimal that reads back as the same number; a point whatever the locale. */
static void format_float(enum sm_gguf_kind kind, double x, char text[40]) {
    int digits = 1; /* no exponent for what has up to 9 digits before the point */
    for (double least = 10; digits < 9 && (x < 0 ? -x : x) >= least; least *= 10) digits++;
    for (; digits <= 17; digits++) {
        snprintf(text, 40, "%.*g", digits, x);
        double back = strtod(text, NULL);
        if (back == x || (kind == SM_GGUF_F32 && (float)back == (float)x)) break;
    }
    char *comma = strchr(text, ',');
    if (comma) *comma = '.';
}

long sm_gguf_format(const struct sm_gguf *g, size_t i, char *buf, size_t cap) {
    const struct entry *e = &g->keys.entries[i];
    char text[40];
    struct sm_str s = {text, 0};
    if (e->kind == SM_GGUF_ARRAY) return -1;
    if (e->kind == SM_GGUF_STRING) {
        s = e->string;
    } else {
        if (e->kind == SM_GGUF_BOOL) {
            snprintf(text, sizeof text, "%s", e->bits ? "true" : "false");
        } else if (e->kind == SM_GGUF_U64) {
            snprintf(text, sizeof text, "%llu", (unsigned long long)e->bits);
        } else if (is_integer(e->kind)) {
            snprintf(text, sizeof text, "%lld", (long long)integer(e->kind, e->bits));
        } else {
            format_float(e->kind, number(e->kind, e->bits), text);
        }
        s.n = strlen(text);
    }
    if (cap > 0) {
        size_t n = SM_MIN(s.n, cap - 1);
        memcpy(buf, s.s, n);
        buf[n] = 0;
    }
    return s.n > LONG_MAX ? LONG_MAX : (long)s.n;
}

/* ---- asking: tensors ------------------------------------------------------------------------ */

size_t sm_gguf_n_tensors(const struct sm_gguf *g) { return g->n_tensors; }
const struct sm_tensor_info *sm_gguf_tensor(const struct sm_gguf *g, size_t i) {
    return &g->tensors[i];
}

const struct sm_tensor_info *sm_gguf_find_tensor(const struct sm_gguf *g, const char *name) {
    struct sm_str want = {name, strlen(name)};
    size_t low = 0, high = g->n_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct sm_tensor_info *t = &g->tensors[g->sorted[middle]];
        int order = compare_strings(want, t->name);
        if (order == 0) return t;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

int sm_gguf_read(const struct sm_gguf *g, const struct sm_tensor_info *t, uint64_t offset,
                 void *dst, size_t n, smallm_error *err) {
    const struct sm_file *file = g->parts[t->part];
    if (offset > t->n_bytes || n > t->n_bytes - offset) {
        char name[100];
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "%s: tensor \"%s\": %zu bytes wanted at %llu of %llu", sm_file_path(file),
                       sm_printable(name, sizeof name, t->name.s, t->name.n), n,
                       (unsigned long long)offset, (unsigned long long)t->n_bytes);
    }
    return sm_file_read(file, t->offset + offset, dst, n, err);
}

uint64_t sm_gguf_data_bytes(const struct sm_gguf *g) { return g->data_bytes; }
