/* Packing file rows into panels of 16 rows, and reading single rows back; layouts in panels.h. */
#include "panels.h"

#include "../f16.h"

#define ROWS SM_PANEL_ROWS

static void put_f16(uint8_t *p, float x) {
    uint16_t h = sm_f32_to_f16(x);
    memcpy(p, &h, 2);
}

typedef void codes_fn(const void *block, struct sm_codes *c);

struct integer_format {
    struct sm_layout layout;
    codes_fn *codes;
};

static const struct integer_format *integer_format(enum sm_type t) {
    static const struct integer_format formats[SM_TYPE_COUNT] = {
#define SM_CODES(NAME, name, ...) \
    [SM_TYPE_##NAME] = {{SM_CODES_ARGS(__VA_ARGS__)}, sm_codes_##name},
#define SM_CODES_ARGS(block, sub, group, mins, scales, low, high, bias) \
    block, sub, group, mins, SM_SCALES_##scales, low, high, bias
#include "../quants/codes.def"
#undef SM_CODES
#undef SM_CODES_ARGS
    };
    return formats[t].codes != NULL ? &formats[t] : NULL;
}

size_t sm_panel_bytes(enum sm_type t, size_t k) {
    const struct integer_format *f = integer_format(t);
    if (f == NULL) return sm_round_up(k, SM_SLAB) * ROWS * sm_quants[t].block_bytes;
    return sm_round_up(k / (size_t)f->layout.block * sm_layout_bytes(f->layout), SM_ALIGN);
}

/* ---- floats ---------------------------------------------------------------------------------------------- */

static void pack_floats(size_t size, uint8_t *panel, const uint8_t *rows, size_t n_rows, size_t k) {
    for (size_t c = 0; c < k; c++)
        for (size_t r = 0; r < n_rows; r++)
            memcpy(panel + (c * ROWS + r) * size, rows + (r * k + c) * size, size);
}

/* ---- integers -------------------------------------------------------------------------------------------- */

static uint32_t every_byte(uint32_t x) { return x * 0x01010101u; }

/* Row r's 32 codes into a slab. */
static void pack_slab(struct sm_layout f, uint8_t *slab, size_t r, const uint8_t codes[SM_SLAB]) {
    for (int g = 0; g < 8; g++) {
        uint32_t four, plane; /* four codes at once: no plane's bits leave their byte */
        memcpy(&four, codes + 4 * g, 4);
        uint8_t *low = slab + (size_t)(g % f.low) * SM_GROUP_BYTES + 4 * r;
        memcpy(&plane, low, 4);
        plane |= (four & every_byte((1u << f.low) - 1)) << (g / f.low * f.low);
        memcpy(low, &plane, 4);
        if (f.high == 0) continue;
        uint8_t *high = slab + (size_t)(f.low + g % f.high) * SM_GROUP_BYTES + 4 * r;
        memcpy(&plane, high, 4);
        plane |= (four >> f.low & every_byte((1u << f.high) - 1)) << (g / f.high * f.high);
        memcpy(high, &plane, 4);
    }
}

static void unpack_slab(struct sm_layout f, const uint8_t *slab, size_t r, uint8_t codes[SM_SLAB]) {
    for (int g = 0; g < 8; g++) {
        uint32_t four, plane;
        memcpy(&plane, slab + (size_t)(g % f.low) * SM_GROUP_BYTES + 4 * r, 4);
        four = plane >> (g / f.low * f.low) & every_byte((1u << f.low) - 1);
        if (f.high > 0) {
            memcpy(&plane, slab + (size_t)(f.low + g % f.high) * SM_GROUP_BYTES + 4 * r, 4);
            four |= (plane >> (g / f.high * f.high) & every_byte((1u << f.high) - 1)) << f.low;
        }
        memcpy(codes + 4 * g, &four, 4);
    }
}

/* One file block of row r into a panel's block.  The float16 scales are copied, not recomputed. */
static void pack_block(const struct integer_format *format, uint8_t *out, size_t r,
                       const void *block) {
    struct sm_layout f = format->layout;
    struct sm_codes c;
    format->codes(block, &c);
    bool plain = f.scales == SM_SCALES_NONE;
    put_f16(out + 2 * r, c.d);
    if (f.mins) put_f16(out + 2 * (ROWS + r), plain ? -c.m : c.m);
    for (size_t s = 0; s < sm_layout_n_sub(f) && !plain; s++) {
        uint8_t *scale = out + sm_layout_scales(f) + s * ROWS + r;
        if (f.scales == SM_SCALES_NIBBLES) {
            *scale = (uint8_t)(c.scale[s] | c.min[s] << 4);
        } else {
            *scale = (uint8_t)c.scale[s];
            if (f.mins) out[sm_layout_mins(f) + s * ROWS + r] = (uint8_t)c.min[s];
        }
    }
    for (size_t i = 0; i < (size_t)(f.block / SM_SLAB); i++)
        pack_slab(f, out + sm_layout_codes(f) + i * sm_layout_slab(f), r, c.code + i * SM_SLAB);
}

void sm_panel_block(struct sm_layout f, const uint8_t *block, size_t r, struct sm_codes *c) {
    bool plain = f.scales == SM_SCALES_NONE;
    c->d = sm_f16_at(block + 2 * r);
    c->m = f.mins ? sm_f16_at(block + 2 * (ROWS + r)) : 0;
    if (plain && f.mins) c->m = -c->m; /* without mins it stays +0 */
    for (size_t s = 0; s < sm_layout_n_sub(f); s++) {
        const uint8_t *scale = block + sm_layout_scales(f) + s * ROWS + r;
        c->scale[s] = c->min[s] = 1;
        if (f.scales == SM_SCALES_NIBBLES) {
            c->scale[s] = *scale & 15;
            c->min[s] = *scale >> 4;
        } else if (!plain) {
            c->scale[s] = (int8_t)*scale;
            c->min[s] = f.mins ? block[sm_layout_mins(f) + s * ROWS + r] : 0;
        }
    }
    for (size_t i = 0; i < (size_t)(f.block / SM_SLAB); i++)
        unpack_slab(f, block + sm_layout_codes(f) + i * sm_layout_slab(f), r, c->code + i * SM_SLAB);
}

/* ---- any format ------------------------------------------------------------------------------------------ */

void sm_panel_pack(enum sm_type t, void *panel, const void *rows, size_t n_rows, size_t k) {
    const struct integer_format *f = integer_format(t);
    memset(panel, 0, sm_panel_bytes(t, k));
    if (f == NULL) {
        pack_floats(sm_quants[t].block_bytes, panel, rows, n_rows, k);
        return;
    }
    const uint8_t *block = rows;
    for (size_t r = 0; r < n_rows; r++) {
        uint8_t *out = panel;
        for (size_t b = 0; b < k / (size_t)f->layout.block; b++) {
            pack_block(f, out, r, block);
            block += sm_quants[t].block_bytes;
            out += sm_layout_bytes(f->layout);
        }
    }
}

void sm_panel_row(enum sm_type t, const void *panel, size_t row, size_t k, float *out) {
    const struct integer_format *f = integer_format(t);
    const uint8_t *p = panel;
    if (f == NULL) {
        size_t size = sm_quants[t].block_bytes;
        for (size_t c = 0; c < k; c++)
            sm_quants[t].dequantize(p + (c * ROWS + row) * size, out + c, 1);
        return;
    }
    struct sm_layout l = f->layout;
    for (size_t b = 0; b < k / (size_t)l.block; b++, p += sm_layout_bytes(l), out += l.block) {
        struct sm_codes c;
        sm_panel_block(l, p, row, &c);
        sm_codes_values(&c, l.block, l.sub, l.bias, out);
    }
}
