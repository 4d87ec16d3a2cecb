/* sm_gate where the system has no futex: the word's own lock and condition. */
#include "os.h"

#if !defined(__linux__)

int sm_gate_init(struct sm_gate *g, smallm_error *err) {
    atomic_init(&g->value, 0);
    g->impl = sm_lock_new();
    return g->impl ? SMALLM_OK : sm_fail(err, SMALLM_E_MEMORY, "thread gate: out of memory");
}
void sm_gate_destroy(struct sm_gate *g) { sm_lock_free(g->impl); }

void sm_gate_wait(struct sm_gate *g, uint32_t seen) {
    sm_lock_enter(g->impl);
    while (atomic_load_explicit(&g->value, memory_order_acquire) == seen) sm_lock_wait(g->impl, -1);
    sm_lock_leave(g->impl);
}

void sm_gate_wake_all(struct sm_gate *g) {
    /* Inside the lock: a waiter that saw the old value is asleep by then. */
    sm_lock_enter(g->impl);
    sm_lock_wake_all(g->impl);
    sm_lock_leave(g->impl);
}

#endif
