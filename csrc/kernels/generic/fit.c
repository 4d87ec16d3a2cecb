/* The integers of a format's blocks. */
#include "../fit.h"
#include "../tier.h"

void SM_NAME(sm_fit)(enum sm_type t, const float *x, const float *w, size_t n_blocks, struct sm_codes *out) {
    sm_fit(t, x, w, n_blocks, out);
}
