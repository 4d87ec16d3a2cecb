/* Builds trees of texts: see trie.h.
 *
 * Nodes are taken in order.  The texts below a node lie together; they are sorted into its children
 * by their next byte, which costs one look at every byte of every text. */
#include "trie.h"

struct range {
    uint32_t from, to; /* of the texts that begin as a node says */
};

static uint8_t byte_at(struct sm_str s, uint32_t depth, bool backwards) {
    return (uint8_t)s.s[backwards ? s.n - 1 - depth : depth];
}

static bool add_node(struct sm_trie *t, struct range **ranges, size_t *cap_ranges, uint8_t byte,
                     bool with_fail) {
    size_t n = (size_t)t->n_nodes + 1;
    if (!sm_grow(&t->first, &t->cap_first, n + 1, sizeof *t->first) ||
        !sm_grow(&t->byte, &t->cap_byte, n, sizeof *t->byte) ||
        !sm_grow(&t->id, &t->cap_id, n, sizeof *t->id) ||
        !sm_grow(ranges, cap_ranges, n, sizeof **ranges))
        return false;
    if (with_fail && !sm_grow(&t->fail, &t->cap_fail, n, sizeof *t->fail)) return false;
    t->byte[t->n_nodes] = byte;
    t->id[t->n_nodes++] = -1;
    return true;
}

bool sm_trie_build(struct sm_trie *t, const struct sm_str *texts, int32_t *ids, size_t n,
                   bool backwards) {
    struct range *ranges = NULL;
    size_t cap_ranges = 0;
    int32_t *sorted = sm_alloc(n * sizeof *sorted);
    uint32_t count[256] = {0}, at[256];
    bool done = false;
    if (sorted == NULL || !add_node(t, &ranges, &cap_ranges, 0, backwards)) goto fail;
    if (backwards) t->fail[0] = 0;
    ranges[0] = (struct range){0, (uint32_t)n};
    for (uint32_t node = 0, depth = 0, level_end = 1; node < t->n_nodes; node++) {
        if (node == level_end) {
            depth++;
            level_end = t->n_nodes;
        }
        struct range r = ranges[node];
        uint8_t bytes[256];
        size_t n_bytes = 0;
        uint32_t kept = r.from;
        for (uint32_t k = r.from; k < r.to; k++) {
            struct sm_str s = texts[ids[k]];
            if (s.n == depth) {
                if (t->id[node] < 0) t->id[node] = ids[k];
                continue;
            }
            uint8_t byte = byte_at(s, depth, backwards);
            if (count[byte]++ == 0) bytes[n_bytes++] = byte;
            ids[kept++] = ids[k];
        }
        t->first[node] = t->n_nodes;
        uint32_t from = r.from;
        for (size_t i = 0; i < n_bytes; i++) {
            uint32_t child = t->n_nodes;
            uint8_t byte = bytes[i];
            if (!add_node(t, &ranges, &cap_ranges, byte, backwards)) goto fail;
            if (node == 0) t->root[byte] = child;
            if (backwards) t->fail[child] = node == 0 ? 0 : sm_trie_step(t, t->fail[node], byte);
            ranges[child] = (struct range){from, from + count[byte]};
            at[byte] = from;
            from += count[byte];
            count[byte] = 0;
        }
        if (n_bytes < 2) continue;
        for (uint32_t k = r.from; k < kept; k++)
            sorted[at[byte_at(texts[ids[k]], depth, backwards)]++] = ids[k];
        memcpy(ids + r.from, sorted + r.from, (kept - r.from) * sizeof *ids);
    }
    t->first[t->n_nodes] = t->n_nodes;
    if (backwards)
        for (uint32_t i = 1; i < t->n_nodes; i++)
            if (t->id[i] < 0) t->id[i] = t->id[t->fail[i]];
    done = true;
fail:
    sm_free(sorted);
    sm_free(ranges);
    return done;
}

void sm_trie_free(struct sm_trie *t) {
    sm_free(t->first);
    sm_free(t->byte);
    sm_free(t->id);
    sm_free(t->fail);
}
