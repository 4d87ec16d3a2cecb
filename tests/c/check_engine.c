/* The engine over its public functions, with the model at argv[1] or stories260K.gguf in the folder
 * SMALLM_TEST_MODELS: whatever happens beside a request, it gets what it gets alone.
 *
 * Answers are forced where their text matters: allowed tokens A, B, C with biases that fall and a
 * frequency penalty above them make any model say A B C A B C... */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.h"
#include "os.h"

#define MAX_TOKENS 512
#define MAX_TEXT 16384

static smallm_model *model;
static smallm_model_info model_info;

struct result {
    int status, finish, n;
    int32_t tokens[MAX_TOKENS];
    float logprobs[MAX_TOKENS], top[MAX_TOKENS];
    char text[MAX_TEXT];
    size_t n_text;
    char pieces[MAX_TEXT]; /* the text with | after each chunk */
    smallm_request_stats stats;
    smallm_error err;
};

/* ---- helpers --------------------------------------------------------------------------------- */

static smallm_engine *open_engine(smallm_engine_params p) {
    smallm_engine *e = NULL;
    smallm_error err = {.size = sizeof err};
    p.size = sizeof p;
    if (p.n_threads == 0) p.n_threads = 2;
    if (smallm_engine_open(model, &p, &e, &err) != SMALLM_OK) {
        printf("cannot open an engine: %s\n", err.message);
        exit(1);
    }
    return e;
}

static smallm_engine_info info_of(smallm_engine *e) {
    smallm_engine_info info = {.size = sizeof info};
    CHECK(smallm_engine_get_info(e, &info, NULL) == SMALLM_OK, "info");
    return info;
}

static smallm_request_params request(const int32_t *tokens, size_t n, int max_tokens) {
    return (smallm_request_params){.size = sizeof(smallm_request_params),
                                   .tokens = tokens,
                                   .n_tokens = n,
                                   .max_tokens = max_tokens,
                                   .n_logprobs = -1,
                                   .sampling = {.size = sizeof(smallm_sampling)}};
}

static void drain(smallm_request *r, struct result *out) {
    smallm_chunk c = {.size = sizeof c};
    size_t n_pieces = 0;
    *out = (struct result){.err = {.size = sizeof out->err}};
    for (;;) {
        int rc = smallm_request_next(r, 100, &c, &out->err);
        if (rc == SMALLM_AGAIN) continue;
        out->status = rc;
        if (rc != SMALLM_OK) break;
        CHECK(out->finish == SMALLM_FINISH_NONE, "a chunk after the last one");
        if (c.token >= 0 && out->n < MAX_TOKENS) {
            out->tokens[out->n] = c.token;
            out->logprobs[out->n] = c.logprob;
            out->top[out->n++] = c.n_top > 0 ? c.top_logprobs[c.n_top - 1] : 0;
        }
        if (out->n_text + c.n_text < MAX_TEXT && n_pieces + c.n_text + 1 < MAX_TEXT) {
            memcpy(out->text + out->n_text, c.text, c.n_text);
            memcpy(out->pieces + n_pieces, c.text, c.n_text);
            out->n_text += c.n_text;
            n_pieces += c.n_text;
            out->pieces[n_pieces++] = '|';
        }
        out->finish = c.finish;
    }
    out->stats.size = sizeof out->stats;
    CHECK(smallm_request_get_stats(r, &out->stats, NULL) == SMALLM_OK, "stats");
    CHECK(out->stats.n_completion == out->n, "%d tokens, %d counted", out->n,
          (int)out->stats.n_completion);
    CHECK(out->status < 0 || out->stats.finish == out->finish, "finish");
}

static smallm_request *submit(smallm_engine *e, const smallm_request_params *p) {
    smallm_request *r = NULL;
    smallm_error err = {.size = sizeof err};
    int rc = smallm_engine_submit(e, p, &r, &err);
    CHECK(rc == SMALLM_OK, "%s", err.message);
    if (rc != SMALLM_OK) exit(1);
    return r;
}

static void run(smallm_engine *e, const smallm_request_params *p, struct result *out) {
    smallm_request *r = submit(e, p);
    drain(r, out);
    smallm_request_free(r);
}

static bool same(const struct result *a, const struct result *b) {
    return a->status == b->status && a->finish == b->finish && a->n == b->n &&
           a->n_text == b->n_text && memcmp(a->text, b->text, a->n_text) == 0 &&
           memcmp(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens) == 0 &&
           memcmp(a->logprobs, b->logprobs, (size_t)a->n * sizeof *a->logprobs) == 0 &&
           memcmp(a->top, b->top, (size_t)a->n * sizeof *a->top) == 0;
}

/* A prompt of n tokens that differs from seed to seed from its first token on. */
static void make_prompt(int32_t *tokens, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tokens[i] = (int32_t)(3 + seed / 7 % (uint32_t)(model_info.n_vocab - 3));
    }
}

/* The token whose bytes are these; ends the test where the vocabulary has none. */
static int32_t find_token(const char *bytes) {
    size_t n = strlen(bytes);
    for (int32_t id = 0; id < model_info.n_vocab; id++) {
        char text[8];
        size_t n_text;
        int rc = smallm_detokenize(model, &id, 1, SMALLM_SKIP_SPECIAL, text, sizeof text, &n_text,
                                   NULL);
        if (rc == SMALLM_OK && n_text == n && memcmp(text, bytes, n) == 0) return id;
    }
    printf("the model has no token of %zu bytes 0x%02x...\n", n, (unsigned)(uint8_t)bytes[0]);
    exit(1);
}

