/* Holds every tier that this CPU runs to the contract of kernels.h, bit for bit, and times it.
 *
 *   check_kernels                      all checks; exit status 1 where a tier differs
 *   check_kernels --only SLOT          one of them
 *   check_kernels --only SLOT --seed N one case again, as a failure names it
 *   check_kernels --quick              fewer and smaller cases (for sanitizers)
 *   check_kernels --bench [PATTERN]    times of the tiers and slots whose line contains PATTERN
 *
 * The reference is written here a second time, straight from the contract and from the file
 * formats: the generic tier is held to it like the others.  It shares sm_fma and sm_expf with the
 * kernels; both are checked against libm.  A case is determined by its seed. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu.h"
#include "f16.h"
#include "kernels/expf.h"
#include "kernels/kernels.h"
#include "os.h"
#include "quants/grids.h"

/* Both builds of the generic tier; sm_kernels_tier gives the better one. */
void sm_init__generic(struct sm_kernels *k);
#if defined(SM_HAVE_X86)
void sm_init__generic_fma(struct sm_kernels *k);
#endif

struct tier {
    const char *name;
    struct sm_kernels k;
};
static struct tier tiers[16];
static size_t n_tiers;

static const char *slot; /* being checked */
static char shape[160]; /* of the case */
static uint64_t case_seed;
static size_t n_failures;
static bool quick;
static void *scratch; /* SM_SCRATCH_BYTES */

/* ---- numbers ---- */

static uint64_t rng;

static uint64_t random64(void) {
    uint64_t z = rng += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
static size_t below(size_t n) { return (size_t)(random64() >> 11) % n; }
static float uniform(void) { return (float)((double)(random64() >> 11) * 0x1p-52 - 1.0); }
static float any_finite(void) {
    for (;;) {
        float x = sm_float_of_bits((uint32_t)random64());
        if (isfinite(x)) return x;
    }
}

enum fill {
    FILL_USUAL, /* of the order of 1, some outliers */
    FILL_ZERO,
    FILL_TINY, /* around 2^-100, where activations become zero */
    FILL_SUBNORMAL,
    FILL_HUGE, /* up to FLT_MAX */
    FILL_MIXED, /* every exponent */
    FILL_TIES, /* halves, with a largest value of 127 */
    FILL_SPARSE,
    FILL_COUNT
};

static float fill_one(enum fill kind) {
    switch (kind) {
    case FILL_ZERO: return below(2) ? 0.0f : -0.0f;
    case FILL_TINY:
        return uniform() * (below(8) ? 0x1p-100f : 0x1.01p-100f);
    case FILL_SUBNORMAL: return uniform() * 0x1p-126f;
    case FILL_HUGE: return uniform() * 0x1.fffffep+127f;
    case FILL_MIXED: return any_finite();
    case FILL_TIES: return (float)((int)below(255) - 127) + (below(2) ? 0.5f : 0.0f);
    case FILL_SPARSE: return below(10) ? 0.0f : uniform();
    default: return uniform() * uniform() * (below(40) ? 2.0f : 30.0f);
    }
}

static void fill(float *x, size_t n, enum fill kind) {
    for (size_t i = 0; i < n; i++) x[i] = fill_one(kind);
    if (kind == FILL_TIES)
        for (size_t i = below(32); i < n; i += 32) x[i] = below(2) ? 127.0f : -127.0f;
}

/* Exactly n bytes, so that AddressSanitizer sees the first one too many. */
static void *allocate(size_t n) {
    void *p = NULL;
    if (posix_memalign(&p, SM_ALIGN, n ? n : 1) != 0) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    memset(p, 0xA5, n);
    return p;
}
static float *floats(size_t n) { return allocate(n * sizeof(float)); }

/* ---- verdicts ---- */

static void fail(const char *tier, const char *what) {
    if (n_failures++ < 20)
        printf("FAIL %s %s: %s (%s, --seed %llu)\n", tier, slot, what, shape,
               (unsigned long long)case_seed);
}

/* The same bits, where any NaN equals any other. */
static bool same_float(float a, float b) {
    return sm_bits_of_float(a) == sm_bits_of_float(b) || (isnan(a) && isnan(b));
}

static void compare(const char *tier, const char *what, const float *got, const float *want,
                    size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (same_float(got[i], want[i])) continue;
        char text[160];
        snprintf(text, sizeof text, "%s[%zu] is %a (%g), not %a (%g)", what, i, (double)got[i],
                 (double)got[i], (double)want[i], (double)want[i]);
        fail(tier, text);
        return;
    }
}

static void compare_bytes(const char *tier, const char *what, const void *got, const void *want,
                          size_t n) {
    for (size_t i = 0; i < n; i++) {
        int g = ((const uint8_t *)got)[i], w = ((const uint8_t *)want)[i];
        if (g == w) continue;
        char text[160];
        snprintf(text, sizeof text, "byte %zu of %s is %d, not %d", i, what, g, w);
        fail(tier, text);
        return;
    }
}

/* ---- fma and expf against libm ---- */

static void case_fma(uint64_t seed) {
    (void)seed;
    for (int i = 0; i < 4096; i++) {
        uint32_t a = (uint32_t)random64(), b = (uint32_t)random64(), c = (uint32_t)random64();
        size_t mode = below(9);
        if (mode >= 2 && mode < 8) { /* sums that cancel, tie or end among the subnormals */
            uint32_t ea = 1 + (uint32_t)below(254);
            uint32_t eb = mode & 1 ? 1 + (uint32_t)below(254) : SM_MAX(1, 254 - ea);
            a = (a & 0x807fffffu) | ea << 23;
            b = (b & 0x807fffffu) | eb << 23;
            if (mode >= 4) a &= UINT32_MAX << below(20);
            float product = sm_float_of_bits(a) * sm_float_of_bits(b);
            int ec = (int)(sm_bits_of_float(product) >> 23 & 255) + (int)below(64) - 32;
            c = (c & 0x807fffffu) | (uint32_t)(ec < 0 ? 0 : ec > 254 ? 254 : ec) << 23;
            if (mode >= 6) c &= UINT32_MAX << below(24);
            if (mode == 7 && below(2)) c = sm_bits_of_float(-product) + (uint32_t)below(8) - 3;
        }
        if (mode == 8) { /* a hair above or below halfway between two floats */
            float f = ldexpf(1.0f, -(int)(below(2) ? 9 + below(3) : 14 + below(10)));
            float up = 1.0f + f, down = 1.0f - f + (f > 0x1p-12f ? f * f : 0.0f);
            int ec = 60 + (int)below(140);
            c = (c & 0x807fffffu) | (uint32_t)ec << 23;
            a = sm_bits_of_float(ldexpf(up, ec - 127 - 24)) | (a & 0x80000000u);
            b = sm_bits_of_float(down);
        }
        float x = sm_float_of_bits(a), y = sm_float_of_bits(b), z = sm_float_of_bits(c);
        float want = fmaf(x, y, z), emulated = sm_fma_emulated(x, y, z), used = sm_fma(x, y, z);
        snprintf(shape, sizeof shape, "%a * %a + %a", (double)x, (double)y, (double)z);
        compare("emulated", "fma", &emulated, &want, 1);
        compare("compiled", "fma", &used, &want, 1);
    }
}

static void check_expf(float x) {
    float got = sm_expf(x);
    snprintf(shape, sizeof shape, "x = %a (%g)", (double)x, (double)x);
    if (isnan(x)) {
        if (!isnan(got)) fail("scalar", "NaN does not stay NaN");
    } else if (x <= SM_EXPF_MIN) {
        if (sm_bits_of_float(got) != 0) fail("scalar", "not 0 below the range");
    } else if (x > SM_EXPF_MAX) {
        if (got != sm_expf(SM_EXPF_MAX)) fail("scalar", "not constant above the range");
    } else {
        double want = exp((double)x);
        int exponent;
        frexp(want, &exponent);
        if (fabs((double)got - want) > 0.902 * ldexp(1, exponent - 24))
            fail("scalar", "off by too much");
    }
}

static void case_expf(uint64_t seed) {
    if (seed % 16 == 0) {
        for (uint32_t e = 0; e < 512; e++) /* every exponent and sign */
            for (int i = 0; i < 8; i++)
                check_expf(
                    sm_float_of_bits(e << 23 | (i == 0   ? 0
                                                : i == 1 ? 0x7fffff
                                                         : (uint32_t)random64() & 0x7fffff)));
        const float special[] = {0.0f,        -0.0f,    1.0f,      SM_EXPF_MIN,
                                 SM_EXPF_MAX, INFINITY, -INFINITY, NAN};
        for (size_t i = 0; i < SM_COUNT(special); i++) check_expf(special[i]);
        shape[0] = 0;
        if (sm_expf(0.0f) != 1.0f || sm_expf(-0.0f) != 1.0f) fail("scalar", "expf(0) is not 1");
    }
    for (int i = 0; i < 4096; i++) check_expf(uniform() * 90.0f);
}

/* The exponential of every tier, seen through attend: one position scores 0, the others x <= 0, and
 * V is the unit matrix, so that the output is expf(x). */
static void case_vector_expf(uint64_t seed) {
    enum { HEAD = SM_CHUNK };
    static float k[HEAD][SM_CHUNK], v[SM_CHUNK][HEAD], q[HEAD];
    float m, l, o[HEAD], want[HEAD];
    const float edges[] = {0.0f,        0x1p-149f, nextafterf(-SM_EXPF_MIN, 0), -SM_EXPF_MIN,
                           nextafterf(-SM_EXPF_MIN, 99), FLT_MAX, 0x1p-126f};
    int16_t lo = 0, hi = SM_CHUNK;
    struct sm_attend a = {.q = q,
                          .lo = &lo,
                          .hi = &hi,
                          .n_q = 1,
                          .head = HEAD,
                          .kv_type = SMALLM_KV_F32,
                          .m = &m,
                          .l = &l,
                          .o = o,
                          .scratch = scratch};
    q[0] = 1.0f;
    for (size_t p = 0; p < SM_CHUNK_PAGES; p++) {
        a.k[p] = (float *)k + p * SM_PAGE * HEAD;
        a.v[p] = v[p * SM_PAGE];
    }
    snprintf(shape, sizeof shape, "expf(x), x <= 0");
    for (size_t j = 0; j < SM_CHUNK; j++) {
        float x = uniform() * 90.0f;
        if (seed % 2) x = sm_float_of_bits((uint32_t)random64() & 0x7fffffff);
        if (!isfinite(x)) x = 100.0f;
        if (below(32) == 0) x = edges[below(SM_COUNT(edges))];
        x = j == 0 ? 0.0f : -fabsf(x);
        ((float *)k)[j / 16 * 16 * HEAD + j % 16] = x;
        v[j][j] = 1.0f;
        want[j] = sm_expf(x) + 0.0f;
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.attend(&a);
        compare(tiers[i].name, "e", o, want, HEAD);
    }
}

/* ---- activations ---- */

static struct sm_acts make_acts(enum sm_act act, size_t n, size_t k) {
    struct sm_acts a;
    sm_acts_place(&a, act, n, k, allocate(sm_acts_bytes(act, n, k)));
    return a;
}
static void free_acts(struct sm_acts *a) { free(a->f ? (void *)a->f : (void *)a->q); }

