/* os.h on Windows 8 and later.  The only Windows file of the core.  No state.
 *
 * Paths arrive as UTF-8, as everywhere in the core. */
#define WIN32_LEAN_AND_MEAN
#if !defined(_WIN32_WINNT)
#define _WIN32_WINNT 0x0602
#endif

#include "os.h"

#include <malloc.h>
#include <process.h>
#include <stdlib.h>
#include <windows.h>

/* ---- files ---------------------------------------------------------------------------------- */

struct sm_file {
    HANDLE handle;
    uint64_t size;
#ifdef SMALLM_TEST_ALLOC
    const uint8_t *bytes; /* NULL, or the content of a file that is not on disk */
#endif
    char path[]; /* as the caller gave it */
};

static int fail_code(smallm_error *err, DWORD code, const char *path, const char *verb) {
    switch (code) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND:
    case ERROR_INVALID_NAME:
    case ERROR_BAD_PATHNAME:
        return sm_fail(err, SMALLM_E_NOT_FOUND, "%s: cannot %s: no such file", path, verb);
    case ERROR_ACCESS_DENIED:
        return sm_fail(err, SMALLM_E_IO, "%s: cannot %s: permission denied", path, verb);
    default:
        return sm_fail(err, SMALLM_E_IO, "%s: cannot %s: system error %lu", path, verb,
                       (unsigned long)code);
    }
}

/* The path in UTF-16, to be freed; NULL: out of memory or not UTF-8. */
static wchar_t *wide(const char *path) {
    int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, NULL, 0);
    wchar_t *w = n > 0 ? sm_alloc((size_t)n * sizeof *w) : NULL;
    if (w) MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, w, n);
    return w;
}

static struct sm_file *file_new(const char *path) {
    size_t n = strlen(path) + 1;
    struct sm_file *f = sm_calloc(1, sizeof *f + n);
    if (!f) return NULL;
    f->handle = INVALID_HANDLE_VALUE;
    memcpy(f->path, path, n);
    return f;
}

int sm_file_open(const char *path, struct sm_file **out, smallm_error *err) {
    *out = NULL;
    int rc = SMALLM_OK;
    LARGE_INTEGER size;
    struct sm_file *f = file_new(path);
    wchar_t *name = wide(path);
    if (!f || !name) {
        rc = sm_fail(err, SMALLM_E_MEMORY, "%s: out of memory", path);
        goto fail;
    }
    DWORD attributes = GetFileAttributesW(name);
    if (attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY)) {
        rc = sm_fail(err, SMALLM_E_IO, "%s: not a regular file but a directory", path);
        goto fail;
    }
    f->handle = CreateFileW(name, GENERIC_READ,
                            FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, NULL,
                            OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (f->handle == INVALID_HANDLE_VALUE) {
        rc = fail_code(err, GetLastError(), path, "open");
        goto fail;
    }
    if (GetFileType(f->handle) != FILE_TYPE_DISK) {
        rc = sm_fail(err, SMALLM_E_IO, "%s: not a regular file", path);
        goto fail;
    }
    if (!GetFileSizeEx(f->handle, &size)) {
        rc = fail_code(err, GetLastError(), path, "open");
        goto fail;
    }
    f->size = (uint64_t)size.QuadPart;
    *out = f;
    f = NULL;
fail:
    sm_free(name);
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
        return sm_fail(err, SMALLM_E_IO, "%s: %zu bytes wanted at %llu, but the file has %llu",
                       f->path, n, (unsigned long long)offset, (unsigned long long)f->size);
    }
#ifdef SMALLM_TEST_ALLOC
    if (f->bytes) {
        if (n) memcpy(dst, f->bytes + offset, n);
        return SMALLM_OK;
    }
#endif
    uint8_t *to = dst;
    while (n > 0) {
        OVERLAPPED at = {0}; /* on a synchronous handle: only where to read */
        DWORD got = 0;
        at.Offset = (DWORD)offset;
        at.OffsetHigh = (DWORD)(offset >> 32);
        if (!ReadFile(f->handle, to, (DWORD)SM_MIN(n, (size_t)1 << 30), &got, &at) &&
            GetLastError() != ERROR_HANDLE_EOF) {
            return fail_code(err, GetLastError(), f->path, "read");
        }
        if (got == 0) {
            return sm_fail(err, SMALLM_E_IO,
                           "%s: ends at byte %llu, but had %llu when it was opened: was it "
                           "replaced meanwhile?",
                           f->path, (unsigned long long)offset, (unsigned long long)f->size);
        }
        to += got;
        offset += got;
        n -= got;
    }
    return SMALLM_OK;
}

void sm_file_close(struct sm_file *f) {
    if (!f) return;
    if (f->handle != INVALID_HANDLE_VALUE) CloseHandle(f->handle);
    sm_free(f);
}

/* ---- memory --------------------------------------------------------------------------------- */

void *sm_os_alloc(size_t n, size_t align) { return _aligned_malloc(n, align); }
void sm_os_free(void *p) { _aligned_free(p); }

/* Large pages need a privilege that ordinary processes do not have. */
void sm_os_advise_huge(void *p, size_t n) {
    (void)p;
    (void)n;
}

/* ---- threads -------------------------------------------------------------------------------- */

#define STACK_BYTES (2u << 20)

struct sm_thread {
    HANDLE handle;
    void (*run)(void *);
    void *arg;
};

static unsigned __stdcall thread_main(void *p) {
    struct sm_thread *t = p;
    t->run(t->arg);
    return 0;
}

