/* Scales, mins and codes that lose least of some values: what a format's blocks are written from.
 *
 * What is lost is sum w (x - value)^2 over a block; w NULL: all weigh the same.  Integers are found in
 * turns: codes for a scale, then the least-squares scale for the codes, from several beginnings.
 * Scales are rounded as the file stores them before the codes are chosen for good.
 *
 * One answer everywhere: a lane has a whole sub-block, and goes through its values in order; the
 * lanes know nothing of each other, so their number, the instruction set's, changes nothing.
 * Products and sums are rounded one by one; there is nothing here but + - * / and comparisons.
 * Values are finite and at most SM_FIT_MAX: no sum overflows.  Only static inline functions; each tier
 * compiles them for itself. */
#ifndef SM_FIT_H
#define SM_FIT_H

#include <float.h>

#include "../f16.h"
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

#if defined(__AVX512F__)
#define SM_LANES 16
#elif defined(__AVX2__)
#define SM_LANES 8
#else
#define SM_LANES 4
#endif
#define SM_SUBS 16                      /* sub-blocks at a time: one or more groups of lanes */
#define SM_GROUPS (SM_SUBS / SM_LANES)
#define SM_SUB_MAX 256                  /* values of a sub-block: those of ternary formats are blocks */

typedef float sm_vf __attribute__((vector_size(4 * SM_LANES)));
typedef int32_t sm_vi __attribute__((vector_size(4 * SM_LANES)));

static inline sm_vf sm_all(float x) { return x - (sm_vf){0}; }
static inline sm_vf sm_load(const float *p) {
    sm_vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void sm_save(float *p, sm_vf v) { memcpy(p, &v, sizeof v); }
static inline sm_vf sm_if(sm_vi where, sm_vf yes, sm_vf no) {
    return (sm_vf)((where & (sm_vi)yes) | (~where & (sm_vi)no));
}
static inline sm_vf sm_least(sm_vf a, sm_vf b) {
#if defined(__AVX512F__)
    return (sm_vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (sm_vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (sm_vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    return sm_if(a < b, a, b);
#endif
}
static inline sm_vf sm_greatest(sm_vf a, sm_vf b) {
#if defined(__AVX512F__)
    return (sm_vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (sm_vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (sm_vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return sm_if(a > b, a, b);
#endif
}
/* To the nearest integer, ties to even; |x| < 2^22. */
static inline sm_vf sm_round(sm_vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
/* a / b, and 0 where b is 0. */
static inline sm_vf sm_quotient(sm_vf a, sm_vf b) {
    sm_vi none = b == sm_all(0);
    return sm_if(none, sm_all(0), a / sm_if(none, sm_all(1), b));
}
static inline sm_vf sm_size(sm_vf x) { return (sm_vf)((sm_vi)x & 0x7fffffff); }

static inline float sm_f16_rounded(float x) { return sm_f16_to_f32(sm_f32_to_f16(x)); }
static inline int sm_nearest(float x, int lo, int hi) {
    x = SM_MIN(SM_MAX(x, (float)lo), (float)hi);
    return (int)((x + 0x1.8p23f) - 0x1.8p23f);
}

/* One sub-block in each lane. */
struct sm_lot {
    const float *x, *w; /* [n][SM_LANES]; w NULL: all weigh the same */
    int n;
};

/* What the codes of a format stand for: the integers lo .. hi, or the values of an ascending list. */
struct sm_steps {
    float lo, hi;
    float value[16];  /* the last one again where there are fewer */
    float middle[16]; /* between value i and i + 1; after the last FLT_MAX */
};

/* The one next to x; of two as near the lower one of a list, and the even integer. */
static inline sm_vf sm_step_at(const struct sm_steps *c, bool listed, sm_vf x) {
    if (!listed) return sm_round(sm_least(sm_greatest(x, sm_all(c->lo)), sm_all(c->hi)));
#if defined(__AVX512F__)
    const __m512 values = (__m512)sm_load(c->value), middles = (__m512)sm_load(c->middle);
    __m512i at = _mm512_setzero_si512();
    for (int step = 8; step > 0; step /= 2) { /* at, the number of middles below x, by its digits */
        __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(step - 1)), middles);
        __mmask16 above = _mm512_cmp_ps_mask((__m512)x, middle, _CMP_GT_OQ);
        at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(step));
    }
    return (sm_vf)_mm512_permutexvar_ps(at, values);
#else
    sm_vf found = sm_all(c->value[0]);
    for (int i = 0; i < 15; i++)
        found += (sm_vf)((x > sm_all(c->middle[i])) & (sm_vi)sm_all(c->value[i + 1] - c->value[i]));
    return found;
#endif
}

/* ---- x = d q ---------------------------------------------------------------------------------- */

/* The value farthest from zero, with its sign; of two alike the positive one. */
static inline sm_vf sm_peak(const struct sm_lot *s) {
    sm_vf low = sm_load(s->x), high = low;
    for (int i = 1; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES);
        low = sm_least(low, x);
        high = sm_greatest(high, x);
    }
    return sm_if(high >= -low, high, low);
}

/* With codes q next to x id: the scale of least squares, and in *gain by how much it makes sum w x^2
 * less. */
static inline sm_vf sm_scale_for(const struct sm_lot *s, const struct sm_steps *c, bool listed,
                                 sm_vf id, sm_vf *gain) {
    sm_vf xq = {0}, qq = {0};
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), q = sm_step_at(c, listed, x * id);
        sm_vf wq = s->w ? sm_load(s->w + i * SM_LANES) * q : q;
        xq += wq * x;
        qq += wq * q;
    }
    sm_vf d = sm_quotient(xq, qq);
    *gain = d * xq;
    return d;
}

/* The scale, from beginnings that take the peak to each of peaks[n_peaks], and two better ones. */
static inline sm_vf sm_fit_scale(const struct sm_lot *s, const struct sm_steps *c, bool listed,
                                 const float *peaks, int n_peaks) {
    sm_vf peak = sm_peak(s), best = {0}, most = {0}, gain;
    sm_vi seen = sm_size(peak) >= sm_all(SM_FIT_MIN);
    sm_vf one = 1 / sm_if(seen, peak, sm_all(1));
    for (int i = 0; i < n_peaks + 2; i++) {
        sm_vf id = i < n_peaks ? peaks[i] * one : sm_quotient(sm_all(1), best);
        sm_vf d = sm_scale_for(s, c, listed, id, &gain);
        sm_vi better = gain > most;
        most = sm_if(better, gain, most);
        best = sm_if(better, d, best);
    }
    return sm_if(seen, best, sm_all(0));
}

/* What is lost with the scale d. */
static inline sm_vf sm_scale_loss(const struct sm_lot *s, const struct sm_steps *c, bool listed, sm_vf d) {
    sm_vf sum = {0}, id = sm_quotient(sm_all(1), d);
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), e = x - d * sm_step_at(c, listed, x * id);
        sum += s->w ? sm_load(s->w + i * SM_LANES) * e * e : e * e;
    }
    return sum;
}

