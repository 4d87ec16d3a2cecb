/* Layout of packed weights, for the tiers' matrix kernels: static inline only.
 *
 * A panel holds 16 rows.  Integer formats (quants/codes.def), block after block along k:
 *   [16 rows] d, two bytes as the layout says, then with mins [16 rows] f16 m
 *   scales BYTES:    [n_sub][16] int8 scale, then with mins [n_sub][16] uint8 min
 *   scales NIBBLES:  [n_sub][16] scale | min << 4
 *   codes: for each 32 columns a slab of 64 bytes per bit of a code: its low plane, its high plane
 * A slab's columns form 8 groups of 4; a group of one plane is a vector of 64 bytes, 4 columns for
 * each of the 16 rows: byte 4 r + j is column j of row r.  A plane of b bits is b such vectors:
 * vector i holds group i + b n in bits b n .. b n + b - 1 of each byte.
 * Float formats: [k_pad][16 rows] values as stored; NVFP4: as bfloat16.
 * Missing rows have d = m = 0; missing columns of float panels are 0. */
#ifndef SM_PANELS_H
#define SM_PANELS_H

#include "kernels.h"

#define SM_GROUP_BYTES 64

static inline size_t sm_layout_n_sub(struct sm_layout f) { return (size_t)(f.block / f.sub); }

/* Offsets in a panel's block. */
static inline size_t sm_layout_scales(struct sm_layout f) { return f.mins ? 64 : 32; }
static inline size_t sm_layout_mins(struct sm_layout f) { /* BYTES with mins */
    return sm_layout_scales(f) + sm_layout_n_sub(f) * SM_PANEL_ROWS;
}
static inline size_t sm_layout_codes(struct sm_layout f) {
    size_t per_sub = !sm_layout_has_scales(f) ? 0
                     : f.scales == SM_SCALES_BYTES && f.mins ? 2 : 1;
    return sm_layout_scales(f) + per_sub * sm_layout_n_sub(f) * SM_PANEL_ROWS;
}
static inline size_t sm_layout_slab(struct sm_layout f) {
    return (size_t)(f.low + f.high) * SM_GROUP_BYTES;
}
static inline size_t sm_layout_bytes(struct sm_layout f) {
    return sm_layout_codes(f) + (size_t)(f.block / SM_SLAB) * sm_layout_slab(f);
}

/* Row r of a panel's block in integers (panels.c). */
void sm_panel_block(struct sm_layout f, const uint8_t *block, size_t r, struct sm_codes *c);

#endif
