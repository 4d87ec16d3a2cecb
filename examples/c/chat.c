/* A chat in the terminal with a model that was trained on ChatML:  chat model.gguf
 *
 * cc chat.c -lsmallm */
#include <smallm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static smallm_error err = {.size = sizeof err};

struct text { /* the conversation so far */
    int32_t *tokens;
    size_t n, capacity;
};

static int make_room(struct text *t, size_t n) {
    if (t->n + n <= t->capacity) return SMALLM_OK;
    int32_t *grown = realloc(t->tokens, 2 * (t->n + n) * sizeof *grown);
    if (!grown) return SMALLM_E_MEMORY;
    t->tokens = grown;
    t->capacity = 2 * (t->n + n);
    return SMALLM_OK;
}

/* Appends s.  Only our own markers become special tokens: what the user types stays text. */
static int add(struct text *t, const smallm_model *model, const char *s, uint32_t flags) {
    size_t n = 0;
    int status = make_room(t, strlen(s) + 8); /* nearly always enough */
    while (status == SMALLM_OK) {
        status = smallm_tokenize(model, s, strlen(s), flags, t->tokens + t->n, t->capacity - t->n,
                                 &n, &err);
        if (status == SMALLM_OK && n <= t->capacity - t->n) break;
        if (status == SMALLM_OK) status = make_room(t, n);
    }
    if (status == SMALLM_OK) t->n += n;
    return status;
}

/* Prints the answer to the conversation as it comes and appends it. */
static int answer(struct text *t, smallm_engine *engine) {
    smallm_request_params params = {
        .size = sizeof params, .tokens = t->tokens, .n_tokens = t->n, .max_tokens = 512,
        .n_logprobs = -1,
        .sampling = {.size = sizeof params.sampling, .temperature = 0.7f, .top_k = 40,
                     .top_p = 0.95f, .min_p = 0.05f, .seed = t->n}};
    smallm_request *request = NULL;
    smallm_chunk chunk = {.size = sizeof chunk};
    int status = smallm_engine_submit(engine, &params, &request, &err);
    while (status == SMALLM_OK || status == SMALLM_AGAIN) {
        status = smallm_request_next(request, 1000, &chunk, &err);
        if (status != SMALLM_OK) continue;
        fwrite(chunk.text, 1, chunk.n_text, stdout);
        fflush(stdout);
        if (chunk.token < 0) continue;
        /* The tokens themselves, not the text: the next turn finds them in the cache. */
        if ((status = make_room(t, 1)) != SMALLM_OK) break;
        t->tokens[t->n++] = chunk.token;
    }
    smallm_request_free(request);
    return status < 0 ? status : SMALLM_OK;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s model.gguf\n", argv[0]);
        return 2;
    }
    smallm_model *model = NULL;
    smallm_engine *engine = NULL;
    struct text t = {0};
    char line[4096];
    int status = smallm_model_open(argv[1], NULL, &model, &err);
    if (status == SMALLM_OK) status = smallm_engine_open(model, NULL, &engine, &err);
    while (status == SMALLM_OK && printf("> ") > 0 && fflush(stdout) == 0 &&
           fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        const char *open = t.n ? "<|im_end|>\n<|im_start|>user\n" : "<|im_start|>user\n";
        status = add(&t, model, open, SMALLM_PARSE_SPECIAL);
        if (status == SMALLM_OK) status = add(&t, model, line, 0);
        if (status == SMALLM_OK)
            status = add(&t, model, "<|im_end|>\n<|im_start|>assistant\n", SMALLM_PARSE_SPECIAL);
        if (status == SMALLM_OK) status = answer(&t, engine);
        putchar('\n');
    }
    if (status < 0) fprintf(stderr, "error %d: %s\n", status, err.message);
    smallm_engine_close(engine);
    smallm_model_free(model);
    free(t.tokens);
    return status < 0;
}
