/* os.h on Linux, macOS and other POSIX systems.  The only POSIX file of the core.  No state. */
#if !defined(__APPLE__) && !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif

#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

/* ---- files ---------------------------------------------------------------------------------- */

struct sm_file {
    int fd;
    uint64_t size;
#ifdef SMALLM_TEST_ALLOC
    const uint8_t *bytes; /* NULL, or the content of a file that is not on disk */
#endif
    char path[]; /* as the caller gave it */
};

static const char *reason(int code) {
    switch (code) {
    case ENOENT:
    case ENOTDIR: return "no such file";
    case EACCES:
    case EPERM: return "permission denied";
    case EISDIR: return "it is a directory";
    case EMFILE:
    case ENFILE: return "too many open files";
    case ENAMETOOLONG: return "the name is too long";
    case ELOOP: return "too many symbolic links";
    case EIO: return "the device reports an error";
    default: return NULL;
    }
}

static int fail_errno(smallm_error *err, int code, const char *path, const char *verb) {
    int status = code == ENOENT || code == ENOTDIR ? SMALLM_E_NOT_FOUND : SMALLM_E_IO;
    const char *why = reason(code);
    if (why) return sm_fail(err, status, "%s: cannot %s: %s", path, verb, why);
    return sm_fail(err, status, "%s: cannot %s: system error %d", path, verb, code);
}

static struct sm_file *file_new(const char *path) {
    size_t n = strlen(path) + 1;
    struct sm_file *f = sm_calloc(1, sizeof *f + n);
    if (!f) return NULL;
    f->fd = -1;
    memcpy(f->path, path, n);
    return f;
}

int sm_file_open(const char *path, struct sm_file **out, smallm_error *err) {
    *out = NULL;
    struct sm_file *f = file_new(path);
    if (!f) return sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
    int rc;
    struct stat st;
    /* Without O_NONBLOCK the open of a named pipe would wait for a writer. */
    f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (f->fd < 0 || fstat(f->fd, &st) != 0) {
        rc = fail_errno(err, errno, path, "open");
        goto fail;
    }
    if (!S_ISREG(st.st_mode)) {
        rc = sm_fail(err, SMALLM_E_IO, "%s: not a regular file%s", path,
                     S_ISDIR(st.st_mode) ? " but a directory" : "");
        goto fail;
    }
    f->size = (uint64_t)st.st_size;
    *out = f;
    return SMALLM_OK;
fail:
    sm_file_close(f);
    return rc;
}

#ifdef SMALLM_TEST_ALLOC
int sm_file_from_memory(const char *path, const void *bytes, size_t n, struct sm_file **out,
                        smallm_error *err) {
    *out = file_new(path);
    if (!*out) return sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
    (*out)->bytes = bytes;
    (*out)->size = n;
    return SMALLM_OK;
}
#endif

uint64_t sm_file_size(const struct sm_file *f) { return f->size; }
const char *sm_file_path(const struct sm_file *f) { return f->path; }

