/* Any bytes as a GGUF file: opened, walked from end to end and asked for everything it has.
 *
 *   cmake -S . -B build-fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DSMALLM_FUZZ=ON
 *         -DSMALLM_SANITIZE=address,undefined,fuzzer-no-link
 *   python tests/gguf_cases.py seeds
 *   build-fuzz/fuzz_gguf -runs=1000000 corpus seeds
 *
 * A file that opens is opened once more with one of its allocations failing. */
#include <stdlib.h>

#include "check.h"
#include "gguf.h"

static uint64_t sum; /* keeps the compiler from dropping the reads */

static void walk_string(struct sm_str s) {
    for (size_t i = 0; i < s.n; i++) sum += (unsigned char)s.s[i];
}

static void walk_array(const struct sm_gguf_array *a, int depth) {
    CHECK(depth <= SM_GGUF_MAX_NESTING);
    for (size_t i = 0; i < a->n; i++) {
        if (a->kind == SM_GGUF_STRING) {
            walk_string(sm_gguf_array_string(a, i));
        } else if (a->kind == SM_GGUF_ARRAY) {
            walk_array((const struct sm_gguf_array *)a->data + i, depth + 1);
        } else if (a->kind == SM_GGUF_F32 || a->kind == SM_GGUF_F64) {
            double d = sm_gguf_array_float(a, i);
            sum += d > 0;
        } else {
            sum += (uint64_t)sm_gguf_array_int(a, i);
        }
    }
}

/* A copy that ends in NUL, to be freed. */
static char *terminated(struct sm_str s) {
    char *copy = malloc(s.n + 1);
    CHECK(copy);
    memcpy(copy, s.s, s.n);
    copy[s.n] = 0;
    return copy;
}

static void walk_key(const struct sm_gguf *g, size_t i) {
    smallm_error err = {.size = sizeof err};
    char *key = terminated(sm_gguf_key(g, i));
    enum sm_gguf_kind kind = sm_gguf_kind(g, i);
    char text[64];
    int64_t n;
    double d;
    bool b, found;
    struct sm_str s;
    struct sm_gguf_array a;
    CHECK(sm_gguf_find(g, key) == i);
    bool whole = sm_gguf_get_int(g, key, &n, &found, &err) == SMALLM_OK;
    CHECK(found && (!whole || (kind != SM_GGUF_STRING && kind != SM_GGUF_F32)));
    bool real = sm_gguf_get_float(g, key, &d, &found, &err) == SMALLM_OK;
    CHECK(found && (real || !whole));
    CHECK((sm_gguf_get_bool(g, key, &b, &found, &err) == SMALLM_OK) == (kind == SM_GGUF_BOOL));
    if (sm_gguf_get_string(g, key, &s, &found, &err) == SMALLM_OK) walk_string(s);
    if (sm_gguf_get_array(g, key, &a, &err) == SMALLM_OK) walk_array(&a, 1);
    CHECK((sm_gguf_format(g, i, text, sizeof text) < 0) == (kind == SM_GGUF_ARRAY));
    free(key);
}

static void walk_tensor(const struct sm_gguf *g, const struct sm_tensor_info *t, size_t size) {
    smallm_error err = {.size = sizeof err};
    char *name = terminated(t->name);
    CHECK(sm_gguf_find_tensor(g, name) == t);
    CHECK(t->n_dims >= 1 && t->n_dims <= SM_GGUF_MAX_DIMS && t->n_bytes <= size);
    size_t n = (size_t)t->n_bytes;
    uint8_t *data = malloc(n + 1);
    CHECK(data);
    CHECK(sm_gguf_read(g, t, 0, data, n, &err) == SMALLM_OK);
    for (size_t i = 0; i < n; i++) sum += data[i];
    CHECK(sm_gguf_read(g, t, 0, data, n + 1, &err) == SMALLM_E_ARGUMENT);
    CHECK(sm_gguf_read(g, t, UINT64_MAX, data, 1, &err) == SMALLM_E_ARGUMENT);
    free(data);
    free(name);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    smallm_error err = {.size = sizeof err};
    struct sm_gguf *g;
    sum = 0; /* which allocation fails below depends on this input alone */
    sm_test_fail_alloc(0);
    int rc = sm_gguf_open_memory(data, size, &g, &err);
    if (rc != SMALLM_OK) {
        CHECK(!g && err.code == rc && err.message[0]);
        return 0;
    }
    long n_allocs = sm_test_alloc_count();
    for (size_t i = 0; i < sm_gguf_n_keys(g); i++) walk_key(g, i);
    for (size_t i = 0; i < sm_gguf_n_tensors(g); i++) walk_tensor(g, sm_gguf_tensor(g, i), size);
    CHECK(sm_gguf_find(g, "") == SIZE_MAX && !sm_gguf_find_tensor(g, ""));
    sm_gguf_close(g);

    sm_test_fail_alloc(1 + (long)(sum % (uint64_t)n_allocs));
    CHECK(sm_gguf_open_memory(data, size, &g, &err) == SMALLM_E_MEMORY && !g);
    sm_test_fail_alloc(0);
    return 0;
}
