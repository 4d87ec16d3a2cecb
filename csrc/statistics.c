#include "statistics.h"

int sm_statistics_new(const struct sm_model *m, struct sm_statistics **out, smallm_error *err) {
    size_t n_squares = 0, n_counts = 0;
    *out = NULL;
    for (size_t i = 0; i < m->n_matrices; i++) {
        size_t n = SM_MAX(m->matrices[i].n_experts, 1);
        n_squares += n * m->matrices[i].matrix->k;
        n_counts += n;
    }
    struct sm_statistics *s = sm_calloc(1, sizeof *s);
    if (s == NULL) goto fail;
    s->of = sm_calloc(m->n_matrices, sizeof s->of[0]);
    s->squares = sm_calloc(n_squares, sizeof s->squares[0]);
    s->counts = sm_calloc(n_counts, sizeof s->counts[0]);
    if (s->of == NULL || s->squares == NULL || s->counts == NULL) goto fail;
    s->n_bytes = n_squares * sizeof s->squares[0] + n_counts * sizeof s->counts[0];
    double *squares = s->squares;
    uint64_t *counts = s->counts;
    for (size_t i = 0; i < m->n_matrices; i++) {
        struct sm_sums *of = &s->of[i];
        *of = (struct sm_sums){.n = SM_MAX(m->matrices[i].n_experts, 1), .k = m->matrices[i].matrix->k,
                               .squares = squares, .counts = counts};
        squares += of->n * of->k;
        counts += of->n;
    }
    *out = s;
    return SMALLM_OK;
fail:
    sm_statistics_free(s);
    return sm_fail(err, SMALLM_E_MEMORY, "no memory for the statistics of %zu columns", n_squares);
}

void sm_statistics_free(struct sm_statistics *s) {
    if (s == NULL) return;
    sm_free(s->of);
    sm_free(s->squares);
    sm_free(s->counts);
    sm_free(s);
}
