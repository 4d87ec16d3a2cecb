/* Logits -> token.  Pure: the same logits, history and state give the same token on every platform
 * (own exp and log in fixed order, no libm).
 *
 * Order: penalties, bias, mask, top_k, typical, top_p, min_p, temperature. */
#ifndef SM_SAMPLER_H
#define SM_SAMPLER_H

#include "base.h"
#include "peaks.h"

struct sm_sampler; /* one per request; one thread at a time */

/* Judges every field (SMALLM_E_ARGUMENT names it, the value and the range) and copies what it
 * points to. */
int sm_sampler_new(const smallm_sampling *params, int32_t n_vocab, int32_t n_ctx,
                   struct sm_sampler **out, smallm_error *err);
void sm_sampler_free(struct sm_sampler *s); /* NULL allowed */

/* The mask, [(n_vocab + 31) / 32], or NULL: sm_sampler_next does not look at other tokens' logits unless
 * it reports probabilities.  Lives as long as the sampler. */
const uint32_t *sm_sampler_allowed(const struct sm_sampler *s);

/* Tells the sampler of a token of the text so far (prompt tokens too), for the penalties. */
void sm_sampler_accept(struct sm_sampler *s, int32_t token);

struct sm_sampled {
    int32_t token;
    float logprob;        /* ln p(token) under the untouched logits; NaN where n_top < 0 */
    int32_t n_top;
    int32_t top_ids[64];
    float top_logprobs[64];
};

/* Chooses from logits [n_vocab] with their peaks (peaks.h); both change meanwhile and are as they were
 * when it returns.  n_top: alternatives to report, 0 .. 64, -1: not even the token's own probability.  SMALLM_E_NUMERIC where a logit is NaN or all are
 * -infinity; SMALLM_E_ARGUMENT where the mask and bias forbid all.  Allocates nothing. */
int sm_sampler_next(struct sm_sampler *s, float *logits, float *peaks, int n_top,
                    struct sm_sampled *out, smallm_error *err);

#endif
