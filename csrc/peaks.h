/* The largest of each SM_PEAK logits, so that whoever looks for the best ones need not read all.
 * Made where the logits are made (a kernel slot), read by the sampler. */
#ifndef SM_PEAKS_H
#define SM_PEAKS_H

#include "base.h"

#define SM_PEAK 16

static inline size_t sm_n_peaks(size_t n) { return (n + SM_PEAK - 1) / SM_PEAK; }

/* The peak of block `block` of x [n], the last of which may be cut short: +0 instead of -0, NaN where
 * a value is NaN. */
static inline float sm_peak(const float *x, size_t n, size_t block) {
    size_t end = SM_MIN((block + 1) * SM_PEAK, n);
    float top = x[block * SM_PEAK];
    for (size_t i = block * SM_PEAK + 1; i < end; i++)
        if (x[i] > top || x[i] != x[i]) top = x[i]; /* nothing is greater than NaN */
    return top + 0.0f;
}

/* out [sm_n_peaks(n)] = the peaks of x [n]. */
static inline void sm_peaks(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < sm_n_peaks(n); i++) out[i] = sm_peak(x, n, i);
}

#endif
