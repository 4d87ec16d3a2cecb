/* Weight formats as the file stores them: sizes, and the value of every weight.
 *
 * One file per format holds its block layout and how a block comes apart (struct sm_parts).  That
 * serves both dequantization, which defines what a weight *is*, bit for bit what the `gguf` Python
 * package's gguf.quants gives, and the panels that matrix kernels work on (kernels/kernels.h). */
#ifndef SM_QUANTS_H
#define SM_QUANTS_H

#include "../base.h"

enum sm_act { SM_ACT_F32, SM_ACT_Q8_32, SM_ACT_Q8_256, SM_ACT_COUNT };

enum sm_type {
#define SM_QUANT(NAME, id, name, n, bytes, act) SM_TYPE_##NAME,
#include "quants.def"
#undef SM_QUANT
    SM_TYPE_COUNT
};

struct sm_quant {
    const char *name;     /* as the field writes it: "Q4_K" */
    uint32_t gguf_id;
    uint32_t block_size;  /* values in a block */
    uint32_t block_bytes;
    enum sm_act act;
    /* Values of n_blocks blocks into out[n_blocks * block_size]. */
    void (*dequantize)(const void *blocks, float *out, size_t n_blocks);
    /* Index of the first block whose scale is infinite or NaN (for float formats: whose value is),
     * or n_blocks. */
    size_t (*find_nonfinite)(const void *blocks, size_t n_blocks);
};

extern const struct sm_quant sm_quants[SM_TYPE_COUNT];

/* The type with this GGUF id, or SM_TYPE_COUNT. */
enum sm_type sm_quant_from_gguf(uint32_t gguf_id);

/* Name of any GGUF type id, also of ones we cannot run ("IQ2_XXS"), or NULL: for messages. */
const char *sm_quant_gguf_name(uint32_t gguf_id);

/* Bytes of a row of k values; k must be a multiple of the block size. */
static inline size_t sm_row_bytes(enum sm_type t, size_t k) {
    return k / sm_quants[t].block_size * sm_quants[t].block_bytes;
}

enum sm_scales { SM_SCALES_NONE, SM_SCALES_ONES, SM_SCALES_BYTES, SM_SCALES_NIBBLES };

enum sm_table_id {
    SM_TABLE_NONE, SM_TABLE_IQ4, SM_TABLE_FP4, SM_TABLE_IQ3_XXS, SM_TABLE_IQ3_S, SM_TABLE_IQ2, SM_TABLE_IQ1
};
#define SM_TABLE_FP4_BIAS 16

enum sm_d { SM_D_F16, SM_D_HALVES, SM_D_EIGHTHS, SM_D_BF16 };

struct sm_layout { /* a row of codes.def */
    int block, sub, group;
    bool mins;
    enum sm_scales scales;
    int low, high, bias;
    enum sm_table_id table;
    enum sm_d d;
};

