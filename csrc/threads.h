/* A persistent pool that runs phases: every thread runs the same function once, and the phase ends
 * when all of them have.  The caller is thread 0.
 *
 * Between phases the workers spin for some 40 us by the clock, then sleep: an idle pool uses no CPU.
 * One caller at a time (the engine's thread, or the loader). */
#ifndef SM_THREADS_H
#define SM_THREADS_H

#include "base.h"

#define SM_MAX_THREADS 256

struct sm_pool;

int sm_pool_new(int n_threads, struct sm_pool **out, smallm_error *err); /* 1 .. SM_MAX_THREADS */
void sm_pool_free(struct sm_pool *p); /* NULL allowed; waits for the workers */

typedef void sm_phase_fn(void *arg, int thread, int n_threads);

/* Runs fn(arg, i, n_threads) on every thread i and returns when all are done.  Writes of a phase
 * are visible to all threads in the next. */
void sm_pool_run(struct sm_pool *p, sm_phase_fn *fn, void *arg);

/* Thread i's share [*begin, *end) of n items, in units of `grain`: contiguous, differing by at most
 * one unit. */
static inline void sm_share(size_t n, size_t grain, int i, int n_threads, size_t *begin, size_t *end) {
    size_t units = (n + grain - 1) / grain;
    size_t b = units * (size_t)i / (size_t)n_threads * grain;
    size_t e = units * ((size_t)i + 1) / (size_t)n_threads * grain;
    *begin = b < n ? b : n;
    *end = e < n ? e : n;
}

#endif
