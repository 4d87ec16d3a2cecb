/* The pool behind threads.h.
 *
 * A phase: the caller lays out the shares, opens the door and raises `start`.  A worker that comes
 * while the door is open enters and takes items; one that comes later finds it closed and has missed
 * nothing but work that is done.  The caller closes the door when no items are left and waits for
 * those inside; the last to leave raises `finish`.
 *
 * Waiting is to spin for SPIN_NS by the clock and then to sleep on the gate.  A raise only makes a
 * system call when somebody sleeps: the sleeper counts itself before it looks at the gate a last
 * time, the raiser looks at the count after it changed the gate, both sequentially consistent, so
 * one of them sees the other.
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

struct share { /* a thread's items that nobody has taken yet: [next, end) */
    alignas(SM_ALIGN) _Atomic size_t next;
    size_t end;
};

struct sm_work {
    size_t grain;
    int n_threads;
    struct share *shares; /* [n_threads] */
};

#define CLOSED 0x80000000u /* the door's bit; below it the number of workers inside */

struct sm_pool {
    struct signal start;  /* value: phases published */
    struct signal finish; /* value: phases whose last worker left after the door was closed */
    alignas(SM_ALIGN) _Atomic uint32_t door;
    alignas(SM_ALIGN) sm_phase_fn *fn; /* NULL: the pool is closing.  Read by workers inside only */
    void *arg;
    struct sm_work work;
    int n_threads, n_started;
    struct worker *workers; /* [n_threads - 1] */
};

static void raise_signal(struct signal *s) {
    atomic_fetch_add(&s->gate.value, 1);
    if (atomic_load(&s->n_sleeping) != 0) sm_gate_wake_all(&s->gate);
}

/* Returns the value once it differs from `seen`. */
static uint32_t await_signal(struct signal *s, uint32_t seen) {
    uint64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            uint32_t value = atomic_load_explicit(&s->gate.value, memory_order_acquire);
            if (value != seen) return value;
            sm_cpu_pause();
        }
        uint64_t now = sm_clock_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_fetch_add(&s->n_sleeping, 1);
    uint32_t value;
    while ((value = atomic_load(&s->gate.value)) == seen) sm_gate_wait(&s->gate, seen);
    atomic_fetch_sub(&s->n_sleeping, 1);
    return value;
}

bool sm_work_take(struct sm_work *work, int thread, size_t *begin, size_t *end) {
    for (int i = 0; i < work->n_threads; i++) {
        struct share *s = &work->shares[(thread + i) % work->n_threads];
        size_t next = atomic_load_explicit(&s->next, memory_order_relaxed);
        while (next < s->end) {
            /* No small rest: it goes with the last. */
            size_t left = s->end - next, n = left < work->grain + work->grain / 2 ? left : work->grain;
            if (!atomic_compare_exchange_weak_explicit(&s->next, &next, next + n, memory_order_relaxed,
                                                       memory_order_relaxed))
                continue;
            *begin = next;
            *end = next + n;
            return true;
        }
    }
    return false;
}

/* False: the phase is over. */
static bool enter(struct sm_pool *p) {
    uint32_t door = atomic_load_explicit(&p->door, memory_order_relaxed);
    while ((door & CLOSED) == 0)
        if (atomic_compare_exchange_weak(&p->door, &door, door + 1)) return true;
    return false;
}

static void work(void *arg) {
    struct worker *w = arg;
    struct sm_pool *p = w->pool;
    (void)sm_fpenv_enter(); /* the thread is ours: nothing to restore */
    for (uint32_t seen = 0;;) {
        seen = await_signal(&p->start, seen);
        if (!enter(p)) continue;
        if (p->fn == NULL) return;
        p->fn(p->arg, w->index, &p->work);
        if (atomic_fetch_sub(&p->door, 1) - 1 == CLOSED) raise_signal(&p->finish);
    }
}

int sm_pool_new(int n_threads, struct sm_pool **out, smallm_error *err) {
    *out = NULL;
    if (n_threads < 1 || n_threads > SM_MAX_THREADS)
        return sm_fail(err, SMALLM_E_ARGUMENT, "threads is %d; allowed are 1 to %d", n_threads,
                       SM_MAX_THREADS);
    size_t n_shares = (size_t)n_threads * sizeof(struct share);
    size_t n_bytes = sizeof(struct sm_pool) + n_shares + (size_t)n_threads * sizeof(struct worker);
    struct sm_pool *p = sm_calloc(1, n_bytes);
    if (p == NULL) return sm_fail(err, SMALLM_E_MEMORY, "out of memory for the thread pool");
    p->n_threads = n_threads;
    p->work.n_threads = n_threads;
    p->work.shares = (struct share *)(p + 1);
    p->workers = (struct worker *)(p->work.shares + n_threads);
    atomic_init(&p->door, CLOSED);
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
    atomic_store(&p->door, 0); /* and stays open: everybody comes in and goes home */
    raise_signal(&p->start);
    for (int i = 0; i < p->n_started; i++) sm_thread_join(p->workers[i].thread);
    sm_gate_destroy(&p->start.gate);
    sm_gate_destroy(&p->finish.gate);
    sm_free(p);
}

static void lay_out(struct sm_work *work, size_t n, size_t grain) {
    size_t n_threads = (size_t)work->n_threads, next = 0;
    work->grain = grain;
    for (size_t i = 0; i < n_threads; i++) {
        struct share *s = &work->shares[i];
        s->end = n * (i + 1) / n_threads;
        atomic_store_explicit(&s->next, next, memory_order_relaxed);
        next = s->end;
    }
}

void sm_pool_run(struct sm_pool *p, size_t n, size_t grain, sm_phase_fn *fn, void *arg) {
    lay_out(&p->work, n, grain); /* nobody is inside */
    if (p->n_threads == 1) {
        fn(arg, 0, &p->work);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    uint32_t finished = atomic_load_explicit(&p->finish.gate.value, memory_order_relaxed);
    atomic_store(&p->door, 0);
    raise_signal(&p->start);
    fn(arg, 0, &p->work);
    if (atomic_fetch_or(&p->door, CLOSED) != 0) await_signal(&p->finish, finished);
}