/* What makes any model answer ids[0], ids[1], ... and again from the start. */
struct forced {
    int32_t ids[4];
    float bias[4];
    uint32_t *allowed;
};

static void force(struct forced *f, smallm_request_params *p, const int32_t *ids, size_t n) {
    f->allowed = calloc(((size_t)model_info.n_vocab + 31) / 32, 4);
    for (size_t i = 0; i < n; i++) {
        f->ids[i] = ids[i];
        f->bias[i] = 1000.0f * (float)(n - i);
        f->allowed[ids[i] / 32] |= 1u << ids[i] % 32;
    }
    p->sampling.bias_ids = f->ids;
    p->sampling.bias = f->bias;
    p->sampling.n_bias = n;
    p->sampling.allowed = f->allowed;
    p->sampling.frequency_penalty = 10000;
    p->sampling.repeat_last_n = -1;
}

/* ---- together as alone ----------------------------------------------------------------------- */

enum { N_TEXTS = 12 };

struct text {
    int32_t prompt[100];
    smallm_request_params params;
    smallm_engine *engine;
    struct result alone, together;
};
static struct text texts[N_TEXTS];

static void run_together(void *arg) {
    struct text *t = arg;
    run(t->engine, &t->params, &t->together);
}

static void check_together(void) {
    for (int i = 0; i < N_TEXTS; i++) {
        struct text *t = &texts[i];
        size_t n = 1 + (size_t)(i * 29 % 97);
        make_prompt(t->prompt, n, i < 3 ? 7u : (uint32_t)i); /* three begin alike */
        t->params = request(t->prompt, n, 8 + i);
        t->params.n_logprobs = 3;
        t->params.n_chunk = i % 4 == 3 ? 1 : 0;
        t->params.sampling.temperature = i % 3 ? 0.8f : 0;
        t->params.sampling.top_k = 20;
        t->params.sampling.repeat_penalty = 1.1f;
        t->params.sampling.repeat_last_n = 32;
        t->params.sampling.seed = (uint64_t)i;
        smallm_engine *e = open_engine((smallm_engine_params){0});
        run(e, &t->params, &t->alone);
        CHECK(t->alone.status == SMALLM_DONE, "text %d: %s", i, t->alone.err.message);
        CHECK(t->alone.stats.n_prompt == (int)n && t->alone.stats.n_cached == 0, "text %d", i);
        CHECK(t->alone.finish == SMALLM_FINISH_STOP || t->alone.n == 8 + i, "%d", t->alone.n);
        smallm_engine_close(e);
    }
    CHECK(!same(&texts[3].alone, &texts[4].alone), "all texts are alike: this shows nothing");
    const int batches[] = {512, 24, 5, 1};
    for (size_t b = 0; b < SM_COUNT(batches); b++) {
        smallm_engine *e = open_engine((smallm_engine_params){.n_batch = batches[b]});
        for (int round = 0; round < 2; round++) {
            struct sm_thread *threads[N_TEXTS];
            for (int i = 0; i < N_TEXTS; i++) {
                texts[i].engine = e;
                int rc = sm_thread_start(&threads[i], run_together, &texts[i], "caller", NULL);
                CHECK(rc == SMALLM_OK, "thread");
            }
            for (int i = 0; i < N_TEXTS; i++) sm_thread_join(threads[i]);
            for (int i = 0; i < N_TEXTS; i++) {
                CHECK(same(&texts[i].alone, &texts[i].together), "batch %d, round %d, text %d: %s",
                      batches[b], round, i, texts[i].together.err.message);
            }
        }
        smallm_engine_info info = info_of(e);
        CHECK(info.n_running == 0 && info.n_batch == batches[b], "%d running", info.n_running);
        CHECK(info.n_tokens >= info.n_forward && info.n_tokens <= info.n_forward * info.n_batch,
              "%llu tokens in %llu passes", (unsigned long long)info.n_tokens,
              (unsigned long long)info.n_forward);
        smallm_engine_close(e);
    }
    /* One thread that submits all and reads nothing until the end. */
    smallm_engine *e = open_engine((smallm_engine_params){0});
    smallm_request *all[N_TEXTS];
    for (int i = 0; i < N_TEXTS; i++) all[i] = submit(e, &texts[i].params);
    for (int i = N_TEXTS - 1; i >= 0; i--) {
        drain(all[i], &texts[i].together);
        CHECK(same(&texts[i].alone, &texts[i].together), "text %d", i);
        smallm_request_free(all[i]);
    }
    smallm_engine_close(e);
}

/* ---- fairness, slow readers ------------------------------------------------------------------ */

static double total_s(const struct result *r) {
    return r->stats.queue_s + r->stats.prefill_s + r->stats.decode_s;
}

/* Neither many tokens to decode nor a long prompt keeps the other kind waiting to its end, even
 * where a pass holds one token.  Both are submitted at once; the shorter ends first. */
