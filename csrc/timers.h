/* Where the time of forward passes goes, in nanoseconds summed over the threads.  Kept by ops.c and
 * engine.c where asked for (smallm_engine_params.timers): the clock is read at each change of what a
 * thread does.  Off, that is a test of a pointer. */
#ifndef SM_TIMERS_H
#define SM_TIMERS_H

#include "quants/quants.h"

enum sm_timer {
    SM_TIMER_SERIAL,    /* the pass's own thread, between phases */
    SM_TIMER_WAIT,      /* a thread without work: for a phase to begin, for the others to finish */
    SM_TIMER_EMBED,
    SM_TIMER_PREPARE,   /* norms, and activations to int8 */
    SM_TIMER_ATTENTION, /* with rotation and the cache's writes */
    SM_TIMER_MIXER,     /* convolutions and state spaces */
    SM_TIMER_FINISH,    /* biases, residual sums, SwiGLU, GELU */
    SM_TIMER_HEAD,      /* the head's panels */
    SM_TIMER_SAMPLE,    /* sampling, detokenizing, handing on: of the engine's thread */
    SM_TIMER_MATMUL,    /* + enum sm_type: panels of that format, without the head's */
    SM_TIMER_COUNT = SM_TIMER_MATMUL + SM_TYPE_COUNT
};

struct sm_timers {
    uint64_t ns[SM_TIMER_COUNT];
};

/* "wait", "matmul Q4_1", ... into out. */
void sm_timer_name(enum sm_timer timer, char *out, size_t capacity);

#endif
