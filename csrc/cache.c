/* Pages and states, owners, copy before write. */
#include "cache.h"

int sm_cache_init(struct sm_cache *c, const struct sm_hparams *h, int kv_type, uint64_t memory_limit,
                  smallm_error *err) {
    *c = (struct sm_cache){.n_layer = h->n_kv_layer, .n_head_kv = h->n_head_kv, .head = h->head,
                           .kv_type = kv_type, .memory_limit = memory_limit};
    c->part_bytes = sm_round_up(sm_kv_part_bytes(kv_type, (size_t)h->head), SM_ALIGN);
    size_t n_parts = (size_t)h->n_kv_layer * (size_t)h->n_head_kv * 2;
    if (!sm_mul(c->part_bytes, n_parts, &c->page_bytes))
        return sm_fail(err, SMALLM_E_MEMORY, "a page of the KV cache exceeds the address space");
    size_t floats = (size_t)(h->conv_kernel - 1) * (size_t)h->conv_width +
                    (size_t)h->n_ssm_head * (size_t)h->ssm_head * (size_t)h->ssm_state;
    c->state_floats = h->n_state_layer > 0 ? sm_round_up(floats, SM_ALIGN / sizeof(float)) : 0;
    if (!sm_mul(c->state_floats, (size_t)h->n_state_layer * sizeof(float), &c->state_bytes))
        return sm_fail(err, SMALLM_E_MEMORY, "a state of all layers exceeds the address space");
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

/* ---- states ---------------------------------------------------------------------------------- */

static int take_state(struct sm_cache *c, struct sm_state **out, smallm_error *err) {
    if (*out != NULL) return SMALLM_OK;
    if (c->memory_limit != 0 && c->n_bytes + c->state_bytes > c->memory_limit)
        return sm_fail(err, SMALLM_E_BUDGET,
                       "a sequence's state needs another %zu bytes; %llu of the %llu that memory_limit "
                       "leaves the cache are in use",
                       c->state_bytes, (unsigned long long)c->n_bytes,
                       (unsigned long long)c->memory_limit);
    struct sm_state *state = sm_alloc(sizeof *state);
    float *data = state != NULL ? sm_alloc(c->state_bytes) : NULL;
    if (data == NULL) {
        sm_free(state);
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for a sequence's state of %zu bytes",
                       c->state_bytes);
    }
    *state = (struct sm_state){.data = data, .n_owners = 1};
    c->n_bytes += c->state_bytes;
    *out = state;
    return SMALLM_OK;
}

/* Lets go of *state, which may be NULL. */
static void drop_state(struct sm_cache *c, struct sm_state **state) {
    struct sm_state *s = *state;
    *state = NULL;
    if (s == NULL || --s->n_owners > 0) return;
    sm_free(s->data);
    sm_free(s);
    c->n_bytes -= c->state_bytes;
}

static struct sm_state *share_state(struct sm_state *state) {
    if (state != NULL) state->n_owners++;
    return state;
}

static void drop_kept(struct sm_cache *c, struct sm_seq *seq, int i) {
    drop_state(c, &seq->kept[i]);
    seq->n_kept--;
    memmove(&seq->kept[i], &seq->kept[i + 1], (size_t)(seq->n_kept - i) * sizeof seq->kept[0]);
}

/* Keeps a state that is later than all others.  Where there are too many, the one goes that follows
 * another most closely: what is left lies spread over the text. */
static void keep_state(struct sm_cache *c, struct sm_seq *seq, struct sm_state *state) {
    if (seq->n_kept == SM_STATES_KEPT) {
        int closest = 0, least = INT32_MAX;
        for (int i = 0; i < seq->n_kept; i++) {
            int gap = seq->kept[i]->n - (i > 0 ? seq->kept[i - 1]->n : 0);
            if (gap >= least) continue;
            least = gap;
            closest = i;
        }
        drop_kept(c, seq, closest);
    }
    seq->kept[seq->n_kept++] = state;
}