int sm_thread_start(struct sm_thread **out, void (*run)(void *), void *arg, const char *name,
                    smallm_error *err) {
    *out = NULL;
    struct sm_thread *t = sm_calloc(1, sizeof *t);
    if (!t) return sm_fail(err, SMALLM_E_MEMORY, "thread %s: out of memory", name);
    t->run = run;
    t->arg = arg;
    t->handle = (HANDLE)_beginthreadex(NULL, STACK_BYTES, thread_main, t,
                                       STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    if (!t->handle) {
        sm_free(t);
        return sm_fail(err, SMALLM_E_MEMORY, "thread %s cannot start: system error %lu", name,
                       (unsigned long)_doserrno);
    }
    *out = t;
    return SMALLM_OK;
}

void sm_thread_join(struct sm_thread *t) {
    if (!t) return;
    WaitForSingleObject(t->handle, INFINITE);
    CloseHandle(t->handle);
    sm_free(t);
}

struct sm_lock {
    SRWLOCK lock;
    CONDITION_VARIABLE cond;
};

struct sm_lock *sm_lock_new(void) {
    struct sm_lock *l = sm_alloc(sizeof *l);
    if (!l) return NULL;
    InitializeSRWLock(&l->lock);
    InitializeConditionVariable(&l->cond);
    return l;
}
void sm_lock_free(struct sm_lock *l) { sm_free(l); }
void sm_lock_enter(struct sm_lock *l) { AcquireSRWLockExclusive(&l->lock); }
void sm_lock_leave(struct sm_lock *l) { ReleaseSRWLockExclusive(&l->lock); }
void sm_lock_wake_all(struct sm_lock *l) { WakeAllConditionVariable(&l->cond); }

void sm_lock_wait(struct sm_lock *l, int64_t timeout_ns) {
    /* Rounded up: a wait of less than a millisecond must not become a busy loop. */
    DWORD ms = INFINITE;
    if (timeout_ns >= 0) ms = (DWORD)SM_MIN((timeout_ns + 999999) / 1000000, (int64_t)INFINITE - 1);
    SleepConditionVariableSRW(&l->cond, &l->lock, ms, 0);
}

/* ---- clock, process, environment ------------------------------------------------------------ */

uint64_t sm_clock_ns(void) {
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    uint64_t t = (uint64_t)ticks.QuadPart, f = (uint64_t)per_second.QuadPart;
    return t / f * 1000000000u + t % f * 1000000000u / f;
}

int64_t sm_process_id(void) { return (int64_t)GetCurrentProcessId(); }
void sm_cpu_relax_os(void) { SwitchToThread(); }
bool sm_os_allow_amx(void) { return false; }

const char *sm_env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

/* ---- cores and memory ----------------------------------------------------------------------- */

uint64_t sm_memory_total(void) {
    MEMORYSTATUSEX status = {.dwLength = sizeof status};
    uint64_t total = GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : 0;
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION job; /* the container's */
    if (QueryInformationJobObject(NULL, JobObjectExtendedLimitInformation, &job, sizeof job,
                                  NULL)) {
        DWORD flags = job.BasicLimitInformation.LimitFlags;
        if (flags & JOB_OBJECT_LIMIT_PROCESS_MEMORY) total = SM_MIN(total, job.ProcessMemoryLimit);
        if (flags & JOB_OBJECT_LIMIT_JOB_MEMORY) total = SM_MIN(total, job.JobMemoryLimit);
    }
    return total;
}

void sm_cores_get(struct sm_cores *out) {
    *out = (struct sm_cores){1, 1, INT_MAX, false};
    DWORD_PTR mask = 0, system_mask = 0;
    /* 0: the process spans several groups of 64 processors, and has all of them. */
    if (!GetProcessAffinityMask(GetCurrentProcess(), &mask, &system_mask)) mask = 0;
    DWORD all = GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    int n_logical = 0;
    for (DWORD_PTR m = mask; m; m &= m - 1) n_logical++;
    out->n_logical = out->n_physical = n_logical ? n_logical : (int)SM_MAX(all, 1);

    JOBOBJECT_CPU_RATE_CONTROL_INFORMATION rate;
    const DWORD capped = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
    if (QueryInformationJobObject(NULL, JobObjectCpuRateControlInformation, &rate, sizeof rate,
                                  NULL) &&
        (rate.ControlFlags & capped) == capped) { /* in hundredths of a percent of the machine */
        uint64_t n = (uint64_t)rate.CpuRate * all / 10000;
        out->quota = (int)SM_MAX(n, 1);
    }

    DWORD n_bytes = 0;
    GetLogicalProcessorInformationEx(RelationProcessorCore, NULL, &n_bytes);
    char *cores = sm_alloc(n_bytes);
    if (!cores) return;
    if (GetLogicalProcessorInformationEx(RelationProcessorCore, (void *)cores, &n_bytes)) {
        int best = -1, n_best = 0, n_cores = 0;
        for (DWORD at = 0; at < n_bytes;) {
            const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX *core = (const void *)(cores + at);
            at += core->Size;
            if (mask && !(core->Processor.GroupMask[0].Mask & mask)) continue;
            int class = core->Processor.EfficiencyClass; /* higher is faster */
            if (class > best) {
                best = class;
                n_best = 0;
            }
            n_best += class == best;
            n_cores++;
        }
        if (n_best > 0) out->n_physical = n_best;
        out->hybrid = n_best < n_cores;
    }
    sm_free(cores);
}
