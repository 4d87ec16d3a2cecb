/* The ground floor against what it promises: error text, versioned structs, memory, half floats,
 * elementary functions, sleeping and waking. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "f16.h"
#include "mathx.h"
#include "os.h"

static int n_failed;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
            n_failed++;                                                          \
        }                                                                        \
    } while (0)

static void check_errors(void) {
    smallm_error e = {.size = sizeof e};
    char longest[2000], shown[8];
    CHECK(sm_fail(NULL, -5, "%d", 1) == -5);
    CHECK(sm_fail(&e, -3, "n = %d", 7) == -3 && e.code == -3 && strcmp(e.message, "n = 7") == 0);
    /* A message may quote the one it replaces. */
    sm_fail(&e, -4, "again: %s", e.message);
    CHECK(strcmp(e.message, "again: n = 7") == 0);
    /* The cut does not leave half a character; bytes that are not UTF-8 do not get through. */
    memset(longest, 'x', sizeof longest);
    longest[sizeof e.message - 2] = (char)0xC3;
    longest[sizeof e.message - 1] = (char)0xA9;
    longest[sizeof longest - 1] = 0;
    sm_fail(&e, -1, "%s", longest);
    CHECK(strlen(e.message) == sizeof e.message - 1);
    CHECK(e.message[sizeof e.message - 2] == '?');
    sm_fail(&e, -1, "%s", "a\xC3\xA9\xED\xA0\x80\xFFz");
    CHECK(strcmp(e.message, "a\xC3\xA9????z") == 0);
    /* An older caller's struct is not written past its end. */
    e.size = offsetof(smallm_error, message) + 4;
    memset(e.message, '#', sizeof e.message);
    sm_fail(&e, -2, "abcdef");
    CHECK(memcmp(e.message, "abc\0#", 5) == 0);
    CHECK(strcmp(sm_printable(shown, sizeof shown, "a\nb\xFF", 4), "a?b?") == 0);
    CHECK(strcmp(sm_printable(shown, sizeof shown, "abcdefgh", 8), "abcd...") == 0);
}

static void check_structs(void) {
    struct v1 { size_t size; int a; } old = {sizeof old, 5};
    struct v2 { size_t size; int a, b; double c; } now, given = {sizeof given, 1, 2, 3.0};
    struct { struct v2 v; int after; } wide = {{sizeof wide, 1, 2, 3.0}, 9};
    smallm_error e = {.size = sizeof e};
    CHECK(sm_read_struct(&now, sizeof now, &old, "v2", &e) == SMALLM_OK);
    CHECK(now.a == 5 && now.c == 0);
    CHECK(sm_read_struct(&now, sizeof now, NULL, "v2", &e) == SMALLM_OK && now.a == 0);
    CHECK(sm_read_struct(&now, sizeof now, &wide, "v2", &e) == SMALLM_OK && now.c == 3.0);
    old.size = 0;
    CHECK(sm_read_struct(&now, sizeof now, &old, "v2", &e) == SMALLM_E_ARGUMENT);
    CHECK(strstr(e.message, "v2.size is 0") != NULL);
    old.size = (size_t)-1;
    CHECK(sm_read_struct(&now, sizeof now, &old, "v2", &e) == SMALLM_E_ARGUMENT);
    old = (struct v1){sizeof old, 0};
    CHECK(sm_write_struct(&old, &given, sizeof given, "v2", &e) == SMALLM_OK);
    CHECK(old.size == sizeof old && old.a == 1);
    wide.v.size = sizeof wide;
    wide.v.b = 0;
    CHECK(sm_write_struct(&wide, &given, sizeof given, "v2", &e) == SMALLM_OK);
    CHECK(wide.v.size == sizeof wide && wide.v.b == 2 && wide.after == 9);
}

static void check_memory(void) {
    size_t product;
    CHECK(sm_mul(SIZE_MAX / 3, 3, &product) && !sm_mul(SIZE_MAX / 3 + 1, 3, &product));
    CHECK(sm_add(SIZE_MAX - 1, 1, &product) && !sm_add(SIZE_MAX, 1, &product));
    CHECK(!sm_alloc(SIZE_MAX) && !sm_calloc(SIZE_MAX / 2, 3));
    for (size_t n = 0; n < (size_t)16 << 20; n = n * 3 + 1) {
        unsigned char *p = sm_calloc(n, 1);
        CHECK(p && (uintptr_t)p % SM_ALIGN == 0);
        for (size_t i = 0; p && i < n; i++) CHECK(p[i] == 0);
        sm_free(p);
    }
    int *a = NULL;
    size_t cap = 0;
    for (size_t i = 0; i < 10000; i++) {
        CHECK(sm_grow(&a, &cap, i + 1, sizeof *a));
        a[i] = (int)i;
    }
    for (size_t i = 0; i < 10000; i++) CHECK(a[i] == (int)i);
    int *before = a;
    sm_test_fail_alloc(1);
    CHECK(!sm_grow(&a, &cap, cap + 1, sizeof *a) && a == before);
    sm_test_fail_alloc(0);
    CHECK(!sm_grow(&a, &cap, SIZE_MAX / 2, sizeof *a) && a == before);
    sm_free(a);
}

