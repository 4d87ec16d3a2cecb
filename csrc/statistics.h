/* What the matrices of a model's layers are multiplied with: for each column the sum of squares over
 * all rows of activations that reached the matrix.
 *
 * A sum is added to row after row, in the order of the tokens: it has the same bits however many
 * threads add to it, each to other columns, and however a text was cut. */
#ifndef SM_STATISTICS_H
#define SM_STATISTICS_H

#include "model.h"

struct sm_sums {
    size_t n, k;      /* experts of the matrix, else 1; columns */
    double *squares;  /* [n][k] */
    uint64_t *counts; /* [n] rows of activations */
};

struct sm_statistics {
    struct sm_sums *of; /* [n_matrices] as in sm_model.matrices */
    bool torn;          /* a pass broke off: what it added is not of whole tokens */
    double *squares;    /* all matrices' */
    uint64_t *counts;
    uint64_t n_bytes;
};

int sm_statistics_new(const struct sm_model *m, struct sm_statistics **out, smallm_error *err);
void sm_statistics_free(struct sm_statistics *s); /* NULL allowed */

#endif
