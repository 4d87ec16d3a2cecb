/* Requests, batched onto one session by one thread.  api.c judges arguments and forwards here;
 * everything is as smallm.h says. */
#ifndef SM_ENGINE_H
#define SM_ENGINE_H

#include "adapter.h"

struct sm_engine_limits {
    const struct sm_model *model;
    int32_t n_vocab, n_ctx, n_batch;
    bool has_encoder, is_encoder; /* arch.h */
};

/* params: all resolved, no zeros but memory_limit. */
int sm_engine_open(const struct sm_model *model, const smallm_engine_params *params,
                   smallm_engine **out, smallm_error *err);
void sm_engine_close(smallm_engine *e);
struct sm_engine_limits sm_engine_get_limits(const smallm_engine *e);
bool sm_engine_timer(smallm_engine *e, size_t i, smallm_timer *out); /* false: past the last */
/* squares, counts: NULL, or room for them.  SMALLM_DONE: past the last. */
int sm_engine_statistic(smallm_engine *e, size_t i, smallm_statistic *out, double *squares,
                        uint64_t *counts, smallm_error *err);
void sm_engine_get_info(smallm_engine *e, smallm_engine_info *out);

/* params: within the limits; the sampler judges params->sampling. */
int sm_engine_submit(smallm_engine *e, const smallm_request_params *params, smallm_request **out,
                     smallm_error *err);
int sm_request_next(smallm_request *r, int32_t timeout_ms, smallm_chunk *out, smallm_error *err);
void sm_request_cancel(smallm_request *r);
void sm_request_get_stats(smallm_request *r, smallm_request_stats *out);
void sm_request_free(smallm_request *r);

/* The process that made it: in any other, a child of fork(), the object is dead. */
int64_t sm_engine_process(const smallm_engine *e);
int64_t sm_request_process(const smallm_request *r);

#endif
