/* Everything the core asks of the operating system: files, threads, waiting, the clock, cores.
 * One implementation file per system (os_posix.c, os_windows.c); no other file includes a system
 * header beyond the C standard library's. */
#ifndef SM_OS_H
#define SM_OS_H

#include <stdatomic.h>

#include "base.h"

/* ---- files: read only, positioned, safe against truncation while open -------------------- */
struct sm_file;
/* SMALLM_E_NOT_FOUND: no such file; SMALLM_E_IO: not a regular file, no permission... */
int sm_file_open(const char *path, struct sm_file **out, smallm_error *err);
uint64_t sm_file_size(const struct sm_file *f); /* when it was opened */
const char *sm_file_path(const struct sm_file *f);
/* Reads exactly n bytes at `offset`; any thread may call.  SMALLM_E_IO: the file ends early. */
int sm_file_read(const struct sm_file *f, uint64_t offset, void *dst, size_t n, smallm_error *err);
void sm_file_close(struct sm_file *f); /* NULL allowed */
#ifdef SMALLM_TEST_ALLOC
/* Test builds only: a file whose content is bytes[n], which the caller keeps alive. */
int sm_file_from_memory(const char *path, const void *bytes, size_t n, struct sm_file **out,
                        smallm_error *err);
#endif

/* ---- raw memory for mem.c ------------------------------------------------------------------ */
void *sm_os_alloc(size_t n, size_t align); /* NULL on failure */
void sm_os_free(void *p);
void sm_os_advise_huge(void *p, size_t n); /* a hint; may do nothing */

/* ---- threads ------------------------------------------------------------------------------- */
struct sm_thread;
int sm_thread_start(struct sm_thread **out, void (*run)(void *), void *arg, const char *name,
                    smallm_error *err);
void sm_thread_join(struct sm_thread *t); /* waits and frees; NULL allowed */

struct sm_lock; /* a mutex with one condition */
struct sm_lock *sm_lock_new(void); /* NULL: out of memory */
void sm_lock_free(struct sm_lock *l);
void sm_lock_enter(struct sm_lock *l);
void sm_lock_leave(struct sm_lock *l);
/* Inside the lock: sleeps until woken or timeout_ns passed (< 0: no limit); may wake early. */
void sm_lock_wait(struct sm_lock *l, int64_t timeout_ns);
void sm_lock_wake_all(struct sm_lock *l);

/* A word that threads sleep on while it keeps a value (a futex on Linux, else a mutex and condition:
 * gate.c).  Spurious wake-ups are allowed. */
struct sm_gate {
    _Atomic uint32_t value;
    void *impl; /* NULL on Linux */
};
int sm_gate_init(struct sm_gate *g, smallm_error *err);
void sm_gate_destroy(struct sm_gate *g);
void sm_gate_wait(struct sm_gate *g, uint32_t seen); /* sleeps while value == seen */
void sm_gate_wake_all(struct sm_gate *g);            /* after value changed */

/* ---- the rest ------------------------------------------------------------------------------ */
uint64_t sm_clock_ns(void); /* monotonic */
int64_t sm_process_id(void); /* cheap enough for every API call; changes in a child of fork() */
void sm_cpu_relax_os(void); /* yields the processor to another runnable thread */
/* Asks the system to let this process use AMX's tile registers; false: it has none, or refuses. */
bool sm_os_allow_amx(void);
uint64_t sm_memory_total(void); /* bytes, the container's limit where there is one; 0: unknown */

/* Processors this process may run on: n_logical by affinity mask; n_physical of them (one per
 * core, the fastest kind only on hybrid machines); quota = cgroup CPU quota in processors rounded
 * down but at least 1, or INT_MAX. */
struct sm_cores {
    int n_logical, n_physical, quota;
    bool hybrid;
};
void sm_cores_get(struct sm_cores *out);

const char *sm_env(const char *name); /* getenv; NULL where unset or empty */

#endif