static void ref_prepare(enum sm_act act, struct sm_acts *a, size_t row, const float *x) {
    size_t size = act == SM_ACT_Q8_256 ? 256 : 32;
    for (size_t begin = 0; begin < a->k_pad; begin += size) {
        size_t block = (row * a->k_pad + begin) / size;
        float amax = 0;
        for (size_t i = begin; i < begin + size && i < a->k; i++) amax = fmaxf(amax, fabsf(x[i]));
        bool zero = amax < 0x1p-100f;
        float d = zero ? 0.0f : amax / 127.0f, id = zero ? 0.0f : 127.0f / amax;
        int total = 0;
        for (size_t i = begin; i < begin + size; i++) {
            float value = i < a->k ? x[i] : 0.0f;
            if (act == SM_ACT_F32) {
                a->f[row * a->stride + i] = value;
                continue;
            }
            float code = zero ? 0.0f : nearbyintf(value * id);
            code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
            a->q[row * a->stride + i] = (int8_t)code;
            total += (int)code;
            if (act == SM_ACT_Q8_256 && i % 16 == 15) {
                a->sum[(row * a->k_pad + i) / 16] = (int16_t)total;
                total = 0;
            }
        }
        if (act != SM_ACT_F32) a->d[block] = d;
        if (act == SM_ACT_Q8_32) {
            a->sum[block] = (int16_t)total;
            a->s[block] = d * (float)total;
        }
    }
}

static void compare_acts(const char *tier, enum sm_act act, const struct sm_acts *got,
                         const struct sm_acts *want, size_t row) {
    size_t k = want->k_pad, n_blocks = k / (act == SM_ACT_Q8_256 ? 256 : 32);
    size_t n_sums = act == SM_ACT_Q8_256 ? k / 16 : n_blocks;
    if (act == SM_ACT_F32) {
        compare(tier, "f", got->f + row * got->stride, want->f + row * want->stride, k);
        return;
    }
    compare_bytes(tier, "q", got->q + row * got->stride, want->q + row * want->stride, k);
    compare(tier, "d", got->d + row * n_blocks, want->d + row * n_blocks, n_blocks);
    compare_bytes(tier, "sum", got->sum + row * n_sums, want->sum + row * n_sums, n_sums * 2);
    if (act == SM_ACT_Q8_32)
        compare(tier, "s", got->s + row * n_blocks, want->s + row * n_blocks, n_blocks);
}

static void case_prepare(uint64_t seed) {
    enum sm_act act = (enum sm_act)(seed % SM_ACT_COUNT);
    size_t k = 1 + below(below(4) ? 300 : 3000), row = below(3);
    if (below(2)) k = sm_round_up(k, act == SM_ACT_Q8_256 ? 256 : 32);
    enum fill kind = (enum fill)(seed / SM_ACT_COUNT % (FILL_COUNT + 1));
    snprintf(shape, sizeof shape, "format %d, k %zu, row %zu, fill %d", (int)act, k, row,
             (int)kind);
    float *x = floats(k);
    fill(x, k, kind == FILL_COUNT ? FILL_USUAL : kind);
    if (kind == FILL_COUNT) /* another kind in each block */
        for (size_t i = 0; i < k; i += 32)
            fill(x + i, SM_MIN(32, k - i), (enum fill)below(FILL_COUNT));
    if (kind == FILL_TINY) /* from here on it is not zero */
        for (size_t i = below(64); i < k; i += 64)
            for (size_t j = i / 32 * 32; j < SM_MIN(i / 32 * 32 + 32, k); j++)
                x[j] = j == i ? 0x1p-100f : x[j] * 0.5f;
    struct sm_acts want = make_acts(act, 3, k), got = make_acts(act, 3, k);
    ref_prepare(act, &want, row, x);
    for (size_t i = 0; i < n_tiers; i++) {
        if (!tiers[i].k.prepare[act](&got, row, x)) fail(tiers[i].name, "finite values refused");
        compare_acts(tiers[i].name, act, &got, &want, row);
    }
    const float bad[] = {INFINITY, -INFINITY, NAN, -NAN};
    x[below(k)] = bad[below(4)];
    for (size_t i = 0; i < n_tiers; i++)
        if (tiers[i].k.prepare[act](&got, row, x))
            fail(tiers[i].name, "a non-finite value accepted");
    free_acts(&want);
    free_acts(&got);
    free(x);
}

/* ---- matrix products ---- */

/* One block of a row as integers, by the file format: weight c is
 * d * scale * code - dmin * min of its sub-block (Q4_1 and Q5_1: d * code + dmin). */
struct block {
    float d, dmin;
    int code[256]; /* less the format's offset */
    int scale[16], min[16]; /* per 16 columns */
    int group; /* columns of one fma; 0: a float */
    bool float_min, int_min;
};

/* The values that formats list. */
static const int iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int iq3_xxs[8] = {2, 6, 10, 14, 18, 22, 26, 31}, iq2[3] = {8, 25, 43};

static uint32_t word_at(const uint8_t *p, int n) { /* n bytes, the lowest first */
    uint32_t word = 0;
    while (n-- > 0) word = word << 8 | p[n];
    return word;
}
/* Sign i (0 .. 7) of a set of seven that are stored: an even number of all are negative. */
static int sign_of(uint32_t seven, int i) {
    int n = 0;
    for (int j = 0; j < 7; j++) n += seven >> j & 1;
    return (i < 7 ? (int)(seven >> i & 1) : n % 2) ? -1 : 1;
}

/* Formats of grids: entry, sign and scale of each value. */
static void read_grid_block(enum sm_type t, const uint8_t *p, struct block *b) {
    b->group = t == SM_TYPE_IQ1_S || t == SM_TYPE_IQ1_M || t == SM_TYPE_IQ3_S ? 256 : 64;
    b->d *= t == SM_TYPE_IQ3_S ? 1.0f : t == SM_TYPE_IQ3_XXS ? 0.5f : 0.125f;
    for (int i = 0; i < 256; i++) {
        int eight = i / 8, four = i / 4, scale = 0, less;
        uint32_t word;
        switch (t) {
        case SM_TYPE_IQ2_XXS:
            word = word_at(p + 2 + 8 * (i / 32) + 4, 4);
            scale = (int)(word >> 28);
            b->code[i] = iq2[sm_grid_iq2_xxs[p[2 + 8 * (i / 32) + eight % 4]] >> 2 * (i % 8) & 3] *
                         sign_of(word >> 7 * (eight % 4), i % 8);
            break;
        case SM_TYPE_IQ2_XS:
            word = word_at(p + 2 + 2 * eight, 2);
            scale = i / 16 % 2 ? p[66 + i / 32] / 16 : p[66 + i / 32] % 16;
            b->code[i] = iq2[sm_grid_iq2_xs[word % 512] >> 2 * (i % 8) & 3] * sign_of(word / 512, i % 8);
            break;
        case SM_TYPE_IQ2_S:
            word = p[2 + eight] + 256 * (p[66 + eight / 4] >> 2 * (eight % 4) & 3u);
            scale = i / 16 % 2 ? p[74 + i / 32] / 16 : p[74 + i / 32] % 16;
            b->code[i] = iq2[sm_grid_iq2_s[word] >> 2 * (i % 8) & 3] *
                         (p[34 + eight] >> i % 8 & 1 ? -1 : 1);
            break;
        case SM_TYPE_IQ3_XXS:
            word = word_at(p + 66 + 4 * (i / 32), 4);
            scale = (int)(word >> 28);
            b->code[i] = iq3_xxs[sm_grid_iq3_xxs[p[2 + four]] >> 3 * (i % 4) & 7] *
                         sign_of(word >> 7 * (eight % 4), i % 8);
            break;
        case SM_TYPE_IQ3_S:
            word = p[2 + four] + 256 * (p[66 + four / 8] >> four % 8 & 1u);
            scale = i / 32 % 2 ? p[106 + i / 64] / 16 : p[106 + i / 64] % 16;
            b->code[i] = (1 + 2 * (sm_grid_iq3_s[word] >> 3 * (i % 4) & 7)) *
                         (p[74 + eight] >> i % 8 & 1 ? -1 : 1);
            break;
        case SM_TYPE_IQ1_S:
            word = word_at(p + 34 + 2 * (i / 32), 2);
            scale = word >> 12 & 7;
            less = word >> 15;
            word = p[2 + eight] + 256 * (word >> 3 * (eight % 4) & 7);
            b->code[i] = 8 * (sm_grid_iq1[word] >> 2 * (i % 8) & 3) - 8 + (less ? -1 : 1);
            break;
        default: /* IQ1_M */
            scale = word_at(p + 48 + 2 * (i / 64), 2) >> 3 * (i / 16 % 4) & 7;
            word = p[32 + i / 16] >> 4 * (eight % 2);
            less = word >> 3 & 1;
            word = p[eight] + 256 * (word & 7);
            b->code[i] = 8 * (sm_grid_iq1[word] >> 2 * (i % 8) & 3) - 8 + (less ? -1 : 1);
        }
        b->scale[i / 16] = 2 * scale + 1;
    }
}

