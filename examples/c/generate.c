/* Completes a text:  generate model.gguf "The capital of France is" [max tokens]
 *
 * cc generate.c -lsmallm */
#include <smallm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s model.gguf text [max tokens]\n", argv[0]);
        return 2;
    }
    smallm_error err = {.size = sizeof err};
    smallm_model *model = NULL;
    smallm_engine *engine = NULL;
    smallm_request *request = NULL;
    const size_t n_text = strlen(argv[2]);
    size_t n_tokens = 0;
    int32_t *tokens = NULL;
    int status;

    if ((status = smallm_model_open(argv[1], NULL, &model, &err)) != SMALLM_OK) goto done;
    if ((status = smallm_engine_open(model, NULL, &engine, &err)) != SMALLM_OK) goto done;
    status = smallm_tokenize(model, argv[2], n_text, SMALLM_ADD_SPECIAL, NULL, 0, &n_tokens, &err);
    if (status != SMALLM_OK) goto done;
    if (!(tokens = malloc((n_tokens + 1) * sizeof *tokens))) {
        status = SMALLM_E_MEMORY;
        goto done;
    }
    status = smallm_tokenize(model, argv[2], n_text, SMALLM_ADD_SPECIAL, tokens, n_tokens,
                             &n_tokens, &err);
    if (status != SMALLM_OK) goto done;

    /* Zero is every field's default: temperature 0 always takes the most probable token. */
    smallm_request_params params = {.size = sizeof params,
                                    .tokens = tokens,
                                    .n_tokens = n_tokens,
                                    .max_tokens = argc > 3 ? atoi(argv[3]) : 64,
                                    .n_logprobs = -1,
                                    .sampling = {.size = sizeof params.sampling}};
    if ((status = smallm_engine_submit(engine, &params, &request, &err)) != SMALLM_OK) goto done;

    smallm_chunk chunk = {.size = sizeof chunk};
    while ((status = smallm_request_next(request, 1000, &chunk, &err)) >= 0) {
        if (status == SMALLM_DONE) break;
        fwrite(chunk.text, 1, chunk.n_text, stdout); /* nothing after SMALLM_AGAIN */
        fflush(stdout);
    }
    putchar('\n');
done:
    if (status < 0) fprintf(stderr, "error %d: %s\n", status, err.message);
    smallm_request_free(request);
    smallm_engine_close(engine);
    smallm_model_free(model);
    free(tokens);
    return status < 0;
}
