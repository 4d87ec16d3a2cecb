/* What this machine can do at all: the limits beside which benchmarks/peers.py puts its figures.
 *
 *     probes read BYTES THREADS SECONDS    GB/s of reading a buffer of that size again and again
 *     probes int8 TIER THREADS SECONDS     G int8 multiplications + additions a second
 *     probes f32 TIER THREADS SECONDS      GFLOP/s of float32 multiply-adds
 *
 * TIER: avx2, avxvnni, avx512vnni or amx.  Every loop works in registers (read: does nothing else); the
 * figure is the sum over threads that begin together, each on a core of its own where the system
 * can say so (Linux).  `read` tries each pattern of loads for an equal part of SECONDS and prints
 * the best.
 *
 * Build: cc -O2 -pthread probes.c -o probes (x86-64; other processors have `read` alone). */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MAX_THREADS 256
#define BLOCK ((size_t)1 << 16) /* bytes between two looks at the clock */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct task {
    pthread_t id;
    double (*run)(const struct task *t); /* work done a second, in units of its own */
    const uint8_t *data;                 /* read: this thread's part [n_bytes] */
    size_t n_bytes;
    int n_streams, ahead;                /* read: streams at once; prefetch distance, 0 = none */
    double seconds, result;
    int index;
    pthread_barrier_t *begin;
};

/* ---- read ---------------------------------------------------------------------------------------- */

static volatile uint64_t sink;

#if defined(__x86_64__)
__attribute__((target("avx2"))) static uint64_t read_block(const uint8_t *p, size_t part, size_t n,
                                                           int n_streams, int ahead) {
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 64)
        for (int s = 0; s < n_streams; s++) {
            const uint8_t *at = p + (size_t)s * part + i;
            if (ahead != 0) _mm_prefetch((const char *)at + ahead, _MM_HINT_T0);
            sum = _mm256_add_epi64(sum, _mm256_loadu_si256((const __m256i *)at));
            sum = _mm256_add_epi64(sum, _mm256_loadu_si256((const __m256i *)(at + 32)));
        }
    return (uint64_t)_mm256_extract_epi64(sum, 0);
}
#else
static uint64_t read_block(const uint8_t *p, size_t part, size_t n, int n_streams, int ahead) {
    uint64_t sum = 0, x;
    for (size_t i = 0; i < n; i += 64)
        for (int s = 0; s < n_streams; s++) {
            const uint8_t *at = p + (size_t)s * part + i;
            if (ahead != 0) __builtin_prefetch(at + ahead);
            for (size_t j = 0; j < 64; j += 8) {
                memcpy(&x, at + j, 8);
                sum += x;
            }
        }
    return sum;
}
#endif

static double run_read(const struct task *t) {
    size_t part = t->n_bytes / (size_t)t->n_streams / 64 * 64, at = 0;
    size_t step = BLOCK / (size_t)t->n_streams, done = 0;
    double start = now(), end;
    do {
        size_t n = part - at < step ? part - at : step;
        sink += read_block(t->data + at, part, n, t->n_streams, t->ahead);
        done += n * (size_t)t->n_streams;
        at = at + n < part ? at + n : 0;
    } while ((end = now()) < start + t->seconds);
    return (double)done / (end - start);
}

/* ---- arithmetic ------------------------------------------------------------------------------------- */

/* One look at the clock per ROUNDS rounds of CHAINS independent operations. */
#define ROUNDS 20000
#define CHAINS 12

#define PROBE(name, isa, vector, zero, one, lanes, step)                      \
    __attribute__((target(isa))) static double name(const struct task *t) {   \
        vector acc[CHAINS], x = one, y = one;                                 \
        _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; c++) acc[c] = zero; \
        double start = now(), end, n = 0;                                     \
        do {                                                                  \
            for (int i = 0; i < ROUNDS; i++) {                                \
                _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; c++) {   \
                    __asm__ volatile("" : "+v"(x)); /* no product is shared */ \
                    acc[c] = step;                                            \
                }                                                             \
            }                                                                 \
            n += 2.0 * ROUNDS * CHAINS * (lanes);                             \
        } while ((end = now()) < start + t->seconds);                         \
        _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; c++)             \
            __asm__ volatile("" : : "v"(acc[c]));                             \
        return n / (end - start);                                             \
    }

#if defined(__x86_64__)
/* Sums stay in 16 bits: with 4-bit weights they need widening only every eighth step. */
#define INT8_AVX2 _mm256_add_epi16(acc[c], _mm256_maddubs_epi16(x, y))
PROBE(int8_avx2, "avx2", __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(1), 32, INT8_AVX2)
PROBE(int8_avxvnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(1), 32,
      _mm256_dpbusd_avx_epi32(acc[c], x, y))
PROBE(int8_avx512vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_set1_epi8(1),
      64, _mm512_dpbusd_epi32(acc[c], x, y))
PROBE(f32_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(0.5f), 8,
      _mm256_fmadd_ps(x, y, acc[c]))
PROBE(f32_avx512vnni, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(0.5f), 16,
      _mm512_fmadd_ps(x, y, acc[c]))