static void read_block(enum sm_type t, const uint8_t *p, struct block *b) {
    *b = (struct block){.d = sm_f16_at(p), .code = {1}};
    for (int i = 0; i < 16; i++) b->scale[i] = 1;
    switch (t) {
    case SM_TYPE_Q4_0:
    case SM_TYPE_Q4_1:
        b->group = 32;
        b->float_min = t == SM_TYPE_Q4_1;
        if (b->float_min) b->dmin = sm_f16_at(p + 2);
        for (int i = 0; i < 32; i++) {
            int byte = p[(b->float_min ? 4 : 2) + i % 16];
            b->code[i] = (i < 16 ? byte % 16 : byte / 16) - (b->float_min ? 0 : 8);
        }
        break;
    case SM_TYPE_Q5_0:
    case SM_TYPE_Q5_1:
        b->group = 32;
        b->float_min = t == SM_TYPE_Q5_1;
        if (b->float_min) b->dmin = sm_f16_at(p + 2);
        for (int i = 0; i < 32; i++) {
            const uint8_t *high = p + (b->float_min ? 4 : 2);
            int byte = high[4 + i % 16];
            b->code[i] = (i < 16 ? byte % 16 : byte / 16) + 16 * (high[i / 8] >> i % 8 & 1);
            b->code[i] -= b->float_min ? 0 : 16;
        }
        break;
    case SM_TYPE_Q8_0:
        b->group = 32;
        for (int i = 0; i < 32; i++) b->code[i] = (int8_t)p[2 + i];
        break;
    case SM_TYPE_Q2_K:
        b->group = 256;
        b->int_min = true;
        b->d = sm_f16_at(p + 80);
        b->dmin = sm_f16_at(p + 82);
        for (int half = 0, i = 0; half < 2; half++)
            for (int pair = 0; pair < 4; pair++)
                for (int j = 0; j < 32; j++, i++)
                    b->code[i] = p[16 + 32 * half + j] >> 2 * pair & 3;
        for (int i = 0; i < 16; i++) {
            b->scale[i] = p[i] % 16;
            b->min[i] = p[i] / 16;
        }
        break;
    case SM_TYPE_Q3_K: {
        b->group = 256;
        b->d = sm_f16_at(p + 108);
        uint32_t word[3];
        memcpy(word, p + 96, sizeof word);
        for (int i = 0; i < 16; i++) {
            uint32_t low = word[i / 4 % 2] >> (8 * (i % 4) + 4 * (i / 8)) & 15;
            uint32_t high = word[2] >> (8 * (i % 4) + 2 * (i / 4)) & 3;
            b->scale[i] = (int)(low + 16 * high) - 32;
        }
        for (int half = 0, i = 0; half < 2; half++)
            for (int pair = 0; pair < 4; pair++)
                for (int j = 0; j < 32; j++, i++) {
                    b->code[i] = p[32 + 32 * half + j] >> 2 * pair & 3;
                    if ((p[j] & 1 << (4 * half + pair)) == 0) b->code[i] -= 4;
                }
        break;
    }
    case SM_TYPE_Q4_K:
    case SM_TYPE_Q5_K:
        b->group = t == SM_TYPE_Q4_K ? 128 : 64;
        b->int_min = true;
        b->dmin = sm_f16_at(p + 2);
        for (int i = 0; i < 16; i++) {
            const uint8_t *s = p + 4;
            int sub = i / 2;
            if (sub < 4) {
                b->scale[i] = s[sub] % 64;
                b->min[i] = s[sub + 4] % 64;
            } else {
                b->scale[i] = s[sub + 4] % 16 + s[sub - 4] / 64 * 16;
                b->min[i] = s[sub + 4] / 16 + s[sub] / 64 * 16;
            }
        }
        for (int pair = 0; pair < 4; pair++)
            for (int j = 0; j < 64; j++) {
                const uint8_t *low = p + (t == SM_TYPE_Q4_K ? 16 : 48);
                int byte = low[32 * pair + j % 32], i = 64 * pair + j;
                b->code[i] = j < 32 ? byte % 16 : byte / 16;
                if (t == SM_TYPE_Q5_K)
                    b->code[i] += 16 * (p[16 + j % 32] >> (2 * pair + j / 32) & 1);
            }
        break;
    case SM_TYPE_Q6_K:
        b->group = 32;
        b->d = sm_f16_at(p + 208);
        for (int i = 0; i < 16; i++) b->scale[i] = (int8_t)p[192 + i];
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 128; j++) {
                int low = p[64 * half + j % 64], high = p[128 + 32 * half + j % 32];
                b->code[128 * half + j] =
                    (j < 64 ? low % 16 : low / 16) + 16 * (high >> 2 * (j / 32) & 3) - 32;
            }
        break;
    case SM_TYPE_TQ1_0:
        b->group = 256;
        b->d = sm_f16_at(p + 52);
        for (int i = 0; i < 256; i++) { /* the digit after the point of 3^n byte / 256 */
            int at = i < 160 ? i % 32 : i < 240 ? 32 + i % 16 : 48 + i % 4;
            int n = i < 160 ? i / 32 : i < 240 ? (i - 160) / 16 : (i - 240) / 4;
            int power = n == 0 ? 1 : n == 1 ? 3 : n == 2 ? 9 : n == 3 ? 27 : 81;
            b->code[i] = p[at] * power * 3 / 256 % 3 - 1;
        }
        break;
    case SM_TYPE_TQ2_0:
        b->group = 256;
        b->d = sm_f16_at(p + 64);
        for (int i = 0; i < 256; i++)
            b->code[i] = (p[i / 128 * 32 + i % 32] >> 2 * (i / 32 % 4) & 3) - 1;
        break;
    case SM_TYPE_IQ4_NL:
        b->group = 32;
        for (int i = 0; i < 32; i++) b->code[i] = iq4[i < 16 ? p[2 + i] % 16 : p[2 + i - 16] / 16];
        break;
    case SM_TYPE_MXFP4:
        b->group = 32;
        b->d = ldexpf(1.0f, p[0] - 128);
        for (int i = 0; i < 32; i++) b->code[i] = fp4[i < 16 ? p[1 + i] % 16 : p[1 + i - 16] / 16];
        break;
    case SM_TYPE_IQ4_XS:
        b->group = 32;
        for (int i = 0; i < 256; i++) {
            int s = i / 32, byte = p[8 + 16 * s + i % 16];
            b->code[i] = iq4[i % 32 < 16 ? byte % 16 : byte / 16];
            b->scale[i / 16] = (p[4 + s / 2] >> 4 * (s % 2) & 15) +
                               16 * (int)(word_at(p + 2, 2) >> 2 * s & 3) - 32;
        }
        break;
    case SM_TYPE_NVFP4: /* floats */
        b->d = 0x1p-11f;
        for (int i = 0; i < 64; i++) {
            int byte = p[4 + i / 16 * 8 + i % 8], e4m3 = p[i / 16] % 128;
            b->code[i] = fp4[i % 16 < 8 ? byte % 16 : byte / 16];
            b->scale[i / 16] = e4m3 < 8 ? 2 * e4m3 : (8 + e4m3 % 8) << e4m3 / 8;
            if (p[i / 16] == 127) b->scale[i / 16] = 0;
        }
        break;
    case SM_TYPE_IQ1_M:
        b->d = sm_f16_to_f32((uint16_t)(p[49] / 16 + p[51] / 16 * 16 + p[53] / 16 * 256 + p[55] / 16 * 4096));
        read_grid_block(t, p, b);
        break;
    case SM_TYPE_IQ1_S:
    case SM_TYPE_IQ2_XXS:
    case SM_TYPE_IQ2_XS:
    case SM_TYPE_IQ2_S:
    case SM_TYPE_IQ3_XXS:
    case SM_TYPE_IQ3_S: read_grid_block(t, p, b); break;
    case SM_TYPE_F32: memcpy(&b->d, p, 4); break;
    case SM_TYPE_BF16: b->d = sm_bf16_to_f32(sm_u16_at(p)); break;
    default: break; /* F16 */
    }
}

/* out[t] of one file row for tokens first .. first + n - 1. */
static void ref_row(enum sm_type t, const uint8_t *row, const struct sm_acts *a, size_t first,
                    size_t n, float *out) {
    size_t size = sm_quants[t].block_size;
    for (size_t i = 0; i < n; i++) out[i] = 0.0f;
    for (size_t c = 0; c < a->k; c += size) {
        struct block b;
        read_block(t, row + c / size * sm_quants[t].block_bytes, &b);
        for (size_t i = 0; i < n; i++) {
            size_t at = ((first + i) * a->k_pad + c) / size; /* the activations' block */
            float acc = out[i];
            if (b.group == 0) {
                const float *x = a->f + (first + i) * a->stride + c;
                for (size_t j = 0; j < size; j++)
                    acc = sm_fma(b.d * (float)(b.scale[j / 16] * b.code[j]), x[j], acc);
                out[i] = acc;
                continue;
            }
            const int8_t *q = a->q + (first + i) * a->stride + c;
            for (size_t g = 0; g < size; g += (size_t)b.group) {
                int64_t isum = 0;
                for (size_t j = g; j < g + (size_t)b.group; j++)
                    isum += (int64_t)b.scale[j / 16] * b.code[j] * q[j];
                acc = sm_fma((float)isum, b.d * a->d[at], acc);
                if ((int64_t)(float)isum != isum) fail("reference", "an inexact integer sum");
            }
            if (b.float_min) acc = sm_fma(b.dmin, a->s[at], acc);
            if (b.int_min) {
                int64_t msum = 0;
                for (size_t j = 0; j < 256; j++) msum += b.min[j / 16] * q[j];
                acc = sm_fma((float)msum, -(b.dmin * a->d[at]), acc);
            }
            out[i] = acc;
        }
    }
    /* The columns of padding, which matter for the sign of zero only. */
    if (sm_quants[t].act == SM_ACT_F32 && a->k < a->k_pad)
        for (size_t i = 0; i < n; i++) out[i] += 0.0f;
}

/* A finite float16: usually near the scales of real files, sometimes any. */
static uint16_t random_scale(void) {
    if (below(16)) return sm_f32_to_f16(uniform() * 0.05f);
    for (;;) {
        uint16_t h = (uint16_t)random64();
        if ((h & 0x7c00) != 0x7c00) return h;
    }
}

static void random_blocks(enum sm_type t, uint8_t *p, size_t n_blocks) {
    /* Where the scales lie. */
    static const int at[SM_TYPE_COUNT][2] = {
        [SM_TYPE_Q4_0] = {0, -1},   [SM_TYPE_Q4_1] = {0, 2},  [SM_TYPE_Q5_0] = {0, -1},
        [SM_TYPE_Q5_1] = {0, 2},    [SM_TYPE_Q8_0] = {0, -1}, [SM_TYPE_Q2_K] = {80, 82},
        [SM_TYPE_Q3_K] = {108, -1}, [SM_TYPE_Q4_K] = {0, 2},  [SM_TYPE_Q5_K] = {0, 2},
        [SM_TYPE_Q6_K] = {208, -1}, [SM_TYPE_TQ1_0] = {52, -1}, [SM_TYPE_TQ2_0] = {64, -1},
        [SM_TYPE_F16] = {0, -1},    [SM_TYPE_IQ4_NL] = {0, -1}, [SM_TYPE_IQ4_XS] = {0, -1},
        [SM_TYPE_IQ3_S] = {0, -1},  [SM_TYPE_IQ3_XXS] = {0, -1}, [SM_TYPE_IQ2_S] = {0, -1},
        [SM_TYPE_IQ2_XS] = {0, -1}, [SM_TYPE_IQ2_XXS] = {0, -1}, [SM_TYPE_IQ1_S] = {0, -1},
        [SM_TYPE_IQ1_M] = {-1, -1}, [SM_TYPE_MXFP4] = {-1, -1},  [SM_TYPE_NVFP4] = {-1, -1},
    };
    size_t bytes = sm_quants[t].block_bytes;
    size_t flat = below(8); /* 0, 1: all codes at one end, where sums are largest */
    for (size_t b = 0; b < n_blocks; b++, p += bytes) {
        for (size_t i = 0; i < bytes; i++)
            p[i] = flat == 0 ? 0 : flat == 1 ? 0xff : (uint8_t)random64();
        if (t == SM_TYPE_F32 || t == SM_TYPE_BF16) {
            uint32_t u = sm_bits_of_float(fill_one(below(50) ? FILL_USUAL : FILL_TINY));
            memcpy(p, t == SM_TYPE_F32 ? (uint8_t *)&u : (uint8_t *)&u + 2, bytes);
            continue;
        }
        if (t == SM_TYPE_MXFP4) p[0] = (uint8_t)(below(16) ? 116 + below(12) : below(253));
        for (int i = 0; i < 4 && t == SM_TYPE_NVFP4; i++) p[i] = (uint8_t)below(255);
        for (uint16_t i = 0, h = random_scale(); i < 4 && t == SM_TYPE_IQ1_M; i++)
            p[49 + 2 * i] = (uint8_t)((p[49 + 2 * i] & 15) | (h >> 4 * i & 15) << 4);
        for (int i = 0; i < 2; i++) {
            uint16_t h = t == SM_TYPE_F16 ? sm_f32_to_f16(fill_one(FILL_USUAL)) : random_scale();
            if (at[t][i] >= 0) memcpy(p + at[t][i], &h, 2);
        }
    }
}

/* A matrix of file rows, packed. */
struct matrix {
    enum sm_type type;
    size_t n_rows, k, n_panels, panel_bytes;
    uint8_t *rows, *panels;
};

