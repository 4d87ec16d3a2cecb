/* The KV cache: pages of SM_PAGE positions, shared between sequences by reference count.
 *
 * A page holds K and V of every layer and kv head for its positions:
 *   [n_layer][n_head_kv]{ K [SM_PAGE / 16][head][16], V [SM_PAGE][head] } of the cache's type, each
 * with what kernels.h says of it.
 * Unwritten positions hold finite numbers.  A page with more than one owner is never written: it is
 * copied first.  One thread at a time. */
#ifndef SM_CACHE_H
#define SM_CACHE_H

#include "arch.h"
#include "kernels/kernels.h"

struct sm_page {
    uint8_t *data;  /* page_bytes */
    int n_owners;
    struct sm_page *next_free;
};

struct sm_cache {
    int n_layer, n_head_kv, head, kv_type;
    size_t part_bytes;      /* one head's K, or V, in a page */
    size_t page_bytes;
    uint64_t memory_limit;  /* bytes of pages; 0: none */
    uint64_t n_bytes;       /* allocated, free pages included */
    struct sm_page *free_pages;
};

struct sm_seq {
    int n;                   /* positions held */
    struct sm_page **pages;  /* [n_pages] */
    size_t n_pages, cap_pages;
};

int sm_cache_init(struct sm_cache *c, const struct sm_hparams *h, int kv_type, uint64_t memory_limit,
                  smallm_error *err);
void sm_cache_free(struct sm_cache *c); /* after all sequences */

/* Makes positions seq->n .. n - 1 of seq writable; seq->n stays.  On failure the sequence is as it
 * was, up to spare pages.  SMALLM_E_BUDGET, SMALLM_E_MEMORY. */
int sm_cache_reserve(struct sm_cache *c, struct sm_seq *seq, int n, smallm_error *err);

/* seq shares the pages of src's first n positions; seq is empty before. */
int sm_cache_share(struct sm_seq *seq, const struct sm_seq *src, int n, smallm_error *err);

void sm_cache_truncate(struct sm_cache *c, struct sm_seq *seq, int n); /* keeps n <= seq->n */

/* K (part 0) or V (part 1) of one layer and kv head in a page. */
static inline void *sm_cache_part(const struct sm_cache *c, const struct sm_page *page, int layer,
                                  int kv_head, int part) {
    size_t index = ((size_t)layer * (size_t)c->n_head_kv + (size_t)kv_head) * 2 + (size_t)part;
    return page->data + index * c->part_bytes;
}

#endif
