/* The largest of each SM_PEAK logits, so that whoever looks for the best ones need not read all.
 * Made where the logits are made (ops.c), read by the sampler. */
#ifndef SM_PEAKS_H
#define SM_PEAKS_H

#include <math.h>

#include "base.h"

#define SM_PEAK 16

static inline size_t sm_n_peaks(size_t n) { return (n + SM_PEAK - 1) / SM_PEAK; }

/* The largest of x [n], n <= SM_PEAK; NaN where one is NaN. */
static inline float sm_peak(const float *x, size_t n) {
    float top = x[0];
    int nan = 0;
    for (size_t i = 0; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        nan |= x[i] != x[i];
    }
    return nan ? NAN : top;
}

/* peaks [sm_n_peaks(n)] of x [n]. */
static inline void sm_peaks(const float *x, size_t n, float *peaks) {
    for (size_t i = 0; i < n; i += SM_PEAK) peaks[i / SM_PEAK] = sm_peak(x + i, SM_MIN(n - i, SM_PEAK));
}

#endif