int sm_file_read(const struct sm_file *f, uint64_t offset, void *dst, size_t n, smallm_error *err) {
    if (offset > f->size || n > f->size - offset) {
        return sm_fail(err, SMALLM_E_IO,
                       "%s: %zu bytes wanted at %llu, but the file has %llu", f->path, n,
                       (unsigned long long)offset, (unsigned long long)f->size);
    }
#ifdef SMALLM_TEST_ALLOC
    if (f->bytes) {
        if (n) memcpy(dst, f->bytes + offset, n);
        return SMALLM_OK;
    }
#endif
    uint8_t *to = dst;
    while (n > 0) {
        /* macOS refuses more than INT_MAX at once. */
        ssize_t got = pread(f->fd, to, SM_MIN(n, (size_t)1 << 30), (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail_errno(err, errno, f->path, "read");
        if (got == 0) {
            return sm_fail(err, SMALLM_E_IO,
                           "%s: ends at byte %llu, but had %llu when it was opened: was it "
                           "replaced meanwhile?",
                           f->path, (unsigned long long)offset, (unsigned long long)f->size);
        }
        to += got;
        offset += (uint64_t)got;
        n -= (size_t)got;
    }
    return SMALLM_OK;
}

void sm_file_close(struct sm_file *f) {
    if (!f) return;
    if (f->fd >= 0) close(f->fd);
    sm_free(f);
}

/* ---- memory --------------------------------------------------------------------------------- */

void *sm_os_alloc(size_t n, size_t align) {
    void *p = NULL;
    return posix_memalign(&p, align, n) == 0 ? p : NULL;
}
void sm_os_free(void *p) { free(p); }

void sm_os_advise_huge(void *p, size_t n) {
#if defined(MADV_HUGEPAGE)
    madvise(p, n, MADV_HUGEPAGE);
#else
    (void)p;
    (void)n;
#endif
}

/* ---- threads -------------------------------------------------------------------------------- */

#define STACK_BYTES ((size_t)2 << 20)

struct sm_thread {
    pthread_t id;
    void (*run)(void *);
    void *arg;
    char name[16]; /* Linux's limit, with the NUL */
};

static void *thread_main(void *p) {
    struct sm_thread *t = p;
#if defined(__linux__)
    pthread_setname_np(pthread_self(), t->name);
#elif defined(__APPLE__)
    pthread_setname_np(t->name);
#endif
    t->run(t->arg);
    return NULL;
}

int sm_thread_start(struct sm_thread **out, void (*run)(void *), void *arg, const char *name,
                    smallm_error *err) {
    *out = NULL;
    struct sm_thread *t = sm_calloc(1, sizeof *t);
    if (!t) return sm_fail(err, SMALLM_E_MEMORY, "thread %s: out of memory", name);
    t->run = run;
    t->arg = arg;
    strncpy(t->name, name, sizeof t->name - 1);
    /* The program's signals stay with the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_t attr;
    int code = pthread_attr_init(&attr);
    if (code == 0) {
        code = pthread_attr_setstacksize(&attr, STACK_BYTES);
        if (code == 0) {
            pthread_sigmask(SIG_SETMASK, &all, &before);
            code = pthread_create(&t->id, &attr, thread_main, t);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
        }
        pthread_attr_destroy(&attr);
    }
    if (code != 0) {
        sm_free(t);
        return sm_fail(err, SMALLM_E_MEMORY, "thread %s cannot start: system error %d", name, code);
    }
    *out = t;
    return SMALLM_OK;
}

void sm_thread_join(struct sm_thread *t) {
    if (!t) return;
    pthread_join(t->id, NULL);
    sm_free(t);
}

struct sm_lock {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
};

struct sm_lock *sm_lock_new(void) {
    struct sm_lock *l = sm_alloc(sizeof *l);
    if (!l) return NULL;
    if (pthread_mutex_init(&l->mutex, NULL) != 0) goto fail;
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr) != 0) goto fail_mutex;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC); /* setting the wall clock must not matter */
#endif
    int code = pthread_cond_init(&l->cond, &attr);
    pthread_condattr_destroy(&attr);
    if (code != 0) goto fail_mutex;
    return l;
fail_mutex:
    pthread_mutex_destroy(&l->mutex);
fail:
    sm_free(l);
    return NULL;
}

void sm_lock_free(struct sm_lock *l) {
    if (!l) return;
    pthread_cond_destroy(&l->cond);
    pthread_mutex_destroy(&l->mutex);
    sm_free(l);
}

void sm_lock_enter(struct sm_lock *l) { pthread_mutex_lock(&l->mutex); }
void sm_lock_leave(struct sm_lock *l) { pthread_mutex_unlock(&l->mutex); }
void sm_lock_wake_all(struct sm_lock *l) { pthread_cond_broadcast(&l->cond); }

void sm_lock_wait(struct sm_lock *l, int64_t timeout_ns) {
    if (timeout_ns < 0) {
        pthread_cond_wait(&l->cond, &l->mutex);
        return;
    }
#if defined(__APPLE__)
    struct timespec t = {(time_t)(timeout_ns / 1000000000), (long)(timeout_ns % 1000000000)};
    pthread_cond_timedwait_relative_np(&l->cond, &l->mutex, &t);
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t ns = t.tv_nsec + timeout_ns % 1000000000;
    t.tv_sec += (time_t)(timeout_ns / 1000000000 + ns / 1000000000);
    t.tv_nsec = (long)(ns % 1000000000);
    pthread_cond_timedwait(&l->cond, &l->mutex, &t);
#endif
}

#if defined(__linux__)

int sm_gate_init(struct sm_gate *g, smallm_error *err) {
    (void)err;
    atomic_init(&g->value, 0);
    g->impl = NULL;
    return SMALLM_OK;
}
void sm_gate_destroy(struct sm_gate *g) { (void)g; }

void sm_gate_wait(struct sm_gate *g, uint32_t seen) {
    while (atomic_load_explicit(&g->value, memory_order_acquire) == seen) {
        syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    }
}
void sm_gate_wake_all(struct sm_gate *g) {
    syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

#endif

/* ---- clock, process, environment ------------------------------------------------------------ */

uint64_t sm_clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int64_t sm_process_id(void) { return (int64_t)getpid(); }
void sm_cpu_relax_os(void) { sched_yield(); }

bool sm_os_allow_amx(void) {
#if defined(__linux__) && defined(__x86_64__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return false;
#endif
}

const char *sm_env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

/* ---- cores and memory ----------------------------------------------------------------------- */

#if defined(__linux__)

/* Reads a small text file into buf[cap]; false where there is none. */
static bool read_text(const char *path, char *buf, size_t cap) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    size_t n = 0;
    while (n < cap - 1) {
        ssize_t got = read(fd, buf + n, cap - 1 - n);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        n += (size_t)got;
    }
    close(fd);
    buf[n] = 0;
    return n > 0;
}

/* The group of this process in hierarchy `controller` ("" is version 2's), from lines
 * "id:controllers:/path" of /proc/self/cgroup. */
static bool cgroup_path(const char *controller, char *path, size_t cap) {
    char text[8192];
    if (!read_text("/proc/self/cgroup", text, sizeof text)) return false;
    size_t n_name = strlen(controller);
    for (char *line = text, *end; *line; line = end) {
        end = strchr(line, '\n');
        if (end) *end++ = 0;
        else end = line + strlen(line);
        char *list = strchr(line, ':'), *group = list ? strchr(list + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        bool match = n_name == 0 && list[1] == 0;
        for (char *c = list + 1; n_name && *c && !match; c += *c == ',') {
            size_t n = strcspn(c, ",");
            match = n == n_name && memcmp(c, controller, n) == 0;
            c += n;
        }
        if (match && strlen(group) < cap) {
            memcpy(path, group, strlen(group) + 1);
            return true;
        }
    }
    return false;
}

/* Calls judge(directory, out) for the process's group and all above it: every limit on the way
 * holds.  Inside a container the path may name the host's view; the mount's root, which is always
 * tried, is then the container's own group. */
static void cgroup_walk(const char *controller, const char *mount,
                        void (*judge)(const char *directory, void *out), void *out) {
    char group[2048], directory[2200];
    if (!cgroup_path(controller, group, sizeof group)) return;
    for (;;) {
        size_t n = strlen(group);
        while (n > 0 && group[n - 1] == '/') group[--n] = 0;
        snprintf(directory, sizeof directory, "%s%s", mount, group);
        judge(directory, out);
        if (n == 0) return;
        *strrchr(group, '/') = 0;
    }
}

static bool read_in(const char *directory, const char *name, char *text, size_t cap) {
    char path[2300];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return read_text(path, text, cap);
}

static void apply_quota(long long quota, long long period, int *least) {
    if (quota <= 0 || period <= 0) return;
    long long n = SM_MAX(quota / period, 1);
    if (n < *least) *least = (int)n;
}
static void judge_cpu_v2(const char *directory, void *out) {
    char text[128];
    long long quota, period;
    if (read_in(directory, "cpu.max", text, sizeof text) &&
        sscanf(text, "%lld %lld", &quota, &period) == 2) /* "max 100000": none */
        apply_quota(quota, period, out);
}
static void judge_cpu_v1(const char *directory, void *out) {
    char quota[64], period[64];
    if (read_in(directory, "cpu.cfs_quota_us", quota, sizeof quota) &&
        read_in(directory, "cpu.cfs_period_us", period, sizeof period))
        apply_quota(atoll(quota), atoll(period), out);
}

static void apply_memory(const char *text, uint64_t *least) {
    unsigned long long limit;
    if (sscanf(text, "%llu", &limit) == 1 && limit > 0 && limit < *least) *least = limit;
}
static void judge_memory_v2(const char *directory, void *out) {
    char text[64];
    if (read_in(directory, "memory.max", text, sizeof text)) apply_memory(text, out);
}
static void judge_memory_v1(const char *directory, void *out) {
    char text[64];
    if (read_in(directory, "memory.limit_in_bytes", text, sizeof text)) apply_memory(text, out);
}

uint64_t sm_memory_total(void) {
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t total = pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : UINT64_MAX;
    cgroup_walk("", "/sys/fs/cgroup", judge_memory_v2, &total);
    cgroup_walk("memory", "/sys/fs/cgroup/memory", judge_memory_v1, &total);
    return total == UINT64_MAX ? 0 : total;
}

#define MAX_CPUS 8192

/* A set of processors from the kernel's list form "0-3,8". */
static void parse_list(const char *text, size_t n_bytes, cpu_set_t *set) {
    memset(set, 0, n_bytes);
    while (*text >= '0' && *text <= '9') {
        char *end;
        long first = strtol(text, &end, 10), last = first;
        if (*end == '-') last = strtol(end + 1, &end, 10);
        for (long i = first; i <= last && i < MAX_CPUS; i++) CPU_SET_S((size_t)i, n_bytes, set);
        text = *end == ',' ? end + 1 : end;
    }
}

static bool read_list(const char *path, size_t n_bytes, cpu_set_t *set) {
    char text[4096];
    if (!read_text(path, text, sizeof text)) return false;
    parse_list(text, n_bytes, set);
    return true;
}

/* Relative speed of processor i where the system says (big.LITTLE), else 0. */
static long capacity(int i) {
    char path[96], text[32];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", i);
    return read_text(path, text, sizeof text) ? atol(text) : 0;
}

void sm_cores_get(struct sm_cores *out) {
    enum { BYTES = MAX_CPUS / 8, SETS = BYTES / sizeof(cpu_set_t) };
    cpu_set_t allowed[SETS], fast[SETS], siblings[SETS];
    *out = (struct sm_cores){1, 1, INT_MAX, false};
    cgroup_walk("", "/sys/fs/cgroup", judge_cpu_v2, &out->quota);
    cgroup_walk("cpu", "/sys/fs/cgroup/cpu", judge_cpu_v1, &out->quota);

    memset(allowed, 0, BYTES);
    if (sched_getaffinity(0, BYTES, allowed) != 0) {
        long n = sysconf(_SC_NPROCESSORS_ONLN);
        out->n_logical = out->n_physical = n > 0 && n < MAX_CPUS ? (int)n : 1;
        return;
    }
    out->n_logical = SM_MAX(CPU_COUNT_S(BYTES, allowed), 1);

    /* The fast kind: what Intel's hybrid parts list as cpu_core; elsewhere what reaches half of the
     * best capacity, which keeps the middle cores of three-tier phones. */
    if (read_list("/sys/devices/cpu_core/cpus", BYTES, fast)) {
        CPU_AND_S(BYTES, fast, fast, allowed);
    } else {
        long best = 0;
        memset(fast, 0, BYTES);
        for (int i = 0; i < MAX_CPUS; i++) {
            if (CPU_ISSET_S((size_t)i, BYTES, allowed)) best = SM_MAX(best, capacity(i));
        }
        for (int i = 0; i < MAX_CPUS; i++) {
            if (CPU_ISSET_S((size_t)i, BYTES, allowed) && (best == 0 || capacity(i) * 2 >= best)) {
                CPU_SET_S((size_t)i, BYTES, fast);
            }
        }
    }
    if (CPU_COUNT_S(BYTES, fast) == 0) memcpy(fast, allowed, BYTES); /* bound to the slow kind */
    out->hybrid = !CPU_EQUAL_S(BYTES, fast, allowed);

    /* One processor counts for each core: the first of its threads that we may use. */
    int n = 0;
    for (int i = 0; i < MAX_CPUS; i++) {
        if (!CPU_ISSET_S((size_t)i, BYTES, fast)) continue;
        char path[96];
        snprintf(path, sizeof path,
                 "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", i);
        bool first = true;
        if (read_list(path, BYTES, siblings)) {
            for (int j = 0; j < i && first; j++) {
                first = !(CPU_ISSET_S((size_t)j, BYTES, siblings) &&
                          CPU_ISSET_S((size_t)j, BYTES, fast));
            }
        }
        n += first;
    }
    out->n_physical = SM_MAX(n, 1);
}

#else

#if defined(__APPLE__)
static int64_t system_value(const char *name) {
    int64_t value = 0; /* the system writes 4 or 8 bytes, little-endian both */
    size_t n = sizeof value;
    return sysctlbyname(name, &value, &n, NULL, 0) == 0 ? value : 0;
}
uint64_t sm_memory_total(void) { return (uint64_t)system_value("hw.memsize"); }
#else
static int64_t system_value(const char *name) {
    (void)name;
    return 0;
}
uint64_t sm_memory_total(void) {
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 0;
}
#endif

void sm_cores_get(struct sm_cores *out) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    int n = online > 0 && online < INT_MAX ? (int)online : 1;
    int fast = (int)system_value("hw.perflevel0.physicalcpu");
    int physical = (int)system_value("hw.physicalcpu");
    *out = (struct sm_cores){n, n, INT_MAX, false};
    if (physical > 0) out->n_physical = SM_MIN(physical, n);
    if (fast > 0 && fast < out->n_physical) {
        out->n_physical = fast;
        out->hybrid = true;
    }
}

#endif