static struct matrix make_matrix(enum sm_type t, size_t n_rows, size_t k) {
    struct matrix m = {.type = t, .n_rows = n_rows, .k = k};
    size_t row_bytes = sm_row_bytes(t, k);
    m.n_panels = (n_rows + SM_PANEL_ROWS - 1) / SM_PANEL_ROWS;
    m.panel_bytes = sm_panel_bytes(t, k);
    m.rows = allocate(n_rows * row_bytes);
    m.panels = allocate(m.n_panels * m.panel_bytes);
    random_blocks(t, m.rows, n_rows * k / sm_quants[t].block_size);
    for (size_t p = 0; p < m.n_panels; p++)
        sm_panel_pack(t, m.panels + p * m.panel_bytes, m.rows + p * SM_PANEL_ROWS * row_bytes,
                      SM_MIN(SM_PANEL_ROWS, n_rows - p * SM_PANEL_ROWS), k);
    return m;
}
static void free_matrix(struct matrix *m) {
    free(m->rows);
    free(m->panels);
}

/* The packed rows are the file's, and the reference agrees with what the file's weights are. */
static void check_rows(const struct matrix *m, const struct sm_acts *a, size_t first, size_t n,
                       const float *want, size_t ld) {
    const struct sm_quant *quant = &sm_quants[m->type];
    float *file = floats(m->k), *packed = floats(m->k);
    for (size_t r = 0; r < m->n_rows; r++) {
        quant->dequantize(m->rows + r * sm_row_bytes(m->type, m->k), file,
                          m->k / quant->block_size);
        sm_panel_row(m->type, m->panels + r / SM_PANEL_ROWS * m->panel_bytes, r % SM_PANEL_ROWS,
                     m->k, packed);
        compare("panels", "row", packed, file, m->k);
        for (size_t t = 0; t < n; t += 7) {
            double sum = 0, size = 0;
            for (size_t c = 0; c < m->k; c++) {
                size_t at = (first + t) * a->stride + c;
                size_t block = ((first + t) * a->k_pad + c) / (quant->act == SM_ACT_Q8_256 ? 256 : 32);
                double x =
                    quant->act == SM_ACT_F32
                        ? (double)a->f[at]
                        : a->q[at] * (double)a->d[block];
                sum += file[c] * x;
                /* Codes and mins may cancel: what counts is how large they were. */
                size += fabs(file[c] * x) + 1e-30;
            }
            double got = (double)want[t * ld + r], error = fabs(got - sum);
            /* With mins the terms are larger than the weights: 64 times is ample. */
            if (isfinite(got) && error > 1e-5 * size * 64)
                fail("reference", "far from the file's weights");
        }
    }
    free(file);
    free(packed);
}

static void case_matmul(uint64_t seed) {
    enum sm_type t = (enum sm_type)(seed % SM_TYPE_COUNT);
    enum sm_act act = sm_quants[t].act;
    size_t variant = (size_t)(seed / SM_TYPE_COUNT), unit = sm_quants[t].block_size;
    size_t n_rows = 1 + below(9 * SM_PANEL_ROWS), n_tokens = 1 + below(70);
    size_t k = unit == 1 ? 1 + below(600) : unit * (1 + below(unit == 32 ? 20 : 5));
    if (variant % 4 == 0) n_tokens = 1;
    if (variant % 4 == 1) n_tokens = 2 + below(6);
    if (variant % 8 == 6) k = 1024; /* rows of activations lie further apart */
    if (variant % 8 == 2 || variant % 16 == 4) { /* longer than any tile's scratch */
        bool many = variant % 8 == 2;
        k = unit == 1 ? 2049 + below(500) : sm_round_up(2049 + below(2500), unit);
        n_rows = 1 + below(quick ? 20 : many ? 40 : 100);
        n_tokens = many ? 18 + below(12) : 1 + below(8);
    }
    if (quick) n_tokens = 1 + (n_tokens - 1) % 24;
    size_t first = below(3), ld = SM_PANEL_ROWS * ((n_rows + 15) / 16) + below(2) * 16;
    enum fill kind = variant % 3 ? FILL_USUAL : (enum fill)below(FILL_COUNT);
    snprintf(shape, sizeof shape, "%s, %zu rows, k %zu, %zu tokens from %zu, ld %zu, fill %d",
             sm_quants[t].name, n_rows, k, n_tokens, first, ld, (int)kind);

    struct matrix m = make_matrix(t, n_rows, k);
    struct sm_acts acts = make_acts(act, first + n_tokens, k);
    float *x = floats(k), *want = floats(n_tokens * ld), *got = floats(n_tokens * ld);
    float *column = floats(n_tokens);
    for (size_t i = 0; i < first + n_tokens; i++) {
        fill(x, k, kind);
        ref_prepare(act, &acts, i, x);
    }
    for (size_t r = 0; r < SM_PANEL_ROWS * m.n_panels; r++) {
        if (r < n_rows)
            ref_row(t, m.rows + r * sm_row_bytes(t, k), &acts, first, n_tokens, column);
        else
            memset(column, 0, n_tokens * sizeof *column);
        for (size_t i = 0; i < n_tokens; i++) want[i * ld + r] = column[i];
    }
    if (kind == FILL_USUAL) check_rows(&m, &acts, first, n_tokens, want, ld);
    for (size_t i = 0; i < n_tiers; i++) {
        memset(got, 0xA5, n_tokens * ld * sizeof *got);
        memset(scratch, 0xFF, SM_SCRATCH_BYTES / 4);
        struct sm_matmul call = {.out = got,
                                 .ld = ld,
                                 .panels = m.panels,
                                 .panel_bytes = m.panel_bytes,
                                 .n_panels = m.n_panels,
                                 .acts = &acts,
                                 .first = first,
                                 .n_tokens = n_tokens,
                                 .scratch = scratch};
        tiers[i].k.matmul[t](&call);
        /* Nobody reads the rows of padding. */
        for (size_t j = 0; j < n_tokens; j++)
            for (size_t r = n_rows; r < SM_PANEL_ROWS * m.n_panels; r++) got[j * ld + r] = 0.0f;
        compare(tiers[i].name, "out", got, want, n_tokens * ld);
    }
    free_matrix(&m);
    free_acts(&acts);
    free(x);
    free(want);
    free(got);
    free(column);
}

/* ---- attention ---- */

static size_t kv_bytes(int kv_type, size_t head) { /* of K or V in a page */
    switch (kv_type) {
    case SMALLM_KV_F32: return SM_PAGE * head * 4;
    case SMALLM_KV_F16: return SM_PAGE * head * 2;
    default: return SM_PAGE * head + SM_PAGE * 4;
    }
}

static float kv_read(int kv_type, const void *page, size_t i) {
    switch (kv_type) {
    case SMALLM_KV_F32: return ((const float *)page)[i];
    case SMALLM_KV_F16: return sm_f16_to_f32(((const uint16_t *)page)[i]);
    default: return ((const int8_t *)page)[i];
    }
}
static void kv_write(int kv_type, void *page, size_t i, float x) {
    if (kv_type == SMALLM_KV_F32)
        ((float *)page)[i] = x;
    else if (kv_type == SMALLM_KV_F16)
        ((uint16_t *)page)[i] = sm_f32_to_f16(x > 65504 ? 65504 : x < -65504 ? -65504 : x);
    else
        ((int8_t *)page)[i] = (int8_t)(isnan(x) ? 0x55 : (int)fmaxf(-127, fminf(127, x * 100)));
}
/* The scale of position j in an int8 page. */
static float *kv_scale(const void *page, size_t head, size_t j) {
    return (float *)(void *)((char *)page + SM_PAGE * head) + j;
}
static size_t k_index(size_t j, size_t d, size_t head) {
    return (j % SM_PAGE / 16 * head + d) * 16 + j % 16;
}

static float ref_tree16(const float *lane) {
    float v[16];
    memcpy(v, lane, sizeof v);
    for (int i = 0; i < 8; i++) v[i] += v[i + 8];
    for (int i = 0; i < 4; i++) v[i] += v[i + 4];
    for (int i = 0; i < 2; i++) v[i] += v[i + 2];
    return v[0] + v[1];
}

static float ref_softcap(float x, float cap) {
    float u = sm_expf(x * (2.0f / cap));
    return cap * ((u - 1.0f) / (u + 1.0f));
}

static void ref_attend(const struct sm_attend *a) {
    for (size_t i = 0; i < a->n_q; i++) {
        float s[SM_CHUNK], lane[16] = {0}, m = -INFINITY;
        for (int j = a->lo[i]; j < a->hi[i]; j++) {
            float acc = 0;
            for (size_t d = 0; d < a->head; d++) {
                size_t at = k_index((size_t)j, d, a->head);
                acc =
                    sm_fma(a->q[i * a->head + d], kv_read(a->kv_type, a->k[j / SM_PAGE], at), acc);
            }
            if (a->kv_type == SMALLM_KV_Q8) acc *= *kv_scale(a->k[j / SM_PAGE], a->head, (size_t)j % SM_PAGE);
            if (a->cap != 0) acc = ref_softcap(acc, a->cap);
            if (a->slope != NULL) acc = sm_fma(a->slope[i], (float)(j - a->at[i]), acc);
            if (a->bias != NULL) acc = acc + a->bias[i][j];
            s[j] = acc;
            if (acc > m) m = acc;
        }
        a->m[i] = m += 0.0f;
        for (int j = a->lo[i]; j < a->hi[i]; j++) {
            s[j] = sm_expf(s[j] - m);
            lane[j % 16] += s[j];
        }
        a->l[i] = ref_tree16(lane);
        for (size_t d = 0; d < a->head; d++) {
            float acc = 0;
            for (int j = a->lo[i]; j < a->hi[i]; j++) {
                size_t at = (size_t)j % SM_PAGE * a->head + d;
                float e = s[j];
                if (a->kv_type == SMALLM_KV_Q8)
                    e *= *kv_scale(a->v[j / SM_PAGE], a->head, (size_t)j % SM_PAGE);
                acc = sm_fma(e, kv_read(a->kv_type, a->v[j / SM_PAGE], at), acc);
            }
            a->o[i * a->head + d] = acc + 0.0f;
        }
    }
}