/* Four products of two tiles of 16 x 64 with two of 64 x 16. */
__attribute__((target("amx-tile,amx-int8"))) static double int8_amx(const struct task *t) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    double start = now(), end, n = 0;
    do {
        for (int i = 0; i < ROUNDS / 10; i++) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        n += 2.0 * (ROUNDS / 10) * 4 * (16 * 16 * 64);
    } while ((end = now()) < start + t->seconds);
    _tile_release();
    return n / (end - start);
}
#endif

static const struct {
    const char *what, *tier;
    double (*run)(const struct task *t);
} probes[] = {
#if defined(__x86_64__)
    {"int8", "avx2", int8_avx2},
    {"int8", "avxvnni", int8_avxvnni},
    {"int8", "avx512vnni", int8_avx512vnni},
    {"int8", "amx", int8_amx},
    {"f32", "avx2", f32_avx2},
    {"f32", "avxvnni", f32_avx2},
    {"f32", "avx512vnni", f32_avx512vnni},
    {"f32", "amx", f32_avx512vnni},
#endif
};

/* ---- threads ---------------------------------------------------------------------------------------- */

/* Keeps the calling thread on the i-th core this process may use. */
static void stay_on_core(int i) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    for (int c = 0; c < CPU_SETSIZE; c++) {
        if (!CPU_ISSET(c, &allowed) || i-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(c, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
        return;
    }
#else
    (void)i;
#endif
}

static void *run_task(void *arg) {
    struct task *t = arg;
    stay_on_core(t->index);
    pthread_barrier_wait(t->begin);
    t->result = t->run(t);
    return NULL;
}

/* The sum over n_threads threads of work a second. */
static double run_together(struct task *tasks, int n_threads) {
    pthread_barrier_t begin;
    pthread_barrier_init(&begin, NULL, (unsigned)n_threads);
    double sum = 0;
    for (int i = 0; i < n_threads; i++) {
        tasks[i].begin = &begin;
        tasks[i].index = i;
        if (pthread_create(&tasks[i].id, NULL, run_task, &tasks[i]) != 0) {
            fputs("probes: cannot start a thread\n", stderr);
            exit(1);
        }
    }
    for (int i = 0; i < n_threads; i++) {
        pthread_join(tasks[i].id, NULL);
        sum += tasks[i].result;
    }
    pthread_barrier_destroy(&begin);
    return sum;
}

static double probe_read(size_t n_bytes, int n_threads, double seconds) {
    static const struct {
        int n_streams, ahead;
    } patterns[] = {{1, 0}, {1, 2048}, {1, 4096}, {1, 16384}, {4, 0}, {4, 2048}, {4, 4096}};
    const int n_patterns = (int)(sizeof patterns / sizeof patterns[0]);
    const size_t huge = (size_t)2 << 20, part = n_bytes / (size_t)n_threads / 64 * 64;
    size_t all = (n_bytes + huge) / huge * huge; /* prefetches may run past the end */
    uint8_t *data = aligned_alloc(huge, all);
    if (data == NULL || part < BLOCK) {
        fprintf(stderr, "probes: cannot read %zu bytes with %d threads\n", n_bytes, n_threads);
        exit(1);
    }
#if defined(MADV_HUGEPAGE)
    madvise(data, all, MADV_HUGEPAGE);
#endif
    memset(data, 1, all);
    double best = 0;
    for (int p = 0; p < n_patterns; p++) {
        struct task tasks[MAX_THREADS];
        for (int i = 0; i < n_threads; i++)
            tasks[i] = (struct task){.run = run_read, .data = data + (size_t)i * part, .n_bytes = part,
                                     .n_streams = patterns[p].n_streams, .ahead = patterns[p].ahead,
                                     .seconds = seconds / n_patterns};
        double rate = run_together(tasks, n_threads);
        if (rate > best) best = rate;
    }
    free(data);
    return best;
}

int main(int argc, char **argv) {
    const char *what = argc == 5 ? argv[1] : "", *tier = argc == 5 ? argv[2] : "";
    int n_threads = argc == 5 ? atoi(argv[3]) : 0;
    double seconds = argc == 5 ? atof(argv[4]) : 0;
    if (n_threads < 1 || n_threads > MAX_THREADS || !(seconds > 0)) {
        fputs("usage: probes read BYTES | int8 TIER | f32 TIER, then THREADS SECONDS\n", stderr);
        return 2;
    }
    if (strcmp(what, "read") == 0) {
        printf("%.3f\n", 1e-9 * probe_read(strtoull(tier, NULL, 10), n_threads, seconds));
        return 0;
    }
#if defined(__linux__) && defined(__x86_64__)
    /* Linux lets a process use tile registers (state 18) only when it has asked to. */
    if (strcmp(tier, "amx") == 0) syscall(SYS_arch_prctl, 0x1023, 18);
#endif
    for (size_t i = 0; i < sizeof probes / sizeof probes[0]; i++) {
        if (strcmp(what, probes[i].what) != 0 || strcmp(tier, probes[i].tier) != 0) continue;
        struct task tasks[MAX_THREADS];
        for (int t = 0; t < n_threads; t++)
            tasks[t] = (struct task){.run = probes[i].run, .seconds = seconds};
        printf("%.3f\n", 1e-9 * run_together(tasks, n_threads));
        return 0;
    }
    fprintf(stderr, "probes: no %s on tier %s\n", what, tier);
    return 2;
}
