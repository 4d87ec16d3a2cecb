/* Fails each allocation in turn on the way from opening a model to closing it: every call must
 * answer SMALLM_OK or SMALLM_E_MEMORY, an answer that comes must be the right one, and afterwards
 * everything works again.  Leaks are the sanitizer's to find.
 *
 * The model is argv[1] or stories260K.gguf in the folder SMALLM_TEST_MODELS. */
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "base.h"

#ifndef SMALLM_TEST_ALLOC
#error "needs the allocator of the test build"
#endif

#define N_TOKENS 5
#define ADAPTER "check_alloc.adapter.gguf" /* written where the test runs, and removed */
#define MAX_STEPS 100000

struct answer {
    int32_t tokens[2 * N_TOKENS];
    int n;
    char text[1024];
    size_t n_text;
};

/* What a refusal must look like. */
static void judge(int rc, const smallm_error *err, const char *what, long step) {
    CHECK(rc == SMALLM_E_MEMORY, "%s, allocation %ld: status %d: %s", what, step, rc, err->message);
    CHECK(err->code == rc && err->message[0] != 0, "%s, allocation %ld: no message", what, step);
}

static void put_int(FILE *f, uint64_t value, size_t n_bytes) { fwrite(&value, n_bytes, 1, f); }

static void put_text(FILE *f, const char *text) {
    put_int(f, strlen(text), 8);
    fwrite(text, strlen(text), 1, f);
}

/* A GGUF adapter of rank 4 for one matrix [rows][k] of a llama model. */
static bool write_adapter(const char *path, size_t rows, size_t k) {
    static const char *const keys[][2] = {
        {"general.architecture", "llama"}, {"general.type", "adapter"}, {"adapter.type", "lora"}};
    enum { KIND_STRING = 8, ALIGNMENT = 32, RANK = 4 };
    FILE *f = fopen(path, "wb");
    if (!f) return false;
    fwrite("GGUF", 4, 1, f);
    put_int(f, 3, 4);
    put_int(f, 2, 8);
    put_int(f, SM_COUNT(keys), 8);
    for (size_t i = 0; i < SM_COUNT(keys); i++) {
        put_text(f, keys[i][0]);
        put_int(f, KIND_STRING, 4);
        put_text(f, keys[i][1]);
    }
    for (int b = 0; b < 2; b++) {
        put_text(f, b ? "blk.0.attn_q.weight.lora_b" : "blk.0.attn_q.weight.lora_a");
        put_int(f, 2, 4);
        put_int(f, b ? RANK : k, 8);
        put_int(f, b ? rows : RANK, 8);
        put_int(f, 0, 4); /* F32 */
        put_int(f, b ? k * RANK * sizeof(float) : 0, 8);
    }
    while (ftell(f) % ALIGNMENT != 0) put_int(f, 0, 1);
    for (size_t i = 0; i < (rows + k) * RANK; i++) {
        float value = (float)(i % 7) - 3;
        fwrite(&value, sizeof value, 1, f);
    }
    return fclose(f) == 0;
}

/* adapter, logits, embedding: may be NULL; with an embedding there is no answer. */
static int generate(const smallm_model *model, smallm_engine *engine, smallm_adapter *adapter,
                    const int32_t *tokens, size_t n_tokens, float *logits, float *embedding,
                    struct answer *out, smallm_error *err) {
    const char *stop[] = {"no text has this", "\xF0\x9F\xA6\x99\xF0\x9F\xA6\x99"};
    const size_t stop_len[] = {16, 8};
    const int32_t bias_ids[] = {3};
    const float bias[] = {-1};
    smallm_model_info info = {.size = sizeof info};
    smallm_model_get_info(model, &info, NULL);
    const bool beside = info.decoder_start >= 0; /* an encoder, which then reads the text */
    smallm_request_params p = {.size = sizeof p,
                               .source = beside ? tokens : NULL,
                               .n_source = beside ? n_tokens : 0,
                               .tokens = beside ? &info.decoder_start : tokens,
                               .n_tokens = beside ? 1 : n_tokens,
                               .max_tokens = embedding ? 0 : N_TOKENS,
                               .n_logprobs = 3,
                               .sampling = {.size = sizeof p.sampling,
                                            .temperature = 0.7f,
                                            .top_k = 40,
                                            .top_p = 0.95f,
                                            .repeat_penalty = 1.1f,
                                            .repeat_last_n = 16,
                                            .bias_ids = bias_ids,
                                            .bias = bias,
                                            .n_bias = 1,
                                            .seed = 7},
                               .stop = stop,
                               .stop_len = stop_len,
                               .n_stop = 2,
                               .logits = logits,
                               .embedding = embedding,
                               .adapter = adapter};
    smallm_request *request = NULL;
    smallm_chunk chunk = {.size = sizeof chunk};
    *out = (struct answer){.n = 0};
    int rc = smallm_engine_submit(engine, &p, &request, err);
    while (rc == SMALLM_OK || rc == SMALLM_AGAIN) {
        rc = smallm_request_next(request, 1000, &chunk, err);
        if (rc != SMALLM_OK) continue;
        if (chunk.token >= 0 && out->n < N_TOKENS) out->tokens[out->n++] = chunk.token;
        if (out->n_text + chunk.n_text <= sizeof out->text) {
            memcpy(out->text + out->n_text, chunk.text, chunk.n_text);
            out->n_text += chunk.n_text;
        }
    }
    smallm_request_free(request);
    return rc == SMALLM_DONE ? SMALLM_OK : rc;
}

