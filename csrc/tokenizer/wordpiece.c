/* WordPiece: text is cleaned and cut into words, and each word into the longest tokens from its
 * start on.  See vocab.h.
 *
 * Cleaning is BERT's: control characters go, CJK ideographs and punctuation stand alone, and, as
 * the file says, accents go (canonical decomposition without nonspacing marks; other marks stay in
 * the order of the text) and letters become lower case.
 * A word's first token has a space before it, here as in the tokens' pieces. */
#include "nfc.h"
#include "unicode.h"
#include "vocab.h"

#define MAX_WORD 100 /* characters: a longer word is unknown as a whole */

struct word {
    struct sm_encode *e;
    uint8_t s[1 + 4 * MAX_WORD]; /* [n] a space first */
    size_t n, n_chars;
};

int sm_wordpiece_load(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    bool found;
    t->lowercase = true;
    int status = sm_gguf_get_bool(b->g, "tokenizer.ggml.normalizer.lowercase", &t->lowercase,
                                  &found, b->err);
    t->strip_accents = t->lowercase;
    if (status == SMALLM_OK)
        status = sm_gguf_get_bool(b->g, "tokenizer.ggml.normalizer.strip_accents",
                                  &t->strip_accents, &found, b->err);
    return status == SMALLM_OK ? sm_vocab_load_tree(b) : status;
}

/* ---- characters ----------------------------------------------------------------------------- */

static bool is_ideograph(uint32_t c) {
    static const struct {
        uint32_t first, last;
    } ranges[] = {
        /* The sixth begins at U+2B920, not U+2B820, in the tokenizers the models were made with. */
        {0x4E00, 0x9FFF}, {0x3400, 0x4DBF}, {0xF900, 0xFAFF}, {0x20000, 0x2A6DF},
        {0x2A700, 0x2B81F}, {0x2B920, 0x2CEAF}, {0x2F800, 0x2FA1F},
    };
    for (size_t i = 0; i < SM_COUNT(ranges); i++)
        if (c >= ranges[i].first && c <= ranges[i].last) return true;
    return false;
}

static bool is_mark(uint32_t c, enum sm_char_class class) {
    return class == SM_CHAR_PUNCTUATION || (class == SM_CHAR_SYMBOL && c < 0x80);
}

/* Canonical decomposition without nonspacing marks; returns the number of characters. */
static size_t without_accents(uint32_t c, uint32_t out[SM_NFC_PARTS]) {
    size_t n = sm_decompose(c, out), kept = 0;
    for (size_t i = 0; i < n; i++)
        if (sm_char_class(out[i]) != SM_CHAR_NONSPACING_MARK) out[kept++] = out[i];
    return kept;
}

static uint32_t lower(uint32_t c) {
    if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    if (c == 0x130) return 'i'; /* and U+0307, which is put after it */
    for (size_t low = 0, high = SM_N_LOWER; low < high;) {
        size_t middle = (low + high) / 2;
        if (sm_lower_table[middle].c == c) return sm_lower_table[middle].lower;
        if (sm_lower_table[middle].c < c) low = middle + 1;
        else high = middle;
    }
    return c;
}

/* ---- words ---------------------------------------------------------------------------------- */

/* The longest token at s[from..n), or -1; *end is where it ends. */
static int32_t longest(const struct sm_trie *tokens, const uint8_t *s, size_t from, size_t n,
                       size_t *end) {
    int32_t id = -1;
    uint32_t node = 0;
    for (size_t i = from; i < n && (node = sm_trie_child(tokens, node, s[i])) != 0; i++) {
        if (tokens->id[node] < 0) continue;
        id = tokens->id[node];
        *end = i + 1;
    }
    return id;
}

static void end_word(struct word *w) {
    struct sm_encode *e = w->e;
    const struct sm_trie *tokens = &e->t->tokens;
    if (w->n_chars == 0) return;
    size_t before = e->n_ids, i = 0;
    bool known = w->n_chars <= MAX_WORD && tokens->n_nodes > 0;
    while (known && i < w->n) {
        int32_t id = longest(tokens, w->s, i, w->n, &i);
        if (id < 0) known = false;
        else sm_encode_emit(e, id);
    }
    if (!known) {
        e->n_ids = before;
        sm_encode_emit(e, e->t->unknown);
    }
    w->n = 1;
    w->n_chars = 0;
}

static void add_char(struct word *w, uint32_t c) {
    enum sm_char_class class = sm_char_class(c);
    if (class == SM_CHAR_SPACE) {
        end_word(w);
        return;
    }
    bool alone = is_mark(c, class);
    if (alone) end_word(w);
    if (w->n_chars++ < MAX_WORD) w->n += sm_utf8_encode(c, w->s + w->n);
    if (alone) end_word(w);
}

int sm_wordpiece_encode(struct sm_encode *e, const char *s, size_t n) {
    const struct sm_tokenizer *t = e->t;
    struct word w = {.e = e, .s = {' '}, .n = 1};
    size_t length;
    for (size_t i = 0; i < n; i += length) {
        SM_WORK();
        uint32_t c = sm_utf8_decode((const uint8_t *)s + i, &length), parts[SM_NFC_PARTS] = {c};
        enum sm_char_class class = sm_char_class(c);
        bool control = class == SM_CHAR_OTHER || c == 0x0B || c == 0x0C || c == 0x85;
        if ((control && c != '\t' && c != '\n' && c != '\r') || c == 0xFFFD) continue;
        bool alone = c >= 0x3400 && is_ideograph(c);
        if (alone) end_word(&w);
        size_t n_parts = t->strip_accents ? without_accents(c, parts) : 1;
        for (size_t k = 0; k < n_parts; k++) {
            add_char(&w, t->lowercase ? lower(parts[k]) : parts[k]);
            if (t->lowercase && parts[k] == 0x130) add_char(&w, 0x307);
        }
        if (alone) end_word(&w);
    }
    end_word(&w);
    return SMALLM_OK;
}