static void check_fair(void) {
    static struct result longer, shorter;
    int32_t prompt[128], ids[] = {find_token("a"), find_token("b")};
    make_prompt(prompt, 128, 50);
    for (int kind = 0; kind < 2; kind++) {
        struct forced f, g;
        smallm_request_params p = kind ? request(prompt, 128, 1) : request(prompt, 1, 200);
        smallm_request_params q = kind ? request(prompt + 1, 1, 20) : request(prompt + 1, 8, 2);
        force(&f, &p, ids, 2);
        force(&g, &q, ids, 2);
        smallm_engine *e = open_engine((smallm_engine_params){.n_batch = 1});
        smallm_request *a = submit(e, &p), *b = submit(e, &q);
        drain(b, &shorter);
        drain(a, &longer);
        CHECK(longer.status == SMALLM_DONE && shorter.status == SMALLM_DONE, "kind %d", kind);
        CHECK(total_s(&shorter) < total_s(&longer), "kind %d: %g s, the longer %g s", kind,
              total_s(&shorter), total_s(&longer));
        smallm_request_free(a);
        smallm_request_free(b);
        smallm_engine_close(e);
        free(f.allowed);
        free(g.allowed);
    }
}

/* The engine runs ahead of readers that sleep, catch up and fall behind again; all get all. */
static void check_slow_reader(void) {
    enum { N = 150, BURST = 40 };
    struct forced f;
    int32_t prompt[4], ids[] = {find_token("a"), find_token("b"), find_token("c")};
    make_prompt(prompt, 4, 60);
    smallm_engine *e = open_engine((smallm_engine_params){0});
    smallm_request_params p = request(prompt, 4, N);
    p.n_logprobs = 64;
    force(&f, &p, ids, 3);
    static int32_t top_ids[2][N][64];
    static float top[2][N][64];
    for (int slow = 0; slow < 2; slow++) {
        smallm_request *r = submit(e, &p);
        smallm_chunk c = {.size = sizeof c};
        int n = 0, rc;
        while ((rc = smallm_request_next(r, 100, &c, NULL)) == SMALLM_OK || rc == SMALLM_AGAIN) {
            if (rc != SMALLM_OK) continue;
            CHECK(c.token == ids[n % 3] && c.n_text == 1 && c.text[0] == "abc"[n % 3], "%d", n);
            CHECK(c.n_top == 64 && n < N, "%d alternatives", (int)c.n_top);
            if (n == N || c.n_top != 64) break;
            memcpy(top_ids[slow][n], c.top_ids, sizeof top_ids[slow][n]);
            memcpy(top[slow][n], c.top_logprobs, sizeof top[slow][n]);
            n++;
            /* Lets the engine run ahead by a burst, then reads all of it and one more. */
            smallm_request_stats s = {.size = sizeof s};
            while (slow && n % (BURST + 1) == 1 && s.finish == 0 && s.n_completion < n + BURST) {
                sm_cpu_relax_os();
                smallm_request_get_stats(r, &s, NULL);
            }
        }
        CHECK(rc == SMALLM_DONE && n == N, "%d, %d chunks", rc, n);
        smallm_request_free(r);
    }
    CHECK(memcmp(top_ids[0], top_ids[1], sizeof top_ids[0]) == 0, "alternatives");
    CHECK(memcmp(top[0], top[1], sizeof top[0]) == 0, "their probabilities");
    smallm_engine_close(e);
    free(f.allowed);
}

/* ---- prompts: logits, chunks, what is cached ------------------------------------------------- */

static void check_logits(void) {
    enum { N = 37 };
    int32_t prompt[N];
    make_prompt(prompt, N, 99);
    size_t n_bytes = sizeof(float) * N * (size_t)model_info.n_vocab;
    float *whole = malloc(n_bytes), *cut = malloc(n_bytes);
    smallm_engine *e = open_engine((smallm_engine_params){.n_batch = 64});
    static struct result r;
    smallm_request_params p = request(prompt, N, 0);
    p.logits = whole;
    run(e, &p, &r);
    CHECK(r.status == SMALLM_DONE && r.finish == SMALLM_FINISH_LENGTH && r.n == 0, "evaluate only");
    CHECK(r.stats.n_chunks == 1, "%d", (int)r.stats.n_chunks);
    const int chunks[] = {1, 7, 36, 37, 64};
    for (size_t i = 0; i < SM_COUNT(chunks); i++) {
        memset(cut, 0, n_bytes);
        p.logits = cut;
        p.n_chunk = chunks[i];
        run(e, &p, &r);
        CHECK(memcmp(whole, cut, n_bytes) == 0, "chunks of %d give other logits", chunks[i]);
        CHECK(r.stats.n_chunks == (N + chunks[i] - 1) / chunks[i], "%d passes with chunks of %d",
              (int)r.stats.n_chunks, chunks[i]);
        CHECK(r.stats.n_cached == 0, "logits of cached tokens are wanted too");
    }
    /* Of the last tokens only: the same rows, and what lies before comes from the cache. */
    const size_t lasts[] = {1, 5, 36, 37};
    for (size_t i = 0; i < 2 * SM_COUNT(lasts); i++) {
        size_t n = lasts[i / 2], before = (N - n) * (size_t)model_info.n_vocab;
        smallm_engine *new = i % 2 ? open_engine((smallm_engine_params){.n_batch = 64}) : NULL;
        memset(cut, 0, n_bytes);
        p.n_logits = n;
        p.n_chunk = i % 2 ? 7 : 0;
        run(new ? new : e, &p, &r);
        CHECK(memcmp(whole + before, cut, n_bytes - before * sizeof(float)) == 0, "the last %zu", n);
        CHECK(n == N || cut[n_bytes / sizeof(float) - before] == 0, "more than the last %zu", n);
        CHECK(new ? r.stats.n_cached == 0 : r.stats.n_cached <= (int)(N - n), "%d", (int)r.stats.n_cached);
        smallm_engine_close(new);
    }
    p.n_chunk = 0;
    p.n_logits = 1;
    run(e, &p, &r);
    CHECK(r.stats.n_cached == N - 1, "%d cached", (int)r.stats.n_cached);
    /* A greedy answer begins with the best of the last row. */
    p = request(prompt, N, 1);
    p.n_logprobs = 0;
    p.logits = cut;
    run(e, &p, &r);
    const float *row = whole + (size_t)(N - 1) * (size_t)model_info.n_vocab;
    int32_t best = 0;
    double sum = 0;
    for (int32_t i = 0; i < model_info.n_vocab; i++) best = row[i] > row[best] ? i : best;
    for (int32_t i = 0; i < model_info.n_vocab; i++) sum += exp((double)row[i] - (double)row[best]);
    if (r.n == 1) {
        CHECK(r.tokens[0] == best, "%d, expected %d", (int)r.tokens[0], (int)best);
        CHECK(fabs(r.logprobs[0] + log(sum)) < 1e-5, "%g", (double)r.logprobs[0]);
    } else {
        CHECK(r.finish == SMALLM_FINISH_STOP && r.n == 0, "%d tokens", r.n);
    }
    smallm_engine_close(e);
    free(whole);
    free(cut);
}

