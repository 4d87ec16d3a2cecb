/* The KV cache: pages of SM_PAGE positions, shared between sequences by reference count.
 *
 * A page holds K and V of every layer and kv head for its positions:
 *   [n_layer][n_head_kv]{ K [SM_PAGE / 16][head][16], V [SM_PAGE][head] } of the cache's type, each
 * with what kernels.h says of it.
 * n_layer counts layers with attention; where there are none there are no pages.
 * Unwritten positions hold finite numbers.  A page with more than one owner is never written: it is
 * copied first.
 *
 * The sequence of an encoder's text has in the place of each layer of the decoder the K and V that this
 * attends to.  While the text is encoded, the encoder's layers have theirs in the first one's place, one
 * after the other.
 *
 * Layers that are recurrent have a state in place of K and V, which all of a text before a position
 * went into: [n_state_layer][state_floats], what a layer's part holds stands in mixers/.  A sequence
 * holds the state after its last position; a pass reads it and writes another one, which takes its
 * place when the pass has succeeded.  Nothing else can be taken back from a state, so some earlier
 * ones are kept: of each pass of several tokens the one before its last token.  States are shared
 * between forks, too, and never written once a sequence holds them.
 *
 * One thread at a time. */
#ifndef SM_CACHE_H
#define SM_CACHE_H

#include "arch.h"
#include "kernels/kernels.h"

struct sm_page {
    uint8_t *data;  /* page_bytes */
    int n_owners;
    struct sm_page *next_free;
};

/* Earlier states that a sequence keeps. */
#define SM_STATES_KEPT 4

struct sm_state {
    float *data; /* [n_state_layer][state_floats] */
    int n;       /* positions that went into it */
    int n_owners;
};

struct sm_cache {
    int n_layer, n_head_kv, head, kv_type;
    size_t part_bytes;      /* one head's K, or V, in a page */
    size_t page_bytes;
    size_t state_floats;    /* of one layer, whole SM_ALIGN; 0: none is recurrent */
    size_t state_bytes;     /* of all layers */
    uint64_t memory_limit;  /* bytes of pages and states; 0: none */
    uint64_t n_bytes;       /* allocated, free pages included */
    struct sm_page *free_pages;
};

struct sm_seq {
    int n;                   /* positions held */
    struct sm_page **pages;  /* [n_pages] */
    size_t n_pages, cap_pages;
    struct sm_state *state;  /* after n positions; NULL: n is 0, or no layer is recurrent */
    struct sm_state *next;   /* what the next pass writes: after its tokens, */
    struct sm_state *mid;    /* and before its last one; NULL: not reserved */
    struct sm_state *kept[SM_STATES_KEPT]; /* [n_kept] n ascending */
    int n_kept;
};

int sm_cache_init(struct sm_cache *c, const struct sm_hparams *h, int kv_type, uint64_t memory_limit,
                  smallm_error *err);
void sm_cache_free(struct sm_cache *c); /* after all sequences */

/* Makes positions seq->n .. n - 1 of seq writable, and the states of a pass that runs them; seq->n
 * stays.  On failure the sequence is as it was, up to spare pages and states: where memory is short
 * it may keep fewer earlier states.  SMALLM_E_BUDGET, SMALLM_E_MEMORY. */
int sm_cache_reserve(struct sm_cache *c, struct sm_seq *seq, int n, smallm_error *err);

/* A pass has filled positions seq->n .. n - 1 and the states. */
void sm_cache_commit(struct sm_cache *c, struct sm_seq *seq, int n);

/* How many of seq's first n positions can be had without those after them: n, or up to the latest
 * state that is there. */
int sm_cache_reach(const struct sm_cache *c, const struct sm_seq *seq, int n);

/* seq, which is empty, shares the pages and states of src's first n positions, which are in reach. */
int sm_cache_share(const struct sm_cache *c, struct sm_seq *seq, const struct sm_seq *src, int n,
                   smallm_error *err);

/* Keeps n <= seq->n positions, which are in reach. */
void sm_cache_truncate(struct sm_cache *c, struct sm_seq *seq, int n);
void sm_cache_drop(struct sm_cache *c, struct sm_seq *seq); /* all, and what is reserved */

/* Where a recurrent layer's part of a state begins, in floats. */
static inline size_t sm_cache_state(const struct sm_cache *c, int layer) {
    return (size_t)layer * c->state_floats;
}

/* K (part 0) or V (part 1) of one layer and kv head in a page. */
static inline void *sm_cache_part(const struct sm_cache *c, const struct sm_page *page, int layer,
                                  int kv_head, int part) {
    size_t index = ((size_t)layer * (size_t)c->n_head_kv + (size_t)kv_head) * 2 + (size_t)part;
    return page->data + index * c->part_bytes;
}

#endif
