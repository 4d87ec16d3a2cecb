/* Sequences that are run, forked, cut, cancelled and run in company hold what their tokens say: the
 * logits after any of it are those of a new sequence that runs the same tokens at once.
 *
 * The model is argv[1] or stories260K.gguf in the folder SMALLM_TEST_MODELS. */
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "session.h"

#define N_CTX 400
#define N_SEQS 3
#define N_STEPS 300
#define N_SOURCES 2 /* of models with an encoder */
#define N_SOURCE 270

struct text {
    int source;
    struct sm_seq *seq;
    int32_t tokens[N_CTX]; /* [sm_seq_length(seq)] */
};

static struct sm_session *session;
static bool has_encoder;
static int32_t source_tokens[N_SOURCES][N_SOURCE];
static struct sm_seq *sources[N_SOURCES]; /* NULL where there is no encoder */
static size_t n_vocab;
static smallm_error err = {.size = sizeof err};
static uint64_t rng = 1;

static int below(int n) {
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (int)((rng >> 33) % (uint64_t)n);
}

static struct sm_session *open_session(const struct sm_model *model, uint64_t memory_limit) {
    const struct sm_session_params params = {.n_threads = 2, .n_ctx = N_CTX, .n_batch = N_CTX,
                                             .kv_type = SMALLM_KV_F16, .memory_limit = memory_limit};
    struct sm_session *s = NULL;
    if (sm_session_new(model, &params, &s, &err) != SMALLM_OK) {
        printf("cannot open a session: %s\n", err.message);
        exit(1);
    }
    return s;
}

/* Encodes texts `first` .. `first` + n - 1 in one pass, the first time cancelled. */
static int encode(int first, int n, struct sm_seq **out) {
    struct sm_span spans[N_SOURCES];
    int rc = SMALLM_OK;
    for (int i = 0; i < n && has_encoder; i++) {
        CHECK(sm_seq_new(session, &out[i], &err) == SMALLM_OK, "%s", err.message);
        spans[i] = (struct sm_span){.seq = out[i], .encodes = true, .n = N_SOURCE - 160 * (first + i),
                                    .tokens = source_tokens[first + i]};
    }
    if (!has_encoder) return SMALLM_OK;
    const atomic_bool stop = true;
    rc = sm_session_run(session, spans, n, &stop, &err);
    if (rc != SMALLM_E_CANCELLED) return rc;
    for (int i = 0; i < n; i++) CHECK(sm_seq_length(out[i]) == 0, "a cancelled pass counts");
    return sm_session_run(session, spans, n, NULL, &err);
}

/* Logits [n_vocab] after n tokens that a new sequence runs at once. */
static void expect(int which, const int32_t *tokens, int n, float *logits) {
    struct sm_seq *seq = NULL, *source = NULL;
    CHECK(encode(which, 1, &source) == SMALLM_OK, "%s", err.message);
    CHECK(sm_seq_new(session, &seq, &err) == SMALLM_OK, "%s", err.message);
    const struct sm_span span = {.seq = seq, .source = source, .tokens = tokens, .n = n, .want = SM_WANT_LAST,
                                 .logits = logits};
    CHECK(sm_session_run(session, &span, 1, NULL, &err) == SMALLM_OK, "%s", err.message);
    sm_seq_free(session, seq);
    sm_seq_free(session, source);
}