static void check_cached(void) {
    enum { N = 50, MORE = 10 };
    int32_t prompt[N + MAX_TOKENS + MORE];
    static struct result first, second, fresh;
    make_prompt(prompt, N, 5);
    smallm_engine *e = open_engine((smallm_engine_params){0});
    int32_t ids[] = {find_token("a"), find_token("b"), find_token("c")};
    struct forced f;
    smallm_request_params p = request(prompt, N, 12);
    force(&f, &p, ids, 3);
    run(e, &p, &first);
    CHECK(first.n == 12 && first.stats.n_cached == 0, "%d", (int)first.stats.n_cached);
    run(e, &p, &second);
    CHECK(second.stats.n_cached == N - 1 && same(&first, &second), "%d cached",
          (int)second.stats.n_cached);
    CHECK(second.stats.n_chunks == 1, "%d", (int)second.stats.n_chunks);

    /* A next turn goes on from the prompt and all of the answer that has run. */
    memcpy(prompt + N, first.tokens, 12 * sizeof *prompt);
    make_prompt(prompt + N + 12, MORE, 77);
    p = request(prompt, N + 12 + MORE, 20);
    p.n_logprobs = 2;
    p.sampling.temperature = 1;
    p.sampling.seed = 3;
    run(e, &p, &second);
    CHECK(second.stats.n_cached == N + 11, "%d cached", (int)second.stats.n_cached);
    smallm_engine *other = open_engine((smallm_engine_params){0});
    run(other, &p, &fresh);
    CHECK(fresh.stats.n_cached == 0 && same(&second, &fresh), "cached and fresh answers differ");
    smallm_engine_close(other);

    /* An earlier turn is a prefix of what is kept; another beginning shares nothing. */
    p = request(prompt, 20, 0);
    run(e, &p, &second);
    CHECK(second.stats.n_cached == 19, "%d cached", (int)second.stats.n_cached);
    prompt[0] = prompt[0] == 3 ? 4 : 3;
    run(e, &p, &second);
    CHECK(second.stats.n_cached == 0, "%d cached", (int)second.stats.n_cached);
    smallm_engine_close(e);
    free(f.allowed);
}

/* ---- text ------------------------------------------------------------------------------------ */

static void check_stop(smallm_engine *e, const int32_t *ids, size_t n_ids, int max_tokens,
                       const char *const *stops, size_t n_stops, const char *pieces, int finish,
                       int line) {
    static struct result r;
    struct forced f;
    int32_t prompt[3];
    size_t lengths[4];
    make_prompt(prompt, 3, 1);
    for (size_t i = 0; i < n_stops; i++) lengths[i] = strlen(stops[i]);
    smallm_request_params p = request(prompt, 3, max_tokens);
    force(&f, &p, ids, n_ids);
    /* The prompt's own tokens must not count as repeated. */
    for (int i = 0; i < 3; i++) {
        for (size_t j = 0; j < n_ids; j++) {
            if (prompt[i] == ids[j]) prompt[i] = 2 + (int32_t)(j + 1) * 7 % 100;
        }
    }
    p.stop = stops;
    p.stop_len = lengths;
    p.n_stop = n_stops;
    run(e, &p, &r);
    CHECK(r.status == SMALLM_DONE && r.finish == finish, "line %d: status %d, finish %d: %s", line,
          r.status, r.finish, r.err.message);
    CHECK(strcmp(r.pieces, pieces) == 0, "line %d: \"%s\", not \"%s\"", line, r.pieces, pieces);
    free(f.allowed);
}

