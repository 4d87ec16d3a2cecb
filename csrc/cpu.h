/* What this CPU can do, and which kernel tier the process uses.
 *
 * Detected once, on first use; the result never changes. */
#ifndef SM_CPU_H
#define SM_CPU_H

#include "base.h"

/* One bit per instruction set extension that some tier needs; usable means that the operating
 * system saves its registers too. */
enum sm_cpu_feature {
    SM_CPU_AVX2 = 1 << 0,       /* with FMA and F16C */
    SM_CPU_AVX_VNNI = 1 << 1,   /* VNNI of 256 bits, which does not need AVX-512 */
    SM_CPU_AVX512 = 1 << 2,     /* F, BW, VL, DQ */
    SM_CPU_AVX512_VNNI = 1 << 3,
    SM_CPU_AMX = 1 << 4         /* tiles of int8, allowed by the system */
};

uint32_t sm_cpu_features(void);
void sm_cpu_brand(char brand[64]); /* "" where the CPU does not say */

/* Threads to use where the caller did not say: SMALLM_THREADS, else min(affinity, quota, cores). */
int sm_cpu_default_threads(int *out, smallm_error *err);

/* One spin-wait step. */
static inline void sm_cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* The floating-point environment kernels run in: round to nearest, no flush to zero, exceptions
 * masked.  enter returns the caller's state for leave. */
uint64_t sm_fpenv_enter(void);
void sm_fpenv_leave(uint64_t saved);

#endif
