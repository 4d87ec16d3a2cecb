/* Status, error text, memory, small arithmetic: what every file of the core may use.
 *
 * Invariants: nothing here reads or writes global state; sizes are checked before they are used. */
#ifndef SM_BASE_H
#define SM_BASE_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "smallm.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "smallm reads little-endian files in place and does not run on big-endian machines"
#endif

#define SM_ALIGN 64 /* alignment of every allocation: a cache line, an AVX-512 vector */

#define SM_COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define SM_MIN(a, b) ((a) < (b) ? (a) : (b))
#define SM_MAX(a, b) ((a) > (b) ? (a) : (b))

#if defined(__GNUC__)
#define SM_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define SM_PRINTF(f, a)
#endif

/* Rounds n up to a multiple of m (m > 0, no overflow: callers hold sizes far below SIZE_MAX). */
static inline size_t sm_round_up(size_t n, size_t m) { return (n + m - 1) / m * m; }

/* a * b and a + b into *out; false where the result does not fit. */
static inline bool sm_mul(size_t a, size_t b, size_t *out) {
    if (b != 0 && a > SIZE_MAX / b) return false;
    *out = a * b;
    return true;
}
static inline bool sm_add(size_t a, size_t b, size_t *out) {
    if (a > SIZE_MAX - b) return false;
    *out = a + b;
    return true;
}

/* Fills *err (may be NULL) with `code` and the formatted message, and returns `code`.
 * A %.*s of file content must go through sm_printable first. */
int sm_fail(smallm_error *err, int code, const char *fmt, ...) SM_PRINTF(3, 4);

/* Copies at most n bytes of s into buf[cap], replacing control and non-ASCII bytes by '?', ending
 * in NUL and in "..." where it was cut.  Returns buf.  For file content inside messages. */
const char *sm_printable(char *buf, size_t cap, const char *s, size_t n);

/* Reads a caller's versioned struct: copies min(src->size, size) bytes of src to dst, zeroes the
 * rest.  src may be NULL (all defaults).  SMALLM_E_ARGUMENT where src->size is 0 or absurd. */
int sm_read_struct(void *dst, size_t size, const void *src, const char *what, smallm_error *err);

/* Writes the first min(*(size_t *)dst, size) bytes of src to the caller's versioned struct dst,
 * leaving its size field. */
int sm_write_struct(void *dst, const void *src, size_t size, const char *what, smallm_error *err);

/* ---- memory (mem.c) ------------------------------------------------------------------------
 * All memory is SM_ALIGN-aligned.  NULL means failure: size 0 gives a valid pointer.
 * Allocations of 4 MB and more lie on huge pages where the system has them. */
void *sm_alloc(size_t n);                 /* contents undefined */
void *sm_calloc(size_t n, size_t size);   /* zeroed; NULL on overflow of n * size */
/* Grows *p (capacity *cap elements of `size` bytes) to hold at least n; contents stay.
 * false: out of memory, *p and *cap unchanged. */
bool sm_grow(void *p, size_t *cap, size_t n, size_t size);
void sm_free(void *p); /* NULL allowed */

#ifdef SMALLM_TEST_ALLOC
/* Test builds only: the n-th allocation from now fails (1: the next one); 0 turns it off. */
void sm_test_fail_alloc(long n);
long sm_test_alloc_count(void); /* allocations since the last sm_test_fail_alloc */

/* Test builds only: steps of work that a caller's text could make many of, on this thread. */
extern _Thread_local uint64_t sm_test_work;
#define SM_WORK() ((void)sm_test_work++)
#else
#define SM_WORK() ((void)0)
#endif

#endif
