/* The allocator every file of the core uses: aligned, on huge pages where it pays, and, in test
 * builds, able to fail on demand.  Owns no state outside test builds. */
#include "os.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define HUGE_FROM ((size_t)4 << 20)

#ifdef SMALLM_TEST_ALLOC
static _Atomic long test_fail_at, test_count;
_Thread_local uint64_t sm_test_work;

void sm_test_fail_alloc(long n) {
    atomic_store(&test_count, 0);
    atomic_store(&test_fail_at, n);
}
long sm_test_alloc_count(void) { return atomic_load(&test_count); }

static bool test_fails(void) {
    return atomic_fetch_add(&test_count, 1) + 1 == atomic_load(&test_fail_at);
}
#endif

void *sm_alloc(size_t n) {
#ifdef SMALLM_TEST_ALLOC
    if (test_fails()) return NULL;
#endif
    if (n > SIZE_MAX / 2) return NULL; /* keeps the rounding below from overflowing */
    if (n < HUGE_FROM) return sm_os_alloc(sm_round_up(n ? n : 1, SM_ALIGN), SM_ALIGN);
    n = sm_round_up(n, HUGE_PAGE);
    void *p = sm_os_alloc(n, HUGE_PAGE);
    if (p) sm_os_advise_huge(p, n);
    return p;
}

void *sm_calloc(size_t n, size_t size) {
    size_t bytes;
    if (!sm_mul(n, size, &bytes)) return NULL;
    void *p = sm_alloc(bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

bool sm_grow(void *p, size_t *cap, size_t n, size_t size) {
    if (n <= *cap) return true;
    /* Half as much again, so that growing one by one stays linear. */
    size_t want, bytes;
    if (!sm_add(*cap, *cap / 2, &want) || want < n) want = n;
    if (want < 16) want = 16;
    if (!sm_mul(want, size, &bytes)) return false;
    void *grown = sm_alloc(bytes), *old;
    if (!grown) return false;
    memcpy(&old, p, sizeof old); /* p points to a pointer of the caller's own type */
    if (old) memcpy(grown, old, *cap * size);
    sm_free(old);
    memcpy(p, &grown, sizeof grown);
    *cap = want;
    return true;
}

void sm_free(void *p) {
    if (p) sm_os_free(p);
}
