#include "timers.h"

#include <stdio.h>

void sm_timer_name(enum sm_timer timer, char *out, size_t capacity) {
    static const char *const names[] = {
        [SM_TIMER_SERIAL] = "serial",   [SM_TIMER_WAIT] = "wait",
        [SM_TIMER_EMBED] = "embed",     [SM_TIMER_PREPARE] = "norm and quantize",
        [SM_TIMER_ATTENTION] = "attention", [SM_TIMER_FINISH] = "elementwise",
        [SM_TIMER_MIXER] = "mixer",
        [SM_TIMER_HEAD] = "head",       [SM_TIMER_SAMPLE] = "sample",
    };
    if (timer < SM_TIMER_MATMUL) snprintf(out, capacity, "%s", names[timer]);
    else snprintf(out, capacity, "matmul %s", sm_quants[timer - SM_TIMER_MATMUL].name);
}
