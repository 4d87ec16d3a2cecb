/* Elementary functions from +, -, *, / and bit patterns alone, so that every platform and compiler
 * gives the same bits (the build forbids contraction).  No state.
 *
 * Reductions are the textbook ones: exp over k ln 2, log through atanh, sin and cos over k pi/2.
 * Polynomials are Taylor series, cut where the next term is below half an ulp. */
#include "mathx.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LN2_HI 0x1.62e42feep-1 /* 32 bits: k * LN2_HI is exact for |k| < 2^21 */
#define LN2_LO 0x1.a39ef35793c76p-33
#define INV_LN2 0x1.71547652b82fep+0

/* pi/2 in parts of 30 bits: k times one of the first three is exact for |k| < 2^23. */
#define PIO2_1 0x1.921fb54p+0
#define PIO2_2 0x1.10b46118p-30
#define PIO2_3 0x1.313198ap-61
#define PIO2_4 0x1.701b839a25205p-92
#define INV_PIO2 0x1.45f306dc9c883p-1

static uint64_t bits_of(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static double from_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}
static double power_of_two(int k) { return from_bits((uint64_t)(k + 1023) << 52); }

/* exp(hi + lo), |lo| tiny beside hi. */
static double exp_sum(double hi, double lo) {
    if (hi != hi) return hi;
    if (hi > 710.0) return INFINITY;
    if (hi < -746.0) return 0.0;
    int k = (int)(hi * INV_LN2 + (hi < 0 ? -0.5 : 0.5));
    double r = hi - k * LN2_HI;
    r += lo - k * LN2_LO;
    static const double factor[] = {/* 1 / i! */
        1.0 / 87178291200, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
        1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0,
        1.0};
    double p = 0.0;
    for (size_t i = 0; i < sizeof factor / sizeof factor[0]; i++) p = p * r + factor[i];
    /* In two steps: 2^k alone may be out of range where the product is not. */
    int half = k / 2;
    return p * power_of_two(half) * power_of_two(k - half);
}

/* x = m 2^k with m in (sqrt(1/2), sqrt(2)); x > 0, finite. */
static double split(double x, int *k) {
    int e = 0;
    if (x < 0x1p-1022) {
        x *= 0x1p54;
        e = -54;
    }
    uint64_t u = bits_of(x);
    e += (int)(u >> 52) - 1023;
    double m = from_bits((u & (UINT64_MAX >> 12)) | (uint64_t)1023 << 52);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        e++;
    }
    *k = e;
    return m;
}

/* hi + lo = a * b exactly (no overflow in our ranges). */
static double product(double a, double b, double *lo) {
    double ta = a * 134217729.0, tb = b * 134217729.0; /* 2^27 + 1 */
    double ah = ta - (ta - a), bh = tb - (tb - b), al = a - ah, bl = b - bh;
    double hi = a * b;
    *lo = ((ah * bh - hi) + ah * bl + al * bh) + al * bl;
    return hi;
}

/* hi + *lo = log(x) to some 70 bits.  log m = 2 atanh(s), s = (m - 1) / (m + 1). */
static double log_sum(double x, double *lo) {
    int k;
    double m = split(x, &k);
    double f = m - 1.0, t = 2.0 + f, t_lo = f - (t - 2.0);
    double s = f / t, e, p = product(s, t, &e);
    double s_lo = ((f - p) - e - s * t_lo) / t;
    static const double factor[] = {1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15,
                                    1.0 / 13, 1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
    double z = s * s, q = 0.0;
    for (size_t i = 0; i < sizeof factor / sizeof factor[0]; i++) q = z * (q + factor[i]);
    double tail = 2.0 * s * q + 2.0 * s_lo + k * LN2_LO;
    double a = k * LN2_HI, b = 2.0 * s; /* |a| > |b| or a = 0 */
    double sum = a + b;
    tail += b - (sum - a);
    double hi = sum + tail;
    *lo = tail - (hi - sum);
    return hi;
}

double sm_exp(double x) { return exp_sum(x, 0.0); }

double sm_log(double x) {
    double lo, hi = log_sum(x, &lo);
    return hi + lo;
}

double sm_pow(double x, double y) {
    double lo, hi = log_sum(x, &lo), e;
    if (hi * y > 800.0) return INFINITY;
    if (hi * y < -800.0) return 0.0;
    double p = product(hi, y, &e);
    return exp_sum(p, e + lo * y);
}

void sm_sincos(double x, double *s, double *c) {
    int64_t k = (int64_t)(x * INV_PIO2 + (x < 0 ? -0.5 : 0.5));
    double n = (double)k;
    double r = x - n * PIO2_1;
    r -= n * PIO2_2;
    r -= n * PIO2_3;
    r -= n * PIO2_4;
    static const double sin_factor[] = {/* +-1 / i!, i odd */
        1.0 / 355687428096000, -1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800,
        1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0};
    static const double cos_factor[] = {/* +-1 / i!, i even */
        1.0 / 20922789888000, -1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320,
        -1.0 / 720, 1.0 / 24, -0.5, 1.0};
    double z = r * r, sn = 0.0, cs = 0.0;
    for (size_t i = 0; i < sizeof sin_factor / sizeof sin_factor[0]; i++) {
        sn = sn * z + sin_factor[i];
        cs = cs * z + cos_factor[i];
    }
    sn *= r;
    switch (k & 3) {
    case 0: *s = sn; *c = cs; break;
    case 1: *s = cs; *c = -sn; break;
    case 2: *s = -sn; *c = -cs; break;
    default: *s = -cs; *c = sn; break;
    }
}
