/* The pool behind threads.h.
 *
 * A phase has a number, its epoch (even; odd while the next one is being written down), and its items
 * are cut into one contiguous share per thread.  What a thread must know to join stands in the one
 * cache line it waits at.  A share is a single word, epoch and next item: with the epoch before this
 * one nobody has touched it yet, so that the caller need not lay anything out; with any other epoch
 * it is of no use to a thread that came too late.  A worker takes items before it looks at anything
 * of the caller's: having taken some is what holds the phase open.  When no items are left the
 * caller closes all shares and waits until the items that the workers say they have done make up
 * the rest.
 *
 * Waiting is to spin for SPIN_NS by the clock and then to sleep on a gate.  A raise only makes a
 * system call when somebody sleeps: the sleeper says so before it looks a last time, the raiser
 * looks at that after its change, both sequentially consistent, so one of them sees the other.
 *
 * Why spin and then sleep: a phase of decode takes some tens of microseconds, and a wake-up costs
 * about as much; but beside busy processes a spinning thread uses up the turn that its absent
 * partner needs.  benchmarks/busy.py measures both sides. */
#include "threads.h"

#include <stdalign.h>

#include "cpu.h"
#include "os.h"

#define SPIN_NS 12000
#define PAUSES_PER_LOOK 16 /* reading the clock costs about as much as one pause */

struct worker {
    struct sm_pool *pool;
    int index;
    struct sm_thread *thread;
};

/* An epoch and a count of items. */
typedef uint64_t stamp;
#define STAMP(epoch, count) ((stamp)(epoch) << 32 | (stamp)(count))
#define EPOCH(s) ((uint32_t)((s) >> 32))
#define COUNT(s) ((size_t)((s) & UINT32_MAX))
#define CLOSED UINT32_MAX /* a count: past every share's end */

struct seat { /* a thread's own line */
    alignas(SM_ALIGN) _Atomic stamp next; /* the next item of its share that nobody has taken */
    alignas(SM_ALIGN) _Atomic stamp done; /* workers: items it has done in the newest phase it joined */
};

struct sm_pool {
    alignas(SM_ALIGN) struct sm_gate start; /* value: the epoch */
    _Atomic uint32_t n_sleeping;            /* workers */
    _Atomic size_t n, grain;                /* the phase's, as long as the epoch stays */
    sm_phase_fn *_Atomic fn;                /* NULL: the pool is closing */
    void *_Atomic arg;

    alignas(SM_ALIGN) struct sm_gate finish; /* raised where the caller sleeps */
    _Atomic uint32_t caller_sleeps;
    int n_threads, n_started;
    struct seat *seats;     /* [n_threads] */
    struct worker *workers; /* [n_threads - 1] */
};

_Static_assert(offsetof(struct sm_pool, arg) + sizeof(void *) <= SM_ALIGN, "one line to wait at");

/* A thread's view of a phase. */
struct sm_work {
    struct sm_pool *pool;
    uint32_t epoch;
    int thread;
    size_t n, grain;
    size_t begin, end; /* taken before the thread's part began: handed out first */
    size_t n_taken;
};

static void raise_gate(struct sm_gate *gate, _Atomic uint32_t *n_sleeping) {
    atomic_fetch_add(&gate->value, 1);
    if (atomic_load(n_sleeping) != 0) sm_gate_wake_all(gate);
}

static bool is_new(uint32_t epoch, uint32_t seen) { return epoch != seen && epoch % 2 == 0; }

/* Waits until there is an epoch other than `seen`. */
static uint32_t await_phase(struct sm_pool *p, uint32_t seen) {
    uint64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            uint32_t epoch = atomic_load_explicit(&p->start.value, memory_order_acquire);
            if (is_new(epoch, seen)) return epoch;
            sm_cpu_pause();
        }
        uint64_t now = sm_clock_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_fetch_add(&p->n_sleeping, 1);
    uint32_t epoch;
    while (!is_new(epoch = atomic_load(&p->start.value), seen)) sm_gate_wait(&p->start, epoch);
    atomic_fetch_sub(&p->n_sleeping, 1);
    return epoch;
}

/* ---- items ----------------------------------------------------------------------------------- */

static size_t share_begin(const struct sm_work *w, int thread) {
    return w->n * (size_t)thread / (size_t)w->pool->n_threads;
}

/* A share's next item; false: it is none of this phase's. */
static bool next_item(const struct sm_work *w, int owner, stamp seen, size_t *next) {
    if (EPOCH(seen) == w->epoch) *next = COUNT(seen);
    else if (EPOCH(seen) == w->epoch - 2) *next = share_begin(w, owner);
    else return false;
    return true;
}

static bool take(struct sm_work *w, size_t *begin, size_t *end) {
    const int n_threads = w->pool->n_threads;
    for (int i = 0, owner = w->thread; i < n_threads; i++, owner = owner + 1 < n_threads ? owner + 1 : 0) {
        _Atomic stamp *share = &w->pool->seats[owner].next;
        const size_t last = share_begin(w, owner + 1);
        stamp seen = atomic_load_explicit(share, memory_order_relaxed);
        size_t next;
        while (next_item(w, owner, seen, &next) && next < last) {
            /* No small rest: it goes with the last. */
            size_t left = last - next, n = left < w->grain + w->grain / 2 ? left : w->grain;
            if (!atomic_compare_exchange_weak(share, &seen, STAMP(w->epoch, next + n))) continue;
            *begin = next;
            *end = next + n;
            w->n_taken += n;
            return true;
        }
    }
    return false;
}

