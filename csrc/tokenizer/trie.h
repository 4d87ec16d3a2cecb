/* A tree of texts, read byte by byte, and the same tree as an automaton (Aho-Corasick).
 *
 * Nodes are in the order of their depth, and the children of a node follow one another, so that a
 * node is a few bytes and nothing is hashed.  Node 0 is the root.  Immutable once built. */
#ifndef SM_TRIE_H
#define SM_TRIE_H

#include "../gguf.h"

struct sm_trie {
    uint32_t n_nodes;   /* 0: nothing was built */
    uint32_t *first;    /* [n_nodes + 1] node i's children are first[i] .. first[i + 1] - 1 */
    uint8_t *byte;      /* [n_nodes] that leads to the node from its parent */
    int32_t *id;        /* [n_nodes] the text that ends here, or -1 */
    uint32_t *fail;     /* [n_nodes] or NULL: the node of the longest proper end that begins a text */
    uint32_t root[256]; /* the root's children, 0 where there is none */
    size_t cap_first, cap_byte, cap_id, cap_fail;
};

/* Builds from texts[ids[0..n)], all of which have n > 0; of equal ones the first stays.  `backwards`
 * reads them from their ends and makes the automaton; an id is then also at every node that ends in
 * its text, the longest where there are more.  false: out of memory. */
bool sm_trie_build(struct sm_trie *t, const struct sm_str *texts, int32_t *ids, size_t n,
                   bool backwards);
void sm_trie_free(struct sm_trie *t);

/* The child of a node, or 0. */
static inline uint32_t sm_trie_child(const struct sm_trie *t, uint32_t node, uint8_t byte) {
    SM_WORK();
    if (node == 0) return t->root[byte];
    uint32_t first = t->first[node], n = t->first[node + 1] - first;
    if (n > 8) {
        const uint8_t *at = memchr(t->byte + first, byte, n);
        return at != NULL ? (uint32_t)(at - t->byte) : 0;
    }
    for (uint32_t i = first; i < first + n; i++)
        if (t->byte[i] == byte) return i;
    return 0;
}

/* The automaton's next state: costs a constant on average over a text. */
static inline uint32_t sm_trie_step(const struct sm_trie *t, uint32_t node, uint8_t byte) {
    uint32_t child;
    while ((child = sm_trie_child(t, node, byte)) == 0 && node != 0) node = t->fail[node];
    return child;
}

#endif
