/* What the tokenizer's files share: the vocabulary, the tables of its model, loading and encoding.
 *
 * Invariants of a tokenizer once made:
 *   - pieces[id] are the bytes that token id stands for.  Where the model marks spaces, a text in
 *     the file has U+2581 where the user's has a space; pieces have a plain space.
 *   - every id in the tables is in 0 .. n_vocab-1, or -1 for none.
 *   - hash tables are at most half full, and no chain is longer than SM_MAX_PROBES: a file made to
 *     collide is refused, so a look-up costs a constant. */
#ifndef SM_VOCAB_H
#define SM_VOCAB_H

#include "../tokenizer.h"
#include "nfc.h"
#include "pretok.h"
#include "trie.h"

#define SM_MAX_PROBES 256

#if defined(__GNUC__)
#define SM_PREFETCH(p) __builtin_prefetch(p)
#else
#define SM_PREFETCH(p) ((void)(p))
#endif

enum sm_token_kind { /* tokenizer.ggml.token_type */
    SM_TOKEN_UNDEFINED, SM_TOKEN_NORMAL, SM_TOKEN_UNKNOWN, SM_TOKEN_CONTROL, SM_TOKEN_USER,
    SM_TOKEN_UNUSED, SM_TOKEN_BYTE
};

/* ---- hash tables ---------------------------------------------------------------------------- */

struct sm_words { /* text -> id */
    const struct sm_str *text; /* [n_vocab] */
    uint64_t *slots;           /* [mask + 1] upper half of the hash, then id + 1; 0: empty */
    size_t mask;
};

/* Polynomial, modulo 2^64: the hash of a part follows from those of the whole and of the rest. */
#define SM_HASH_BASE 0x9E3779B97F4A7C15u

static inline uint64_t sm_hash_more(uint64_t h, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) h = h * SM_HASH_BASE + (uint8_t)s[i] + 1;
    return h;
}