/* The whole way; *what names the call that failed.  out[0]: the model's answer; out[1]: with an adapter. */
static int go(const char *path, struct answer out[2], const char **what, smallm_error *err) {
    const char *text = "Once upon a time, \xC3\xA9t\xC3\xA9 2024";
    smallm_model *model = NULL;
    smallm_engine *engine = NULL, *observer = NULL;
    smallm_adapter *adapter = NULL;
    float *logits = NULL, *embedding = NULL;
    int32_t ids[64];
    size_t n_ids = 0, n_text = 0;
    char back[256];
    struct answer first, none;
    smallm_model_params mp = {.size = sizeof mp, .n_threads = 2};
    smallm_engine_params ep = {.size = sizeof ep, .n_threads = 2, .n_batch = 32};

    *what = "smallm_model_open";
    int rc = smallm_model_open(path, &mp, &model, err);
    if (rc != SMALLM_OK) goto done;
    *what = "smallm_engine_open";
    rc = smallm_engine_open(model, &ep, &engine, err);
    if (rc != SMALLM_OK) goto done;
    *what = "smallm_tokenize";
    rc = smallm_tokenize(model, text, strlen(text), SMALLM_ADD_SPECIAL, ids, SM_COUNT(ids), &n_ids,
                         err);
    if (rc != SMALLM_OK) goto done;
    CHECK(n_ids > 0 && n_ids <= SM_COUNT(ids), "%zu tokens", n_ids);
    *what = "smallm_detokenize";
    rc = smallm_detokenize(model, ids, n_ids, 0, back, sizeof back, &n_text, err);
    if (rc != SMALLM_OK) goto done;
    *what = "generate with logits";
    smallm_model_info info = {.size = sizeof info};
    smallm_model_get_info(model, &info, NULL);
    logits = malloc(n_ids * (size_t)info.n_vocab * sizeof *logits);
    rc = generate(model, engine, NULL, ids, n_ids, logits, NULL, &first, err);
    if (rc != SMALLM_OK) goto done;
    *what = "generate from the cache";
    rc = generate(model, engine, NULL, ids, n_ids, NULL, NULL, &out[0], err);
    if (rc != SMALLM_OK) goto done;
    CHECK(memcmp(&first, &out[0], sizeof first) == 0, "cached and fresh answers differ");
    out[1] = out[0];
    if (info.decoder_start < 0) { /* beside an encoder there is no embedding */
        *what = "embed";
        embedding = malloc((size_t)info.n_embd * sizeof *embedding);
        rc = generate(model, engine, NULL, ids, n_ids, NULL, embedding, &none, err);
        if (rc != SMALLM_OK) goto done;
    }
    *what = "smallm_engine_open with statistics";
    ep.statistics = 1;
    rc = smallm_engine_open(model, &ep, &observer, err);
    if (rc != SMALLM_OK) goto done;
    *what = "generate with statistics";
    rc = generate(model, observer, NULL, ids, n_ids, NULL, NULL, &none, err);
    if (rc != SMALLM_OK) goto done;
    CHECK(memcmp(&first, &none, sizeof first) == 0, "statistics change the answer");
    smallm_statistic statistic = {.size = sizeof statistic};
    uint64_t count = 0;
    CHECK(smallm_engine_statistic(observer, 0, &statistic, NULL, &count, err) == SMALLM_OK, "%s",
          err->message);
    size_t n_run = info.decoder_start < 0 ? n_ids + (size_t)first.n - 1 : 0;
    CHECK(n_run == 0 || count == n_run, "%s: %d tokens were counted", statistic.name, (int)count);
    if (strcmp(info.architecture, "llama") != 0) goto done; /* the adapter's */
    *what = "smallm_adapter_open";
    rc = smallm_adapter_open(model, ADAPTER, NULL, &adapter, err);
    if (rc != SMALLM_OK) goto done;
    *what = "generate with an adapter";
    rc = generate(model, engine, adapter, ids, n_ids, NULL, NULL, &out[1], err);
    if (rc != SMALLM_OK) goto done;
    CHECK(memcmp(&first, &out[1], sizeof first) != 0, "the adapter changed nothing");
done:
    smallm_adapter_free(adapter);
    smallm_engine_close(engine);
    smallm_engine_close(observer);
    smallm_model_free(model);
    free(logits);
    free(embedding);
    return rc;
}