/* The power of two that as a scale loses least, of those that take the peak to about the last step: of
 * FP4's, whose steps of twice the greatest of these are among its own, up to the peak. */
static inline sm_vf sm_fit_power(const struct sm_lot *s, const struct sm_steps *c) {
    sm_vf peak = sm_size(sm_peak(s)), best = {0}, least = {0};
    sm_vi seen = peak >= sm_all(SM_FIT_MIN);
    sm_vf power = (sm_vf)((sm_vi)peak & 0x7f800000); /* at most the peak */
    power = sm_if(seen, power, sm_all(1)) * 0.0625f;
    for (int i = 0; i < 3; i++, power += power) {
        sm_vf loss = sm_scale_loss(s, c, true, power);
        sm_vi better = i == 0 ? (sm_vi)(loss == loss) : (sm_vi)(loss < least);
        least = sm_if(better, loss, least);
        best = sm_if(better, power, best);
    }
    return sm_if(seen, best, sm_all(0));
}

/* ---- x = d q + m, q the integers 0 .. top ------------------------------------------------------- */

struct sm_line {
    sm_vf d, m;
};

static inline sm_vf sm_line_code(sm_vf x, sm_vf m, sm_vf id, float top) {
    return sm_round(sm_least(sm_greatest((x - m) * id, sm_all(0)), sm_all(top)));
}

/* With codes q next to (x - m) id: the line of least squares, with m <= 0 where below, and in *gain by
 * how much it makes sum w x^2 less. */
