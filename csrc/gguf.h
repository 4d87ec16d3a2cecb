/* GGUF files, versions 2 and 3, whole or split (-00001-of-0000N).
 *
 * The reader trusts no byte: every count, length, offset and product is checked against the file's
 * size before it is used, and memory asked for stays in proportion to the file.  Nothing above this
 * file sees raw metadata bytes.  Immutable once open; any thread may read. */
#ifndef SM_GGUF_H
#define SM_GGUF_H

#include "base.h"

enum sm_gguf_kind { /* the file's own ids */
    SM_GGUF_U8, SM_GGUF_I8, SM_GGUF_U16, SM_GGUF_I16, SM_GGUF_U32, SM_GGUF_I32, SM_GGUF_F32,
    SM_GGUF_BOOL, SM_GGUF_STRING, SM_GGUF_ARRAY, SM_GGUF_U64, SM_GGUF_I64, SM_GGUF_F64,
    SM_GGUF_KIND_COUNT
};

#define SM_GGUF_MAX_DIMS 4
#define SM_GGUF_MAX_NESTING 4

struct sm_str { /* a view into the reader's memory: not NUL-terminated, may hold any byte */
    const char *s;
    size_t n;
};
static inline bool sm_str_is(struct sm_str s, const char *text) {
    return s.n == strlen(text) && memcmp(s.s, text, s.n) == 0;
}

struct sm_gguf;

struct sm_tensor_info {
    struct sm_str name;
    int n_dims;
    uint64_t dims[SM_GGUF_MAX_DIMS]; /* dims[0] runs fastest; unused ones are 1 */
    uint32_t gguf_type;
    int part;            /* index of the file of a split model */
    uint64_t offset;     /* absolute in that file */
    uint64_t n_bytes;    /* checked to lie inside the file; 0 where the type is unknown to us */
};

/* `path` may be the first part of a split model: its siblings are opened too.
 * SMALLM_E_NOT_FOUND, _IO, _CORRUPT (what, where, value, limit), _UNSUPPORTED (version 1, big
 * endian), _MEMORY. */
int sm_gguf_open(const char *path, struct sm_gguf **out, smallm_error *err);
#ifdef SMALLM_TEST_ALLOC
/* Test builds only: the file is bytes[n], which the caller keeps alive. */
int sm_gguf_open_memory(const void *bytes, size_t n, struct sm_gguf **out, smallm_error *err);
#endif
void sm_gguf_close(struct sm_gguf *g); /* NULL allowed */

const char *sm_gguf_path(const struct sm_gguf *g);

/* ---- metadata.  A missing key is not an error: the getters return false (or 0 elements). ---- */
size_t sm_gguf_n_keys(const struct sm_gguf *g);
struct sm_str sm_gguf_key(const struct sm_gguf *g, size_t i);
enum sm_gguf_kind sm_gguf_kind(const struct sm_gguf *g, size_t i);
size_t sm_gguf_find(const struct sm_gguf *g, const char *key); /* index or SIZE_MAX */
const char *sm_gguf_kind_name(enum sm_gguf_kind kind);

/* Scalars.  Any integer kind answers get_int, any number get_float; where the kind does not fit
 * (a string asked for as a number; a value beyond int64) the result is SMALLM_E_CORRUPT and names key and kind.
 * SMALLM_OK and *found = false where the key is missing; *out is then untouched. */
int sm_gguf_get_int(const struct sm_gguf *g, const char *key, int64_t *out, bool *found, smallm_error *err);
int sm_gguf_get_float(const struct sm_gguf *g, const char *key, double *out, bool *found, smallm_error *err);
int sm_gguf_get_bool(const struct sm_gguf *g, const char *key, bool *out, bool *found, smallm_error *err);
int sm_gguf_get_string(const struct sm_gguf *g, const char *key, struct sm_str *out, bool *found, smallm_error *err);

/* Arrays.  The element kind must be the one asked for: numbers convert within their class
 * (integers to int64, floats to double), strings stay views.  *n = 0 and SMALLM_OK where missing. */
struct sm_gguf_array {
    enum sm_gguf_kind kind; /* of the elements */
    size_t n;
    const void *data; /* numbers: packed, unaligned, little-endian; strings: struct sm_str[n];
                         arrays: struct sm_gguf_array[n] */
};
int sm_gguf_get_array(const struct sm_gguf *g, const char *key, struct sm_gguf_array *out, smallm_error *err);
int64_t sm_gguf_array_int(const struct sm_gguf_array *a, size_t i);    /* kind is an integer or bool */
double sm_gguf_array_float(const struct sm_gguf_array *a, size_t i);   /* kind is F32 or F64 */
struct sm_str sm_gguf_array_string(const struct sm_gguf_array *a, size_t i);

/* Scalars and strings as text for people ("32", "true", "1e-05"); n < 0 for arrays.  buf[cap] gets
 * at most cap - 1 bytes and a NUL; the return value is the full length. */
long sm_gguf_format(const struct sm_gguf *g, size_t i, char *buf, size_t cap);

/* ---- tensors ------------------------------------------------------------------------------- */
size_t sm_gguf_n_tensors(const struct sm_gguf *g);
const struct sm_tensor_info *sm_gguf_tensor(const struct sm_gguf *g, size_t i);
const struct sm_tensor_info *sm_gguf_find_tensor(const struct sm_gguf *g, const char *name); /* or NULL */
/* Reads n bytes of the tensor's data from `offset` on (offset + n <= n_bytes: checked). */
int sm_gguf_read(const struct sm_gguf *g, const struct sm_tensor_info *t, uint64_t offset, void *dst,
                 size_t n, smallm_error *err);
uint64_t sm_gguf_data_bytes(const struct sm_gguf *g); /* sum over tensors */

#endif
