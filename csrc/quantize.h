/* Rows of numbers from one weight format into another, by a pool of threads.
 *
 * The result depends on nothing but the numbers and their importance: blocks are independent, and what
 * kernels find for one is the same on every machine (kernels/fit.h). */
#ifndef SM_QUANTIZE_H
#define SM_QUANTIZE_H

#include "quants/quants.h"

struct sm_rows {
    enum sm_type from, to;  /* to can be written */
    const void *in;         /* [n_rows] rows of n_cols values in `from` */
    void *out;              /* the same in `to` */
    size_t n_rows, n_cols;  /* n_cols: whole blocks of both; the product is a size_t */
    const float *importance; /* [n_cols] finite and >= 0, or NULL */
};

/* SMALLM_E_CORRUPT: a value is infinite or NaN; SMALLM_E_UNSUPPORTED: it is beyond the format's
 * range.  The message names row and column. */
int sm_quantize_rows(const struct sm_rows *rows, int n_threads, smallm_error *err);

#endif