static void check_text(void) {
    smallm_engine *e = open_engine((smallm_engine_params){0});
    const int32_t abc[] = {find_token("a"), find_token("b"), find_token("c")};
#define STOP(ids, n_ids, max_tokens, pieces, finish, ...)                                          \
    check_stop(e, ids, n_ids, max_tokens, (const char *const[]){__VA_ARGS__},                      \
               sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), pieces, finish,        \
               __LINE__)
    /* The answer is abcabcabc...; a | ends a chunk. */
    STOP(abc, 3, 7, "a|b|c|a|b|c|a|", SMALLM_FINISH_LENGTH, "x");
    STOP(abc, 3, 7, "|", SMALLM_FINISH_STOP, "a");
    STOP(abc, 3, 7, "a|b||", SMALLM_FINISH_STOP, "c");
    STOP(abc, 3, 9, "a|b|||||", SMALLM_FINISH_STOP, "cabc");
    STOP(abc, 3, 9, "a|||bca|||bca||bc|", SMALLM_FINISH_LENGTH, "bcx");
    STOP(abc, 3, 8, "a|||bca|||bca|b|", SMALLM_FINISH_LENGTH, "bcx");
    /* After abca, "ab" may still become the string: the longest possible beginning is held. */
    STOP(abc, 3, 8, "|||||abc||abcab|", SMALLM_FINISH_LENGTH, "abcabx");
    STOP(abc, 3, 9, "||||||||abcabcabc|", SMALLM_FINISH_LENGTH, "abcabcabcab");
    /* The one that ends first, and the longest of those that end together. */
    STOP(abc, 3, 9, "||a|", SMALLM_FINISH_STOP, "abcab", "bc");
    STOP(abc, 3, 9, "||||", SMALLM_FINISH_STOP, "a b", "bca", "abca");
    STOP(abc, 1, 9, "||||", SMALLM_FINISH_STOP, "aaaa");
    STOP(abc, 1, 5, "||||aaaaa|", SMALLM_FINISH_LENGTH, "aaaab", "b");

    /* Half a character is never handed out, a wrong one becomes U+FFFD. */
    const int32_t umlaut[] = {find_token("\xC3"), find_token("\xA9"), find_token("a")};
    STOP(umlaut, 3, 4, "|\xC3\xA9|a|\xEF\xBF\xBD|", SMALLM_FINISH_LENGTH, "x");
    STOP(umlaut, 2, 3, "|\xC3\xA9|\xEF\xBF\xBD|", SMALLM_FINISH_LENGTH, "x");
    STOP(umlaut + 1, 2, 3, "\xEF\xBF\xBD|a|\xEF\xBF\xBD|", SMALLM_FINISH_LENGTH, "x");
    STOP(umlaut, 3, 9, "||", SMALLM_FINISH_STOP, "\xC3\xA9");
    STOP(umlaut, 3, 3, "||\xC3\xA9" "a|", SMALLM_FINISH_LENGTH, "\xC3\xA9" "b");
    const int32_t cut[] = {umlaut[0], umlaut[2]};
    STOP(cut, 2, 3, "|\xEF\xBF\xBD" "a|\xEF\xBF\xBD|", SMALLM_FINISH_LENGTH, "x");

    /* The end token ends the answer, frees what was held and is not part of it. */
    if (model_info.eos >= 0) {
        const int32_t end[] = {abc[0], abc[1], model_info.eos};
        STOP(end, 3, 9, "a||b|", SMALLM_FINISH_STOP, "bx");
    }
    smallm_engine_close(e);
}

static void check_length(void) {
    smallm_engine *e = open_engine((smallm_engine_params){.n_ctx = 40});
    static struct result r;
    struct forced f;
    int32_t prompt[41], ids[] = {find_token("a"), find_token("b")};
    make_prompt(prompt, 41, 8);
    for (size_t n = 30; n <= 40; n += 5) { /* prompt and answer fill the context, no more */
        smallm_request_params p = request(prompt, n, 100);
        force(&f, &p, ids, 2);
        run(e, &p, &r);
        CHECK(r.finish == SMALLM_FINISH_LENGTH && r.n == 40 - (int)n, "%d after %zu", r.n, n);
        free(f.allowed);
    }
    smallm_error err = {.size = sizeof err};
    smallm_request *q = NULL;
    smallm_request_params p = request(prompt, 41, 1);
    int rc = smallm_engine_submit(e, &p, &q, &err);
    CHECK(rc == SMALLM_E_CONTEXT && !q && strstr(err.message, "41") && strstr(err.message, "40"),
          "%d: %s", rc, err.message);
    smallm_engine_close(e);
}

/* ---- cancel, free, close --------------------------------------------------------------------- */

static void check_cancel(void) {
    smallm_engine *e = open_engine((smallm_engine_params){0});
    static struct result r, beside, alone;
    struct forced f, g;
    int32_t prompt[128], ids[] = {find_token("a"), find_token("b")};
    size_t n_long = SM_MIN(sizeof prompt / sizeof *prompt, (size_t)model_info.n_ctx_train / 2);
    make_prompt(prompt, n_long, 21);
    int limit = SM_MIN(model_info.n_ctx_train - (int)n_long, 200);
    smallm_request_params p = request(prompt, n_long, limit), q = request(prompt + 1, 20, limit);
    force(&f, &p, ids, 2);
    force(&g, &q, ids, 2);
    run(e, &q, &alone);
    int n_cancelled = 0;
    for (int i = 0; i < 20; i++) {
        p.n_chunk = i % 2; /* odd: cancelled in its prompt, which takes a pass per token */
        prompt[0] = 3 + i;
        smallm_request *a = submit(e, &p), *b = submit(e, &q);
        if (i % 2 == 0) { /* in the middle of its answer */
            smallm_chunk c = {.size = sizeof c};
            for (int k = 0; k < 3; k++) {
                while (smallm_request_next(a, 100, &c, NULL) == SMALLM_AGAIN) continue;
            }
        }
        smallm_request_cancel(a);
        smallm_request_cancel(a);
        smallm_chunk c = {.size = sizeof c};
        int rc = SMALLM_AGAIN, finish = 0;
        while ((rc = smallm_request_next(a, 100, &c, NULL)) == SMALLM_OK || rc == SMALLM_AGAIN) {
            if (rc == SMALLM_OK) finish = c.finish;
        }
        CHECK(rc == SMALLM_DONE, "%d", rc);
        CHECK(finish == SMALLM_FINISH_CANCELLED || finish == SMALLM_FINISH_LENGTH, "%d", finish);
        smallm_request_stats s = {.size = sizeof s};
        smallm_request_get_stats(a, &s, NULL);
        CHECK(s.finish == finish, "%d", (int)s.finish);
        if (finish == SMALLM_FINISH_CANCELLED) {
            n_cancelled++;
            CHECK(s.n_completion < limit, "%d", (int)s.n_completion);
        }
        drain(b, &beside);
        CHECK(same(&alone, &beside), "a cancelled neighbour changed an answer");
        smallm_request_free(a);
        smallm_request_free(b);
    }
    CHECK(n_cancelled >= 10, "%d of 20 were cancelled in time", n_cancelled);

    /* What was cancelled goes on from what has run. */
    prompt[0] = 3;
    p.n_chunk = 0;
    run(e, &p, &r);
    CHECK(r.status == SMALLM_DONE && r.n == limit, "%d", r.n);
    /* Freed while it runs. */
    for (int i = 0; i < 20; i++) {
        prompt[0] = 5 + i;
        smallm_request_free(submit(e, &p));
    }
    CHECK(info_of(e).n_running == 0, "%d running", info_of(e).n_running);
    run(e, &q, &beside);
    CHECK(same(&alone, &beside), "after freeing");
    smallm_engine_close(e);
    free(f.allowed);
    free(g.allowed);
}

