/* Which kernels run: generic first, then every tier of isas.def that the chosen one builds on.
 *
 * The tables are built once and never change; SMALLM_ISA is read at each sm_kernels_get. */
#include <stdatomic.h>

#include "../cpu.h"
#include "../os.h"
#include "kernels.h"

#define SM_ISA(name, needs) void sm_init__##name(struct sm_kernels *k);
#include "isas.def"
#undef SM_ISA
#if defined(SM_HAVE_X86)
void sm_init__generic_fma(struct sm_kernels *k);
#endif

struct isa {
    const char *name;
    uint32_t needs; /* CPU features */
    void (*init)(struct sm_kernels *k);
};

static const struct isa isas[] = {
#define SM_ISA(name, needs) {#name, needs, sm_init__##name},
#include "isas.def"
#undef SM_ISA
};

static bool covers(uint32_t features, uint32_t needs) { return (needs & ~features) == 0; }

static bool runs(size_t i) { return covers(sm_cpu_features(), isas[i].needs); }

/* Tier i, which runs here, over each lower tier that runs wherever i does.  Even a tier's init is
 * compiled for its instruction set. */
static void build(size_t i, struct sm_kernels *k) {
    void (*generic)(struct sm_kernels *) = sm_init__generic;
#if defined(SM_HAVE_X86)
    if (covers(isas[i].needs | sm_cpu_features(), SM_CPU_AVX2)) generic = sm_init__generic_fma;
#endif
    generic(k);
    for (size_t j = 1; j <= i; j++)
        if (covers(isas[i].needs, isas[j].needs)) isas[j].init(k);
}

bool sm_kernels_tier(size_t i, struct sm_kernels *out, bool *usable) {
    if (i >= SM_COUNT(isas)) return false;
    *out = (struct sm_kernels){.name = isas[i].name};
    *usable = runs(i);
    if (*usable) build(i, out);
    return true;
}

/* Every thread that finds the tables unbuilt could build the same ones; the first to claim them
 * does, and the others wait those few microseconds. */
static const struct sm_kernels *tables(void) {
    static struct sm_kernels built[SM_COUNT(isas)];
    static atomic_int state; /* 0: nothing, 1: being built, 2: there */
    int expected = 0;
    if (atomic_load_explicit(&state, memory_order_acquire) == 2) return built;
    if (atomic_compare_exchange_strong(&state, &expected, 1)) {
        for (size_t i = 0; i < SM_COUNT(isas); i++)
            if (runs(i)) build(i, &built[i]);
        atomic_store_explicit(&state, 2, memory_order_release);
    }
    while (atomic_load_explicit(&state, memory_order_acquire) != 2) sm_cpu_pause();
    return built;
}

void sm_kernels_available(char *out, size_t capacity) {
    size_t n = 0;
    out[0] = 0;
    for (size_t i = 0; i < SM_COUNT(isas); i++) {
        size_t length = strlen(isas[i].name);
        if (!runs(i) || n + length + 2 > capacity) continue;
        if (n > 0) out[n++] = ',';
        memcpy(out + n, isas[i].name, length + 1);
        n += length;
    }
}

int sm_kernels_get(const struct sm_kernels **out, smallm_error *err) {
    const char *wanted = sm_env("SMALLM_ISA");
    size_t chosen = SM_COUNT(isas);
    for (size_t i = 0; i < SM_COUNT(isas); i++)
        if (runs(i) && (wanted == NULL || strcmp(wanted, isas[i].name) == 0))
            chosen = i;
    if (chosen == SM_COUNT(isas)) {
        char shown[32], available[128];
        sm_kernels_available(available, sizeof available);
        return sm_fail(err, SMALLM_E_ARGUMENT,
                       "SMALLM_ISA is \"%s\": this CPU and this build of smallm have %s",
                       sm_printable(shown, sizeof shown, wanted, strlen(wanted)), available);
    }
    *out = tables() + chosen;
    return SMALLM_OK;
}