/* More tokens for some of the texts in one pass; what it must answer. */
static void run(struct text *texts, bool cancelled) {
    static float *got[N_SEQS], *want;
    for (int i = 0; i < N_SEQS && got[i] == NULL; i++) got[i] = malloc(n_vocab * sizeof(float));
    if (want == NULL) want = malloc(n_vocab * sizeof(float));
    struct sm_span spans[N_SEQS];
    struct text *of[N_SEQS];
    int n_spans = 0, few = below(2);
    for (int i = 0; i < N_SEQS; i++) {
        int length = sm_seq_length(texts[i].seq), n = few ? 1 : 1 + below(90);
        if (below(3) == 0 || length + n > N_CTX) continue;
        for (int t = 0; t < n; t++) texts[i].tokens[length + t] = below((int)n_vocab);
        of[n_spans] = &texts[i];
        spans[n_spans] = (struct sm_span){.seq = texts[i].seq, .source = sources[texts[i].source],
                                          .tokens = texts[i].tokens + length,
                                          .n = n, .want = SM_WANT_LAST, .logits = got[n_spans]};
        n_spans++;
    }
    if (n_spans == 0) return;
    const atomic_bool stop = true;
    int before[N_SEQS];
    for (int i = 0; i < n_spans; i++) before[i] = sm_seq_length(spans[i].seq);
    if (cancelled) {
        int rc = sm_session_run(session, spans, n_spans, &stop, &err);
        CHECK(rc == SMALLM_E_CANCELLED, "status %d", rc);
        for (int i = 0; i < n_spans; i++)
            CHECK(sm_seq_length(spans[i].seq) == before[i], "a cancelled pass counts");
    }
    CHECK(sm_session_run(session, spans, n_spans, NULL, &err) == SMALLM_OK, "%s", err.message);
    for (int i = 0; i < n_spans; i++) {
        int length = sm_seq_length(spans[i].seq);
        CHECK(length == before[i] + spans[i].n, "%d tokens after %d and %d", length, before[i],
              spans[i].n);
        expect(of[i]->source, of[i]->tokens, length, want);
        CHECK(memcmp(want, got[i], n_vocab * sizeof *want) == 0, "other logits after %d tokens",
              length);
    }
}

static void cut(struct text *t) {
    int length = sm_seq_length(t->seq), n = below(length + 1);
    int reach = sm_seq_reach(session, t->seq, n);
    CHECK(reach >= 0 && reach <= n, "reach %d of %d", reach, n);
    CHECK(n < length || reach == n, "all is not in reach");
    sm_seq_rewind(session, t->seq, n);
    CHECK(sm_seq_length(t->seq) == reach, "%d positions, not %d", sm_seq_length(t->seq), reach);
    CHECK(sm_seq_reach(session, t->seq, reach) == reach, "what is held is not in reach");
}

static void fork(const struct text *from, struct text *to) {
    int n = below(sm_seq_length(from->seq) + 1), reach = sm_seq_reach(session, from->seq, n);
    sm_seq_free(session, to->seq);
    CHECK(sm_seq_fork(session, from->seq, n, &to->seq, &err) == SMALLM_OK, "%s", err.message);
    CHECK(sm_seq_length(to->seq) == reach, "%d positions, not %d", sm_seq_length(to->seq), reach);
    memcpy(to->tokens, from->tokens, sizeof to->tokens);
    to->source = from->source;
}

static void free_texts(struct text *texts) {
    for (int i = 0; i < N_SEQS; i++) sm_seq_free(session, texts[i].seq);
}

