/* What the quantizers share: scales, mins and codes that lose least of some values.
 *
 * What is lost is sum w (x - value)^2 over a block; w NULL: all weigh the same.  Integers are found in
 * turns: codes for a scale, then the least-squares scale for the codes, from several beginnings.
 * Scales are rounded as the file stores them before the codes are chosen for good.
 *
 * One answer everywhere: sums have four lanes, which a fixed tree joins; products and sums are
 * rounded one by one; there is nothing here but + - * / and comparisons.
 * Values are finite and at most SM_FIT_MAX: no sum overflows.  Only static inline functions. */
#ifndef SM_QUANTS_FIT_H
#define SM_QUANTS_FIT_H

#include "block.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define SM_FIT_MAX 0x1p30f  /* more than any format of blocks holds */
#define SM_FIT_MIN 0x1p-40f /* less than any float16 scale gives: as good as zero */

typedef float sm_v4 __attribute__((vector_size(16)));
typedef int32_t sm_i4 __attribute__((vector_size(16)));

static inline sm_v4 sm_v4_all(float x) { return (sm_v4){x, x, x, x}; }
static inline sm_v4 sm_v4_load(const float *p) {
    sm_v4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline float sm_v4_sum(sm_v4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline sm_v4 sm_v4_min(sm_v4 a, sm_v4 b) {
#if defined(__SSE__)
    return (sm_v4)_mm_min_ps((__m128)a, (__m128)b);
#else
    sm_i4 less = (sm_i4)(a < b);
    return (sm_v4)(((sm_i4)a & less) | ((sm_i4)b & ~less));
#endif
}
static inline sm_v4 sm_v4_max(sm_v4 a, sm_v4 b) {
#if defined(__SSE__)
    return (sm_v4)_mm_max_ps((__m128)a, (__m128)b);
#else
    sm_i4 more = (sm_i4)(a > b);
    return (sm_v4)(((sm_i4)a & more) | ((sm_i4)b & ~more));
#endif
}
/* To the nearest integer, ties to even; |x| < 2^22. */
static inline sm_v4 sm_v4_round(sm_v4 x) {
    sm_v4 big = sm_v4_all(0x1.8p23f);
    return (x + big) - big;
}
/* The integer lo .. hi next to x; any finite x. */
static inline sm_v4 sm_v4_code(sm_v4 x, float lo, float hi) {
    return sm_v4_round(sm_v4_min(sm_v4_max(x, sm_v4_all(lo)), sm_v4_all(hi)));
}

static inline float sm_inverse(float d) { return d != 0 ? 1.0f / d : 0.0f; }
static inline float sm_f16_rounded(float x) { return sm_f16_to_f32(sm_f32_to_f16(x)); }
static inline void sm_put_f16(uint8_t at[2], float x) {
    uint16_t h = sm_f32_to_f16(x);
    at[0] = (uint8_t)h;
    at[1] = (uint8_t)(h >> 8);
}
static inline int sm_nearest(float x, int lo, int hi) { /* |x| < 2^22 */
    int n = (int)((x + 0x1.8p23f) - 0x1.8p23f);
    return SM_MIN(SM_MAX(n, lo), hi);
}

/* The value of x[n] farthest from zero, with its sign; of two alike the positive one.  n is a
 * multiple of 4, here and below. */
static inline float sm_peak(const float *x, int n) {
    sm_v4 low = sm_v4_load(x), high = low;
    for (int i = 4; i < n; i += 4) {
        low = sm_v4_min(low, sm_v4_load(x + i));
        high = sm_v4_max(high, sm_v4_load(x + i));
    }
    float a = SM_MIN(SM_MIN(low[0], low[1]), SM_MIN(low[2], low[3]));
    float b = SM_MAX(SM_MAX(high[0], high[1]), SM_MAX(high[2], high[3]));
    return b >= -a ? b : a;
}

/* code[n] = the integers lo .. hi next to x id + shift, each plus bias. */
static inline void sm_codes_of(const float *x, int n, float id, float shift, float lo, float hi,
                               int bias, uint8_t *code) {
    for (int i = 0; i < n; i += 4) {
        sm_v4 q = sm_v4_code(sm_v4_load(x + i) * id + shift, lo, hi);
        for (int j = 0; j < 4; j++) code[i + j] = (uint8_t)((int)q[j] + bias);
    }
}

/* ---- x = d q ---------------------------------------------------------------------------------- */

/* With codes q = the integers lo .. hi next to x id: the scale of least squares, and in *gain by how
 * much it makes sum w x^2 less. */
static inline float sm_scale_for(const float *x, const float *w, int n, float id, float lo, float hi,
                                 float *gain) {
    sm_v4 xq = {0}, qq = {0};
    for (int i = 0; i < n; i += 4) {
        sm_v4 v = sm_v4_load(x + i), q = sm_v4_code(v * id, lo, hi);
        sm_v4 wq = w ? sm_v4_load(w + i) * q : q;
        xq += wq * v;
        qq += wq * q;
    }
    float sum_xq = sm_v4_sum(xq), sum_qq = sm_v4_sum(qq);
    float d = sum_qq > 0 ? sum_xq / sum_qq : 0;
    *gain = d * sum_xq;
    return d;
}

/* The scale of x[n] to the integers lo .. hi, from beginnings that take the peak to each of
 * peaks[n_peaks]. */
static inline float sm_fit_scale(const float *x, const float *w, int n, float lo, float hi,
                                 const float *peaks, int n_peaks) {
    float peak = sm_peak(x, n), best = 0, most = 0, gain;
    if (peak < SM_FIT_MIN && peak > -SM_FIT_MIN) return 0;
    for (int i = 0; i < n_peaks; i++) {
        float d = sm_scale_for(x, w, n, peaks[i] / peak, lo, hi, &gain);
        if (gain > most) most = gain, best = d;
    }
    for (int i = 0; i < 2 && best != 0; i++) {
        float d = sm_scale_for(x, w, n, 1 / best, lo, hi, &gain);
        if (!(gain > most)) break;
        most = gain, best = d;
    }
    return best;
}

/* What x[n] loses with the scale d. */
static inline float sm_scale_loss(const float *x, const float *w, int n, float d, float lo, float hi) {
    sm_v4 sum = {0};
    float id = sm_inverse(d);
    for (int i = 0; i < n; i += 4) {
        sm_v4 v = sm_v4_load(x + i), e = v - d * sm_v4_code(v * id, lo, hi);
        sum += w ? sm_v4_load(w + i) * e * e : e * e;
    }
    return sm_v4_sum(sum);
}

/* The scale of 256 values to -1, 0 and 1. */
static inline float sm_fit_ternary(const float *x, const float *w) {
    static const float peaks[] = {1, 0.75f, 1.25f, 1.5f, 1.75f, 2, 2.25f, 2.5f, 3, 3.5f};
    float d = sm_fit_scale(x, w, 256, -1, 1, peaks, SM_COUNT(peaks));
    return d < 0 ? -d : d;
}

/* ---- x = d q + m ------------------------------------------------------------------------------ */

struct sm_line {
    float d, m;
};

/* With codes q = the integers 0 .. top next to (x - m) id: the line of least squares, with m <= 0
 * where below, and in *gain by how much it makes sum w x^2 less. */
static inline struct sm_line sm_line_for(const float *x, const float *w, int n, float id, float m,
                                         float top, bool below, float *gain) {
    sm_v4 wx = {0}, wq = {0}, xq = {0}, qq = {0}, ws = {0};
    for (int i = 0; i < n; i += 4) {
        sm_v4 v = sm_v4_load(x + i), q = sm_v4_code((v - m) * id, 0, top), weighted = q, one = v;
        if (w) {
            sm_v4 weight = sm_v4_load(w + i);
            weighted = weight * q;
            one = weight * v;
            ws += weight;
        }
        wx += one;
        wq += weighted;
        xq += weighted * v;
        qq += weighted * q;
    }
    float sw = w ? sm_v4_sum(ws) : (float)n, sx = sm_v4_sum(wx), sq = sm_v4_sum(wq),
          sxq = sm_v4_sum(xq), sqq = sm_v4_sum(qq);
    float det = sw * sqq - sq * sq;
    struct sm_line line = {0, sw > 0 ? sx / sw : 0};
    if (det > 0) line = (struct sm_line){(sw * sxq - sx * sq) / det, (sqq * sx - sq * sxq) / det};
    if (below && line.m > 0) line = (struct sm_line){sqq > 0 ? sxq / sqq : 0, 0};
    *gain = line.d * sxq + line.m * sx;
    return line;
}

/* The line of x[n] to the integers 0 .. top, from beginnings that take all there is between the
 * least and the greatest value to 0 .. tops[i]. */
static inline struct sm_line sm_fit_line(const float *x, const float *w, int n, float top,
                                         bool below, const float *tops, int n_tops) {
    sm_v4 low = sm_v4_load(x), high = low;
    for (int i = 4; i < n; i += 4) {
        low = sm_v4_min(low, sm_v4_load(x + i));
        high = sm_v4_max(high, sm_v4_load(x + i));
    }
    float least = SM_MIN(SM_MIN(low[0], low[1]), SM_MIN(low[2], low[3]));
    float greatest = SM_MAX(SM_MAX(high[0], high[1]), SM_MAX(high[2], high[3]));
    if (below && least > 0) least = 0;
    if (below && greatest < 0) greatest = 0;
    struct sm_line best = {0, least};
    float range = greatest - least, most = -1, gain;
    if (range < SM_FIT_MIN) return best;
    best.d = range / top;
    for (int i = 0; i < n_tops; i++) {
        struct sm_line line = sm_line_for(x, w, n, tops[i] / range, least, top, below, &gain);
        if (gain > most && line.d > 0) most = gain, best = line;
    }
    for (int i = 0; i < 2; i++) {
        struct sm_line line = sm_line_for(x, w, n, 1 / best.d, best.m, top, below, &gain);
        if (!(gain > most) || !(line.d > 0)) break;
        most = gain, best = line;
    }
    return best;
}

/* What x[n] loses with the line d q + m. */
static inline float sm_line_loss(const float *x, const float *w, int n, float d, float m, float top) {
    sm_v4 sum = {0};
    float id = sm_inverse(d);
    for (int i = 0; i < n; i += 4) {
        sm_v4 v = sm_v4_load(x + i) - m, e = v - d * sm_v4_code(v * id, 0, top);
        sum += w ? sm_v4_load(w + i) * e * e : e * e;
    }
    return sm_v4_sum(sum);
}

/* ---- blocks of 256 with integer scales of sub-blocks ------------------------------------------- */

#define SM_SUPER 256

/* x = d scale q with codes lo .. hi, and integer scales least .. greatest. */
struct sm_scaled {
    float d; /* a float16 */
    int scale[SM_SUPER / 16];
};

static inline struct sm_scaled sm_fit_scaled(const float *x, const float *w, int sub, float lo,
                                             float hi, int least, int greatest, const float *peaks,
                                             int n_peaks) {
    int n_sub = SM_SUPER / sub;
    float own[SM_SUPER / 16];
    for (int s = 0; s < n_sub; s++)
        own[s] = sm_fit_scale(x + s * sub, w ? w + s * sub : NULL, sub, lo, hi, peaks, n_peaks);
    struct sm_scaled f = {.d = 0};
    f.d = sm_f16_rounded(sm_peak(own, n_sub) / (float)least);
    if (f.d == 0) return (struct sm_scaled){.d = 0};
    float id = 1 / f.d;
    for (int s = 0; s < n_sub; s++) f.scale[s] = sm_nearest(own[s] * id, least, greatest);
    for (int pass = 0; pass < 2; pass++) {
        float sum_xa = 0, sum_aa = 0; /* a = scale q: x = d a */
        for (int s = 0; s < n_sub; s++) {
            const float *v = x + s * sub, *weight = w ? w + s * sub : NULL;
            int middle = f.scale[s];
            float fewest = sm_scale_loss(v, weight, sub, f.d * (float)middle, lo, hi);
            for (int c = SM_MAX(middle - 1, least); c <= SM_MIN(middle + 1, greatest); c += 1) {
                if (c == middle) continue;
                float loss = sm_scale_loss(v, weight, sub, f.d * (float)c, lo, hi);
                if (loss < fewest) fewest = loss, f.scale[s] = c;
            }
            if (pass > 0) continue;
            sm_v4 xa = {0}, aa = {0};
            float c = (float)f.scale[s], step = sm_inverse(f.d * c);
            for (int i = 0; i < sub; i += 4) {
                sm_v4 u = sm_v4_load(v + i), a = c * sm_v4_code(u * step, lo, hi);
                sm_v4 wa = weight ? sm_v4_load(weight + i) * a : a;
                xa += wa * u;
                aa += wa * a;
            }
            sum_xa += sm_v4_sum(xa);
            sum_aa += sm_v4_sum(aa);
        }
        if (pass > 0 || !(sum_aa > 0)) continue;
        float d = sm_f16_rounded(sum_xa / sum_aa);
        if (d != 0) f.d = d;
    }
    return f;
}

/* x = d scale q - m min with codes 0 .. top, and integer scales and mins 0 .. limit. */
struct sm_lined {
    float d, m; /* float16 */
    int scale[SM_SUPER / 16], min[SM_SUPER / 16];
};

static inline struct sm_lined sm_fit_lined(const float *x, const float *w, int sub, float top,
                                           int limit, const float *tops, int n_tops) {
    int n_sub = SM_SUPER / sub;
    struct sm_line own[SM_SUPER / 16];
    float steepest = 0, deepest = 0;
    for (int s = 0; s < n_sub; s++) {
        own[s] = sm_fit_line(x + s * sub, w ? w + s * sub : NULL, sub, top, true, tops, n_tops);
        steepest = SM_MAX(steepest, own[s].d);
        deepest = SM_MAX(deepest, -own[s].m);
    }
    struct sm_lined f = {.d = sm_f16_rounded(steepest / (float)limit),
                         .m = sm_f16_rounded(deepest / (float)limit)};
    float id = sm_inverse(f.d), im = sm_inverse(f.m);
    for (int s = 0; s < n_sub; s++) {
        f.scale[s] = sm_nearest(own[s].d * id, 0, limit);
        f.min[s] = sm_nearest(-own[s].m * im, 0, limit);
    }
    for (int pass = 0; pass < 2; pass++) {
        float aa = 0, ab = 0, bb = 0, xa = 0, xb = 0; /* a = scale q, b = -min: x = d a + m b */
        for (int s = 0; s < n_sub; s++) {
            const float *v = x + s * sub, *weight = w ? w + s * sub : NULL;
            int scale = f.scale[s], min = f.min[s];
            float fewest = sm_line_loss(v, weight, sub, f.d * (float)scale, -(f.m * (float)min), top);
            for (int c = SM_MAX(scale - 1, 0); c <= SM_MIN(scale + 1, limit); c++)
                for (int b = SM_MAX(min - 1, 0); b <= SM_MIN(min + 1, limit); b++) {
                    if (c == scale && b == min) continue;
                    float loss =
                        sm_line_loss(v, weight, sub, f.d * (float)c, -(f.m * (float)b), top);
                    if (loss < fewest) fewest = loss, f.scale[s] = c, f.min[s] = b;
                }
            if (pass > 0) continue;
            float c = (float)f.scale[s], b = -(float)f.min[s], step = sm_inverse(f.d * c);
            sm_v4 sw = {0}, sx = {0}, sa = {0}, sxa = {0}, saa = {0};
            for (int i = 0; i < sub; i += 4) {
                sm_v4 u = sm_v4_load(v + i), a = c * sm_v4_code((u - f.m * b) * step, 0, top);
                sm_v4 one = weight ? sm_v4_load(weight + i) : sm_v4_all(1);
                sw += one;
                sx += one * u;
                sa += one * a;
                sxa += one * a * u;
                saa += one * a * a;
            }
            aa += sm_v4_sum(saa);
            ab += b * sm_v4_sum(sa);
            bb += b * b * sm_v4_sum(sw);
            xa += sm_v4_sum(sxa);
            xb += b * sm_v4_sum(sx);
        }
        float det = aa * bb - ab * ab;
        if (pass > 0 || !(det > 0)) continue;
        float d = sm_f16_rounded((bb * xa - ab * xb) / det);
        float m = sm_f16_rounded((aa * xb - ab * xa) / det);
        if (d > 0 && m >= 0) f.d = d, f.m = m;
    }
    return f;
}

/* The codes of all sub-blocks. */
static inline void sm_scaled_codes(const struct sm_scaled *f, const float *x, int sub, float lo,
                                   float hi, uint8_t code[SM_SUPER]) {
    for (int s = 0; s < SM_SUPER / sub; s++)
        sm_codes_of(x + s * sub, sub, sm_inverse(f->d * (float)f->scale[s]), 0, lo, hi, -(int)lo,
                    code + s * sub);
}
static inline void sm_lined_codes(const struct sm_lined *f, const float *x, int sub, float top,
                                  uint8_t code[SM_SUPER]) {
    for (int s = 0; s < SM_SUPER / sub; s++) {
        float id = sm_inverse(f->d * (float)f->scale[s]);
        sm_codes_of(x + s * sub, sub, id, f->m * (float)f->min[s] * id, 0, top, 0, code + s * sub);
    }
}

#endif
