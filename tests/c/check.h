/* What the tests share: failures that are told and counted, and where a test's model is. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static _Atomic int n_failed;

#define CHECK(ok, ...)                                                                             \
    do {                                                                                           \
        if (!(ok)) {                                                                               \
            n_failed++;                                                                            \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #ok);                                        \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

/* argv[1], or stories260K.gguf in the folder SMALLM_TEST_MODELS, into path [cap]; false: neither is
 * there, which is told. */
static inline bool find_model(int argc, char **argv, char *path, size_t cap) {
    const char *folder = getenv("SMALLM_TEST_MODELS");
    if (argc > 1) snprintf(path, cap, "%s", argv[1]);
    else if (folder != NULL) snprintf(path, cap, "%s/stories260K.gguf", folder);
    else printf("%s: skipped: needs a model: pass a GGUF path\n", argv[0]);
    return argc > 1 || folder != NULL;
}

#endif