#define SM_LAYOUT(block, sub, group, mins, scales, low, high, bias, table, d) \
    ((struct sm_layout){block, sub, group, mins, SM_SCALES_##scales, low, high, bias, SM_TABLE_##table, \
                        SM_D_##d})

/* [16] codes for the stored ones: the values that formats list, plus the bias.  Stored codes of three
 * or four bits with signs have them at the top. */
static inline const uint8_t *sm_table(enum sm_table_id id) {
    static const uint8_t tables[][16] = {
        [SM_TABLE_IQ4] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
        /* E2M1, doubled: 0 1 2 3 4 6 8 12 and their negatives */
        [SM_TABLE_FP4] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4},
        /* +-2 6 10 14 18 22 26 31 */
        [SM_TABLE_IQ3_XXS] = {34, 38, 42, 46, 50, 54, 58, 63, 30, 26, 22, 18, 14, 10, 6, 1},
        /* +-1 3 5 7 9 11 13 15 */
        [SM_TABLE_IQ3_S] = {17, 19, 21, 23, 25, 27, 29, 31, 15, 13, 11, 9, 7, 5, 3, 1},
        /* +-8 25 43; grids have no fourth */
        [SM_TABLE_IQ2] = {72, 89, 107, 64, 56, 39, 21, 64},
        /* -8 0 8, one more and one less; grids have no fourth */
        [SM_TABLE_IQ1] = {9, 17, 25, 16, 7, 15, 23, 16},
    };
    return tables[id];
}

/* Bits of a code after the table, if there is one. */
static inline int sm_layout_bits(struct sm_layout f) {
    return f.table == SM_TABLE_NONE ? f.low + f.high : __builtin_ctz((unsigned)f.bias) + 1;
}

/* Whether panels keep scales of sub-blocks. */
static inline bool sm_layout_has_scales(struct sm_layout f) { return f.scales >= SM_SCALES_BYTES; }

#define SM_SLAB 32 /* columns */

/* One block of an integer format taken apart, its stored codes as panels keep them (kernels/panels.h): in
 * two planes, low bits and high bits.  32 columns are a slab, 4 of them a group.  A plane of b bits
 * is b words a slab: byte j of word i holds column j of the groups i + b n, each in bits
 * b n .. b n + b - 1. */
struct sm_parts {
    uint16_t d, m;              /* d as the layout says, m float16; m is 0 without mins */
    uint8_t scale[16], min[16]; /* [block / sub]; NIBBLES: scale holds both; NONE, ONES: undefined */
    uint32_t plane[48];         /* [block / 32][low + high] */
};

/* The same in integers: value c of sub-block s is
 * (d * scale[s]) * (code[c] - bias) - (m * min[s]), each operation rounded to float. */
struct sm_codes {
    float d, m;
    int16_t scale[16], min[16]; /* [block / sub] */
    uint8_t code[256];          /* [block] */
};

void sm_parts_codes(struct sm_layout f, const struct sm_parts *p, struct sm_codes *c);

/* The values of one block, out [block], from its integers. */
void sm_codes_values(struct sm_layout f, const struct sm_codes *c, float *out);

/* n blocks of a file, which lie `stride` bytes apart, into parts[n]. */
typedef void sm_parts_fn(const void *blocks, size_t stride, size_t n, struct sm_parts *parts);
#define SM_CODES(NAME, name, ...)                    \
    sm_parts_fn sm_parts_##name;                     \
    static inline struct sm_layout sm_layout_##name(void) { return SM_LAYOUT(__VA_ARGS__); }
#define SM_SAME(NAME, name, AS, as)                  \
    sm_parts_fn sm_parts_##name;                     \
    static inline struct sm_layout sm_layout_##name(void) { return sm_layout_##as(); }
#include "codes.def"
#undef SM_CODES

/* Row of codes.def, or block 0 for float formats. */
struct sm_layout sm_layout_of(enum sm_type t);

#define SM_QUANT(NAME, id, name, n, bytes, act)                                  \
    void sm_dequantize_##name(const void *blocks, float *out, size_t n_blocks);  \
    size_t sm_find_nonfinite_##name(const void *blocks, size_t n_blocks);
#include "quants.def"
#undef SM_QUANT

/* ---- writing -------------------------------------------------------------------------------------
 *
 * Integer formats are written in two steps: kernels find the integers (kernels.h: fit), and the
 * format's file puts them into its blocks. */

#define SM_FIT_MAX 0x1p30f  /* the largest magnitude that is fitted: more than blocks hold */
#define SM_FIT_MIN 0x1p-40f /* less than any float16 scale gives: as good as zero */

/* x = d q, x = d q + m, the same with integer scales (and mins) of sub-blocks, x = d q with d > 0,
 * d a power of two, or the peak taken to hi. */
enum sm_fit_kind { SM_FIT_SCALE, SM_FIT_LINE, SM_FIT_SCALED, SM_FIT_LINED, SM_FIT_TERNARY, SM_FIT_POWER,
                   SM_FIT_PEAK };

struct sm_fit { /* a row of writers.def */
    enum sm_fit_kind kind;
    int sub;             /* values that share a scale */
    float lo, hi;        /* the integers that codes stand for, where the layout lists no values */
    int least, greatest; /* integer scales, and mins */
    int n_to;
    float to[16];        /* [n_to] what the peak, or the range, is taken to in the beginning */
};

struct sm_writer {
    /* Float formats: n values x. */
    void (*store)(const float *x, void *out, size_t n);
    /* Integer formats: n blocks of these codes.  Scales beyond their range become infinite
     * (find_nonfinite). */
    void (*put)(const struct sm_codes *codes, void *blocks, size_t n);
    struct sm_fit fit;
};

const struct sm_writer *sm_writer(enum sm_type t); /* NULL: this format is only read */

#endif