static inline struct sm_line sm_line_for(const struct sm_lot *s, sm_vf id, sm_vf m, float top, bool below,
                                         sm_vf *gain) {
    sm_vf sx = {0}, sq = {0}, sxq = {0}, sqq = {0}, sw = {0};
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), q = sm_line_code(x, m, id, top), wq = q, wx = x;
        if (s->w) {
            sm_vf w = sm_load(s->w + i * SM_LANES);
            wq = w * q;
            wx = w * x;
            sw += w;
        }
        sx += wx;
        sq += wq;
        sxq += wq * x;
        sqq += wq * q;
    }
    if (!s->w) sw = sm_all((float)s->n);
    sm_vf det = sw * sqq - sq * sq;
    sm_vi solved = det > sm_all(0);
    det = sm_if(solved, det, sm_all(1));
    struct sm_line line = {.d = sm_if(solved, (sw * sxq - sx * sq) / det, sm_all(0)),
                           .m = sm_if(solved, (sqq * sx - sq * sxq) / det, sm_quotient(sx, sw))};
    if (below) {
        sm_vi above = line.m > sm_all(0);
        line.d = sm_if(above, sm_quotient(sxq, sqq), line.d);
        line.m = sm_if(above, sm_all(0), line.m);
    }
    *gain = line.d * sxq + line.m * sx;
    return line;
}

/* The line, from beginnings that take all there is between the least and the greatest value to
 * 0 .. tops[i], and two better ones. */
static inline struct sm_line sm_fit_line(const struct sm_lot *s, float top, bool below, const float *tops,
                                         int n_tops) {
    sm_vf low = sm_load(s->x), high = low, most = sm_all(-1), gain;
    for (int i = 1; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES);
        low = sm_least(low, x);
        high = sm_greatest(high, x);
    }
    if (below) {
        low = sm_least(low, sm_all(0));
        high = sm_greatest(high, sm_all(0));
    }
    sm_vf range = high - low;
    sm_vi seen = range >= sm_all(SM_FIT_MIN);
    range = sm_if(seen, range, sm_all(1));
    struct sm_line best = {.d = range / top, .m = low};
    for (int i = 0; i < n_tops + 2; i++) {
        sm_vf id = i < n_tops ? tops[i] / range : 1 / best.d;
        struct sm_line line = sm_line_for(s, id, i < n_tops ? low : best.m, top, below, &gain);
        sm_vi better = (gain > most) & (line.d > sm_all(0));
        most = sm_if(better, gain, most);
        best.d = sm_if(better, line.d, best.d);
        best.m = sm_if(better, line.m, best.m);
    }
    return (struct sm_line){.d = sm_if(seen, best.d, sm_all(0)), .m = sm_if(seen, best.m, low)};
}

/* What is lost with the line d q + m. */
static inline sm_vf sm_line_loss(const struct sm_lot *s, sm_vf d, sm_vf m, float top) {
    sm_vf sum = {0}, id = sm_quotient(sm_all(1), d);
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), e = (x - m) - d * sm_line_code(x, m, id, top);
        sum += s->w ? sm_load(s->w + i * SM_LANES) * e * e : e * e;
    }
    return sum;
}

/* ---- blocks with integer scales of sub-blocks ---------------------------------------------------- */

/* All that is found about SM_SUBS sub-blocks; d and m are alike within a block. */
struct sm_found {
    float d[SM_SUBS], m[SM_SUBS];         /* as the file stores them: x = d scale q - m min */
    float scale[SM_SUBS], min[SM_SUBS];   /* whole numbers */
};

/* The value of x[n] farthest from zero. */
static inline float sm_peak_of(const float *x, int n) {
    float peak = x[0];
    for (int i = 1; i < n; i++)
        if (SM_MAX(x[i], -x[i]) > SM_MAX(peak, -peak)) peak = x[i];
    return peak;
}

/* For d: the neighbours of the scales that lose less; in xa and aa the sums of w x a and w a^2 with
 * a = scale q. */
static inline void sm_better_scales(const struct sm_lot *s, const struct sm_steps *c, bool listed,
                                    const struct sm_fit *f, const float *d, float *scale, float *xa,
                                    float *aa) {
    sm_vf d_v = sm_load(d), middle = sm_load(scale), best = middle;
    sm_vf fewest = sm_scale_loss(s, c, listed, d_v * middle);
    for (int i = -1; i <= 1; i += 2) {
        sm_vf tried = middle + (float)i;
        tried = sm_least(sm_greatest(tried, sm_all((float)f->least)), sm_all((float)f->greatest));
        sm_vf loss = sm_scale_loss(s, c, listed, d_v * tried);
        sm_vi better = loss < fewest;
        fewest = sm_if(better, loss, fewest);
        best = sm_if(better, tried, best);
    }
    sm_vf sum_xa = {0}, sum_aa = {0}, id = sm_quotient(sm_all(1), d_v * best);
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), a = best * sm_step_at(c, listed, x * id);
        sm_vf wa = s->w ? sm_load(s->w + i * SM_LANES) * a : a;
        sum_xa += wa * x;
        sum_aa += wa * a;
    }
    sm_save(scale, best);
    sm_save(xa, sum_xa);
    sm_save(aa, sum_aa);
}