int main(int argc, char **argv) {
    char path[4096];
    if (!find_model(argc, argv, path, sizeof path)) return 0;
    struct sm_model *model = NULL;
    const smallm_model_params params = {.size = sizeof params, .n_threads = 2};
    if (sm_model_open(path, &params, &model, &err) != SMALLM_OK) {
        printf("check_session: %s\n", err.message);
        return 1;
    }
    smallm_model_info info;
    sm_model_get_info(model, &info);
    n_vocab = (size_t)info.n_vocab;
    has_encoder = info.decoder_start >= 0;
    for (int i = 0; i < N_SOURCES * N_SOURCE; i++) source_tokens[i / N_SOURCE][i % N_SOURCE] = below((int)n_vocab);
    session = open_session(model, 0);
    CHECK(encode(0, N_SOURCES, sources) == SMALLM_OK, "%s", err.message);
    static struct text texts[N_SEQS];
    for (int i = 0; i < N_SEQS; i++)
        CHECK(sm_seq_new(session, &texts[i].seq, &err) == SMALLM_OK, "%s", err.message);
    for (int i = 0; i < N_SEQS; i++) texts[i].source = i % N_SOURCES;
    for (int step = 0; step < N_STEPS && n_failed < 20; step++) {
        int a = below(N_SEQS), b = (a + 1 + below(N_SEQS - 1)) % N_SEQS;
        switch (below(5)) {
        case 0: cut(&texts[a]); break;
        case 1: fork(&texts[a], &texts[b]); break;
        case 2: run(texts, true); break;
        default: run(texts, false); break;
        }
    }

    /* The same tokens again after a cut by one: nothing but the last one runs. */
    int32_t tokens[70];
    for (int i = 0; i < 70; i++) tokens[i] = below((int)n_vocab);
    sm_seq_rewind(session, texts[0].seq, 0);
    float *first = malloc(n_vocab * sizeof *first), *again = malloc(n_vocab * sizeof *again);
    struct sm_span span = {.seq = texts[0].seq, .source = sources[0], .tokens = tokens, .n = 70, .want = SM_WANT_LAST,
                           .logits = first};
    CHECK(sm_session_run(session, &span, 1, NULL, &err) == SMALLM_OK, "%s", err.message);
    CHECK(sm_seq_reach(session, texts[0].seq, 69) == 69, "the last token cannot be taken back");
    sm_seq_rewind(session, texts[0].seq, 69);
    span = (struct sm_span){.seq = texts[0].seq, .source = sources[0], .tokens = tokens + 69, .n = 1,
                            .want = SM_WANT_LAST, .logits = again};
    CHECK(sm_session_run(session, &span, 1, NULL, &err) == SMALLM_OK, "%s", err.message);
    CHECK(memcmp(first, again, n_vocab * sizeof *first) == 0, "other logits");
    uint64_t most = sm_session_cache_bytes(session);
    free_texts(texts);
    for (int i = 0; i < N_SOURCES; i++) sm_seq_free(session, sources[i]);

    /* With as little memory as one text needs: earlier states go, the text stays. */
    uint64_t scratch = sm_session_scratch_bytes(session);
    sm_session_free(session);
    bool ran = false;
    for (uint64_t limit = 1024; limit < 2 * most + 1024 && !ran; limit += 1 + limit / 8) {
        session = open_session(model, scratch + limit);
        uint64_t room = scratch + limit - sm_session_scratch_bytes(session);
        struct sm_seq *seq = NULL, *source = NULL;
        CHECK(sm_seq_new(session, &seq, &err) == SMALLM_OK, "%s", err.message);
        int rc = encode(0, 1, &source);
        for (int i = 0; i < 70 && rc == SMALLM_OK; i += 7) {
            span = (struct sm_span){.seq = seq, .source = source, .tokens = tokens + i, .n = 7,
                                    .want = SM_WANT_LAST, .logits = again};
            rc = sm_session_run(session, &span, 1, NULL, &err);
            CHECK(sm_session_cache_bytes(session) <= room, "%llu bytes, allowed are %llu",
                  (unsigned long long)sm_session_cache_bytes(session), (unsigned long long)room);
        }
        CHECK(rc == SMALLM_OK || rc == SMALLM_E_BUDGET, "status %d: %s", rc, err.message);
        if (rc == SMALLM_OK) CHECK(memcmp(first, again, n_vocab * sizeof *first) == 0, "other logits");
        ran = rc == SMALLM_OK;
        sm_seq_free(session, seq);
        sm_seq_free(session, source);
        sm_session_free(session);
    }
    CHECK(ran, "no limit was enough");
    free(first);
    free(again);
    sm_model_free(model);
    printf("check_session: %s\n", n_failed ? "FAILED" : "ok");
    return n_failed != 0;
}
