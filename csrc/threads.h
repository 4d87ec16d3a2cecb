/* A persistent pool that runs phases: a phase is a number of items, which the threads take until none
 * is left.  The caller is thread 0.
 *
 * No thread is waited for that has not begun: beside busy processes, or on cores of unequal speed, the
 * threads that run take the share of those that do not.  Between phases the workers spin for some
 * 12 us by the clock, then sleep: an idle pool uses no CPU.
 * One caller at a time (the engine's thread, or the loader). */
#ifndef SM_THREADS_H
#define SM_THREADS_H

#include "base.h"

#define SM_MAX_THREADS 256

struct sm_pool;
struct sm_work; /* a thread's view of a phase */

int sm_pool_new(int n_threads, struct sm_pool **out, smallm_error *err); /* 1 .. SM_MAX_THREADS */
void sm_pool_free(struct sm_pool *p); /* NULL allowed; waits for the workers */

/* A thread's part of a phase: it must call sm_work_take until that says no, or return early when the
 * rest need not be done.  Each thread runs it at most once a phase; thread 0 always does, the others
 * only where they have got an item. */
typedef void sm_phase_fn(void *arg, int thread, struct sm_work *work);

/* Has the threads take n < 2^32 - 1 items, about `grain` at once, and returns when all are done.  Each thread
 * has a contiguous share, so that it goes on where it was in memory, and takes from the others'
 * shares once its own is empty.  Writes of a phase are visible to all threads in the next. */
void sm_pool_run(struct sm_pool *p, size_t n, size_t grain, sm_phase_fn *fn, void *arg);

/* The next items [*begin, *end) for this thread, fewer than 1.5 grains; false: none is left. */
bool sm_work_take(struct sm_work *work, size_t *begin, size_t *end);

#endif