/* Scales of SM_SUBS sub-blocks, n_sub to a block. */
static inline void sm_fit_scaled(const struct sm_lot *lots, int n_sub, const struct sm_steps *c,
                                 bool listed, const struct sm_fit *f, struct sm_found *found) {
    float own[SM_SUBS], xa[SM_SUBS], aa[SM_SUBS];
    for (int g = 0; g < SM_GROUPS; g++)
        sm_save(own + g * SM_LANES, sm_fit_scale(&lots[g], c, listed, f->to, f->n_to));
    for (int first = 0; first < SM_SUBS; first += n_sub) {
        float d = sm_f16_rounded(sm_peak_of(own + first, n_sub) / (float)f->least);
        for (int s = first; s < first + n_sub; s++) {
            found->d[s] = d;
            found->scale[s] = d != 0 ? (float)sm_nearest(own[s] / d, f->least, f->greatest) : 0;
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int g = 0, at = 0; g < SM_GROUPS; g++, at += SM_LANES)
            sm_better_scales(&lots[g], c, listed, f, found->d + at, found->scale + at, xa + at, aa + at);
        for (int first = 0; pass == 0 && first < SM_SUBS; first += n_sub) {
            float sum_xa = 0, sum_aa = 0;
            for (int s = first; s < first + n_sub; s++) sum_xa += xa[s], sum_aa += aa[s];
            float d = sum_aa > 0 ? sm_f16_rounded(sum_xa / sum_aa) : 0;
            for (int s = first; s < first + n_sub && d != 0; s++) found->d[s] = d;
        }
    }
}

/* Sums over a sub-block with a = scale q and b = -min: x = d a + m b. */
struct sm_line_sums {
    float aa[SM_SUBS], ab[SM_SUBS], bb[SM_SUBS], xa[SM_SUBS], xb[SM_SUBS];
};

/* For d and m: the neighbours of scales and mins that lose less, and their sums. */
static inline void sm_better_lines(const struct sm_lot *s, const struct sm_fit *f, struct sm_found *found,
                                   struct sm_line_sums *sums, int at) {
    sm_vf d = sm_load(found->d + at), m = sm_load(found->m + at);
    sm_vf scale = sm_load(found->scale + at), min = sm_load(found->min + at);
    sm_vf limit = sm_all((float)f->greatest);
    sm_vf best = scale, deepest = min;
    sm_vf fewest = sm_line_loss(s, d * scale, -(m * min), f->hi);
    for (int i = 0; i < 9; i++) {
        if (i == 4) continue;
        sm_vf c = sm_least(sm_greatest(scale + (float)(i / 3 - 1), sm_all(0)), limit);
        sm_vf b = sm_least(sm_greatest(min + (float)(i % 3 - 1), sm_all(0)), limit);
        sm_vf loss = sm_line_loss(s, d * c, -(m * b), f->hi);
        sm_vi better = loss < fewest;
        fewest = sm_if(better, loss, fewest);
        best = sm_if(better, c, best);
        deepest = sm_if(better, b, deepest);
    }
    sm_vf id = sm_quotient(sm_all(1), d * best), least = -(m * deepest), b = -deepest;
    sm_vf sw = {0}, sx = {0}, sa = {0}, sxa = {0}, saa = {0};
    for (int i = 0; i < s->n; i++) {
        sm_vf x = sm_load(s->x + i * SM_LANES), a = best * sm_line_code(x, least, id, f->hi);
        sm_vf w = s->w ? sm_load(s->w + i * SM_LANES) : sm_all(1);
        sw += w;
        sx += w * x;
        sa += w * a;
        sxa += w * a * x;
        saa += w * a * a;
    }
    sm_save(found->scale + at, best);
    sm_save(found->min + at, deepest);
    sm_save(sums->aa + at, saa);
    sm_save(sums->ab + at, b * sa);
    sm_save(sums->bb + at, b * b * sw);
    sm_save(sums->xa + at, sxa);
    sm_save(sums->xb + at, b * sx);
}