static inline uint64_t sm_hash_mix(uint64_t h) {
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

size_t sm_hash_size(size_t n); /* slots for n entries, at most half full: a power of two */

bool sm_words_init(struct sm_words *w, const struct sm_str *text, size_t n);
/* The token whose text is a followed by b and has this hash, or -1. */
int32_t sm_words_find(const struct sm_words *w, uint64_t h, struct sm_str a, struct sm_str b);
int32_t sm_words_get(const struct sm_words *w, struct sm_str s);
/* Adds the id under its text, which has this hash and is not in the table yet.  false: too many
 * texts collide. */
bool sm_words_add(struct sm_words *w, uint64_t h, int32_t id);

/* A table of a large vocabulary is no cache's: loading computes some hashes ahead of their use. */
static inline void sm_words_prefetch(const struct sm_words *w, uint64_t h) {
    SM_PREFETCH(&w->slots[sm_hash_mix(h) & w->mask]);
}
#define SM_HASHES_AHEAD 32
/* The token that likely has a text of this hash, or -1 where none has: its text is not looked at. */
static inline int32_t sm_words_guess(const struct sm_words *w, uint64_t h) {
    h = sm_hash_mix(h);
    size_t i = h & w->mask;
    while (w->slots[i] != 0 && (w->slots[i] ^ h) >> 32 != 0) i = (i + 1) & w->mask;
    return (int32_t)(uint32_t)w->slots[i] - 1;
}

static inline bool sm_same_text(struct sm_str a, struct sm_str b) {
    return a.n == b.n && memcmp(a.s, b.s, a.n) == 0;
}

/* ---- the tokenizer -------------------------------------------------------------------------- */

struct sm_vocab_load;
struct sm_encode;

struct sm_token_model { /* a row for each tokenizer.ggml.model */
    const char *name;
    bool marks_spaces; /* U+2581 in the file's texts */
    bool marks_words;  /* only at the start of a text: the first piece of a word has it */
    bool copies_text;  /* to put spaces for the marks in it, and one before it */
    bool needs_scores, needs_types, needs_unknown;
    bool has_pretok;
    int32_t bos, eos, unknown; /* where the file does not say, if the token is of that kind */
    bool add_bos, add_eos, add_space;
    int (*load)(struct sm_vocab_load *b);
    int (*encode)(struct sm_encode *e, const char *s, size_t n); /* a text without special tokens */
};

struct sm_pair { /* left == -1: an empty slot */
    int32_t left, right;
    uint32_t rank; /* lower merges first */
    int32_t id;    /* what the two become */
};

struct sm_letter { /* id == -1: an empty slot */
    uint32_t c;
    int32_t id;
};

struct sm_charsmap { /* a double array over bytes, in Darts' form, whose values are in strings */
    uint32_t *units; /* [n_units] */
    char *strings;   /* [n_strings] each ends in NUL */
    uint32_t n_units;
    size_t n_strings;
};

struct sm_tokenizer {
    const struct sm_token_model *model;
    int32_t n_vocab;
    struct sm_str *pieces; /* [n_vocab] into blob */
    char *blob;
    uint8_t *kinds; /* [n_vocab] enum sm_token_kind */
    bool *ends;     /* [n_vocab] ends a generation */
    int32_t byte_ids[256];
    struct sm_trie control, user; /* backwards: special tokens in a text */
    int32_t bos, eos, eot, unknown;
    bool add_bos, add_eos, add_space;
    bool space_starts_word; /* no normal token has a space after another character */

    /* bpe.c */
    const struct sm_pretok *pretok; /* byte-level */
    bool nfc;                       /* byte-level: a text is first brought to that form */
    struct sm_pair *pairs;          /* [pair_mask + 1] */
    size_t pair_mask;
    struct sm_letter *letters; /* [letter_mask + 1] SentencePiece: tokens of one character */
    size_t letter_mask;
    struct sm_words whole;  /* byte-level: pieces that are tokens as they are; slots may be NULL */

    /* wordpiece.c, unigram.c */
    struct sm_trie tokens; /* normal tokens by their pieces */
    bool lowercase, strip_accents;
    struct sm_charsmap charsmap;
    bool merge_spaces;
    float *scores; /* [n_vocab] */
    double unknown_score;
};

/* ---- loading -------------------------------------------------------------------------------- */

struct sm_vocab_load {
    const struct sm_gguf *g;
    const char *path;
    struct sm_tokenizer *t;
    smallm_error *err;
    struct sm_gguf_array tokens, scores, merges;
    struct sm_words raw;    /* the file's texts of all tokens */
    struct sm_pair *list;   /* [n_list] the merges, on their way to the table */
    size_t n_list, cap_list;
    char shown[2][64];      /* file content for messages */
};

/* Reads all that does not depend on the model's kind, calls its `load` in between. */
int sm_vocab_load(struct sm_vocab_load *b);

static inline struct sm_str sm_vocab_text(const struct sm_vocab_load *b, int32_t id) {
    return sm_gguf_array_string(&b->tokens, (size_t)id);
}
const char *sm_vocab_show(struct sm_vocab_load *b, int i, struct sm_str s); /* for messages */
int sm_vocab_no_memory(struct sm_vocab_load *b, const char *what);
int sm_vocab_collides(struct sm_vocab_load *b, const char *what);
int sm_vocab_missing(struct sm_vocab_load *b, const char *key);
/* The array of strings under the key; n == 0 where it is missing. */
int sm_vocab_strings(struct sm_vocab_load *b, const char *key, struct sm_gguf_array *out);
/* t->tokens: a tree of the normal tokens' pieces. */
int sm_vocab_load_tree(struct sm_vocab_load *b);

int sm_bpe_load_merges(struct sm_vocab_load *b); /* byte-level: ranks are in the file */
int sm_bpe_load_scores(struct sm_vocab_load *b); /* SentencePiece */
int sm_wordpiece_load(struct sm_vocab_load *b);
int sm_unigram_load(struct sm_vocab_load *b);

/* ---- encoding ------------------------------------------------------------------------------- */

struct sm_match {
    size_t at;
    int32_t id;
};

struct sm_matches {
    struct sm_match *list; /* [n] from the end of the text to its start */
    size_t n, cap;
};

struct sm_symbol {
    int32_t id;          /* -1: not a token */
    uint32_t prev, next; /* UINT32_MAX, n: none */
    uint32_t rank;       /* of the merge with the next; UINT32_MAX: there is none, or it was merged */
    int32_t into;        /* what that merge makes */
};

struct sm_path { /* the best way to a byte of a word */
    double score;
    uint32_t start; /* of its last token */
    int32_t id;     /* its last token */
};

struct sm_encode {
    const struct sm_tokenizer *t;
    smallm_error *err;
    int32_t *ids; /* [capacity] */
    size_t capacity, n_ids;
    bool unknown_before; /* the last id was the unknown token, in this fragment */
    struct sm_matches control, user;

    /* bpe.c */
    struct sm_symbol *symbols;
    size_t cap_symbols;
    uint64_t *heap; /* rank << 32 | position, the least on top */
    size_t n_heap, cap_heap;
    struct sm_nfc nfc;

    /* unigram.c */
    char *normal;
    struct sm_path *best;
    size_t cap_normal, cap_best;
};

static inline void sm_encode_emit(struct sm_encode *e, int32_t id) {
    if (e->n_ids < e->capacity) e->ids[e->n_ids] = id;
    e->n_ids++;
}
int sm_encode_no_memory(struct sm_encode *e, size_t n); /* n: bytes of the text */
/* A character that is no token: its bytes, or the unknown token once for a run of them. */
void sm_encode_unknown(struct sm_encode *e, const char *s, size_t n);

/* Parts of a text that no token crosses the ends of, in order, to `encode`. */
int sm_encode_by_words(struct sm_encode *e, const char *s, size_t n,
                       int (*encode)(struct sm_encode *e, const char *s, size_t n));

int sm_bpe_encode_bytes(struct sm_encode *e, const char *s, size_t n);
int sm_bpe_encode_words(struct sm_encode *e, const char *s, size_t n);
int sm_wordpiece_encode(struct sm_encode *e, const char *s, size_t n);
int sm_unigram_encode(struct sm_encode *e, const char *s, size_t n);

#define SM_SPACE_MARK "\xE2\x96\x81" /* U+2581 */
/* Copies a text with spaces for the marks; out holds n bytes. */
size_t sm_plain_spaces(const char *s, size_t n, char *out);

#endif
