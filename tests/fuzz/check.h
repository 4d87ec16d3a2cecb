/* What a fuzzer does when the code is wrong: it ends, and libFuzzer keeps the input. */
#ifndef CHECK_H
#define CHECK_H

#include <stdlib.h>

#define CHECK(condition)           \
    do {                           \
        if (!(condition)) abort(); \
    } while (0)

#endif