/* Scales and mins of SM_SUBS sub-blocks, n_sub to a block. */
static inline void sm_fit_lined(const struct sm_lot *lots, int n_sub, const struct sm_fit *f,
                                struct sm_found *found) {
    float own_d[SM_SUBS], own_m[SM_SUBS], limit = (float)f->greatest;
    struct sm_line_sums sums;
    for (int g = 0; g < SM_GROUPS; g++) {
        struct sm_line line = sm_fit_line(&lots[g], f->hi, true, f->to, f->n_to);
        sm_save(own_d + g * SM_LANES, line.d);
        sm_save(own_m + g * SM_LANES, -line.m);
    }
    for (int first = 0; first < SM_SUBS; first += n_sub) {
        float steepest = 0, deepest = 0;
        for (int s = first; s < first + n_sub; s++) {
            steepest = SM_MAX(steepest, own_d[s]);
            deepest = SM_MAX(deepest, own_m[s]);
        }
        float d = sm_f16_rounded(steepest / limit), m = sm_f16_rounded(deepest / limit);
        for (int s = first; s < first + n_sub; s++) {
            found->d[s] = d;
            found->m[s] = m;
            found->scale[s] = d != 0 ? (float)sm_nearest(own_d[s] / d, 0, f->greatest) : 0;
            found->min[s] = m != 0 ? (float)sm_nearest(own_m[s] / m, 0, f->greatest) : 0;
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int g = 0; g < SM_GROUPS; g++) sm_better_lines(&lots[g], f, found, &sums, g * SM_LANES);
        for (int first = 0; pass == 0 && first < SM_SUBS; first += n_sub) {
            float aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
            for (int s = first; s < first + n_sub; s++) {
                aa += sums.aa[s];
                ab += sums.ab[s];
                bb += sums.bb[s];
                xa += sums.xa[s];
                xb += sums.xb[s];
            }
            float det = aa * bb - ab * ab;
            if (!(det > 0)) continue;
            float d = sm_f16_rounded((bb * xa - ab * xb) / det);
            float m = sm_f16_rounded((aa * xb - ab * xa) / det);
            for (int s = first; s < first + n_sub && d > 0 && m >= 0; s++) found->d[s] = d, found->m[s] = m;
        }
    }
}

/* ---- SM_SUBS sub-blocks -------------------------------------------------------------------------- */

/* [n_subs][sub] into [SM_GROUPS][sub][SM_LANES], zeros past the last. */
static inline void sm_spread(const float *from, int sub, int n_subs, float *to) {
    if (n_subs < SM_SUBS) memset(to, 0, (size_t)(SM_SUBS * sub) * sizeof *to);
    for (int s = 0; s < n_subs; s++) {
        float *lane = to + s / SM_LANES * sub * SM_LANES + s % SM_LANES;
        for (int i = 0; i < sub; i++) lane[i * SM_LANES] = from[s * sub + i];
    }
}

static inline void sm_fit_subs(const struct sm_fit *f, const struct sm_steps *c, bool listed,
                               struct sm_lot *lots, int n_sub, struct sm_found *found) {
    if (f->kind == SM_FIT_SCALED) {
        sm_fit_scaled(lots, n_sub, c, listed, f, found);
        return;
    }
    if (f->kind == SM_FIT_LINED) {
        sm_fit_lined(lots, n_sub, f, found);
        return;
    }
    for (int g = 0, at = 0; g < SM_GROUPS; g++, at += SM_LANES) {
        sm_vf d, m = {0};
        if (f->kind == SM_FIT_LINE) {
            struct sm_line line = sm_fit_line(&lots[g], f->hi, false, f->to, f->n_to);
            d = line.d;
            m = -line.m;
        } else if (f->kind == SM_FIT_PEAK) {
            d = sm_size(sm_peak(&lots[g])) / f->hi;
        } else if (f->kind == SM_FIT_POWER) {
            d = sm_fit_power(&lots[g], c);
        } else {
            d = sm_fit_scale(&lots[g], c, listed, f->to, f->n_to);
            if (f->kind == SM_FIT_TERNARY) d = sm_size(d);
        }
        sm_save(found->d + at, d);
        sm_save(found->m + at, m);
        for (int s = at; s < at + SM_LANES; s++) {
            if (f->kind != SM_FIT_POWER) found->d[s] = sm_f16_rounded(found->d[s]);
            found->m[s] = sm_f16_rounded(found->m[s]);
            found->scale[s] = found->min[s] = 1;
        }
    }
}

