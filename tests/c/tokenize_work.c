/* How much work texts of growing length are for a tokenizer, for tests/test_tokenizer.py.
 *
 *   tokenize_work FILE    reads texts from stdin, one a line, in hexadecimal; prints for each the
 *                         work (sm_test_work) of 32, 64 and 128 KiB of its repetitions */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "tokenizer.h"

#define LEAST ((size_t)32 << 10)

static int read_line(char *out, size_t cap, size_t *n) {
    int c, digits = 0, value = 0;
    *n = 0;
    while ((c = getchar()) != EOF && c != '\n') {
        value = value * 16 + (c >= 'a' ? c - 'a' + 10 : c - '0');
        if (++digits % 2 == 1) continue;
        if (*n == cap) return -1;
        out[(*n)++] = (char)value;
        value = 0;
    }
    return c == EOF ? -1 : 0;
}

int main(int argc, char **argv) {
    if (argc != 2) return 0;
    smallm_error err = {.size = sizeof err};
    struct sm_gguf *g = NULL;
    struct sm_tokenizer *t = NULL;
    char unit[4096], *text = malloc(8 * LEAST);
    size_t n_unit;
    if (!text || sm_gguf_open(argv[1], &g, &err) || sm_tokenizer_new(g, &t, &err)) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    while (read_line(unit, sizeof unit, &n_unit) == 0 && n_unit > 0) {
        for (size_t size = LEAST; size <= 4 * LEAST; size *= 2) {
            size_t n = 0, n_ids;
            for (; n < size; n += n_unit) memcpy(text + n, unit, n_unit);
            sm_test_work = 0;
            if (sm_tokenizer_encode(t, text, n, SMALLM_PARSE_SPECIAL, NULL, 0, &n_ids, &err)) {
                fprintf(stderr, "%s\n", err.message);
                return 1;
            }
            printf("%zu %" PRIu64 " ", n, sm_test_work);
        }
        putchar('\n');
    }
    sm_tokenizer_free(t);
    sm_gguf_close(g);
    free(text);
    return 0;
}
