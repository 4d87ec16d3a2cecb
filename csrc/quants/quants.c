/* The table of weight formats, and the names of all types a GGUF file may hold. */
#include "quants.h"

#include "../f16.h"

static uint32_t every_byte(uint32_t x) { return x * 0x01010101u; }

void sm_parts_codes(struct sm_layout f, const struct sm_parts *p, struct sm_codes *c) {
    bool plain = f.scales == SM_SCALES_NONE;
    c->d = f.d == SM_D_BF16 ? sm_bf16_to_f32(p->d) : sm_f16_to_f32(p->d);
    if (f.d == SM_D_HALVES) c->d *= 0.5f;
    if (f.d == SM_D_EIGHTHS) c->d *= 0.125f;
    c->m = sm_f16_to_f32(p->m);
    if (plain && f.mins) c->m = -c->m; /* it is added; without mins it stays +0 */
    for (int s = 0; s < f.block / f.sub; s++) {
        c->scale[s] = c->min[s] = 1;
        if (f.scales == SM_SCALES_NIBBLES) {
            c->scale[s] = p->scale[s] & 15;
            c->min[s] = p->scale[s] >> 4;
        } else if (sm_layout_has_scales(f)) {
            c->scale[s] = (int8_t)p->scale[s];
            c->min[s] = f.mins ? p->min[s] : 0;
        }
    }
    const uint32_t *low = p->plane, *high = low + f.low;
    for (int at = 0; at < f.block; at += SM_SLAB, low += f.low + f.high, high += f.low + f.high)
        for (int g = 0; g < SM_SLAB / 4; g++) { /* four codes at once: none leaves its byte */
            uint32_t four = low[g % f.low] >> (g / f.low * f.low) & every_byte((1u << f.low) - 1);
            if (f.high > 0)
                four |= (high[g % f.high] >> (g / f.high * f.high) & every_byte((1u << f.high) - 1))
                        << f.low;
            memcpy(c->code + at + 4 * g, &four, 4);
        }
    for (int i = 0; i < f.block && f.table != SM_TABLE_NONE; i++) c->code[i] = sm_table(f.table)[c->code[i]];
}

void sm_codes_values(struct sm_layout f, const struct sm_codes *c, float *out) {
    for (int s = 0; s < f.block / f.sub; s++) {
        float scaled = c->d * (float)c->scale[s], least = c->m * (float)c->min[s];
        for (int j = s * f.sub; j < (s + 1) * f.sub; j++)
            out[j] = scaled * (float)(c->code[j] - f.bias) - least;
    }
}

static void dequantize(enum sm_type t, struct sm_layout f, sm_parts_fn *take, const uint8_t *p, float *out,
                       size_t n_blocks) {
    for (; n_blocks > 0; n_blocks--, p += sm_quants[t].block_bytes, out += f.block) {
        struct sm_parts parts;
        struct sm_codes c;
        take(p, 0, 1, &parts);
        sm_parts_codes(f, &parts, &c);
        sm_codes_values(f, &c, out);
    }
}

#define SM_CODES(NAME, name, ...)                                                                \
    void sm_dequantize_##name(const void *blocks, float *out, size_t n_blocks) {                 \
        dequantize(SM_TYPE_##NAME, sm_layout_##name(), sm_parts_##name, blocks, out, n_blocks);  \
    }
#define SM_SAME(NAME, name, AS, as) SM_CODES(NAME, name, )
#include "codes.def"
#undef SM_CODES

const struct sm_quant sm_quants[SM_TYPE_COUNT] = {
#define SM_QUANT(NAME, id, name, n, bytes, act) \
    {#NAME, id, n, bytes, SM_ACT_##act, sm_dequantize_##name, sm_find_nonfinite_##name},
#include "quants.def"
#undef SM_QUANT
};

#define SM_STORED(NAME, name) void sm_store_##name(const float *x, void *out, size_t n);
#define SM_FITTED(NAME, name, ...) void sm_put_##name(const struct sm_codes *codes, void *blocks, size_t n);
#include "writers.def"

const struct sm_writer *sm_writer(enum sm_type t) {
    static const struct sm_writer writers[SM_TYPE_COUNT] = {
#define SM_STORED(NAME, name) [SM_TYPE_##NAME] = {.store = sm_store_##name},
#include "writers.def"
#define SM_FITTED(NAME, name, kind, sub, lo, hi, least, greatest, ...)                             \
    [SM_TYPE_##NAME] = {.put = sm_put_##name,                                                      \
                        .fit = {SM_FIT_##kind, sub, lo, hi, least, greatest,                       \
                                sizeof((float[]){__VA_ARGS__}) / sizeof(float), {__VA_ARGS__}}},
#include "writers.def"
    };
    return writers[t].store || writers[t].put ? &writers[t] : NULL;
}

struct sm_layout sm_layout_of(enum sm_type t) {
    switch (t) {
#define SM_CODES(NAME, name, ...) \
    case SM_TYPE_##NAME: return sm_layout_##name();
#define SM_SAME(NAME, name, AS, as) SM_CODES(NAME, name, )
#include "codes.def"
#undef SM_CODES
    default: return (struct sm_layout){0};
    }
}

enum sm_type sm_quant_from_gguf(uint32_t gguf_id) {
    int t = 0;
    while (t < SM_TYPE_COUNT && sm_quants[t].gguf_id != gguf_id) t++;
    return (enum sm_type)t;
}

const char *sm_quant_gguf_name(uint32_t gguf_id) {
    static const char *const names[] = {
        [0] = "F32",      [1] = "F16",      [2] = "Q4_0",     [3] = "Q4_1",    [6] = "Q5_0",
        [7] = "Q5_1",     [8] = "Q8_0",     [9] = "Q8_1",     [10] = "Q2_K",   [11] = "Q3_K",
        [12] = "Q4_K",    [13] = "Q5_K",    [14] = "Q6_K",    [15] = "Q8_K",   [16] = "IQ2_XXS",
        [17] = "IQ2_XS",  [18] = "IQ3_XXS", [19] = "IQ1_S",   [20] = "IQ4_NL", [21] = "IQ3_S",
        [22] = "IQ2_S",   [23] = "IQ4_XS",  [24] = "I8",      [25] = "I16",    [26] = "I32",
        [27] = "I64",     [28] = "F64",     [29] = "IQ1_M",   [30] = "BF16",   [34] = "TQ1_0",
        [35] = "TQ2_0",   [39] = "MXFP4",   [40] = "NVFP4",   [41] = "Q1_0",
    };
    return gguf_id < SM_COUNT(names) ? names[gguf_id] : NULL;
}