bool sm_work_take(struct sm_work *w, size_t *begin, size_t *end) {
    if (w->begin == w->end) return take(w, begin, end);
    *begin = w->begin;
    *end = w->end;
    w->begin = w->end;
    return true;
}

/* Closes all shares: nobody joins any more.  Returns the items that nobody has taken. */
static size_t close_shares(struct sm_work *w) {
    size_t n_left = 0;
    for (int i = 0; i < w->pool->n_threads; i++) {
        _Atomic stamp *share = &w->pool->seats[i].next;
        const size_t last = share_begin(w, i + 1);
        stamp seen = atomic_load_explicit(share, memory_order_relaxed);
        if (EPOCH(seen) == w->epoch && COUNT(seen) >= last) continue;
        size_t next = last;
        seen = atomic_exchange(share, STAMP(w->epoch, CLOSED));
        (void)next_item(w, i, seen, &next);
        n_left += next < last ? last - next : 0;
    }
    return n_left;
}

/* ---- phases ---------------------------------------------------------------------------------- */

static void work(void *arg) {
    struct worker *self = arg;
    struct sm_pool *p = self->pool;
    struct seat *seat = &p->seats[self->index];
    (void)sm_fpenv_enter(); /* the thread is ours: nothing to restore */
    for (uint32_t epoch = 0;;) {
        epoch = await_phase(p, epoch);
        sm_phase_fn *fn = atomic_load_explicit(&p->fn, memory_order_relaxed);
        void *phase_arg = atomic_load_explicit(&p->arg, memory_order_relaxed);
        struct sm_work w = {.pool = p, .epoch = epoch, .thread = self->index,
                            .n = atomic_load_explicit(&p->n, memory_order_relaxed),
                            .grain = atomic_load_explicit(&p->grain, memory_order_relaxed)};
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(&p->start.value, memory_order_relaxed) != epoch) continue; /* over */
        if (fn == NULL) return;
        if (!take(&w, &w.begin, &w.end)) continue;
        fn(phase_arg, self->index, &w);
        atomic_exchange(&seat->done, STAMP(epoch, w.n_taken));
        if (atomic_load(&p->caller_sleeps) != 0) raise_gate(&p->finish, &p->caller_sleeps);
    }
}

/* Items that workers have done in this phase. */
static size_t n_done(const struct sm_work *w) {
    size_t sum = 0;
    for (int i = 1; i < w->pool->n_threads; i++) {
        stamp done = atomic_load(&w->pool->seats[i].done);
        if (EPOCH(done) == w->epoch) sum += COUNT(done);
    }
    return sum;
}

/* Waits until workers have done n items. */
static void await_items(const struct sm_work *w, size_t n) {
    struct sm_pool *p = w->pool;
    uint64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (n_done(w) == n) return;
            sm_cpu_pause();
        }
        uint64_t now = sm_clock_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_store(&p->caller_sleeps, 1);
    for (;;) {
        uint32_t seen = atomic_load(&p->finish.value);
        if (n_done(w) == n) break;
        sm_gate_wait(&p->finish, seen);
    }
    atomic_store(&p->caller_sleeps, 0);
}

/* Writes a phase down and lets the workers see it; its epoch. */
static uint32_t publish(struct sm_pool *p, size_t n, size_t grain, sm_phase_fn *fn, void *arg) {
    uint32_t epoch = atomic_load_explicit(&p->start.value, memory_order_relaxed) + 2;
    atomic_store_explicit(&p->start.value, epoch - 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(&p->n, n, memory_order_relaxed);
    atomic_store_explicit(&p->grain, grain, memory_order_relaxed);
    atomic_store_explicit(&p->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&p->arg, arg, memory_order_relaxed);
    raise_gate(&p->start, &p->n_sleeping);
    return epoch;
}

void sm_pool_run(struct sm_pool *p, size_t n, size_t grain, sm_phase_fn *fn, void *arg) {
    struct sm_work w = {.pool = p, .n = n, .grain = grain, .epoch = publish(p, n, grain, fn, arg)};
    fn(arg, 0, &w);
    size_t n_left = close_shares(&w);
    await_items(&w, n - n_left - w.n_taken);
}

/* ---- making ---------------------------------------------------------------------------------- */

int sm_pool_new(int n_threads, struct sm_pool **out, smallm_error *err) {
    *out = NULL;
    if (n_threads < 1 || n_threads > SM_MAX_THREADS)
        return sm_fail(err, SMALLM_E_ARGUMENT, "threads is %d; allowed are 1 to %d", n_threads,
                       SM_MAX_THREADS);
    size_t n_seats = (size_t)n_threads * sizeof(struct seat);
    size_t n_bytes = sizeof(struct sm_pool) + n_seats + (size_t)n_threads * sizeof(struct worker);
    struct sm_pool *p = sm_calloc(1, n_bytes);
    if (p == NULL) return sm_fail(err, SMALLM_E_MEMORY, "out of memory for the thread pool");
    p->n_threads = n_threads;
    p->seats = (struct seat *)(p + 1);
    p->workers = (struct worker *)(p->seats + n_threads);
    int status = sm_gate_init(&p->start, err);
    if (status != SMALLM_OK) {
        sm_free(p);
        return status;
    }
    status = sm_gate_init(&p->finish, err);
    if (status != SMALLM_OK) {
        sm_gate_destroy(&p->start);
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
    (void)publish(p, 0, 1, NULL, NULL);
    for (int i = 0; i < p->n_started; i++) sm_thread_join(p->workers[i].thread);
    sm_gate_destroy(&p->start);
    sm_gate_destroy(&p->finish);
    sm_free(p);
}
