/* Pages, owners, copy before write. */
#include "cache.h"

int sm_cache_init(struct sm_cache *c, const struct sm_hparams *h, int kv_type, uint64_t memory_limit,
                  smallm_error *err) {
    *c = (struct sm_cache){.n_layer = h->n_layer, .n_head_kv = h->n_head_kv, .head = h->head,
                           .kv_type = kv_type, .memory_limit = memory_limit};
    c->part_bytes = sm_round_up(sm_kv_part_bytes(kv_type, (size_t)h->head), SM_ALIGN);
    size_t n_parts = (size_t)h->n_layer * (size_t)h->n_head_kv * 2;
    if (!sm_mul(c->part_bytes, n_parts, &c->page_bytes))
        return sm_fail(err, SMALLM_E_MEMORY, "a page of the KV cache exceeds the address space");
    return SMALLM_OK;
}

void sm_cache_free(struct sm_cache *c) {
    while (c->free_pages != NULL) {
        struct sm_page *page = c->free_pages;
        c->free_pages = page->next_free;
        sm_free(page->data);
        sm_free(page);
    }
}

static int take_page(struct sm_cache *c, struct sm_page **out, smallm_error *err) {
    struct sm_page *page = c->free_pages;
    if (page != NULL) {
        c->free_pages = page->next_free;
    } else {
        if (c->memory_limit != 0 && c->n_bytes + c->page_bytes > c->memory_limit)
            return sm_fail(err, SMALLM_E_BUDGET,
                           "the KV cache needs another %zu bytes for %d positions; %llu of the %llu "
                           "that memory_limit leaves it are in use",
                           c->page_bytes, SM_PAGE, (unsigned long long)c->n_bytes,
                           (unsigned long long)c->memory_limit);
        page = sm_alloc(sizeof *page);
        uint8_t *data = page != NULL ? sm_calloc(1, c->page_bytes) : NULL;
        if (data == NULL) {
            sm_free(page);
            return sm_fail(err, SMALLM_E_MEMORY, "no memory for another %zu bytes of KV cache",
                           c->page_bytes);
        }
        page->data = data;
        c->n_bytes += c->page_bytes;
    }
    page->n_owners = 1;
    *out = page;
    return SMALLM_OK;
}

static void drop_page(struct sm_cache *c, struct sm_page *page) {
    if (--page->n_owners > 0) return;
    page->next_free = c->free_pages;
    c->free_pages = page;
}

int sm_cache_reserve(struct sm_cache *c, struct sm_seq *seq, int n, smallm_error *err) {
    size_t first = (size_t)seq->n / SM_PAGE, last = ((size_t)n + SM_PAGE - 1) / SM_PAGE;
    if (!sm_grow(&seq->pages, &seq->cap_pages, last, sizeof(struct sm_page *)))
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for a table of %zu cache pages", last);
    for (size_t i = first; i < last; i++) {
        struct sm_page *old = i < seq->n_pages ? seq->pages[i] : NULL;
        if (old != NULL && old->n_owners == 1) continue;
        struct sm_page *page = NULL;
        int status = take_page(c, &page, err);
        if (status != SMALLM_OK) return status;
        if (old != NULL) {
            memcpy(page->data, old->data, c->page_bytes);
            drop_page(c, old);
        } else {
            seq->n_pages++;
        }
        seq->pages[i] = page;
    }
    return SMALLM_OK;
}

int sm_cache_share(struct sm_seq *seq, const struct sm_seq *src, int n, smallm_error *err) {
    size_t n_pages = ((size_t)n + SM_PAGE - 1) / SM_PAGE;
    if (!sm_grow(&seq->pages, &seq->cap_pages, n_pages, sizeof(struct sm_page *)))
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for a table of %zu cache pages", n_pages);
    for (size_t i = 0; i < n_pages; i++) {
        seq->pages[i] = src->pages[i];
        seq->pages[i]->n_owners++;
    }
    seq->n_pages = n_pages;
    seq->n = n;
    return SMALLM_OK;
}

void sm_cache_truncate(struct sm_cache *c, struct sm_seq *seq, int n) {
    size_t keep = ((size_t)n + SM_PAGE - 1) / SM_PAGE;
    while (seq->n_pages > keep) drop_page(c, seq->pages[--seq->n_pages]);
    seq->n = n;
}
