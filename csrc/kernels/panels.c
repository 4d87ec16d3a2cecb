/* Packing file rows into panels of 16 rows, and reading single rows back; layouts in kernels.h. */
#include "../f16.h"
#include "kernels.h"

#define ROWS SM_PANEL_ROWS

/* Formats of 32 values a block that get interleaved panels: where the file block keeps its parts. */
struct block32 {
    size_t n_scales;    /* f16 values at the block's start: d, or d and m */
    bool nibbles;       /* 16 bytes of two codes, else 32 signed bytes */
};

static bool block32(enum sm_type t, struct block32 *b) {
    switch (t) {
    case SM_TYPE_Q4_0: *b = (struct block32){1, true}; return true;
    case SM_TYPE_Q4_1: *b = (struct block32){2, true}; return true;
    case SM_TYPE_Q8_0: *b = (struct block32){1, false}; return true;
    default: return false;
    }
}

static bool is_float(enum sm_type t) { return sm_quants[t].block_size == 1; }

size_t sm_panel_bytes(enum sm_type t, size_t k) {
    if (is_float(t)) return sm_round_up(k, 32) * ROWS * sm_quants[t].block_bytes;
    return sm_round_up(sm_row_bytes(t, k) * ROWS, SM_ALIGN);
}

static void pack_floats(size_t size, uint8_t *panel, const uint8_t *rows, size_t n_rows, size_t k) {
    for (size_t c = 0; c < k; c++)
        for (size_t r = 0; r < n_rows; r++)
            memcpy(panel + (c * ROWS + r) * size, rows + (r * k + c) * size, size);
}

/* One block column: block[r] is row r's file block, NULL past the last row. */
static void pack_block32(struct block32 f, uint8_t *out, const uint8_t *const block[ROWS]) {
    for (size_t i = 0; i < f.n_scales; i++, out += 2 * ROWS)
        for (size_t r = 0; r < ROWS; r++)
            if (block[r] != NULL) memcpy(out + 2 * r, block[r] + 2 * i, 2);
    /* A file byte of the 4-bit formats already pairs column c (low) with column c + 16 (high). */
    size_t n_groups = f.nibbles ? 4 : 8;
    const uint32_t flip = f.nibbles ? 0 : 0x80808080u;
    for (size_t g = 0; g < n_groups; g++)
        for (size_t r = 0; r < ROWS; r++) {
            uint32_t four = 0;
            if (block[r] != NULL) memcpy(&four, block[r] + 2 * f.n_scales + 4 * g, 4);
            four ^= flip;
            memcpy(out + (g * ROWS + r) * 4, &four, 4);
        }
}

void sm_panel_pack(enum sm_type t, void *panel, const void *rows, size_t n_rows, size_t k) {
    size_t row_bytes = sm_row_bytes(t, k);
    memset(panel, 0, sm_panel_bytes(t, k));
    struct block32 f;
    if (is_float(t)) {
        pack_floats(sm_quants[t].block_bytes, panel, rows, n_rows, k);
    } else if (block32(t, &f)) {
        size_t bytes = sm_quants[t].block_bytes;
        for (size_t b = 0; b < k / 32; b++) {
            const uint8_t *block[ROWS] = {0};
            for (size_t r = 0; r < n_rows; r++)
                block[r] = (const uint8_t *)rows + r * row_bytes + b * bytes;
            pack_block32(f, (uint8_t *)panel + b * bytes * ROWS, block);
        }
    } else {
        memcpy(panel, rows, n_rows * row_bytes);
    }
}

void sm_panel_row(enum sm_type t, const void *panel, size_t row, size_t k, float *out) {
    const uint8_t *p = panel;
    const struct sm_quant *quant = &sm_quants[t];
    struct block32 f;
    if (is_float(t)) {
        size_t size = quant->block_bytes;
        for (size_t c = 0; c < k; c++)
            quant->dequantize(p + (c * ROWS + row) * size, out + c, 1);
    } else if (block32(t, &f)) {
        /* Puts the file's block together again and lets the format say what it means. */
        uint8_t block[34];
        for (size_t b = 0; b < k / 32; b++, p += quant->block_bytes * ROWS) {
            for (size_t i = 0; i < f.n_scales; i++)
                memcpy(block + 2 * i, p + 2 * (i * ROWS + row), 2);
            const uint8_t *codes = p + f.n_scales * 2 * ROWS;
            const uint32_t flip = f.nibbles ? 0 : 0x80808080u;
            for (size_t g = 0; g < (f.nibbles ? 4u : 8u); g++) {
                uint32_t four;
                memcpy(&four, codes + (g * ROWS + row) * 4, 4);
                four ^= flip;
                memcpy(block + 2 * f.n_scales + 4 * g, &four, 4);
            }
            quant->dequantize(block, out + 32 * b, 1);
        }
    } else {
        quant->dequantize(p + row * sm_row_bytes(t, k), out, k / quant->block_size);
    }
}