static void case_attend(uint64_t seed) {
    static const size_t heads[] = {4,  8,  12, 16,  20,  32,  36,  48, 64,
                                   68, 80, 96, 112, 128, 192, 256, 512};
    size_t head = heads[seed % SM_COUNT(heads)], variant = (size_t)(seed / SM_COUNT(heads));
    int kv_type = (int[]){SMALLM_KV_F16, SMALLM_KV_Q8, SMALLM_KV_F32}[variant % 3];
    size_t n_q = 1 + below(variant % 2 ? SM_ATTEND_MAX : 9);
    if (variant % 8 == 7) n_q = SM_ATTEND_MAX;
    if (quick) n_q = 1 + (n_q - 1) % 15;
    static const enum fill kinds[] = {FILL_USUAL,  FILL_USUAL, FILL_ZERO,
                                      FILL_SPARSE, FILL_TINY,  FILL_MIXED};
    enum fill kind = kinds[below(SM_COUNT(kinds))];
    size_t ranges = below(4);
    bool vanishing = below(4) == 0; /* sums that end as a zero of either sign */
    float gain = (float[]){0.1f, 1.0f, 1.0f, 20.0f}[below(4)];
    bool sloped = below(4) == 0, biased = below(4) == 0;
    float cap = below(4) == 0 ? 1.0f + fabsf(uniform()) * 50 : 0, slope[SM_ATTEND_MAX];
    int query_at[SM_ATTEND_MAX];
    float *biases = floats(2 * SM_CHUNK); /* of distances: queries begin anywhere */
    const float *bias[SM_ATTEND_MAX];
    fill(biases, 2 * SM_CHUNK, FILL_USUAL);

    int16_t lo[SM_ATTEND_MAX], hi[SM_ATTEND_MAX];
    size_t first = SM_CHUNK, last = 0, group = 1 + below(8), at = below(SM_CHUNK),
           window = 1 + below(80);
    for (size_t i = 0; i < n_q; i++) {
        size_t position = SM_MIN(at + i / group, SM_CHUNK - 1);
        size_t from = 0, to = SM_CHUNK; /* 0: all of the chunk */
        if (ranges == 1) to = position + 1; /* causal */
        if (ranges == 2) { /* a window */
            to = position + 1;
            from = to > window ? to - window : 0;
        }
        if (ranges == 3) {
            from = below(SM_CHUNK);
            to = from + 1 + below(SM_CHUNK - from);
        }
        lo[i] = (int16_t)from;
        hi[i] = (int16_t)to;
        slope[i] = fabsf(uniform());
        bias[i] = biases + below(SM_CHUNK);
        query_at[i] = (int)position + (below(2) ? SM_CHUNK * (int)below(1000) : 0);
        first = SM_MIN(first, from);
        last = SM_MAX(last, to);
    }
    snprintf(shape, sizeof shape,
             "head %zu, %zu queries, kv type %d, ranges %zu, [%zu, %zu), fill %d, cap %g%s%s",
             head, n_q, kv_type, ranges, first, last, (int)kind, (double)cap,
             sloped ? ", slopes" : "", biased ? ", biases" : "");

    struct sm_attend a = {
        .lo = lo, .hi = hi, .n_q = n_q, .head = head, .kv_type = kv_type, .cap = cap,
        .slope = sloped ? slope : NULL, .at = sloped ? query_at : NULL,
        .bias = biased ? bias : NULL, .scratch = scratch};
    float *q = floats(n_q * head), *want = floats(n_q * (head + 2)),
          *got = floats(n_q * (head + 2));
    fill(q, n_q * head, kind == FILL_MIXED && below(2) ? FILL_USUAL : kind);
    for (size_t i = 0; i < n_q * head; i++) q[i] *= gain;
    a.q = q;
    for (size_t p = 0; p * SM_PAGE < last; p++) {
        void *k = allocate(kv_bytes(kv_type, head)), *v = allocate(kv_bytes(kv_type, head));
        for (size_t j = 0; j < SM_PAGE; j++) {
            /* What no query sees was never written, and may be NaN. */
            bool seen = p * SM_PAGE + j >= first && p * SM_PAGE + j < last;
            for (size_t d = 0; d < head; d++) {
                float x = fill_one(kind), y = fill_one(kind);
                if (vanishing) y = below(2) ? 0.0f : -0x1p-149f;
                kv_write(kv_type, k, k_index(j, d, head), seen ? x : NAN);
                kv_write(kv_type, v, j * head + d, seen ? y : NAN);
            }
            if (kv_type != SMALLM_KV_Q8) continue;
            *kv_scale(k, head, j) = seen ? fabsf(fill_one(kind)) * 0.01f : NAN;
            *kv_scale(v, head, j) = seen ? fabsf(fill_one(kind)) * 0.01f : NAN;
        }
        a.k[p] = k;
        a.v[p] = v;
    }
    if (kv_type == SMALLM_KV_Q8 && below(4) == 0) { /* seen by some queries, mostly not by all */
        size_t j = first + below(last - first);
        const void *const *parts = below(2) ? a.k : a.v;
        *kv_scale(parts[j / SM_PAGE], head, j % SM_PAGE) = NAN;
    }
    a.m = want;
    a.l = want + n_q;
    a.o = want + 2 * n_q;
    ref_attend(&a);
    a.m = got;
    a.l = got + n_q;
    a.o = got + 2 * n_q;
    for (size_t i = 0; i < n_tiers; i++) {
        memset(got, 0xA5, n_q * (head + 2) * sizeof *got);
        memset(scratch, 0xFF, SM_SCRATCH_BYTES);
        tiers[i].k.attend(&a);
        compare(tiers[i].name, "m, l, o", got, want, n_q * (head + 2));
    }
    for (size_t p = 0; p * SM_PAGE < last; p++) {
        free((void *)a.k[p]);
        free((void *)a.v[p]);
    }
    free(biases);
    free(q);
    free(want);
    free(got);
}

static void case_fold(uint64_t seed) {
    size_t head = 4 * (1 + below(SM_HEAD_MAX / 4));
    enum fill kind = (enum fill)(seed % FILL_COUNT);
    float M = uniform() * 50, m = below(4) ? uniform() * 50 : M, L = fabsf(uniform()) * 9,
          l = fabsf(uniform());
    snprintf(shape, sizeof shape, "head %zu, M %a, m %a, fill %d", head, (double)M, (double)m,
             (int)kind);
    float *start = floats(head), *o = floats(head), *want = floats(head), *got = floats(head);
    fill(start, head, kind);
    fill(o, head, kind);
    float max = fmaxf(M, m), a = sm_expf(M - max), b = sm_expf(m - max);
    float sum = sm_fma(L, a, l * b);
    for (size_t d = 0; d < head; d++) want[d] = sm_fma(start[d], a, o[d] * b);
    for (size_t i = 0; i < n_tiers; i++) {
        float gotM = M, gotL = L;
        memcpy(got, start, head * sizeof *got);
        tiers[i].k.attend_fold(&gotM, &gotL, got, m, l, o, head);
        compare(tiers[i].name, "M", &gotM, &max, 1);
        compare(tiers[i].name, "L", &gotL, &sum, 1);
        compare(tiers[i].name, "O", got, want, head);
    }
    float r = 1.0f / L;
    for (size_t d = 0; d < head; d++) want[d] = start[d] * r;
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.attend_finish(got, start, L, head);
        compare(tiers[i].name, "finished", got, want, head);
    }
    free(start);
    free(o);
    free(want);
    free(got);
}

/* Codes of x [n] to page[at + i * step], and their scale. */
static float ref_quantize(int8_t *page, size_t at, size_t step, const float *x, size_t n) {
    float most = 0;
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        finite = finite && isfinite(x[i]);
        most = fmaxf(most, fabsf(x[i]));
    }
    bool zero = !finite || most < 0x1p-100f;
    float id = zero ? 0 : 127.0f / most;
    for (size_t i = 0; i < n; i++) {
        float code = zero ? 0 : rintf(x[i] * id);
        page[at + i * step] = (int8_t)fmaxf(-127, fminf(127, code));
    }
    return !finite ? NAN : zero ? 0 : most / 127.0f;
}

static void case_kv_store(uint64_t seed) {
    size_t head = 4 * (1 + below(SM_HEAD_MAX / 4)), position = below(SM_PAGE);
    if (seed % 2) head = (size_t[]){4, 8, 64, 80, 128}[below(5)];
    int kv_type = (int)(seed / 2 % 3); /* all of them */
    enum fill kind = (enum fill)(seed / 6 % FILL_COUNT);
    snprintf(shape, sizeof shape, "head %zu, slot %zu, kv type %d, fill %d", head, position,
             kv_type, (int)kind);
    size_t bytes = kv_bytes(kv_type, head);
    void *wantk = allocate(bytes), *wantv = allocate(bytes), *gotk = allocate(bytes),
         *gotv = allocate(bytes);
    float *k = floats(head), *v = floats(head);
    fill(k, head, kind);
    fill(v, head, kind);
    if (below(4) == 0) k[below(head)] = INFINITY, v[below(head)] = -INFINITY;
    if (kv_type == SMALLM_KV_Q8) {
        if (below(8) == 0) (below(2) ? k : v)[below(head)] = NAN;
        *kv_scale(wantk, head, position) = ref_quantize(wantk, k_index(position, 0, head), 16, k, head);
        *kv_scale(wantv, head, position) = ref_quantize(wantv, position * head, 1, v, head);
    }
    for (size_t d = 0; d < head && kv_type != SMALLM_KV_Q8; d++) {
        kv_write(kv_type, wantk, k_index(position, d, head), k[d]);
        kv_write(kv_type, wantv, position * head + d, v[d]);
    }
    for (size_t i = 0; i < n_tiers; i++) {
        memset(gotk, 0xA5, bytes);
        memset(gotv, 0xA5, bytes);
        tiers[i].k.kv_store(kv_type, gotk, gotv, position, k, v, head);
        compare_bytes(tiers[i].name, "the K page", gotk, wantk, bytes);
        compare_bytes(tiers[i].name, "the V page", gotv, wantv, bytes);
    }
    free(wantk);
    free(wantv);
    free(gotk);
    free(gotv);
    free(k);
    free(v);
}

/* ---- one vector ---- */