/* The latest state of seq at or before position n; NULL: only the beginning is. */
static struct sm_state *state_before(const struct sm_seq *seq, int n) {
    if (seq->state == NULL || seq->n <= n) return seq->state;
    struct sm_state *found = NULL;
    for (int i = 0; i < seq->n_kept && seq->kept[i]->n <= n; i++) found = seq->kept[i];
    return found;
}

int sm_cache_reach(const struct sm_cache *c, const struct sm_seq *seq, int n) {
    if (c->state_floats == 0) return n;
    const struct sm_state *state = state_before(seq, n);
    return state != NULL ? state->n : 0;
}

/* ---- sequences ------------------------------------------------------------------------------- */

static int reserve(struct sm_cache *c, struct sm_seq *seq, int n, smallm_error *err) {
    size_t first = (size_t)seq->n / SM_PAGE, last = ((size_t)n + SM_PAGE - 1) / SM_PAGE;
    if (c->n_layer == 0) last = 0;
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
    return c->state_floats > 0 ? take_state(c, &seq->next, err) : SMALLM_OK;
}

int sm_cache_reserve(struct sm_cache *c, struct sm_seq *seq, int n, smallm_error *err) {
    int status = reserve(c, seq, n, err);
    while (seq->n_kept > 0 && (status == SMALLM_E_BUDGET || status == SMALLM_E_MEMORY)) {
        drop_kept(c, seq, 0);
        status = reserve(c, seq, n, err);
    }
    if (status != SMALLM_OK) return status;
    if (n - seq->n == 1) drop_state(c, &seq->mid);
    else if (c->state_floats > 0) (void)take_state(c, &seq->mid, NULL); /* can be done without */
    return SMALLM_OK;
}

void sm_cache_commit(struct sm_cache *c, struct sm_seq *seq, int n) {
    struct sm_state *old = seq->state;
    seq->n = n;
    if (c->state_floats == 0) return;
    seq->state = seq->next;
    seq->state->n = n;
    seq->next = NULL;
    if (old != NULL && old->n_owners == 1) seq->next = old; /* decoding takes turns with two */
    else drop_state(c, &old);
    if (seq->mid == NULL) return;
    seq->mid->n = n - 1;
    keep_state(c, seq, seq->mid);
    seq->mid = NULL;
}

int sm_cache_share(const struct sm_cache *c, struct sm_seq *seq, const struct sm_seq *src, int n,
                   smallm_error *err) {
    size_t n_pages = SM_MIN(((size_t)n + SM_PAGE - 1) / SM_PAGE, src->n_pages);
    if (!sm_grow(&seq->pages, &seq->cap_pages, n_pages, sizeof(struct sm_page *)))
        return sm_fail(err, SMALLM_E_MEMORY, "no memory for a table of %zu cache pages", n_pages);
    for (size_t i = 0; i < n_pages; i++) {
        seq->pages[i] = src->pages[i];
        seq->pages[i]->n_owners++;
    }
    seq->n_pages = n_pages;
    seq->n = n;
    if (c->state_floats == 0) return SMALLM_OK;
    seq->state = share_state(state_before(src, n));
    for (int i = 0; i < src->n_kept && src->kept[i]->n <= n; i++)
        seq->kept[seq->n_kept++] = share_state(src->kept[i]);
    return SMALLM_OK;
}

void sm_cache_truncate(struct sm_cache *c, struct sm_seq *seq, int n) {
    size_t keep = ((size_t)n + SM_PAGE - 1) / SM_PAGE;
    while (seq->n_pages > keep) drop_page(c, seq->pages[--seq->n_pages]);
    struct sm_state *state = share_state(state_before(seq, n));
    drop_state(c, &seq->state);
    seq->state = state;
    while (seq->n_kept > 0 && seq->kept[seq->n_kept - 1]->n > n) drop_kept(c, seq, seq->n_kept - 1);
    seq->n = n;
}

void sm_cache_drop(struct sm_cache *c, struct sm_seq *seq) {
    sm_cache_truncate(c, seq, 0);
    drop_state(c, &seq->next);
    drop_state(c, &seq->mid);
}