/* Every float16, every float32 that lies exactly between two of them and its neighbours. */
static void check_halves(void) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        bool nan = (h & 0x7C00) == 0x7C00 && (h & 0x3FF);
        float x = sm_f16_to_f32((uint16_t)h);
        uint32_t fraction = h & 0x3FF, exponent = h >> 10 & 31;
        double want = exponent ? ldexp(1024 + fraction, (int)exponent - 25) : ldexp(fraction, -24);
        if (exponent == 31) {
            CHECK(nan ? isnan(x) : isinf(x));
        } else {
            CHECK(x == (h & 0x8000 ? -want : want));
        }
        CHECK(nan ? isnan(sm_f16_to_f32(sm_f32_to_f16(x))) : sm_f32_to_f16(x) == h);
        if (exponent == 31 || h & 0x8000) continue;
        double next = exponent == 30 && fraction == 1023
                          ? 65536 : sm_f16_to_f32((uint16_t)(h + 1));
        float middle = (float)((want + next) / 2);
        CHECK(sm_f32_to_f16(middle) == h + (h & 1)); /* ties go to even */
        CHECK(sm_f32_to_f16(nextafterf(middle, 0)) == h);
        CHECK(sm_f32_to_f16(nextafterf(middle, 1e9f)) == h + 1);
        CHECK(sm_f32_to_f16(-middle) == (0x8000 | (h + (h & 1))));
    }
    CHECK(sm_f32_to_f16(1e30f) == 0x7C00 && sm_f32_to_f16(1e-30f) == 0);
    CHECK(sm_bf16_to_f32(0xC049) == -3.140625f);
}

static bool close_to(double got, double want, double relative) {
    return got == want || fabs(got - want) <= relative * fabs(want);
}

/* Against the C library's, which is good to an ulp or two of its own. */
static void check_functions(void) {
    uint64_t state = 1;
    for (int i = 0; i < 200000; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        double u = (double)(state >> 11) * 0x1p-53, v = (double)(state << 32 >> 32) * 0x1p-32, s, c;
        double x = u * 1400 - 700, y = exp(x), small = (u - 0.5) * 0.1, angle = (u - 0.5) * 2e7;
        double power = (v - 0.5) * 40;
        CHECK(close_to(sm_exp(x), y, 1e-14) && close_to(sm_exp(small), exp(small), 1e-14));
        CHECK(close_to(sm_log(y), log(y), 1e-14));
        CHECK(close_to(sm_log(1 + small), log(1 + small), 1e-14));
        double base = sm_exp((u - 0.5) * 30);
        CHECK(close_to(sm_pow(base, power), pow(base, power), 1e-14));
        sm_sincos(angle, &s, &c);
        CHECK(fabs(s - sin(angle)) < 1e-14 && fabs(c - cos(angle)) < 1e-14);
        sm_sincos(small, &s, &c);
        CHECK(close_to(s, sin(small), 1e-14) && close_to(c, cos(small), 1e-14));
    }
    CHECK(sm_exp(0) == 1 && sm_log(1) == 0 && sm_pow(10000, 0) == 1 && sm_pow(1, 3e10) == 1);
    CHECK(sm_exp(710) == INFINITY && sm_exp(-800) == 0 && isnan(sm_exp(NAN)));
    CHECK(sm_exp(-INFINITY) == 0 && close_to(sm_exp(-744), exp(-744), 1e-14));
    CHECK(close_to(sm_log(0x1p-1070), log(0x1p-1070), 1e-14));
    CHECK(sm_pow(1e300, 2) == INFINITY && sm_pow(1e300, -2) == 0);
}

struct sleeper {
    struct sm_gate gate;
    struct sm_lock *lock;
    int n_awake; /* under the lock */
};

static void sleep_and_report(void *arg) {
    struct sleeper *s = arg;
    sm_gate_wait(&s->gate, 0);
    sm_lock_enter(s->lock);
    s->n_awake++;
    sm_lock_wake_all(s->lock);
    sm_lock_leave(s->lock);
}

static void check_waiting(void) {
    enum { N = 3 };
    struct sleeper s = {.n_awake = 0};
    struct sm_thread *threads[N];
    smallm_error e = {.size = sizeof e};
    CHECK(sm_gate_init(&s.gate, &e) == SMALLM_OK);
    s.lock = sm_lock_new();
    for (int i = 0; i < N; i++) {
        CHECK(sm_thread_start(&threads[i], sleep_and_report, &s, "sleeper", &e) == SMALLM_OK);
    }
    sm_lock_enter(s.lock);
    uint64_t until = sm_clock_ns() + 20000000;
    while (sm_clock_ns() < until) sm_lock_wait(s.lock, 5000000);
    CHECK(s.n_awake == 0); /* nobody passes while the value stands */
    atomic_store(&s.gate.value, 1);
    sm_gate_wake_all(&s.gate);
    while (s.n_awake < N) sm_lock_wait(s.lock, -1);
    sm_lock_leave(s.lock);
    for (int i = 0; i < N; i++) sm_thread_join(threads[i]);
    sm_lock_free(s.lock);
    sm_gate_destroy(&s.gate);
}

static void check_machine(void) {
    struct sm_cores cores;
    sm_cores_get(&cores);
    CHECK(cores.n_logical >= 1 && cores.n_physical >= 1 && cores.quota >= 1);
    CHECK(cores.n_physical <= cores.n_logical);
    CHECK(sm_memory_total() > (uint64_t)16 << 20);
}

int main(void) {
    check_errors();
    check_structs();
    check_memory();
    check_halves();
    check_functions();
    check_waiting();
    check_machine();
    return n_failed ? 1 : 0;
}