static void case_vector(uint64_t seed) {
    size_t n = 1 + below(below(3) ? 100 : 2000);
    enum fill kind = (enum fill)(seed % FILL_COUNT);
    snprintf(shape, sizeof shape, "n %zu, fill %d", n, (int)kind);
    float *x = floats(2 * n), *w = floats(n), *want = floats(2 * n), *got = floats(2 * n);
    float *cos = floats(n), *sin = floats(n);
    fill(x, 2 * n, kind);
    fill(w, n, below(2) ? kind : FILL_USUAL);
    fill(cos, n, FILL_USUAL);
    fill(sin, n, FILL_USUAL);
    float a = fill_one(kind);

    float lane[16] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 16] = sm_fma(x[i], x[i], lane[i % 16]);
    float ss = ref_tree16(lane);
    float r = isfinite(ss) ? 1.0f / sqrtf(ss / (float)n + 1e-5f) : NAN;
    for (size_t i = 0; i < n; i++) want[i] = (x[i] * r) * w[i];
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.rms_norm(got, x, w, n, 1e-5f);
        compare(tiers[i].name, "rms_norm", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.rms_norm(got, got, w, n, 1e-5f);
        compare(tiers[i].name, "rms_norm in place", got, want, n);
    }
    memset(lane, 0, sizeof lane);
    for (size_t i = 0; i < n; i++) lane[i % 16] += x[i];
    float mean = ref_tree16(lane) / (float)n;
    memset(lane, 0, sizeof lane);
    for (size_t i = 0; i < n; i++) lane[i % 16] = sm_fma(x[i] - mean, x[i] - mean, lane[i % 16]);
    ss = ref_tree16(lane);
    r = isfinite(ss) ? 1.0f / sqrtf(ss / (float)n + 1e-5f) : NAN;
    for (size_t i = 0; i < n; i++) want[i] = sm_fma((x[i] - mean) * r, w[i], cos[i]);
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.layer_norm(got, x, w, cos, n, 1e-5f);
        compare(tiers[i].name, "layer_norm", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.layer_norm(got, got, w, cos, n, 1e-5f);
        compare(tiers[i].name, "layer_norm in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = sm_fma((x[i] - mean) * r, w[i], 0.0f);
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.layer_norm(got, x, w, NULL, n, 1e-5f);
        compare(tiers[i].name, "layer_norm without b", got, want, n);
    }
    for (size_t i = 0; i < n; i++) {
        want[2 * i] = sm_fma(x[2 * i], cos[i], -(x[2 * i + 1] * sin[i]));
        want[2 * i + 1] = sm_fma(x[2 * i], sin[i], x[2 * i + 1] * cos[i]);
    }
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, x, 2 * n * sizeof *got);
        tiers[i].k.rope_pairs(got, cos, sin, n);
        compare(tiers[i].name, "rope_pairs", got, want, 2 * n);
    }
    for (size_t i = 0; i < n; i++) {
        want[i] = sm_fma(x[i], cos[i], -(x[n + i] * sin[i]));
        want[n + i] = sm_fma(x[i], sin[i], x[n + i] * cos[i]);
    }
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, x, 2 * n * sizeof *got);
        tiers[i].k.rope_halves(got, cos, sin, n);
        compare(tiers[i].name, "rope_halves", got, want, 2 * n);
    }
    for (size_t i = 0; i < n; i++) {
        float inner = x[i] * sm_fma(SM_GELU_B, x[i] * x[i], SM_GELU_A);
        want[i] = x[i] / (1.0f + sm_expf(-inner));
        double v = x[i], exact = 0.5 * v * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
        if (fabs(want[i] - exact) > 1e-6 * fabs(v) + 1e-37) fail("gelu", "not the tanh form");
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.gelu(got, x, n);
        compare(tiers[i].name, "gelu", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.gelu(got, got, n);
        compare(tiers[i].name, "gelu in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] *= w[i]; /* gelu(x), from above */
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.geglu(got, x, w, n);
        compare(tiers[i].name, "geglu", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.geglu(got, got, w, n);
        compare(tiers[i].name, "geglu in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) {
        static const float Q[] = SM_GELU_ERF_Q;
        float t = 1.0f / sm_fma(SM_GELU_ERF_P, fabsf(x[i]), 1.0f), q = Q[0];
        for (size_t j = 1; j < SM_COUNT(Q); j++) q = sm_fma(q, t, Q[j]);
        float h = sm_expf(-(x[i] * x[i] * 0.5f)) * (q * t);
        want[i] = x[i] < 0 ? x[i] * h : sm_fma(-x[i], h, x[i]);
        double v = x[i], exact = 0.5 * v * erfc(-v * 0.70710678118654752);
        if (fabs(want[i] - exact) > 2e-7 * fabs(v) + 1e-37) fail("gelu_erf", "not the exact form");
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.gelu_erf(got, x, n);
        compare(tiers[i].name, "gelu_erf", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.gelu_erf(got, got, n);
        compare(tiers[i].name, "gelu_erf in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] *= w[i]; /* gelu_erf(x), from above */
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.geglu_erf(got, x, w, n);
        compare(tiers[i].name, "geglu_erf", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.geglu_erf(got, got, w, n);
        compare(tiers[i].name, "geglu_erf in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = x[i] < 0 ? 0 : x[i];
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.relu(got, x, n);
        compare(tiers[i].name, "relu", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.relu(got, got, n);
        compare(tiers[i].name, "relu in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] *= want[i];
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.relu2(got, x, n);
        compare(tiers[i].name, "relu2", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.relu2(got, got, n);
        compare(tiers[i].name, "relu2 in place", got, want, n);
    }
    float cap = 1.0f + fabsf(a) * 50;
    for (size_t i = 0; i < n; i++) {
        want[i] = ref_softcap(x[i], cap);
        double exact = (double)cap * tanh((double)x[i] / (double)cap);
        if (fabs((double)want[i] - exact) > 3e-7 * (double)cap) fail("softcap", "not cap tanh(x / cap)");
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.softcap(got, x, cap, n);
        compare(tiers[i].name, "softcap", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.softcap(got, got, cap, n);
        compare(tiers[i].name, "softcap in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = 1.0f / (1.0f + sm_expf(-x[i]));
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.sigmoid(got, got, n);
        compare(tiers[i].name, "sigmoid in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = x[i] / (1.0f + sm_expf(-x[i])) * w[i];
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.swiglu(got, x, w, n);
        compare(tiers[i].name, "swiglu", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.swiglu(got, got, w, n);
        compare(tiers[i].name, "swiglu in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = (x[i] < 0 ? 0 : x[i] * x[i]) * w[i];
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.relu2glu(got, x, w, n);
        compare(tiers[i].name, "relu2glu", got, want, n);
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.relu2glu(got, got, w, n);
        compare(tiers[i].name, "relu2glu in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) { /* beyond the limits, too */
        cos[i] = 8 * x[i];
        sin[i] = 8 * w[i];
        float g = cos[i] > 7 ? 7 : cos[i], u = sin[i] > 7 ? 7 : sin[i] < -7 ? -7 : sin[i];
        want[i] = g / (1.0f + sm_expf(-(g * 1.702f))) * (u + 1.0f);
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.swiglu_clamped(got, cos, sin, n);
        compare(tiers[i].name, "swiglu_clamped", got, want, n);
        memcpy(got, cos, n * sizeof *got);
        tiers[i].k.swiglu_clamped(got, got, sin, n);
        compare(tiers[i].name, "swiglu_clamped in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = x[i] * a;
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.scale(got, x, a, n);
        compare(tiers[i].name, "scale", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = w[i] + x[i];
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, w, n * sizeof *got);
        tiers[i].k.add(got, x, n);
        compare(tiers[i].name, "add", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = sm_fma(a, x[i], w[i]);
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, w, n * sizeof *got);
        tiers[i].k.add_scaled(got, x, a, n);
        compare(tiers[i].name, "add_scaled", got, want, n);
    }
    free(x);
    free(w);
    free(want);
    free(got);
    free(cos);
    free(sin);
}

/* ---- mixers that carry a state ---- */

static void case_recurrent(uint64_t seed) {
    (void)seed;
    size_t n = 1 + below(below(2) ? 40 : 600), taps = 2 + below(SM_TAPS_MAX - 1);
    size_t stride = n + below(20), n_state = 1 + below(40), head = 1 + below(SM_HEAD_MAX);
    enum fill kind = below(2) ? FILL_USUAL : (enum fill)below(FILL_COUNT);
    snprintf(shape, sizeof shape, "n %zu, %zu taps, head %zu, %zu states, values %d", n, taps, head,
             n_state, (int)kind);
    float *x = floats(taps * n), *w = floats(taps * stride), *bias = floats(n);
    float *want = floats(n), *got = floats(n);
    const float *rows[SM_TAPS_MAX];
    fill(x, taps * n, kind);
    fill(w, taps * stride, FILL_USUAL);
    fill(bias, n, FILL_USUAL);
    for (size_t j = 0; j < taps; j++) rows[j] = x + j * n;
    bool biased = below(2) != 0;
    for (size_t i = 0; i < n; i++) {
        want[i] = biased ? bias[i] : 0.0f;
        for (size_t j = 0; j < taps; j++) want[i] = sm_fma(w[j * stride + i], x[j * n + i], want[i]);
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.conv(got, rows, w, stride, biased ? bias : NULL, taps, n);
        compare(tiers[i].name, "conv", got, want, n);
        memcpy(got, rows[taps - 1], n * sizeof *got);
        rows[taps - 1] = got;
        tiers[i].k.conv(got, rows, w, stride, biased ? bias : NULL, taps, n);
        rows[taps - 1] = x + (taps - 1) * n;
        compare(tiers[i].name, "conv in place", got, want, n);
    }
    for (size_t i = 0; i < n; i++) want[i] = x[i] / (1.0f + sm_expf(-x[i]));
    for (size_t i = 0; i < n_tiers; i++) {
        memcpy(got, x, n * sizeof *got);
        tiers[i].k.silu(got, got, n);
        compare(tiers[i].name, "silu in place", got, want, n);
    }

    size_t size = n_state * head;
    float *from = floats(size), *to = floats(size), *want_to = floats(size);
    float *in = floats(head), *b = floats(n_state), *c = floats(n_state), *y = floats(head),
          *want_y = floats(head);
    fill(from, size, kind);
    fill(in, head, kind);
    fill(b, n_state, FILL_USUAL);
    fill(c, n_state, FILL_USUAL);
    struct sm_ssm_step call = {.from = from, .x = in, .b = b, .c = c, .dt = fabsf(uniform()),
                               .decay = fabsf(uniform()), .skip = uniform(), .head = head,
                               .n_state = n_state};
    for (size_t i = 0; i < head; i++) {
        float u = in[i] * call.dt;
        want_y[i] = in[i] * call.skip;
        for (size_t s = 0; s < n_state; s++) {
            float h = sm_fma(from[s * head + i], call.decay, u * b[s]);
            want_to[s * head + i] = h;
            want_y[i] = sm_fma(h, c[s], want_y[i]);
        }
    }
    for (size_t i = 0; i < n_tiers; i++) {
        call.y = y;
        call.to = to;
        call.x = in;
        call.from = from;
        tiers[i].k.ssm_step(&call);
        compare(tiers[i].name, "ssm_step, what is read", y, want_y, head);
        compare(tiers[i].name, "ssm_step, the state", to, want_to, size);
        memcpy(y, in, head * sizeof *y);
        memcpy(to, from, size * sizeof *to);
        call.x = y;
        call.from = to;
        tiers[i].k.ssm_step(&call);
        compare(tiers[i].name, "ssm_step in place, what is read", y, want_y, head);
        compare(tiers[i].name, "ssm_step in place, the state", to, want_to, size);
    }
    float *all[] = {x, w, bias, want, got, from, to, want_to, in, b, c, y, want_y};
    for (size_t i = 0; i < SM_COUNT(all); i++) free(all[i]);
}

/* ---- the router ---- */

/* How many experts come before e: those with larger logits, and of equal ones those with lower ids. */
static size_t rank_of(const float *logits, size_t n_expert, size_t e) {
    size_t rank = 0;
    for (size_t i = 0; i < n_expert; i++)
        rank += logits[i] > logits[e] || (logits[i] == logits[e] && i < e);
    return rank;
}

static void case_route(uint64_t seed) {
    size_t n_expert = 1 + below(seed % 8 == 0 ? SM_EXPERTS_MAX : 130);
    size_t n_used = 1 + below(SM_MIN(n_expert, SM_USED_MAX));
    bool of_chosen = below(2) != 0;
    float scale = below(2) ? 1.0f : 2.5f, *logits = floats(n_expert), *e = floats(n_expert);
    fill(logits, n_expert, FILL_USUAL);
    for (size_t i = 0; i < n_expert && below(2); i++) /* ties, also between zeros of both signs */
        logits[i] = below(2) ? (float)(int)(3 * logits[i]) : copysignf(0, logits[i]);
    snprintf(shape, sizeof shape, "%zu of %zu experts", n_used, n_expert);

    uint16_t ids[SM_USED_MAX];
    float want[SM_USED_MAX], got[SM_USED_MAX], lane[16] = {0}, m = -INFINITY;
    double sum = 0;
    for (size_t i = 0; i < n_expert; i++) m = fmaxf(m, logits[i]);
    size_t n = 0, counted = 0;
    for (size_t i = 0; i < n_expert; i++) {
        bool chosen = rank_of(logits, n_expert, i) < n_used;
        e[i] = sm_expf(logits[i] - m);
        if (chosen) ids[n++] = (uint16_t)i;
        if (chosen || !of_chosen) lane[counted++ % 16] += e[i];
        if (chosen || !of_chosen) sum += exp((double)logits[i] - m);
    }
    float r = 1.0f / ref_tree16(lane);
    for (size_t i = 0; i < n_used; i++) {
        want[i] = e[ids[i]] * r * scale;
        double below_m = (double)m - logits[ids[i]]; /* rounded to float before expf */
        double exact = exp(-below_m) / sum * scale;
        if (fabs(want[i] - exact) > (1e-6 + 1e-7 * below_m) * exact + 1e-37) fail("route", "not the softmax");
    }
    for (size_t i = 0; i < n_tiers; i++) {
        uint16_t found[SM_USED_MAX];
        if (!tiers[i].k.route(found, got, n_used, logits, n_expert, of_chosen, scale))
            fail(tiers[i].name, "finite logits are refused");
        if (memcmp(found, ids, n_used * sizeof ids[0]) != 0) fail(tiers[i].name, "other experts");
        compare(tiers[i].name, "route", got, want, n_used);
        size_t bad = below(n_expert);
        float good = logits[bad];
        logits[bad] = below(2) ? NAN : below(2) ? INFINITY : -INFINITY;
        if (tiers[i].k.route(found, got, n_used, logits, n_expert, of_chosen, scale))
            fail(tiers[i].name, "a logit that is not finite");
        logits[bad] = good;
    }
    free(logits);
    free(e);
}

/* ---- codes of weights ---- */

static void case_fit(uint64_t seed) {
    enum sm_type t = (enum sm_type)(seed % SM_TYPE_COUNT);
    const struct sm_writer *writer = sm_writer(t);
    if (!writer || !writer->put) return;
    const struct sm_quant *quant = &sm_quants[t];
    size_t n_blocks = 1 + below(20), n = n_blocks * quant->block_size;
    size_t bytes = n_blocks * sizeof(struct sm_codes);
    float *x = floats(n), *w = floats(n), *values = floats(n), *file = floats(n);
    struct sm_codes *want = allocate(bytes), *got = allocate(bytes);
    uint8_t *blocks = allocate(n_blocks * quant->block_bytes);
    enum fill kind = (enum fill)below(FILL_COUNT);
    bool weighted = below(2) != 0;
    snprintf(shape, sizeof shape, "%s, %zu blocks, fill %d%s", quant->name, n_blocks, kind,
             weighted ? ", weighted" : "");
    fill(x, n, kind);
    for (size_t i = 0; i < n; i++) {
        x[i] = fmaxf(-SM_FIT_MAX, fminf(x[i], SM_FIT_MAX));
        w[i] = below(10) ? fabsf(uniform()) * 2 : 0x1p-14f;
    }
    memset(want, 0, bytes);
    tiers[0].k.fit(t, x, weighted ? w : NULL, n_blocks, want);
    for (size_t i = 1; i < n_tiers; i++) {
        memset(got, 0, bytes);
        tiers[i].k.fit(t, x, weighted ? w : NULL, n_blocks, got);
        compare_bytes(tiers[i].name, quant->name, got, want, bytes);
    }
    /* What was found is what a file's blocks say, and no worse than zeros. */
    writer->put(want, blocks, n_blocks);
    if (quant->find_nonfinite(blocks, n_blocks) == n_blocks) {
        quant->dequantize(blocks, file, n_blocks);
        for (size_t b = 0; b < n_blocks; b++) {
            float *at = values + b * quant->block_size, *from = x + b * quant->block_size;
            double lost = 0, there = 0;
            sm_codes_values(sm_layout_of(t), &want[b], at);
            for (size_t i = 0; i < quant->block_size; i++) {
                double weight = weighted ? w[b * quant->block_size + i] : 1;
                lost += weight * ((double)at[i] - from[i]) * ((double)at[i] - from[i]);
                there += weight * (double)from[i] * from[i];
            }
            /* Half a unit of the smallest float16, as a scale of such codes, is lost at most. */
            double unit = weighted ? 4096 : 1024;
            if (!(lost <= 1.001 * there + unit * (128 * 0x1p-25) * (128 * 0x1p-25)))
                fail("generic", "worse than zeros");
        }
        compare("generic", "value", file, values, n);
    }
    free(x);
    free(w);
    free(values);
    free(file);
    free(want);
    free(got);
    free(blocks);
}

/* ---- the choice of a tier ---- */

static void expect_tier(const char *wanted, const char *name) {
    smallm_error err = {.size = sizeof err};
    const struct sm_kernels *k = NULL;
    if (wanted)
        setenv("SMALLM_ISA", wanted, 1);
    else
        unsetenv("SMALLM_ISA");
    int status = sm_kernels_get(&k, &err);
    snprintf(shape, sizeof shape, "SMALLM_ISA=%s", wanted ? wanted : "(unset)");
    char available[128];
    sm_kernels_available(available, sizeof available);
    if (name == NULL) {
        if (status != SMALLM_E_ARGUMENT) fail("dispatch", "no error");
        if (strstr(err.message, wanted) == NULL || strstr(err.message, available) == NULL)
            fail("dispatch", "the message names neither the value nor what there is");
    } else if (status != SMALLM_OK || strcmp(k->name, name) != 0) {
        fail("dispatch", "not that tier");
    } else {
        for (size_t t = 0; t < SM_TYPE_COUNT; t++)
            if (k->matmul[t] == NULL) fail("dispatch", "an empty slot");
    }
}

/* Against a maximum taken one by one; NaN has no equal, so it is compared as a number. */
static void case_peaks(uint64_t seed) {
    float x[400], got[25];
    size_t n = 1 + below(SM_COUNT(x));
    snprintf(shape, sizeof shape, "n %zu", n);
    for (size_t j = 0; j < n; j++) x[j] = (float)below(2001) - 1000.0f;
    if (seed % 3 != 0 && n > 40) {
        x[n / 2] = NAN;
        x[n - 1] = -INFINITY;
        for (size_t j = 0; j < 16; j++) x[j] = j % 2 == 0 ? -0.0f : 0.0f;
    }
    for (size_t i = 0; i < n_tiers; i++) {
        tiers[i].k.peaks(got, x, n);
        for (size_t b = 0; b < (n + 15) / 16; b++) {
            float most = -INFINITY;
            bool nan = false;
            for (size_t j = 16 * b; j < SM_MIN(16 * b + 16, n); j++) {
                most = fmaxf(most, x[j]);
                nan = nan || isnan(x[j]);
            }
            if (nan ? !isnan(got[b]) : got[b] != most || (most == 0 && signbit(got[b])))
                fail(tiers[i].name, "peaks");
        }
    }
}

static void case_dispatch(uint64_t seed) {
    (void)seed;
    const char *before = getenv("SMALLM_ISA");
    char *saved = before ? strdup(before) : NULL;
    struct sm_kernels k;
    bool usable;
    const char *best = "generic";
    for (size_t i = 0; sm_kernels_tier(i, &k, &usable); i++) {
        expect_tier(k.name, usable ? k.name : NULL);
        if (usable) best = k.name;
    }
    expect_tier(NULL, best);
    expect_tier("", best);
    expect_tier("abacus", NULL);
    if (saved)
        setenv("SMALLM_ISA", saved, 1);
    else
        unsetenv("SMALLM_ISA");
    free(saved);
}

/* ---- times ---- */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median seconds of one call. */
static double time_of(void (*run)(const struct sm_kernels *, void *), const struct sm_kernels *k,
                      void *arg) {
    double sample[15];
    size_t n = 1;
    for (;;) { /* also the warm-up */
        uint64_t begin = sm_clock_ns();
        for (size_t i = 0; i < n; i++) run(k, arg);
        if (sm_clock_ns() - begin > 3000000) break;
        n *= 2;
    }
    for (size_t s = 0; s < SM_COUNT(sample); s++) {
        uint64_t begin = sm_clock_ns();
        for (size_t i = 0; i < n; i++) run(k, arg);
        sample[s] = (double)(sm_clock_ns() - begin) * 1e-9 / (double)n;
    }
    qsort(sample, SM_COUNT(sample), sizeof *sample, ascending);
    return sample[SM_COUNT(sample) / 2];
}

/* A line for each tier: time, and amount / time where there is an amount (of `unit` per 1e9). */
static void bench(const char *pattern, const char *what, const char *unit, double amount,
                  void (*run)(const struct sm_kernels *, void *), void *arg) {
    for (size_t i = 0; i < n_tiers; i++) {
        char line[200];
        snprintf(line, sizeof line, "%-12s %-44s", tiers[i].name, what);
        if (pattern && strstr(line, pattern) == NULL) continue;
        double s = time_of(run, &tiers[i].k, arg);
        printf("%s %10.3f us", line, s * 1e6);
        if (amount > 0) printf(" %8.2f %s", amount / s * 1e-9, unit);
        printf("\n");
        fflush(stdout);
    }
}

struct bench_matmul {
    enum sm_type type;
    struct sm_matmul call;
};
static void run_matmul(const struct sm_kernels *k, void *arg) {
    struct bench_matmul *b = arg;
    k->matmul[b->type](&b->call);
}

static void bench_matmuls(const char *pattern) {
    for (int t = 0; t < SM_TYPE_COUNT; t++) {
        static const struct {
            size_t n_rows, k, n_tokens;
        } sizes[] = {{1 << 16, 1024, 1}, {1 << 16, 1024, 8}, {1536, 512, 1},
                     {1536, 512, 8}, {1536, 512, 16}, {1536, 512, 128}};
        for (size_t s = 0; s < SM_COUNT(sizes); s++) {
            size_t n_rows = sizes[s].n_rows, k = sizes[s].k, n = sizes[s].n_tokens;
            char what[100];
            snprintf(what, sizeof what, "matmul %s %zu x %zu, %zu tokens", sm_quants[t].name,
                     n_rows, k, n);
            if (pattern && strstr(what, pattern) == NULL) {
                bool wanted = false; /* by the tier's name */
                for (size_t i = 0; i < n_tiers; i++)
                    wanted |= strstr(tiers[i].name, pattern) != NULL;
                if (!wanted) continue;
            }
            struct matrix m = make_matrix((enum sm_type)t, n_rows, k);
            struct sm_acts acts = make_acts(sm_quants[t].act, n, k);
            float *x = floats(k), *out = floats(n * n_rows);
            for (size_t i = 0; i < n; i++) {
                fill(x, k, FILL_USUAL);
                ref_prepare(sm_quants[t].act, &acts, i, x);
            }
            struct bench_matmul b = {.type = (enum sm_type)t,
                                     .call = {.out = out,
                                              .ld = n_rows,
                                              .panels = m.panels,
                                              .panel_bytes = m.panel_bytes,
                                              .n_panels = m.n_panels,
                                              .acts = &acts,
                                              .n_tokens = n,
                                              .scratch = scratch}};
            if (n == 1)
                bench(pattern, what, "GB/s", (double)(m.n_panels * m.panel_bytes), run_matmul, &b);
            else
                bench(pattern, what, "GOP/s", 2.0 * (double)(n_rows * k * n), run_matmul, &b);
            free_matrix(&m);
            free_acts(&acts);
            free(x);
            free(out);
        }
    }
}

struct bench_attend {
    struct sm_attend call;
    uint8_t *memory; /* [n_chunks] K and V of one chunk */
    size_t n_chunks, next, chunk_bytes;
};
static void run_attend(const struct sm_kernels *k, void *arg) {
    struct bench_attend *b = arg;
    uint8_t *chunk = b->memory + b->next * b->chunk_bytes;
    b->next = (b->next + 1) % b->n_chunks;
    for (size_t p = 0; p < SM_CHUNK_PAGES; p++) {
        b->call.k[p] = chunk + 2 * p * b->chunk_bytes / (2 * SM_CHUNK_PAGES);
        b->call.v[p] = chunk + (2 * p + 1) * b->chunk_bytes / (2 * SM_CHUNK_PAGES);
    }
    k->attend(&b->call);
}

static void bench_attends(const char *pattern) {
    static const struct {
        size_t n_q, head, n_chunks;
        bool causal;
    } sizes[] = {{1, 64, 1, 0},    {3, 64, 1, 0},    {8, 128, 1, 0},   {12, 64, 1, 0},
                 {1, 64, 1000, 0}, {3, 64, 1000, 0}, {4, 128, 500, 0}, {8, 128, 500, 0},
                 {24, 64, 1, 0},   {64, 64, 1, 0},   {64, 80, 1, 0},   {64, 128, 1, 0},
                 {64, 64, 1, 1},   {8, 8, 1, 0}};
    for (size_t s = 0; s < SM_COUNT(sizes); s++)
        for (int kv = 0; kv <= SMALLM_KV_Q8; kv++) {
            size_t n_q = sizes[s].n_q, head = sizes[s].head;
            size_t chunk_bytes = 2 * SM_CHUNK_PAGES * kv_bytes(kv, head);
            float *q = floats(n_q * head), *out = floats(n_q * (head + 2));
            int16_t lo[SM_ATTEND_MAX] = {0}, hi[SM_ATTEND_MAX];
            size_t pairs = 0;
            for (size_t i = 0; i < n_q; i++) {
                hi[i] = (int16_t)(sizes[s].causal ? 129 + i / 3 : SM_CHUNK);
                pairs += (size_t)hi[i];
            }
            fill(q, n_q * head, FILL_USUAL);
            struct bench_attend b = {.call = {.q = q,
                                              .lo = lo,
                                              .hi = hi,
                                              .n_q = n_q,
                                              .head = head,
                                              .kv_type = kv,
                                              .m = out,
                                              .l = out + n_q,
                                              .o = out + 2 * n_q,
                                              .scratch = scratch},
                                     .n_chunks = sizes[s].n_chunks,
                                     .chunk_bytes = chunk_bytes};
            b.memory = sm_alloc(b.n_chunks * chunk_bytes); /* on huge pages, as the cache's */
            if (b.memory == NULL) exit(2);
            memset(b.memory, 0x3c, b.n_chunks * chunk_bytes); /* small positive numbers */
            size_t n_values = b.n_chunks * chunk_bytes / (kv == SMALLM_KV_F32 ? 4 : 2);
            for (size_t i = 0; i < n_values && kv != SMALLM_KV_Q8; i++)
                kv_write(kv, b.memory, i, uniform());
            char what[100];
            snprintf(what, sizeof what, "attend head %zu, %zu queries, %s%s%s", head, n_q,
                     (const char *[]){"f16", "f32", "q8"}[kv], sizes[s].causal ? ", causal" : "",
                     b.n_chunks > 1 ? ", cold" : "");
            if (n_q <= 8 && head > 8)
                bench(pattern, what, "GB/s", (double)chunk_bytes, run_attend, &b);
            else
                bench(pattern, what, "GFLOP/s", 4.0 * (double)(pairs * head), run_attend, &b);
            sm_free(b.memory);
            free(q);
            free(out);
        }
}

struct bench_fit {
    enum sm_type t;
    float *x;
    struct sm_codes codes[16];
};
static void run_fit(const struct sm_kernels *k, void *arg) {
    struct bench_fit *b = arg;
    k->fit(b->t, b->x, NULL, 16, b->codes);
}
static void bench_fits(const char *pattern) {
    struct bench_fit b = {.x = floats(4096)};
    fill(b.x, 4096, FILL_USUAL);
    for (int t = 0; t < SM_TYPE_COUNT; t++) {
        b.t = (enum sm_type)t;
        if (!sm_writer(b.t) || !sm_writer(b.t)->put) continue;
        char what[40];
        snprintf(what, sizeof what, "fit %s", sm_quants[t].name);
        bench(pattern, what, "Gvalues/s", 16.0 * sm_quants[t].block_size, run_fit, &b);
    }
    free(b.x);
}

struct bench_vector {
    float *x, *w, *out;
    size_t n;
    struct sm_acts acts;
    enum sm_act act;
};
static void run_prepare(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->prepare[b->act](&b->acts, 0, b->x);
}
static void run_rms_norm(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->rms_norm(b->out, b->x, b->w, b->n, 1e-5f);
}
static void run_layer_norm(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->layer_norm(b->out, b->x, b->w, b->w, b->n, 1e-5f);
}
static float rope_cos[32], rope_sin[32];
static void run_rope_pairs(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->rope_pairs(b->out, rope_cos, rope_sin, 32);
}
static void run_rope_halves(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->rope_halves(b->out, rope_cos, rope_sin, 32);
}
static void run_gelu(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->gelu(b->out, b->x, b->n);
}
static void run_swiglu(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->swiglu(b->out, b->x, b->w, b->n);
}
static void run_scale(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->scale(b->out, b->x, 0.5f, b->n);
}
static void run_add(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->add(b->out, b->x, b->n);
}
static void run_fold(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    float M = 1, L = 1;
    k->attend_fold(&M, &L, b->out, 2, 1, b->x, 64);
}
static void run_finish(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->attend_finish(b->out, b->x, 3, 64);
}
static void run_kv_store(const struct sm_kernels *k, void *arg) {
    struct bench_vector *b = arg;
    k->kv_store(SMALLM_KV_F16, b->out, b->out + SM_PAGE * 64 / 2, 17, b->x, b->w, 64);
}

static void bench_vectors(const char *pattern) {
    struct bench_vector b = {.n = 1536};
    b.x = floats(b.n);
    b.w = floats(b.n);
    b.out = floats(SM_PAGE * 64);
    fill(b.x, b.n, FILL_USUAL);
    fill(b.w, b.n, FILL_USUAL);
    fill(b.out, SM_PAGE * 64, FILL_USUAL);
    for (int act = 0; act < SM_ACT_COUNT; act++) {
        static const char *const what[] = {"prepare F32 1536", "prepare Q8_32 1536",
                                           "prepare Q8_256 1536"};
        b.act = (enum sm_act)act;
        b.acts = make_acts(b.act, 1, b.n);
        bench(pattern, what[act], "", 0, run_prepare, &b);
        free_acts(&b.acts);
    }
    bench(pattern, "rms_norm 1536", "", 0, run_rms_norm, &b);
    bench(pattern, "layer_norm 1536", "", 0, run_layer_norm, &b);
    for (int i = 0; i < 32; i++) rope_cos[i] = 0.6f, rope_sin[i] = 0.8f; /* keep the length */
    bench(pattern, "rope_pairs 32 pairs", "", 0, run_rope_pairs, &b);
    bench(pattern, "rope_halves 32 pairs", "", 0, run_rope_halves, &b);
    bench(pattern, "swiglu 1536", "", 0, run_swiglu, &b);
    bench(pattern, "gelu 1536", "", 0, run_gelu, &b);
    bench(pattern, "scale 1536", "", 0, run_scale, &b);
    bench(pattern, "add 1536", "", 0, run_add, &b);
    bench(pattern, "attend_fold head 64", "", 0, run_fold, &b);
    bench(pattern, "attend_finish head 64", "", 0, run_finish, &b);
    bench(pattern, "kv_store head 64, f16", "", 0, run_kv_store, &b);
    free(b.x);
    free(b.w);
    free(b.out);
}

/* ---- the program ---- */

static const struct {
    const char *slot;
    void (*run)(uint64_t seed);
    size_t n_cases, n_quick;
} checks[] = {
    {"fma", case_fma, 3000, 50},
    {"expf", case_expf, 1000, 16},
    {"vector_expf", case_vector_expf, 600, 10},
    {"prepare", case_prepare, 2000, 200},
    {"matmul", case_matmul, SM_TYPE_COUNT * 64, SM_TYPE_COUNT * 4},
    {"attend", case_attend, 17 * 24, 17 * 6},
    {"attend_fold", case_fold, 2000, 100},
    {"kv_store", case_kv_store, 2000, 100},
    {"vector", case_vector, 2000, 100},
    {"recurrent", case_recurrent, 600, 50},
    {"peaks", case_peaks, 1000, 50},
    {"route", case_route, 1000, 50},
    {"fit", case_fit, SM_TYPE_COUNT * 40, SM_TYPE_COUNT * 4},
    {"dispatch", case_dispatch, 1, 1},
};

static void find_tiers(void) {
    struct tier *t = &tiers[n_tiers++];
    sm_init__generic(&t->k);
    t->name = "generic";
#if defined(SM_HAVE_X86)
    if (sm_cpu_features() & SM_CPU_AVX2) {
        t = &tiers[n_tiers++];
        sm_init__generic_fma(&t->k);
        t->name = "generic_fma";
    }
#endif
    bool usable;
    for (size_t i = 1; sm_kernels_tier(i, &tiers[n_tiers].k, &usable); i++) {
        if (!usable) continue;
        tiers[n_tiers].name = tiers[n_tiers].k.name;
        n_tiers++;
    }
}

int main(int argc, char **argv) {
    const char *only = NULL, *pattern = NULL;
    bool timing = false;
    uint64_t seed = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--bench") == 0) {
            timing = true;
            if (i + 1 < argc) pattern = argv[++i];
        } else {
            fprintf(stderr, "usage: %s [--quick] [--only SLOT [--seed N]] [--bench [PATTERN]]\n",
                    argv[0]);
            return 2;
        }
    }
    scratch = allocate(SM_SCRATCH_BYTES);
    uint64_t fpenv = sm_fpenv_enter();
    find_tiers();
    if (timing) {
        bench_matmuls(pattern);
        bench_attends(pattern);
        bench_vectors(pattern);
        bench_fits(pattern);
        free(scratch);
        sm_fpenv_leave(fpenv);
        return 0;
    }
    size_t n_run = 0;
    for (size_t c = 0; c < SM_COUNT(checks); c++) {
        slot = checks[c].slot;
        if (only && strcmp(only, slot) != 0) continue;
        size_t n = seed ? 1 : quick ? checks[c].n_quick : checks[c].n_cases, before = n_failures;
        uint64_t begin = sm_clock_ns();
        for (size_t i = 0; i < n; i++) {
            rng = case_seed = seed ? seed : SM_TYPE_COUNT * 16 * 17 + i;
            checks[c].run(case_seed);
        }
        n_run++;
        printf("%-12s %6zu cases, %zu failures, %.1f s\n", slot, n, n_failures - before,
               (double)(sm_clock_ns() - begin) * 1e-9);
        fflush(stdout);
    }
    if (n_run == 0) fprintf(stderr, "no slot \"%s\"\n", only);
    printf("tiers:");
    for (size_t i = 0; i < n_tiers; i++) printf(" %s", tiers[i].name);
    printf("\n");
    free(scratch);
    sm_fpenv_leave(fpenv);
    return n_run == 0 ? 2 : n_failures > 0;
}
