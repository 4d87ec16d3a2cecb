/* fma(a, b, c): a * b + c with one rounding, on every machine.
 *
 * Where the instruction set has it the compiler emits the instruction; elsewhere the same bits come
 * from double arithmetic.  Payloads of NaN may differ, nothing else. */
#ifndef SM_FMA_H
#define SM_FMA_H

#include <stdint.h>
#include <string.h>

/* The product is exact in double.  Its sum with c is not: TwoSum gives the rounding error, and with
 * it the sum is rounded to odd instead, which keeps enough for the rounding to float to be the only
 * one (53 >= 24 + 2 bits). */
static inline float sm_fma_emulated(float a, float b, float c) {
    double p = (double)a * (double)b, z = c;
    double sum = p + z;
    double rest = sum - p;
    double error = (p - (sum - rest)) + (z - rest);
    /* An infinite or NaN sum has a NaN error, for which both comparisons are false. */
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    uint64_t away = (error > 0) == (sum > 0);
    uint64_t inexact = (error > 0) | (error < 0);
    bits += (inexact & ~bits & 1) * (2 * away - 1);
    memcpy(&sum, &bits, sizeof bits);
    return (float)sum;
}

static inline float sm_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_flen)
    return __builtin_fmaf(a, b, c);
#else
    return sm_fma_emulated(a, b, c);
#endif
}

#endif
