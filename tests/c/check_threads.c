/* The pool: each item is done exactly once, by a thread of the phase, before sm_pool_run returns,
 * however many threads there are, and a phase that is given up leaves nothing behind for the next. */
#include <stdio.h>
#include <stdlib.h>

#include "threads.h"

#define MAX_ITEMS 300
#define N_PHASES 20000

struct phase {
    unsigned char times[MAX_ITEMS]; /* how often an item was done; not atomic: sanitizers look */
    int by[MAX_ITEMS];
    size_t n, stop; /* threads return once they have got item `stop` or a later one */
    int n_threads;
    _Atomic int n_wrong;
};

static void run(void *arg, int thread, struct sm_work *work) {
    struct phase *p = arg;
    size_t begin, end;
    if (thread < 0 || thread >= p->n_threads) p->n_wrong++;
    while (sm_work_take(work, &begin, &end)) {
        if (begin >= end || end > p->n) p->n_wrong++;
        for (size_t i = begin; i < end && i < p->n; i++) {
            p->times[i]++;
            p->by[i] = thread;
        }
        if (end > p->stop) return;
    }
}

static int fail(const char *what, int n_threads, const struct phase *p) {
    printf("FAILED: %s; %d threads, %zu items\n", what, n_threads, p->n);
    return 1;
}

static int check(int n_threads) {
    smallm_error err = {.size = sizeof err};
    struct sm_pool *pool;
    if (sm_pool_new(n_threads, &pool, &err) != SMALLM_OK) {
        printf("FAILED: %s\n", err.message);
        return 1;
    }
    uint32_t random = 1;
    for (int i = 0; i < N_PHASES; i++) {
        struct phase p = {.n_threads = n_threads};
        random = random * 1664525u + 1013904223u;
        p.n = (random >> 8) % MAX_ITEMS;
        bool given_up = i % 7 == 0;
        p.stop = given_up ? p.n / 2 : p.n;
        sm_pool_run(pool, p.n, 1 + (random >> 24) % 20, run, &p);
        if (p.n_wrong != 0) return fail("an item outside the phase", n_threads, &p);
        for (size_t j = 0; j < p.n; j++)
            if (p.times[j] > 1 || (p.times[j] == 0 && !given_up))
                return fail("an item not done once", n_threads, &p);
    }
    sm_pool_free(pool);
    return 0;
}

int main(void) {
    smallm_error err = {.size = sizeof err};
    struct sm_pool *pool;
    for (int n_threads = 1; n_threads <= 7; n_threads++)
        if (check(n_threads) != 0) return 1;
    for (int i = 0; i < 200; i++) { /* pools that are closed before their threads have woken up */
        if (sm_pool_new(1 + i % 5, &pool, &err) != SMALLM_OK) return 1;
        sm_pool_free(pool);
    }
    if (sm_pool_new(0, &pool, &err) != SMALLM_E_ARGUMENT || pool != NULL) return 1;
    if (sm_pool_new(SM_MAX_THREADS + 1, &pool, &err) != SMALLM_E_ARGUMENT || pool != NULL) return 1;
    printf("%d phases with 1 to 7 threads: ok\n", N_PHASES);
    return 0;
}