static void read_to_end(void *arg) { drain(*(smallm_request **)arg, &texts[0].together); }

static void check_close(void) {
    struct forced f;
    int32_t prompt[8], ids[] = {find_token("a"), find_token("b")};
    make_prompt(prompt, 8, 4);
    smallm_request_params p = request(prompt, 8, model_info.n_ctx_train);
    force(&f, &p, ids, 2);
    int n_closed = 0;
    for (int i = 0; i < 20; i++) {
        smallm_engine *e = open_engine((smallm_engine_params){.n_batch = 1 + i % 3});
        smallm_request *r[4];
        for (int k = 0; k < 4; k++) r[k] = submit(e, &p);
        struct sm_thread *reader = NULL;
        sm_thread_start(&reader, read_to_end, &r[0], "reader", NULL);
        smallm_engine_close(e);
        sm_thread_join(reader);
        for (int k = 0; k < 4; k++) {
            struct result *out = &texts[k].together;
            if (k > 0) drain(r[k], out);
            CHECK(out->status == SMALLM_E_CLOSED || out->status == SMALLM_DONE, "%d", out->status);
            if (out->status == SMALLM_E_CLOSED) {
                n_closed++;
                CHECK(out->err.code == SMALLM_E_CLOSED && out->err.message[0], "no message");
                CHECK(out->stats.finish == SMALLM_FINISH_ERROR, "%d", (int)out->stats.finish);
            }
            smallm_request_cancel(r[k]);
            smallm_request_free(r[k]);
        }
    }
    CHECK(n_closed >= 20, "%d of 80 were still running", n_closed);
    smallm_engine_close(NULL);
    smallm_request_free(NULL);
    smallm_request_cancel(NULL);
    smallm_model_free(NULL);
    free(f.allowed);
}

/* ---- masks ------------------------------------------------------------------------------------ */