/* Weights into another format, with importance: the same bytes, or a refusal for each allocation. */
static void check_quantize(void) {
    enum { ROWS = 40, COLUMNS = 256, BLOCK_BYTES = 144, Q4_K = 12 };
    static float x[ROWS * COLUMNS], importance[COLUMNS];
    static uint8_t out[ROWS * BLOCK_BYTES], expected[ROWS * BLOCK_BYTES];
    smallm_error err = {.size = sizeof err};
    smallm_quantize_params p = {.size = sizeof p, .from = 0, .to = Q4_K, .in = x, .out = expected,
                                .n_in = sizeof x, .n_out = sizeof out, .n_rows = ROWS, .n_cols = COLUMNS,
                                .importance = importance, .n_threads = 3};
    for (size_t i = 0; i < SM_COUNT(x); i++) x[i] = (float)(i * 7919 % 1009) - 504;
    for (size_t i = 0; i < SM_COUNT(importance); i++) importance[i] = (float)(i % 5);
    CHECK(smallm_quantize(&p, &err) == SMALLM_OK, "smallm_quantize: %s", err.message);
    p.out = out;
    long step = 1, n_refused = 0;
    for (; step < 100; step++) {
        err.code = 0;
        err.message[0] = 0;
        memset(out, 0, sizeof out);
        sm_test_fail_alloc(step);
        int rc = smallm_quantize(&p, &err);
        long count = sm_test_alloc_count();
        sm_test_fail_alloc(0);
        if (rc != SMALLM_OK) {
            n_refused++;
            judge(rc, &err, "smallm_quantize", step);
            continue;
        }
        CHECK(memcmp(out, expected, sizeof out) == 0, "allocation %ld: other bytes", step);
        if (count < step) break;
    }
    CHECK(n_refused >= 3 && step < 100, "%ld of %ld allocations of smallm_quantize mattered", n_refused, step);
}

int main(int argc, char **argv) {
    char path[4096];
    check_quantize();
    if (!find_model(argc, argv, path, sizeof path)) return 0;
    static struct answer expected[2], got[2];
    smallm_error err = {.size = sizeof err};
    const char *what = "";
    sm_test_fail_alloc(0);
    if (!write_adapter(ADAPTER, 64, 64)) {
        printf("check_alloc: cannot write %s\n", ADAPTER);
        return 1;
    }
    if (go(path, expected, &what, &err) != SMALLM_OK) {
        printf("check_alloc: %s: %s\n", what, err.message);
        return 1;
    }
    CHECK(expected[0].n > 0, "no token");
    long step = 1, n_refused = 0;
    for (; step < MAX_STEPS && n_failed < 20; step++) {
        err.code = 0;
        err.message[0] = 0;
        sm_test_fail_alloc(step);
        int rc = go(path, got, &what, &err);
        long count = sm_test_alloc_count();
        sm_test_fail_alloc(0);
        if (rc == SMALLM_OK) {
            CHECK(memcmp(expected, got, sizeof got) == 0, "allocation %ld: another answer", step);
            if (count < step) break; /* none was left to fail */
        } else {
            n_refused++;
            judge(rc, &err, what, step);
        }
    }
    CHECK(step < MAX_STEPS, "no end of allocations");
    CHECK(n_refused > 50, "only %ld of %ld allocations mattered", n_refused, step - 1);
    CHECK(go(path, got, &what, &err) == SMALLM_OK, "%s: %s", what, err.message);
    CHECK(memcmp(expected, got, sizeof got) == 0, "another answer in the end");
    remove(ADAPTER);
    printf("check_alloc: %s (%ld allocations, %ld refused)\n", n_failed ? "FAILED" : "ok", step - 1,
           n_refused);
    return n_failed != 0;
}
