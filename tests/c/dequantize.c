/* Weight formats one by one, for tests/test_quants.py.
 *
 *   dequantize TYPE < blocks > floats       values of the blocks
 *   dequantize --nonfinite TYPE < blocks    prints find_nonfinite's answer
 *   dequantize                              checks the table and sm_find_nonfinite on its own */
#include <stdio.h>
#include <stdlib.h>

#include "quants/quants.h"

static enum sm_type type_of(const char *name) {
    int t = 0;
    while (t < SM_TYPE_COUNT && strcmp(sm_quants[t].name, name) != 0) t++;
    return (enum sm_type)t;
}

static int check_table(void) {
    int bad = 0;
    for (int t = 0; t < SM_TYPE_COUNT; t++) {
        const struct sm_quant *q = &sm_quants[t];
        const char *name = sm_quant_gguf_name(q->gguf_id);
        if (sm_quant_from_gguf(q->gguf_id) != (enum sm_type)t || !name || strcmp(name, q->name)) {
            fprintf(stderr, "%s: the id %u leads elsewhere\n", q->name, (unsigned)q->gguf_id);
            bad = 1;
        }
        /* Zero blocks are finite; a block of ones has NaN scales. */
        uint8_t blocks[3 * 256] = {0};
        memset(blocks + q->block_bytes, 0xFF, q->block_bytes);
        if (q->find_nonfinite(blocks, 1) != 1 || q->find_nonfinite(blocks, 3) != 1) {
            fprintf(stderr, "%s: find_nonfinite misses the second block\n", q->name);
            bad = 1;
        }
    }
    if (sm_quant_from_gguf(4) != SM_TYPE_COUNT || sm_quant_gguf_name(4) != NULL) bad = 1;
    return bad;
}

int main(int argc, char **argv) {
    if (argc == 1) return check_table();
    enum sm_type t = type_of(argv[argc - 1]);
    if (t == SM_TYPE_COUNT) {
        fprintf(stderr, "no format %s\n", argv[argc - 1]);
        return 2;
    }
    const struct sm_quant *q = &sm_quants[t];
    size_t cap = (size_t)16 << 20, n = 0, got;
    uint8_t *blocks = malloc(cap);
    float *out = malloc(cap / q->block_bytes * q->block_size * sizeof *out);
    if (!blocks || !out) return 3;
    while ((got = fread(blocks + n, 1, cap - n, stdin)) > 0) n += got;
    size_t n_blocks = n / q->block_bytes;
    if (argc == 3) {
        printf("%zu\n", q->find_nonfinite(blocks, n_blocks));
    } else {
        q->dequantize(blocks, out, n_blocks);
        fwrite(out, sizeof *out * q->block_size, n_blocks, stdout);
    }
    free(out);
    free(blocks);
    return 0;
}