/* Without probabilities only the head's panels of allowed tokens are computed; with them all are. */
static void check_masks(void) {
    static struct result want, got, other;
    const size_t n_words = ((size_t)model_info.n_vocab + 31) / 32;
    uint32_t *allowed = calloc(n_words, 4), *one = calloc(n_words, 4);
    int32_t prompt[9];
    smallm_engine *e = open_engine((smallm_engine_params){0});
    for (uint32_t i = 0; i < 12; i++) {
        memset(allowed, 0, n_words * 4);
        for (uint32_t j = 0; j < 2 + 5 * i; j++) { /* some lie together */
            uint32_t id = (j * j * 7919u + i * 31u + j % 3) % (uint32_t)model_info.n_vocab;
            allowed[id / 32] |= 1u << id % 32;
        }
        make_prompt(prompt, 9, i);
        smallm_request_params p = request(prompt, 9, 12);
        p.sampling.temperature = i % 3 == 0 ? 0 : 1.5f;
        p.sampling.seed = i;
        p.sampling.allowed = allowed;
        p.n_logprobs = 0;
        run(e, &p, &want);
        p.n_logprobs = -1;
        smallm_request_params q = request(prompt + 1, 8, 12); /* beside it, all or one token */
        memset(one, 0, n_words * 4);
        one[i % n_words] = 1;
        if (i % 2 == 0) q.sampling.allowed = one;
        smallm_request *a = submit(e, &p), *b = submit(e, &q);
        drain(a, &got);
        drain(b, &other);
        smallm_request_free(a);
        smallm_request_free(b);
        CHECK(want.n > 0 && got.n == want.n, "%u: %d of %d tokens", i, got.n, want.n);
        for (int j = 0; j < got.n; j++) {
            CHECK(got.tokens[j] == want.tokens[j], "%u: token %d", i, j);
            CHECK(allowed[got.tokens[j] / 32] >> got.tokens[j] % 32 & 1, "%u: token %d", i, j);
        }
    }
    smallm_engine_close(e);
    free(allowed);
    free(one);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void check_budget(void) {
    static struct result r, small;
    struct forced f;
    int32_t prompt[150], other[8], ids[] = {find_token("a"), find_token("b")};
    int n_long = SM_MIN(150, model_info.n_ctx_train - 10);
    make_prompt(prompt, 150, 31);
    smallm_engine *e = open_engine((smallm_engine_params){0});
    smallm_request_params p = request(prompt, 1, 0);
    run(e, &p, &r);
    smallm_engine_info info = info_of(e);
    smallm_engine_close(e);
    /* Room for two units of the cache, where the long prompt needs three. */
    smallm_engine_params limit = {.memory_limit = info.n_scratch_bytes + 2 * info.n_cache_bytes};
    e = open_engine(limit);
    p = request(prompt, (size_t)n_long, 3);
    run(e, &p, &r);
    CHECK(r.status == SMALLM_E_BUDGET && r.stats.finish == SMALLM_FINISH_ERROR, "%d: %s", r.status,
          r.err.message);
    CHECK(info_of(e).n_cache_bytes <= 2 * info.n_cache_bytes, "over the limit");
    /* Sequences that are only kept give way, request after request. */
    for (int i = 0; i < 8; i++) {
        make_prompt(other, 8, (uint32_t)i);
        p = request(other, 8, 4);
        force(&f, &p, ids, 2);
        run(e, &p, &small);
        CHECK(small.status == SMALLM_DONE && small.n == 4, "%d: %s", small.status,
              small.err.message);
        free(f.allowed);
    }
    /* Together with one that cannot fit, the one that can is served. */
    smallm_request_params q = request(prompt, (size_t)n_long, 3);
    p = request(other, 8, 30);
    force(&f, &p, ids, 2);
    smallm_request *a = submit(e, &p), *b = submit(e, &q);
    drain(a, &small);
    drain(b, &r);
    CHECK(small.status == SMALLM_DONE && small.n == 30, "%d: %s", small.status, small.err.message);
    CHECK(r.status == SMALLM_E_BUDGET, "%d", r.status);
    smallm_request_free(a);
    smallm_request_free(b);
    smallm_engine_close(e);
    free(f.allowed);
}

/* ---- refusals -------------------------------------------------------------------------------- */

static void check_refusals(void) {
    smallm_error err = {.size = sizeof err};
    smallm_engine *e = NULL;
#define REFUSE_OPEN(field, value)                                                                  \
    do {                                                                                           \
        smallm_engine_params bad = {.size = sizeof bad};                                           \
        bad.field = value;                                                                         \
        int refused = smallm_engine_open(model, &bad, &e, &err);                                   \
        CHECK(refused == SMALLM_E_ARGUMENT && !e, "%s: %d", #field, refused);                      \
        CHECK(strstr(err.message, #field), "%s: \"%s\"", #field, err.message);                     \
    } while (0)
    REFUSE_OPEN(size, 0);
    REFUSE_OPEN(n_threads, -1);
    REFUSE_OPEN(n_threads, 257);
    REFUSE_OPEN(n_ctx, -1);
    REFUSE_OPEN(n_ctx, model_info.n_ctx_train + 1);
    REFUSE_OPEN(n_batch, -1);
    REFUSE_OPEN(n_batch, INT32_MAX);
    REFUSE_OPEN(kv_type, -1);
    REFUSE_OPEN(kv_type, 3);
    CHECK(smallm_engine_open(NULL, NULL, &e, &err) == SMALLM_E_ARGUMENT, "no model");
    CHECK(smallm_engine_open(model, NULL, NULL, &err) == SMALLM_E_ARGUMENT, "no out");

    e = open_engine((smallm_engine_params){.n_batch = 16});
    int32_t prompt[4] = {3, 4, 5, 6}, bad_id[2] = {3, 0};
    smallm_request *r = NULL;
    const char *stop[] = {"x", NULL};
    size_t stop_len[] = {0, 1};
#define REFUSE(name, ...)                                                                          \
    do {                                                                                           \
        smallm_request_params p = request(prompt, 4, 4);                                           \
        __VA_ARGS__;                                                                               \
        int refused = smallm_engine_submit(e, &p, &r, &err);                                       \
        CHECK(refused == SMALLM_E_ARGUMENT && !r, "%s: %d", name, refused);                        \
        CHECK(strstr(err.message, name), "%s: \"%s\"", name, err.message);                         \
    } while (0)
    REFUSE("size", p.size = 3);
    REFUSE("size", p.sampling.size = 0);
    REFUSE("n_tokens", p.n_tokens = 0);
    REFUSE("tokens", p.tokens = NULL);
    REFUSE("tokens[1]", p.tokens = bad_id; p.n_tokens = 2; bad_id[1] = -1);
    REFUSE("n_logits", p.n_logits = p.n_tokens + 1);
    REFUSE("tokens[1]", p.tokens = bad_id; p.n_tokens = 2; bad_id[1] = model_info.n_vocab);
    REFUSE("max_tokens", p.max_tokens = -1);
    REFUSE("n_logprobs", p.n_logprobs = 65);
    REFUSE("n_logprobs", p.n_logprobs = -2);
    REFUSE("n_chunk", p.n_chunk = 17);
    REFUSE("n_chunk", p.n_chunk = -1);
    REFUSE("temperature", p.sampling.temperature = -1);
    REFUSE("stop", p.n_stop = 1);
    REFUSE("stop_len[0]", p.stop = stop; p.stop_len = stop_len; p.n_stop = 1);
    REFUSE("stop[1]", p.stop = stop; p.stop_len = stop_len; p.n_stop = 2; stop_len[0] = 1);
    REFUSE("stop", p.stop = stop; p.stop_len = stop_len; p.n_stop = 1; stop_len[0] = SIZE_MAX);
    CHECK(smallm_engine_submit(e, NULL, &r, &err) == SMALLM_E_ARGUMENT, "no params");
    CHECK(smallm_engine_submit(NULL, NULL, &r, &err) == SMALLM_E_ARGUMENT, "no engine");

    /* A mask that forbids everything fails that request, later, and no other. */
    uint32_t *none = calloc(((size_t)model_info.n_vocab + 31) / 32, 4);
    static struct result out, good;
    smallm_request_params p = request(prompt, 4, 4), q = request(prompt, 4, 4);
    p.sampling.allowed = none;
    smallm_request *a = submit(e, &p), *b = submit(e, &q);
    drain(a, &out);
    drain(b, &good);
    CHECK(out.status == SMALLM_E_ARGUMENT && strstr(out.err.message, "allowed"), "%d", out.status);
    CHECK(good.status == SMALLM_DONE, "%d", good.status);
    smallm_request_free(a);
    free(none);

    /* A bad out loses no chunk, and an ended answer stays ended. */
    smallm_chunk c = {.size = sizeof c};
    CHECK(smallm_request_next(b, 0, &c, &err) == SMALLM_DONE, "again");
    smallm_request_free(b);
    q.max_tokens = 1;
    b = submit(e, &q);
    smallm_chunk bad = {.size = 0};
    CHECK(smallm_request_next(b, 100, &bad, &err) == SMALLM_E_ARGUMENT, "size 0");
    CHECK(smallm_request_next(b, 100, NULL, &err) == SMALLM_E_ARGUMENT, "NULL");
    CHECK(smallm_request_next(b, -1, &c, &err) == SMALLM_E_ARGUMENT, "timeout");
    drain(b, &out);
    CHECK(out.status == SMALLM_DONE && (out.n == 1 || out.finish == SMALLM_FINISH_STOP), "lost");
    smallm_request_free(b);
    smallm_engine_close(e);
}

/* ---- fork ------------------------------------------------------------------------------------ */

#ifndef _WIN32
static int in_child(smallm_engine *e, smallm_request *r) {
    smallm_error err = {.size = sizeof err};
    smallm_chunk c = {.size = sizeof c};
    smallm_request_stats s = {.size = sizeof s};
    smallm_engine_info info = {.size = sizeof info};
    smallm_model_info m = {.size = sizeof m};
    int32_t ids[4] = {3};
    size_t n;
    const char *key, *value;
    smallm_request *other = NULL;
    smallm_engine *second = NULL;
    smallm_request_params p = request(ids, 1, 1);
    const int results[] = {
        smallm_engine_submit(e, &p, &other, &err),
        smallm_request_next(r, 1000, &c, &err),
        smallm_request_get_stats(r, &s, &err),
        smallm_engine_get_info(e, &info, &err),
        smallm_engine_open(model, NULL, &second, &err),
        smallm_model_get_info(model, &m, &err),
        smallm_model_metadata(model, 0, &key, &value, &n),
        smallm_tokenize(model, "a", 1, 0, ids, 4, &n, &err),
        smallm_detokenize(model, ids, 1, 0, NULL, 0, &n, &err),
    };
    for (size_t i = 0; i < SM_COUNT(results); i++) {
        if (results[i] != SMALLM_E_FORKED) return 10 + (int)i;
    }
    if (!strstr(err.message, "fork")) return 2;
    smallm_request_cancel(r);
    smallm_request_free(r);
    smallm_engine_close(e);
    smallm_model_free(model);
    /* Nothing was freed: the request still answers, if only with a refusal. */
    return smallm_request_next(r, 0, &c, &err) == SMALLM_E_FORKED ? 0 : 3;
}

static void check_fork(void) {
    static struct result before, after;
    struct forced f;
    int32_t prompt[8], ids[] = {find_token("a"), find_token("b")};
    make_prompt(prompt, 8, 4);
    smallm_engine *e = open_engine((smallm_engine_params){0});
    smallm_request_params p = request(prompt, 8, SM_MIN(model_info.n_ctx_train - 8, 100));
    force(&f, &p, ids, 2);
    run(e, &p, &before);
    for (int i = 0; i < 5; i++) {
        smallm_request *r = submit(e, &p);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            alarm(20); /* a hang is a failure, not a hang */
            _exit(in_child(e, r));
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with 0x%x", status);
        drain(r, &after);
        CHECK(same(&before, &after), "the parent's answer changed");
        smallm_request_free(r);
    }
    smallm_engine_close(e);
    free(f.allowed);
}
#endif

int main(int argc, char **argv) {
    char path[4096];
    if (!find_model(argc, argv, path, sizeof path)) return 0;
    smallm_error err = {.size = sizeof err};
    if (smallm_model_open(path, NULL, &model, &err) != SMALLM_OK) {
        printf("check_engine: %s\n", err.message);
        return 1;
    }
    model_info.size = sizeof model_info;
    CHECK(smallm_model_get_info(model, &model_info, NULL) == SMALLM_OK, "info");
    check_together();
    check_fair();
    check_slow_reader();
    check_logits();
    check_cached();
    check_text();
    check_length();
    check_cancel();
    check_close();
    check_masks();
    check_budget();
    check_refusals();
#ifndef _WIN32
    check_fork();
#endif
    smallm_model_free(model);
    printf("check_engine: %s\n", n_failed ? "FAILED" : "ok");
    return n_failed != 0;
}
