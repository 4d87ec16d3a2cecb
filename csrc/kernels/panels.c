/* Packing file rows into panels of 16 rows, and reading single rows back; layouts in panels.h.
 *
 * Loading waits for packing.  It writes whole lines of 16 rows, each once, and moves codes by
 * words, which in plain C is about as fast as memory takes them. */
#include "panels.h"

#define ROWS SM_PANEL_ROWS
#define INLINE static inline __attribute__((always_inline))

/* The float type of a panel's values. */
static enum sm_type as_kept(enum sm_type t) { return t == SM_TYPE_NVFP4 ? SM_TYPE_BF16 : t; }

size_t sm_panel_bytes(enum sm_type t, size_t k) {
    struct sm_layout f = sm_layout_of(t);
    if (f.block == 0) return sm_round_up(k, SM_SLAB) * ROWS * sm_quants[as_kept(t)].block_bytes;
    return sm_round_up(k / (size_t)f.block * sm_layout_bytes(f), SM_ALIGN);
}

/* ---- floats ---------------------------------------------------------------------------------------------- */

/* A line of each row at a time: rows may lie a multiple of the cache's sets apart. */
INLINE void pack_floats(size_t size, uint8_t *panel, const uint8_t *rows, size_t n_rows, size_t k) {
    size_t k_pad = sm_round_up(k, SM_SLAB);
    if (n_rows < ROWS) memset(panel, 0, k_pad * ROWS * size);
    else memset(panel + k * ROWS * size, 0, (k_pad - k) * ROWS * size);
    for (size_t first = 0; first < k; first += SM_SLAB)
        for (size_t r = 0; r < n_rows; r++)
            for (size_t c = first; c < SM_MIN(first + SM_SLAB, k); c++)
                memcpy(panel + (c * ROWS + r) * size, rows + (r * k + c) * size, size);
}

/* NVFP4: its values, which bfloat16 holds. */
static void pack_values(uint8_t *panel, const uint8_t *rows, size_t n_rows, size_t k) {
    const struct sm_quant *q = &sm_quants[SM_TYPE_NVFP4];
    memset(panel, 0, sm_panel_bytes(SM_TYPE_NVFP4, k));
    for (size_t c = 0; c < k; c += 64)
        for (size_t r = 0; r < n_rows; r++) {
            float values[64];
            q->dequantize(rows + (r * k + c) / 64 * q->block_bytes, values, 1);
            for (size_t j = 0; j < 64; j++) {
                uint32_t bits;
                memcpy(&bits, &values[j], 4);
                uint16_t half = (uint16_t)(bits >> 16);
                memcpy(panel + ((c + j) * ROWS + r) * 2, &half, 2);
            }
        }
}

/* ---- integers -------------------------------------------------------------------------------------------- */

/* One block of each of the 16 rows. */
INLINE void pack_block(struct sm_layout f, uint8_t *out, const struct sm_parts parts[ROWS]) {
    for (size_t r = 0; r < ROWS; r++) memcpy(out + 2 * r, &parts[r].d, 2);
    for (size_t r = 0; r < ROWS && f.mins; r++) memcpy(out + 2 * (ROWS + r), &parts[r].m, 2);
    for (size_t s = 0; s < sm_layout_n_sub(f) && sm_layout_has_scales(f); s++) {
        uint8_t *scale = out + sm_layout_scales(f) + s * ROWS;
        for (size_t r = 0; r < ROWS; r++) scale[r] = parts[r].scale[s];
        if (!f.mins || f.scales == SM_SCALES_NIBBLES) continue;
        uint8_t *min = out + sm_layout_mins(f) + s * ROWS;
        for (size_t r = 0; r < ROWS; r++) min[r] = parts[r].min[s];
    }
    uint8_t *group = out + sm_layout_codes(f);
    for (int i = 0; i < f.block / SM_SLAB * (f.low + f.high); i++, group += SM_GROUP_BYTES)
        for (size_t r = 0; r < ROWS; r++) memcpy(group + 4 * r, &parts[r].plane[i], 4);
}

INLINE void pack_integers(struct sm_layout f, sm_parts_fn *take, size_t block_bytes, uint8_t *out,
                          const uint8_t *rows, size_t n_rows, size_t k) {
    size_t n_blocks = k / (size_t)f.block, row_bytes = n_blocks * block_bytes;
    struct sm_parts parts[ROWS];
    memset(parts + n_rows, 0, (ROWS - n_rows) * sizeof parts[0]);
    for (size_t b = 0; b < n_blocks; b++, out += sm_layout_bytes(f)) {
        take(rows + b * block_bytes, row_bytes, n_rows, parts);
        pack_block(f, out, parts);
    }
    size_t bytes = n_blocks * sm_layout_bytes(f);
    memset(out, 0, sm_round_up(bytes, SM_ALIGN) - bytes);
}

void sm_panel_block(struct sm_layout f, const uint8_t *block, size_t r, struct sm_codes *c) {
    struct sm_parts p;
    p.m = 0;
    memcpy(&p.d, block + 2 * r, 2);
    if (f.mins) memcpy(&p.m, block + 2 * (ROWS + r), 2);
    for (size_t s = 0; s < sm_layout_n_sub(f) && sm_layout_has_scales(f); s++) {
        p.scale[s] = block[sm_layout_scales(f) + s * ROWS + r];
        if (f.mins && f.scales == SM_SCALES_BYTES)
            p.min[s] = block[sm_layout_mins(f) + s * ROWS + r];
    }
    const uint8_t *group = block + sm_layout_codes(f);
    for (int i = 0; i < f.block / SM_SLAB * (f.low + f.high); i++, group += SM_GROUP_BYTES)
        memcpy(&p.plane[i], group + 4 * r, 4);
    sm_parts_codes(f, &p, c);
}

/* ---- any format ------------------------------------------------------------------------------------------ */

void sm_panel_pack(enum sm_type t, void *panel, const void *rows, size_t n_rows, size_t k) {
    switch (t) {
#define SM_CODES(NAME, name, ...)                                                          \
    case SM_TYPE_##NAME:                                                                   \
        pack_integers(sm_layout_##name(), sm_parts_##name, sm_quants[t].block_bytes,   \
                      panel, rows, n_rows, k);                                             \
        break;
#define SM_SAME(NAME, name, AS, as) SM_CODES(NAME, name, )
#include "../quants/codes.def"
#undef SM_CODES
    case SM_TYPE_NVFP4: pack_values(panel, rows, n_rows, k); break;
    default:
        if (sm_quants[t].block_bytes == 4) pack_floats(4, panel, rows, n_rows, k);
        else pack_floats(2, panel, rows, n_rows, k);
    }
}

void sm_panel_row(enum sm_type t, const void *panel, size_t row, size_t k, float *out) {
    struct sm_layout f = sm_layout_of(t);
    const uint8_t *p = panel;
    if (f.block == 0) {
        size_t size = sm_quants[as_kept(t)].block_bytes;
        for (size_t c = 0; c < k; c++)
            sm_quants[as_kept(t)].dequantize(p + (c * ROWS + row) * size, out + c, 1);
        return;
    }
    for (size_t b = 0; b < k / (size_t)f.block; b++, p += sm_layout_bytes(f), out += f.block) {
        struct sm_codes c;
        sm_panel_block(f, p, row, &c);
        sm_codes_values(f, &c, out);
    }
}
