/* The pool behind threads.h.
 *
 * A phase is one fork and join: the caller publishes the function and raises `start`; the last
 * worker to finish raises `finish`.  Both sides spin for SPIN_NS by the clock and then sleep on the
 * gate.  A raise only makes a system call when somebody sleeps: the sleeper counts itself before it
 * looks at the gate a last time, the raiser looks at the count after it changed the gate, both
 * sequentially consistent, so one of them sees the other.
 *
 * Why spin and then sleep: a phase of decode takes some tens of microseconds, and a wake-up costs
 * about as much; but beside busy processes a spinning thread uses up the turn that its absent
 * partner needs.  benchmarks/busy.py measures both sides. */
#include "threads.h"

#include <stdalign.h>

#include "cpu.h"
#include "os.h"

#define SPIN_NS 40000
#define PAUSES_PER_LOOK 16 /* reading the clock costs about as much as one pause */

struct worker {
    struct sm_pool *pool;
    int index;
    struct sm_thread *thread;
};

struct signal { /* a counter that others wait for */
    alignas(SM_ALIGN) struct sm_gate gate;
    _Atomic uint32_t n_sleeping;
};

struct sm_pool {
    struct signal start;  /* value: phases published */
    struct signal finish; /* value: phases finished */
    alignas(SM_ALIGN) _Atomic uint32_t n_left; /* workers still in this phase */
    alignas(SM_ALIGN) sm_phase_fn *fn;         /* NULL: the pool is closing */
    void *arg;
    int n_threads, n_started;
    struct worker workers[]; /* [n_threads - 1] */
};

static void raise_signal(struct signal *s) {
    atomic_fetch_add(&s->gate.value, 1);
    if (atomic_load(&s->n_sleeping) != 0) sm_gate_wake_all(&s->gate);
}

/* Returns once the value differs from `seen`. */
static void await_signal(struct signal *s, uint32_t seen) {
    uint64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (atomic_load_explicit(&s->gate.value, memory_order_acquire) != seen) return;
            sm_cpu_pause();
        }
        uint64_t now = sm_clock_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_fetch_add(&s->n_sleeping, 1);
    while (atomic_load(&s->gate.value) == seen) sm_gate_wait(&s->gate, seen);
    atomic_fetch_sub(&s->n_sleeping, 1);
}

static void work(void *arg) {
    struct worker *w = arg;
    struct sm_pool *p = w->pool;
    (void)sm_fpenv_enter(); /* the thread is ours: nothing to restore */
    for (uint32_t phase = 0;; phase++) {
        await_signal(&p->start, phase);
        sm_phase_fn *fn = p->fn;
        if (fn == NULL) return;
        fn(p->arg, w->index, p->n_threads);
        if (atomic_fetch_sub(&p->n_left, 1) == 1) raise_signal(&p->finish);
    }
}

int sm_pool_new(int n_threads, struct sm_pool **out, smallm_error *err) {
    *out = NULL;
    if (n_threads < 1 || n_threads > SM_MAX_THREADS)
        return sm_fail(err, SMALLM_E_ARGUMENT, "threads is %d; allowed are 1 to %d", n_threads,
                       SM_MAX_THREADS);
    size_t n_workers = (size_t)n_threads - 1;
    struct sm_pool *p = sm_calloc(1, sizeof *p + n_workers * sizeof p->workers[0]);
    if (p == NULL) return sm_fail(err, SMALLM_E_MEMORY, "out of memory for the thread pool");
    p->n_threads = n_threads;
    int status = sm_gate_init(&p->start.gate, err);
    if (status != SMALLM_OK) {
        sm_free(p);
        return status;
    }
    status = sm_gate_init(&p->finish.gate, err);
    if (status != SMALLM_OK) {
        sm_gate_destroy(&p->start.gate);
        sm_free(p);
        return status;
    }
    for (; p->n_started < n_threads - 1; p->n_started++) {
        struct worker *w = &p->workers[p->n_started];
        w->pool = p;
        w->index = p->n_started + 1;
        status = sm_thread_start(&w->thread, work, w, "smallm-worker", err);
        if (status != SMALLM_OK) {
            sm_pool_free(p);
            return status;
        }
    }
    *out = p;
    return SMALLM_OK;
}

void sm_pool_free(struct sm_pool *p) {
    if (p == NULL) return;
    p->fn = NULL;
    raise_signal(&p->start);
    for (int i = 0; i < p->n_started; i++) sm_thread_join(p->workers[i].thread);
    sm_gate_destroy(&p->start.gate);
    sm_gate_destroy(&p->finish.gate);
    sm_free(p);
}

void sm_pool_run(struct sm_pool *p, sm_phase_fn *fn, void *arg) {
    if (p->n_threads == 1) {
        fn(arg, 0, 1);
        return;
    }
    uint32_t finished = atomic_load_explicit(&p->finish.gate.value, memory_order_relaxed);
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->n_left, (uint32_t)p->n_threads - 1, memory_order_relaxed);
    raise_signal(&p->start);
    fn(arg, 0, p->n_threads);
    await_signal(&p->finish, finished);
}
