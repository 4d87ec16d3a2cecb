/* Everything a GGUF file says, for tests/test_gguf.py.
 *
 *   gguf_dump FILE    one line per key ("key NAME KIND VALUE...") and per tensor ("tensor NAME TYPE
 *                     PART OFFSET BYTES HASH DIM..."); text in hexadecimal, floats as their bits
 *   gguf_dump         checks what no file can show: a file that changes while it is open */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "gguf.h"
#include "os.h"

static void print_text(struct sm_str s) {
    putchar(' ');
    putchar('"');
    for (size_t i = 0; i < s.n; i++) printf("%02x", (unsigned char)s.s[i]);
    putchar('"');
}

static void print_float(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    printf(" 0x%016" PRIx64, bits);
}

static void print_array(const struct sm_gguf_array *a) {
    printf(" [ %s", sm_gguf_kind_name(a->kind));
    for (size_t i = 0; i < a->n; i++) {
        if (a->kind == SM_GGUF_STRING) print_text(sm_gguf_array_string(a, i));
        else if (a->kind == SM_GGUF_ARRAY) print_array((const struct sm_gguf_array *)a->data + i);
        else if (a->kind == SM_GGUF_F32 || a->kind == SM_GGUF_F64) {
            print_float(sm_gguf_array_float(a, i));
        } else {
            printf(" %" PRId64, sm_gguf_array_int(a, i));
        }
    }
    printf(" ]");
}

static void print_key(const struct sm_gguf *g, size_t i) {
    struct sm_str name = sm_gguf_key(g, i), s;
    char *key = calloc(name.n + 1, 1);
    smallm_error err = {.size = sizeof err};
    enum sm_gguf_kind kind = sm_gguf_kind(g, i);
    struct sm_gguf_array a;
    int64_t n;
    double d;
    bool b, found;
    if (!key) exit(3);
    memcpy(key, name.s, name.n);
    printf("key");
    print_text(name);
    printf(" %s", sm_gguf_kind_name(kind));
    if (kind == SM_GGUF_ARRAY) {
        if (sm_gguf_get_array(g, key, &a, &err) == SMALLM_OK) print_array(&a);
    } else if (kind == SM_GGUF_STRING) {
        if (sm_gguf_get_string(g, key, &s, &found, &err) == SMALLM_OK) print_text(s);
    } else if (kind == SM_GGUF_BOOL) {
        if (sm_gguf_get_bool(g, key, &b, &found, &err) == SMALLM_OK) printf(" %d", b);
    } else if (kind == SM_GGUF_F32 || kind == SM_GGUF_F64) {
        if (sm_gguf_get_float(g, key, &d, &found, &err) == SMALLM_OK) print_float(d);
    } else if (sm_gguf_get_int(g, key, &n, &found, &err) == SMALLM_OK) {
        printf(" %" PRId64, n);
    }
    putchar('\n');
    free(key);
}

static void print_tensor(const struct sm_gguf *g, const struct sm_tensor_info *t) {
    smallm_error err = {.size = sizeof err};
    uint64_t hash = 14695981039346656037u; /* FNV-1a over the data */
    uint8_t *data = malloc((size_t)t->n_bytes + 1);
    if (!data || sm_gguf_read(g, t, 0, data, (size_t)t->n_bytes, &err) != SMALLM_OK) exit(3);
    for (uint64_t i = 0; i < t->n_bytes; i++) hash = (hash ^ data[i]) * 1099511628211u;
    printf("tensor");
    print_text(t->name);
    printf(" %" PRIu32 " %d %" PRIu64 " %" PRIu64 " %016" PRIx64, t->gguf_type, t->part, t->offset,
           t->n_bytes, hash);
    for (int d = 0; d < t->n_dims; d++) printf(" %" PRIu64, t->dims[d]);
    putchar('\n');
    free(data);
}

static int dump(const char *path) {
    smallm_error err = {.size = sizeof err};
    struct sm_gguf *g;
    int rc = sm_gguf_open(path, &g, &err);
    if (rc != SMALLM_OK) {
        printf("error %d %s\n", rc, err.message);
        return 0;
    }
    for (size_t i = 0; i < sm_gguf_n_keys(g); i++) print_key(g, i);
    for (size_t i = 0; i < sm_gguf_n_tensors(g); i++) print_tensor(g, sm_gguf_tensor(g, i));
    sm_gguf_close(g);
    return 0;
}

/* A file that shrinks after it was opened is an error code, not a signal. */
static int check_shrinking(void) {
    char path[] = "gguf_dump.tmp", byte = 1;
    smallm_error err = {.size = sizeof err};
    struct sm_file *file;
    FILE *f = fopen(path, "wb");
    if (!f || fwrite("0123456789", 1, 10, f) != 10 || fclose(f) != 0) return 1;
    if (sm_file_open(path, &file, &err) != SMALLM_OK) return 1;
    bool ok = sm_file_read(file, 9, &byte, 1, &err) == SMALLM_OK && byte == '9' &&
              sm_file_read(file, 9, &byte, 2, &err) == SMALLM_E_IO &&
              sm_file_read(file, UINT64_MAX, &byte, 1, &err) == SMALLM_E_IO;
    f = fopen(path, "wb"); /* truncates */
    if (!f || fclose(f) != 0) return 1;
    ok = ok && sm_file_read(file, 5, &byte, 1, &err) == SMALLM_E_IO &&
         strstr(err.message, path) != NULL;
    sm_file_close(file);
    remove(path);
    return ok ? 0 : 1;
}

int main(int argc, char **argv) { return argc > 1 ? dump(argv[1]) : check_shrinking(); }