/* The codes of a group, each plus bias, into the lanes' rows of code[sub]. */
static inline void sm_fit_codes(const struct sm_lot *lot, const struct sm_steps *c, bool listed,
                                const float *d, const float *m, int bias, uint8_t *const *code) {
    sm_vf id = sm_quotient(sm_all(1), sm_load(d)), least = sm_load(m);
    for (int i = 0; i < lot->n; i++) {
        sm_vf q = sm_step_at(c, listed, (sm_load(lot->x + i * SM_LANES) + least) * id);
        sm_vi whole = __builtin_convertvector(q, sm_vi) + bias;
        for (int j = 0; j < SM_LANES; j++) code[j][i] = (uint8_t)whole[j];
    }
}

/* listed, by which loops differ, is known when this is compiled. */
static inline void sm_fit_blocks(const struct sm_fit *f, struct sm_layout layout, const struct sm_steps *c,
                                 bool listed, const float *x, const float *w, size_t n_blocks,
                                 struct sm_codes *out) {
    _Alignas(64) float room[2][SM_SUBS * SM_SUB_MAX];
    const int sub = f->sub, block = layout.block, n_sub = block / sub;
    const int each = sub / layout.sub; /* of the layout's, which are as long or shorter */
    const size_t at_once = SM_SUBS / (size_t)n_sub;
    struct sm_lot lots[SM_GROUPS];
    for (int g = 0; g < SM_GROUPS; g++)
        lots[g] = (struct sm_lot){.x = room[0] + g * sub * SM_LANES,
                                  .w = w ? room[1] + g * sub * SM_LANES : NULL, .n = sub};
    for (size_t n; n_blocks > 0; n_blocks -= n, out += n) {
        n = SM_MIN(n_blocks, at_once);
        int n_subs = (int)n * n_sub;
        sm_spread(x, sub, n_subs, room[0]);
        x += n * (size_t)block;
        if (w) {
            sm_spread(w, sub, n_subs, room[1]);
            w += n * (size_t)block;
        }
        struct sm_found found;
        memset(&found, 0, sizeof found);
        sm_fit_subs(f, c, listed, lots, n_sub, &found);
        uint8_t *code[SM_SUBS], unused[SM_SUB_MAX];
        float d[SM_SUBS], m[SM_SUBS];
        for (int s = 0; s < SM_SUBS; s++) {
            d[s] = found.d[s] * found.scale[s];
            m[s] = found.m[s] * found.min[s];
            code[s] = s < n_subs ? out[s / n_sub].code + s % n_sub * sub : unused;
            if (s >= n_subs) continue;
            struct sm_codes *b = &out[s / n_sub];
            b->d = found.d[s];
            b->m = found.m[s];
            for (int i = s % n_sub * each; i < (s % n_sub + 1) * each; i++) {
                b->scale[i] = (int16_t)found.scale[s];
                b->min[i] = (int16_t)found.min[s];
            }
        }
        for (int g = 0; g < SM_GROUPS; g++)
            sm_fit_codes(&lots[g], c, listed, d + g * SM_LANES, m + g * SM_LANES, layout.bias,
                         code + g * SM_LANES);
    }
}

static inline void sm_fit(enum sm_type t, const float *x, const float *w, size_t n_blocks,
                          struct sm_codes *out) {
    const struct sm_writer *writer = sm_writer(t);
    const struct sm_layout layout = sm_layout_of(t);
    struct sm_steps steps = {.lo = writer->fit.lo, .hi = writer->fit.hi};
    if (layout.table == SM_TABLE_NONE) {
        sm_fit_blocks(&writer->fit, layout, &steps, false, x, w, n_blocks, out);
        return;
    }
    const uint8_t *table = sm_table(layout.table); /* FP4 has zero twice, and is not in order */
    int n = 0;
    for (int v = 0; v < 256; v++)
        for (int i = 0; i < 16; i++)
            if (table[i] == v) {
                steps.value[n++] = (float)(v - layout.bias);
                break;
            }
    for (; n < 16; n++) steps.value[n] = steps.value[n - 1];
    for (int i = 0; i < 16; i++) {
        bool last = i == 15 || steps.value[i] == steps.value[i + 1];
        steps.middle[i] = last ? FLT_MAX : 0.5f * (steps.value[i] + steps.value[i + 1]);
    }
    sm_fit_blocks(&writer->fit, layout, &steps, true, x, w, n_blocks, out);
}

#endif
