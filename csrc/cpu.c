/* CPU detection by CPUID, kept in one atomic word that is written once with the value every
 * thread would find. */
#include "cpu.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "os.h"
#include "threads.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#include <xmmintrin.h>

static bool bit(uint32_t word, int i) { return word >> i & 1; }

static uint32_t detect(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!osxsave || !avx) return 0;
    uint32_t saved, high;
    __asm__ __volatile__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x6) != 0x6) return 0; /* xmm and ymm */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    uint32_t features = 0;
    if (!bit(b, 5) || !fma || !f16c) return 0; /* every tier above generic builds on AVX2 */
    features |= SM_CPU_AVX2;
    uint32_t more, unused; /* a: the last subleaf of leaf 7 */
    if (a >= 1 && __get_cpuid_count(7, 1, &more, &unused, &unused, &unused) && bit(more, 4))
        features |= SM_CPU_AVX_VNNI;
    if ((saved & 0xE0) == 0xE0) { /* opmask and zmm */
        if (bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31)) {
            features |= SM_CPU_AVX512;
            if (bit(c, 11)) features |= SM_CPU_AVX512_VNNI;
            bool tiles = bit(d, 24) && bit(d, 25) && (saved & 0x60000) == 0x60000;
            if (tiles && sm_os_allow_amx()) features |= SM_CPU_AMX;
        }
    }
    return features;
}

void sm_cpu_brand(char brand[64]) {
    uint32_t words[13] = {0};
    memset(brand, 0, 64);
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t *w = words + 4 * i;
        if (!__get_cpuid(0x80000002u + i, w, w + 1, w + 2, w + 3)) return;
    }
    const char *s = (const char *)words;
    while (*s == ' ') s++;
    memcpy(brand, s, strlen(s));
}

uint64_t sm_fpenv_enter(void) {
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return saved;
}
void sm_fpenv_leave(uint64_t saved) { _mm_setcsr((uint32_t)saved); }

#else

static uint32_t detect(void) { return 0; }

void sm_cpu_brand(char brand[64]) { memset(brand, 0, 64); }

#if defined(__aarch64__)
uint64_t sm_fpenv_enter(void) {
    uint64_t saved;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved));
    __asm__ __volatile__("msr fpcr, %0" : : "r"((uint64_t)0));
    return saved;
}
void sm_fpenv_leave(uint64_t saved) { __asm__ __volatile__("msr fpcr, %0" : : "r"(saved)); }
#else
uint64_t sm_fpenv_enter(void) { return 0; }
void sm_fpenv_leave(uint64_t saved) { (void)saved; }
#endif
#endif

uint32_t sm_cpu_features(void) {
    static _Atomic uint32_t known; /* bit 31: detected */
    uint32_t found = atomic_load_explicit(&known, memory_order_relaxed);
    if (!(found >> 31)) {
        found = detect() | UINT32_C(1) << 31;
        atomic_store_explicit(&known, found, memory_order_relaxed);
    }
    return found & ~(UINT32_C(1) << 31);
}

int sm_cpu_default_threads(int *out, smallm_error *err) {
    const char *text = sm_env("SMALLM_THREADS");
    if (text) {
        char *end;
        long n = strtol(text, &end, 10);
        if (*end || end == text || n < 1 || n > SM_MAX_THREADS) {
            char shown[32];
            return sm_fail(err, SMALLM_E_ARGUMENT,
                           "SMALLM_THREADS is \"%s\": allowed are the numbers 1 to %d",
                           sm_printable(shown, sizeof shown, text, strlen(text)), SM_MAX_THREADS);
        }
        *out = (int)n;
        return SMALLM_OK;
    }
    struct sm_cores cores;
    sm_cores_get(&cores);
    int n = SM_MIN(SM_MIN(cores.n_logical, cores.n_physical), cores.quota);
    *out = SM_MAX(1, SM_MIN(n, SM_MAX_THREADS));
    return SMALLM_OK;
}
