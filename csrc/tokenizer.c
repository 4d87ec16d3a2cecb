/* Tokenizers: see tokenizer.h.
 *
 * Both models merge neighbouring symbols, best first.  Byte-level BPE starts from bytes, and its
 * merges and their ranks are in the file; SentencePiece starts from characters, merges any two
 * tokens whose texts make a third, and ranks by the third's score.  At load both become one table,
 * (left, right) -> (rank, merged), so that one loop serves both.
 *
 * A text is taken as it is: some families' own tokenizers first bring it to Unicode's form NFC,
 * which a GGUF file does not say.
 *
 * Invariants of a tokenizer once made:
 *   - pieces[id] are the bytes that token id stands for.  A SentencePiece text has U+2581 where the
 *     user's has a space; pieces (and the text while it is encoded) have a plain space.
 *   - every id in the tables is in 0 .. n_vocab-1, or -1 for none.
 *   - hash tables are at most half full, and no chain is longer than MAX_PROBES: a file made to
 *     collide is refused, so a look-up costs a constant. */
#include "tokenizer.h"

#include <math.h>

#include "pretok.h"
#include "unicode.h"

#define MAX_PROBES 256
#define MAX_SPECIAL_BYTES (1u << 20) /* of all control or user-defined tokens together */
#define NONE UINT32_MAX

enum kind { /* tokenizer.ggml.token_type */
    KIND_UNDEFINED, KIND_NORMAL, KIND_UNKNOWN, KIND_CONTROL, KIND_USER, KIND_UNUSED, KIND_BYTE
};

struct words { /* text -> id */
    const struct sm_str *text; /* [n_vocab] */
    uint64_t *slots;           /* [mask + 1] upper half of the hash, then id + 1; 0: empty */
    size_t mask;
};

struct pair { /* left == -1: an empty slot */
    int32_t left, right;
    uint32_t rank; /* lower merges first */
    int32_t id;    /* what the two become */
};

struct letter { /* id == -1: an empty slot */
    uint32_t c;
    int32_t id;
};

/* Finds special tokens in a text, longest match at each position.  An Aho-Corasick automaton over
 * the reversed tokens that reads the text backwards: the state at a position then is the longest
 * token, or part of one, that starts there.  Node 0 is the root. */
struct trie {
    size_t n_nodes;
    uint32_t *fail;  /* [n_nodes] */
    int32_t *out;    /* [n_nodes] the longest token that starts here, or -1 */
    uint64_t *edges; /* [mask + 1] (node << 8 | byte) << 32 | child, 0: empty */
    size_t mask;
};

struct sm_tokenizer {
    bool sentencepiece;
    const struct sm_pretok *pretok; /* byte-level BPE only */
    int32_t n_vocab;
    struct sm_str *pieces; /* [n_vocab] into blob */
    char *blob;
    uint8_t *kinds;        /* [n_vocab] enum kind */
    bool *ends;            /* [n_vocab] ends a generation */
    struct pair *pairs;    /* [pair_mask + 1] */
    size_t pair_mask;
    int32_t byte_ids[256];
    struct letter *letters; /* [letter_mask + 1] SentencePiece: tokens of one character */
    size_t letter_mask;
    struct words whole;     /* byte-level: pieces that are tokens as they are; slots may be NULL */
    struct trie control, user;
    bool space_starts_word; /* no token has a space after another character */
    int32_t bos, eos, eot, unknown;
    bool add_bos, add_eos, add_space;
};

/* ---- UTF-8 ---------------------------------------------------------------------------------- */

/* Looks at the character that begins s[0..n), n > 0.  1: it is whole, *length bytes.  0: this is
 * not UTF-8, and *length is the maximal part that could have begun a character, at least 1.
 * -1: s ends inside of it. */
static int utf8_look(const uint8_t *s, size_t n, size_t *length) {
    *length = 1;
    if (s[0] < 0x80) return 1;
    if (s[0] < 0xC2 || s[0] > 0xF4) return 0;
    size_t need = sm_utf8_length(s[0]);
    uint8_t low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    for (size_t i = 1; i < need; i++) {
        *length = i;
        if (i >= n) return -1;
        if (s[i] < low || s[i] > high) return 0;
        low = 0x80;
        high = 0xBF;
    }
    *length = need;
    return 1;
}

/* Position of the first byte that does not belong to valid UTF-8; n where all of it is. */
static size_t utf8_valid(const char *text, size_t n) {
    const uint8_t *s = (const uint8_t *)text;
    for (size_t i = 0, length; i < n; i += length) {
        uint64_t eight;
        if (n - i >= sizeof eight) {
            memcpy(&eight, s + i, sizeof eight);
            length = sizeof eight;
            if ((eight & 0x8080808080808080u) == 0) continue;
        }
        if (utf8_look(s + i, n - i, &length) != 1) return i;
    }
    return n;
}

size_t sm_utf8_complete(const char *s, size_t n) {
    for (size_t back = 1; back <= SM_MIN(n, 3); back++) {
        const uint8_t *last = (const uint8_t *)s + n - back;
        size_t length;
        if ((*last & 0xC0) == 0x80) continue;
        return utf8_look(last, back, &length) < 0 ? n - back : n;
    }
    return n;
}

size_t sm_utf8_clean(const char *s, size_t n, char *out) {
    size_t written = 0, length;
    for (size_t i = 0; i < n; i += length) {
        bool whole = utf8_look((const uint8_t *)s + i, n - i, &length) == 1;
        const char *from = whole ? s + i : "\xEF\xBF\xBD";
        size_t bytes = whole ? length : 3;
        if (out != NULL) memcpy(out + written, from, bytes);
        written += bytes;
    }
    return written;
}

/* ---- hash tables ---------------------------------------------------------------------------- */

/* Polynomial, modulo 2^64: the hash of a part follows from those of the whole and of the rest. */
#define HASH_BASE 0x9E3779B97F4A7C15u

static uint64_t hash_more(uint64_t h, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) h = h * HASH_BASE + (uint8_t)s[i] + 1;
    return h;
}

static uint64_t mix(uint64_t h) {
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

/* Slots for n entries, at most half full: a power of two. */
static size_t table_size(size_t n) {
    size_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

/* The token whose text is a followed by b and has this hash, or -1. */
static int32_t words_find(const struct words *w, uint64_t h, struct sm_str a, struct sm_str b) {
    h = mix(h);
    for (size_t i = h & w->mask; w->slots[i] != 0; i = (i + 1) & w->mask) {
        if ((w->slots[i] ^ h) >> 32 != 0) continue;
        uint32_t id = (uint32_t)w->slots[i] - 1;
        const struct sm_str *text = &w->text[id];
        if (text->n == a.n + b.n && memcmp(text->s, a.s, a.n) == 0 &&
            memcmp(text->s + a.n, b.s, b.n) == 0)
            return (int32_t)id;
    }
    return -1;
}

static const struct sm_str nothing = {"", 0};

static int32_t words_get(const struct words *w, struct sm_str s) {
    return words_find(w, hash_more(0, s.s, s.n), s, nothing);
}

/* Adds the id under its text, which is not in the table yet.  false: too many texts collide. */
static bool words_add(struct words *w, int32_t id) {
    uint64_t h = mix(hash_more(0, w->text[id].s, w->text[id].n));
    size_t i = h & w->mask;
    for (int probes = 0; w->slots[i] != 0; i = (i + 1) & w->mask)
        if (++probes == MAX_PROBES) return false;
    w->slots[i] = (h >> 32 << 32) | ((uint32_t)id + 1);
    return true;
}

static bool words_init(struct words *w, const struct sm_str *text, size_t n) {
    size_t size = table_size(n);
    w->text = text;
    w->mask = size - 1;
    w->slots = sm_calloc(size, sizeof *w->slots);
    return w->slots != NULL;
}

static uint64_t pair_hash(int32_t left, int32_t right) {
    return mix((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * HASH_BASE >> 32;
}

static const struct pair *find_pair(const struct sm_tokenizer *t, int32_t left, int32_t right) {
    const struct pair *p;
    for (size_t i = pair_hash(left, right) & t->pair_mask; (p = &t->pairs[i])->left >= 0;
         i = (i + 1) & t->pair_mask)
        if (p->left == left && p->right == right) return p;
    return NULL;
}

static int32_t find_letter(const struct sm_tokenizer *t, uint32_t c) {
    size_t i = mix(c) & t->letter_mask;
    while (t->letters[i].id >= 0 && t->letters[i].c != c) i = (i + 1) & t->letter_mask;
    return t->letters[i].id;
}

/* ---- special tokens -------------------------------------------------------------------------- */

/* The child of a node, or 0. */
static uint32_t trie_child(const struct trie *t, uint32_t node, uint8_t byte) {
    uint32_t key = node << 8 | byte;
    for (size_t i = mix(key) & t->mask; t->edges[i] != 0; i = (i + 1) & t->mask)
        if (t->edges[i] >> 32 == key) return (uint32_t)t->edges[i];
    return 0;
}

static uint32_t trie_step(const struct trie *t, uint32_t node, uint8_t byte) {
    uint32_t child;
    while ((child = trie_child(t, node, byte)) == 0 && node != 0) node = t->fail[node];
    return child;
}

static void trie_free(struct trie *t) {
    sm_free(t->fail);
    sm_free(t->out);
    sm_free(t->edges);
}

/* ---- loading --------------------------------------------------------------------------------- */

struct build {
    const struct sm_gguf *g;
    const char *path;
    struct sm_tokenizer *t;
    smallm_error *err;
    struct sm_gguf_array tokens, scores, merges;
    struct words raw;       /* the file's texts of all tokens */
    struct pair *list;      /* [n_list] the merges, on their way to the table */
    size_t n_list, cap_list;
    char shown[2][64];      /* file content for messages */
};

static struct sm_str token_text(const struct build *b, int32_t id) {
    return sm_gguf_array_string(&b->tokens, (size_t)id);
}

static const char *show(struct build *b, int i, struct sm_str s) {
    return sm_printable(b->shown[i], sizeof b->shown[i], s.s, s.n);
}

static const char *show_token(struct build *b, int i, int32_t id) {
    return show(b, i, token_text(b, id));
}

static int out_of_memory(struct build *b, const char *what) {
    return sm_fail(b->err, SMALLM_E_MEMORY, "%s: out of memory for the tokenizer's %s", b->path,
                   what);
}

static int collides(struct build *b, const char *what) {
    return sm_fail(b->err, SMALLM_E_CORRUPT,
                   "%s: the tokenizer's %s are made to collide: more than %d share a place",
                   b->path, what, MAX_PROBES);
}

/* An array of one element per token; n == 0 where the key is missing. */
static int get_array(struct build *b, const char *key, bool (*fits)(enum sm_gguf_kind),
                     const char *kind, struct sm_gguf_array *out) {
    int status = sm_gguf_get_array(b->g, key, out, b->err);
    if (status != SMALLM_OK) return status;
    if (out->n > 0 && !fits(out->kind))
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is an array of %s, not of %s", b->path,
                       key, sm_gguf_kind_name(out->kind), kind);
    return SMALLM_OK;
}

static bool is_string(enum sm_gguf_kind kind) { return kind == SM_GGUF_STRING; }
static bool is_float(enum sm_gguf_kind kind) {
    return kind == SM_GGUF_F32 || kind == SM_GGUF_F64;
}
static bool is_int(enum sm_gguf_kind kind) {
    return kind != SM_GGUF_STRING && kind != SM_GGUF_ARRAY && !is_float(kind);
}

static int check_count(struct build *b, const char *key, size_t n) {
    if (n == 0 || n == b->tokens.n) return SMALLM_OK;
    return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s has %zu entries for %zu tokens", b->path, key,
                   n, b->tokens.n);
}

static int missing(struct build *b, const char *key) {
    return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is missing or empty", b->path, key);
}

static int load_model(struct build *b) {
    struct sm_str model, pre = {"default", 7};
    bool found;
    int status = sm_gguf_get_string(b->g, "tokenizer.ggml.model", &model, &found, b->err);
    if (status != SMALLM_OK) return status;
    if (!found) return missing(b, "tokenizer.ggml.model");
    b->t->sentencepiece = model.n == 5 && memcmp(model.s, "llama", 5) == 0;
    if (b->t->sentencepiece) return SMALLM_OK;
    if (model.n != 4 || memcmp(model.s, "gpt2", 4) != 0)
        return sm_fail(b->err, SMALLM_E_UNSUPPORTED,
                       "%s: tokenizer.ggml.model is \"%s\"; known are gpt2, llama", b->path,
                       show(b, 0, model));
    status = sm_gguf_get_string(b->g, "tokenizer.ggml.pre", &pre, &found, b->err);
    if (status != SMALLM_OK) return status;
    b->t->pretok = sm_pretok_find(pre.s, pre.n);
    if (b->t->pretok == NULL) {
        char names[256];
        return sm_fail(b->err, SMALLM_E_UNSUPPORTED,
                       "%s: tokenizer.ggml.pre is \"%s\"; known are %s", b->path, show(b, 0, pre),
                       sm_pretok_names(names, sizeof names));
    }
    return SMALLM_OK;
}

/* Tokens and their kinds; every text is in the raw table afterwards. */
static int load_tokens(struct build *b) {
    struct sm_tokenizer *t = b->t;
    struct sm_gguf_array types;
    int status = get_array(b, "tokenizer.ggml.tokens", is_string, "strings", &b->tokens);
    if (status != SMALLM_OK) return status;
    if (b->tokens.n == 0) return missing(b, "tokenizer.ggml.tokens");
    if (b->tokens.n > INT32_MAX / 4)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %zu tokens; at most %d", b->path, b->tokens.n,
                       INT32_MAX / 4);
    t->n_vocab = (int32_t)b->tokens.n;
    status = get_array(b, "tokenizer.ggml.token_type", is_int, "integers", &types);
    if (status == SMALLM_OK) status = check_count(b, "tokenizer.ggml.token_type", types.n);
    if (status != SMALLM_OK) return status;
    if (types.n == 0 && t->sentencepiece) return missing(b, "tokenizer.ggml.token_type");

    t->kinds = sm_alloc(b->tokens.n);
    t->ends = sm_calloc(b->tokens.n, sizeof *t->ends);
    if (t->kinds == NULL || t->ends == NULL || !words_init(&b->raw, b->tokens.data, b->tokens.n))
        return out_of_memory(b, "tokens");
    for (int32_t id = 0; id < t->n_vocab; id++) {
        struct sm_str s = token_text(b, id);
        int64_t kind = types.n > 0 ? sm_gguf_array_int(&types, (size_t)id) : KIND_NORMAL;
        if (kind < KIND_UNDEFINED || kind > KIND_BYTE)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: tokenizer.ggml.token_type of token %d is %lld, not 0 .. %d",
                           b->path, (int)id, (long long)kind, KIND_BYTE);
        t->kinds[id] = (uint8_t)kind;
        size_t bad = utf8_valid(s.s, s.n);
        if (bad < s.n)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: token %d (\"%s\") is not UTF-8 at its byte %zu", b->path, (int)id,
                           show_token(b, 0, id), bad);
        if (s.n == 0) continue;
        int32_t same = words_get(&b->raw, s);
        if (same >= 0)
            return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: tokens %d and %d are both \"%s\"",
                           b->path, (int)same, (int)id, show_token(b, 0, id));
        if (!words_add(&b->raw, id)) return collides(b, "tokens");
    }
    return SMALLM_OK;
}

static int load_scores(struct build *b) {
    int status = get_array(b, "tokenizer.ggml.scores", is_float, "floats", &b->scores);
    if (status == SMALLM_OK) status = check_count(b, "tokenizer.ggml.scores", b->scores.n);
    if (status != SMALLM_OK) return status;
    if (b->scores.n == 0 && b->t->sentencepiece) return missing(b, "tokenizer.ggml.scores");
    for (size_t i = 0; i < b->scores.n; i++) {
        double score = sm_gguf_array_float(&b->scores, i);
        if (!isfinite((float)score))
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: tokenizer.ggml.scores of token %zu is %g, not a finite number",
                           b->path, i, score);
    }
    return SMALLM_OK;
}

/* Byte-level BPE writes a byte as a character: itself where it prints in Latin-1, else U+0100 on in
 * the order of the bytes. */
#define N_SYMBOLS 0x144
static void byte_symbols(int16_t byte_of[N_SYMBOLS]) {
    int next = 0x100;
    for (int i = 0; i < N_SYMBOLS; i++) byte_of[i] = -1;
    for (int byte = 0; byte < 256; byte++) {
        bool prints = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
        byte_of[prints ? byte : next++] = (int16_t)byte;
    }
}

/* Decodes a byte-level text to out; 0 where a character stands for no byte (n > 0). */
static size_t decode_symbols(const int16_t byte_of[N_SYMBOLS], struct sm_str s, char *out) {
    size_t written = 0, length;
    for (size_t i = 0; i < s.n; i += length) {
        uint32_t c = sm_utf8_decode((const uint8_t *)s.s + i, &length);
        if (c >= N_SYMBOLS || byte_of[c] < 0) return 0;
        out[written++] = (char)byte_of[c];
    }
    return written;
}

/* Copies a text with spaces for U+2581; out holds n bytes. */
static size_t plain_spaces(const char *s, size_t n, char *out) {
    size_t written = 0;
    for (size_t i = 0; i < n;) {
        if (n - i >= 3 && memcmp(s + i, "\xE2\x96\x81", 3) == 0) {
            out[written++] = ' ';
            i += 3;
        } else {
            out[written++] = s[i++];
        }
    }
    return written;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* <0xNN> as a byte, or -1. */
static int byte_token(struct sm_str s) {
    if (s.n != 6 || memcmp(s.s, "<0x", 3) != 0 || s.s[5] != '>') return -1;
    int high = hex_digit(s.s[3]), low = hex_digit(s.s[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* The bytes of every token, and the tokens of single bytes. */
static int load_pieces(struct build *b) {
    struct sm_tokenizer *t = b->t;
    int16_t byte_of[N_SYMBOLS];
    byte_symbols(byte_of);
    size_t total = 0;
    for (int32_t id = 0; id < t->n_vocab; id++) total += token_text(b, id).n; /* all in memory */
    size_t size;
    if (!sm_mul((size_t)t->n_vocab, sizeof *t->pieces, &size)) return out_of_memory(b, "tokens");
    t->pieces = sm_alloc(size);
    t->blob = sm_alloc(total);
    if (t->pieces == NULL || t->blob == NULL) return out_of_memory(b, "tokens");
    for (size_t i = 0; i < 256; i++) t->byte_ids[i] = -1;
    char *at = t->blob;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        struct sm_str s = token_text(b, id);
        enum kind kind = t->kinds[id];
        size_t n;
        if (t->sentencepiece) {
            n = plain_spaces(s.s, s.n, at);
            if (kind == KIND_BYTE) {
                int byte = byte_token(s);
                if (byte < 0)
                    return sm_fail(b->err, SMALLM_E_CORRUPT,
                                   "%s: token %d is of type byte, but its text is \"%s\", not like "
                                   "<0x0A>", b->path, (int)id, show_token(b, 0, id));
                n = 1;
                *at = (char)byte;
                if (t->byte_ids[byte] < 0) t->byte_ids[byte] = id;
            }
        } else {
            bool plain = kind == KIND_CONTROL || kind == KIND_USER || kind == KIND_UNKNOWN;
            n = plain ? 0 : decode_symbols(byte_of, s, at);
            if (n == 1) t->byte_ids[(uint8_t)*at] = id;
            if (n == 0) memcpy(at, s.s, n = s.n);
        }
        t->pieces[id] = (struct sm_str){at, n};
        at += n;
    }
    return SMALLM_OK;
}

static int add_merge(struct build *b, int32_t left, int32_t right, uint32_t rank, int32_t id) {
    if (!sm_grow(&b->list, &b->cap_list, b->n_list + 1, sizeof *b->list))
        return out_of_memory(b, "merges");
    b->list[b->n_list++] = (struct pair){left, right, rank, id};
    return SMALLM_OK;
}

static int load_merges(struct build *b) {
    const char *key = "tokenizer.ggml.merges";
    int status = get_array(b, key, is_string, "strings", &b->merges);
    if (status != SMALLM_OK) return status;
    if (b->merges.n == 0) return missing(b, key);
    if (b->merges.n >= NONE)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s has %zu entries", b->path, key,
                       b->merges.n);
    if (!sm_grow(&b->list, &b->cap_list, b->merges.n, sizeof *b->list))
        return out_of_memory(b, "merges");
    for (size_t i = 0; i < b->merges.n && status == SMALLM_OK; i++) {
        struct sm_str s = sm_gguf_array_string(&b->merges, i);
        const char *space = s.n > 2 ? memchr(s.s + 1, ' ', s.n - 2) : NULL;
        if (space == NULL)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: %s, entry %zu is \"%s\", not two tokens with a space between",
                           b->path, key, i, show(b, 0, s));
        struct sm_str x = {s.s, (size_t)(space - s.s)}, y = {space + 1, s.n - x.n - 1};
        uint64_t hash = hash_more(0, x.s, x.n);
        int32_t left = words_find(&b->raw, hash, x, nothing);
        int32_t right = words_get(&b->raw, y);
        int32_t both = words_find(&b->raw, hash_more(hash, y.s, y.n), x, y);
        if (left < 0 || right < 0 || both < 0)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: %s, entry %zu is \"%s\", but %s is not a token", b->path, key, i,
                           show(b, 0, s), left < 0    ? "its first part"
                                          : right < 0 ? "its second part"
                                                      : "what it makes");
        status = add_merge(b, left, right, (uint32_t)i, both);
    }
    return status;
}

/* Scores as ranks: a higher score gives a lower rank, equal ones the same, none gives NONE. */
static uint32_t score_rank(double score) {
    float f = (float)score + 0.0f; /* no negative zero */
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (bits & 0x80000000u) ? bits : ~(bits | 0x80000000u);
}

/* SentencePiece: every way to make a normal token of two others.  Where a token's own characters
 * are no tokens, no merge reaches it; SentencePiece's trainer makes no such files. */
static int load_splits(struct build *b) {
    struct sm_tokenizer *t = b->t;
    uint64_t inverse = HASH_BASE; /* of the base, by Newton's iteration */
    for (int i = 0; i < 6; i++) inverse *= 2 - HASH_BASE * inverse;
    if (!sm_grow(&b->list, &b->cap_list, 2 * b->tokens.n, sizeof *b->list)) /* the usual number */
        return out_of_memory(b, "merges");
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (t->kinds[id] != KIND_NORMAL) continue;
        struct sm_str s = token_text(b, id);
        uint32_t rank = score_rank(sm_gguf_array_float(&b->scores, (size_t)id));
        uint64_t whole = hash_more(0, s.s, s.n), first = 0, power = 1; /* base^(bytes to come) */
        for (size_t i = 0; i < s.n; i++) power *= HASH_BASE;
        for (size_t i = 0, n; i < s.n; i += n) {
            if (i > 0) {
                struct sm_str x = {s.s, i}, y = {s.s + i, s.n - i};
                int32_t left = words_find(&b->raw, first, x, nothing), right = -1;
                if (left >= 0) right = words_find(&b->raw, whole - first * power, y, nothing);
                if (right >= 0 && t->kinds[left] == KIND_NORMAL && t->kinds[right] == KIND_NORMAL) {
                    int status = add_merge(b, left, right, rank, id);
                    if (status != SMALLM_OK) return status;
                }
            }
            n = sm_utf8_length((uint8_t)s.s[i]);
            first = hash_more(first, s.s + i, n);
            for (size_t k = 0; k < n; k++) power *= inverse;
        }
    }
    return SMALLM_OK;
}

static int build_pairs(struct build *b) {
    struct sm_tokenizer *t = b->t;
    size_t size = table_size(b->n_list);
    t->pairs = sm_calloc(size, sizeof *t->pairs);
    if (t->pairs == NULL) return out_of_memory(b, "merges");
    for (size_t i = 0; i < size; i++) t->pairs[i].left = -1;
    t->pair_mask = size - 1;
    for (size_t k = 0; k < b->n_list; k++) {
        const struct pair *p = &b->list[k];
        size_t i = pair_hash(p->left, p->right) & t->pair_mask;
        for (int probes = 0; t->pairs[i].left >= 0; i = (i + 1) & t->pair_mask) {
            if (t->pairs[i].left == p->left && t->pairs[i].right == p->right)
                return sm_fail(b->err, SMALLM_E_CORRUPT,
                               "%s: tokenizer.ggml.merges, entries %u and %u both merge \"%s\" and "
                               "\"%s\"", b->path, (unsigned)t->pairs[i].rank, (unsigned)p->rank,
                               show_token(b, 0, p->left), show_token(b, 1, p->right));
            if (++probes == MAX_PROBES) return collides(b, "merges");
        }
        t->pairs[i] = *p;
    }
    return SMALLM_OK;
}

/* SentencePiece: tokens of one character, and whether words can be taken one by one. */
static int load_letters(struct build *b) {
    struct sm_tokenizer *t = b->t;
    size_t count = 0;
    t->space_starts_word = true;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t id = 0; id < t->n_vocab; id++) {
            struct sm_str s = t->pieces[id];
            if (t->kinds[id] != KIND_NORMAL || s.n == 0) continue;
            for (size_t i = 1; i < s.n; i++)
                if (s.s[i] == ' ' && s.s[i - 1] != ' ') t->space_starts_word = false;
            if (s.n != sm_utf8_length((uint8_t)s.s[0])) continue;
            /* A token that is a literal space is never made: U+2581 stands for it. */
            if (s.s[0] == ' ' && token_text(b, id).n == 1) continue;
            if (pass == 0) {
                count++;
                continue;
            }
            size_t length;
            uint32_t c = sm_utf8_decode((const uint8_t *)s.s, &length);
            size_t i = mix(c) & t->letter_mask;
            while (t->letters[i].id >= 0) i = (i + 1) & t->letter_mask; /* at most 0x110000 */
            t->letters[i] = (struct letter){c, id};
        }
        if (pass == 1) break;
        size_t size = table_size(count);
        t->letters = sm_calloc(size, sizeof *t->letters);
        if (t->letters == NULL) return out_of_memory(b, "tokens");
        for (size_t i = 0; i < size; i++) t->letters[i].id = -1;
        t->letter_mask = size - 1;
    }
    return SMALLM_OK;
}

/* Byte-level: pieces of normal tokens, where the pre-tokenizer's row looks for them. */
static int load_whole(struct build *b) {
    struct sm_tokenizer *t = b->t;
    if (!sm_pretok_whole_pieces(t->pretok)) return SMALLM_OK;
    if (!words_init(&t->whole, t->pieces, (size_t)t->n_vocab)) return out_of_memory(b, "tokens");
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (t->kinds[id] != KIND_NORMAL || t->pieces[id].n == 0) continue;
        if (words_get(&t->whole, t->pieces[id]) >= 0) continue;
        if (!words_add(&t->whole, id)) return collides(b, "tokens");
    }
    return SMALLM_OK;
}

/* A key that names a token.  Where it is missing *id stays as it is. */
static int load_id(struct build *b, const char *key, int32_t *id) {
    int64_t value;
    bool found;
    int status = sm_gguf_get_int(b->g, key, &value, &found, b->err);
    if (status != SMALLM_OK || !found) return status;
    if (value < 0 || value >= b->t->n_vocab)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is %lld, not a token 0 .. %d", b->path,
                       key, (long long)value, (int)b->t->n_vocab - 1);
    *id = (int32_t)value;
    return SMALLM_OK;
}

static int32_t of_kind(const struct sm_tokenizer *t, int32_t id, enum kind kind) {
    return id < t->n_vocab && t->kinds[id] == kind ? id : -1;
}

/* A flag that needs a token.  Where the file does not say, `set` and the token decide. */
static int load_flag(struct build *b, const char *key, const char *id_key, int32_t id, bool set,
                     bool *out) {
    bool found;
    *out = set && id >= 0;
    int status = sm_gguf_get_bool(b->g, key, out, &found, b->err);
    if (status != SMALLM_OK) return status;
    if (*out && id < 0)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is true, but %s is missing", b->path, key,
                       id_key);
    return SMALLM_OK;
}

/* Texts that end a turn or a text in the models we know; the first found is the end of a turn. */
static const char *const end_texts[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|eom_id|>",
    "<|endoftext|>", "<|end_of_text|>", "<EOT>", "<｜end▁of▁sentence｜>", "</s>",
};

static int load_special(struct build *b) {
    struct sm_tokenizer *t = b->t;
    int32_t eom = -1;
    t->bos = t->sentencepiece ? of_kind(t, 1, KIND_CONTROL) : -1;
    t->eos = t->sentencepiece ? of_kind(t, 2, KIND_CONTROL) : -1;
    t->unknown = t->sentencepiece ? of_kind(t, 0, KIND_UNKNOWN) : -1;
    t->eot = -1;
    int status = load_id(b, "tokenizer.ggml.bos_token_id", &t->bos);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eos_token_id", &t->eos);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.unknown_token_id", &t->unknown);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eot_token_id", &t->eot);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eom_token_id", &eom);
    if (status != SMALLM_OK) return status;
    for (size_t i = 0; i < SM_COUNT(end_texts); i++) {
        struct sm_str text = {end_texts[i], strlen(end_texts[i])};
        int32_t id = words_get(&b->raw, text);
        if (id < 0 || t->kinds[id] != KIND_CONTROL) continue;
        t->ends[id] = true;
        if (t->eot < 0) t->eot = id;
    }
    if (t->eos >= 0) t->ends[t->eos] = true;
    if (t->eot >= 0) t->ends[t->eot] = true;
    if (eom >= 0) t->ends[eom] = true;

    bool add_bos = t->sentencepiece || sm_pretok_add_bos(t->pretok), found;
    status = load_flag(b, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", t->bos,
                       add_bos, &t->add_bos);
    if (status == SMALLM_OK)
        status = load_flag(b, "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", t->eos,
                           false, &t->add_eos);
    if (status != SMALLM_OK || !t->sentencepiece) return status;
    t->add_space = true;
    status = sm_gguf_get_bool(b->g, "tokenizer.ggml.add_space_prefix", &t->add_space, &found,
                              b->err);
    if (status != SMALLM_OK) return status;
    int n_missing = 0;
    for (size_t i = 0; i < 256; i++) n_missing += t->byte_ids[i] < 0;
    if (n_missing > 0 && t->unknown < 0)
        return sm_fail(b->err, SMALLM_E_CORRUPT,
                       "%s: %d of the 256 byte tokens (like <0x0A>) are missing, and "
                       "tokenizer.ggml.unknown_token_id is, too", b->path, n_missing);
    return SMALLM_OK;
}

/* Control tokens of one byte are not looked for: a letter of a text is no command, and the space
 * that SentencePiece adds after a control token could make more ids than the text has bytes. */
static bool is_sought(const struct sm_tokenizer *t, int32_t id, enum kind kind) {
    return t->kinds[id] == kind && t->pieces[id].n > (kind == KIND_CONTROL);
}

/* The automaton of the tokens of a kind, built level by level, so that nodes are in the order of
 * their depth and a node's failure is known before its children are made. */
static int build_trie(struct build *b, struct trie *trie, enum kind kind) {
    const struct sm_tokenizer *t = b->t;
    struct active { /* a token that is not all in the trie yet */
        int32_t id;
        uint32_t node;
    } *active = NULL;
    size_t n_bytes = 0, n_active = 0;
    int status = SMALLM_OK;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (!is_sought(t, id, kind)) continue;
        n_bytes += t->pieces[id].n;
        n_active++;
    }
    if (n_bytes > MAX_SPECIAL_BYTES)
        return sm_fail(b->err, SMALLM_E_CORRUPT,
                       "%s: control or user-defined tokens have %zu bytes of text; at most %u",
                       b->path, n_bytes, MAX_SPECIAL_BYTES);
    if (n_active == 0) return SMALLM_OK;

    size_t size = table_size(n_bytes);
    trie->mask = size - 1;
    trie->edges = sm_calloc(size, sizeof *trie->edges);
    trie->fail = sm_calloc(n_bytes + 1, sizeof *trie->fail);
    trie->out = sm_calloc(n_bytes + 1, sizeof *trie->out);
    active = sm_calloc(n_active, sizeof *active);
    if (trie->edges == NULL || trie->fail == NULL || trie->out == NULL || active == NULL) {
        status = out_of_memory(b, "special tokens");
        goto done;
    }
    n_active = 0;
    for (int32_t id = 0; id < t->n_vocab; id++)
        if (is_sought(t, id, kind)) active[n_active++] = (struct active){id, 0};
    trie->n_nodes = 1;
    trie->out[0] = -1;
    for (size_t depth = 0; n_active > 0; depth++) {
        size_t kept = 0;
        for (size_t k = 0; k < n_active; k++) {
            struct active a = active[k];
            struct sm_str s = t->pieces[a.id];
            uint8_t byte = (uint8_t)s.s[s.n - 1 - depth];
            uint32_t child = trie_child(trie, a.node, byte);
            if (child == 0) {
                uint32_t key = a.node << 8 | byte;
                child = (uint32_t)trie->n_nodes++;
                trie->fail[child] = depth == 0 ? 0 : trie_step(trie, trie->fail[a.node], byte);
                trie->out[child] = -1;
                size_t i = mix(key) & trie->mask;
                for (int probes = 0; trie->edges[i] != 0; i = (i + 1) & trie->mask)
                    if (++probes == MAX_PROBES) {
                        status = collides(b, "special tokens");
                        goto done;
                    }
                trie->edges[i] = (uint64_t)key << 32 | child;
            }
            if (depth + 1 < s.n) active[kept++] = (struct active){a.id, child};
            else if (trie->out[child] < 0) trie->out[child] = a.id;
        }
        n_active = kept;
    }
    for (size_t i = 1; i < trie->n_nodes; i++)
        if (trie->out[i] < 0) trie->out[i] = trie->out[trie->fail[i]];
done:
    sm_free(active);
    return status;
}

int sm_tokenizer_new(const struct sm_gguf *g, struct sm_tokenizer **out, smallm_error *err) {
    struct build b = {.g = g, .path = sm_gguf_path(g), .err = err};
    struct sm_tokenizer *t = b.t = sm_calloc(1, sizeof *t);
    if (t == NULL) return out_of_memory(&b, "tables");
    int status = load_model(&b);
    if (status == SMALLM_OK) status = load_tokens(&b);
    if (status == SMALLM_OK) status = load_scores(&b);
    if (status == SMALLM_OK) status = load_pieces(&b);
    if (status == SMALLM_OK) status = t->sentencepiece ? load_splits(&b) : load_merges(&b);
    if (status == SMALLM_OK) status = build_pairs(&b);
    if (status == SMALLM_OK) status = t->sentencepiece ? load_letters(&b) : load_whole(&b);
    if (status == SMALLM_OK) status = load_special(&b);
    if (status == SMALLM_OK) status = build_trie(&b, &t->control, KIND_CONTROL);
    if (status == SMALLM_OK) status = build_trie(&b, &t->user, KIND_USER);
    sm_free(b.raw.slots);
    sm_free(b.list);
    if (status != SMALLM_OK) {
        sm_tokenizer_free(t);
        return status;
    }
    *out = t;
    return SMALLM_OK;
}

void sm_tokenizer_free(struct sm_tokenizer *t) {
    if (t == NULL) return;
    sm_free(t->pieces);
    sm_free(t->blob);
    sm_free(t->kinds);
    sm_free(t->ends);
    sm_free(t->pairs);
    sm_free(t->letters);
    sm_free(t->whole.slots);
    trie_free(&t->control);
    trie_free(&t->user);
    sm_free(t);
}

int32_t sm_tokenizer_n_vocab(const struct sm_tokenizer *t) { return t->n_vocab; }

bool sm_tokenizer_is_eog(const struct sm_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_vocab && t->ends[id];
}

bool sm_tokenizer_is_control(const struct sm_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_vocab && t->kinds[id] == KIND_CONTROL;
}

void sm_tokenizer_get_info(const struct sm_tokenizer *t, struct sm_tokenizer_info *out) {
    *out = (struct sm_tokenizer_info){
        .model = t->sentencepiece ? "llama" : "gpt2",
        .pre = t->sentencepiece ? "" : sm_pretok_name(t->pretok),
        .bos = t->bos,
        .eos = t->eos,
        .eot = t->eot,
        .add_bos = t->add_bos,
        .add_eos = t->add_eos,
    };
}

/* ---- encoding -------------------------------------------------------------------------------- */

struct symbol {
    int32_t id;          /* -1: not a token */
    uint32_t prev, next; /* NONE, n: none */
    uint32_t rank;       /* of the merge with the next; NONE: there is none, or this was merged */
    int32_t into;        /* what that merge makes */
};

struct match {
    size_t at;
    int32_t id;
};

struct matches {
    struct match *list; /* [n] from the end of the text to its start */
    size_t n, cap;
};

struct work {
    const struct sm_tokenizer *t;
    smallm_error *err;
    int32_t *ids; /* [capacity] */
    size_t capacity, n_ids;
    bool unknown_before; /* the last id was the unknown token, in this fragment */
    struct symbol *symbols;
    size_t cap_symbols;
    uint64_t *heap; /* rank << 32 | position, the least on top */
    size_t n_heap, cap_heap;
    struct matches control, user;
};

static int no_room(struct work *w, size_t n) {
    return sm_fail(w->err, SMALLM_E_MEMORY, "out of memory for tokenizing %zu bytes", n);
}

static void emit(struct work *w, int32_t id) {
    if (w->n_ids < w->capacity) w->ids[w->n_ids] = id;
    w->n_ids++;
}

static void sift_down(uint64_t *heap, size_t n, size_t i) {
    uint64_t key = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

static void push(struct work *w, uint64_t key) {
    size_t i = w->n_heap++;
    while (i > 0 && w->heap[(i - 1) / 2] > key) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = key;
}

/* Looks up what symbol i can become together with the next one. */
static bool find_merge(const struct work *w, uint32_t i, size_t n) {
    struct symbol *s = &w->symbols[i];
    s->rank = NONE;
    if (s->next >= n || s->id < 0 || w->symbols[s->next].id < 0) return false;
    const struct pair *p = find_pair(w->t, s->id, w->symbols[s->next].id);
    if (p == NULL) return false;
    s->rank = p->rank;
    s->into = p->id;
    return true;
}

static bool reserve(struct work *w, size_t n) {
    return sm_grow(&w->symbols, &w->cap_symbols, n, sizeof *w->symbols) &&
           sm_grow(&w->heap, &w->cap_heap, 2 * n, sizeof *w->heap);
}

/* Merges symbols[0..n), whose ids are set, and links what remains; symbol 0 stays.  The heap has an
 * entry for every merge that is possible and some that no longer are: at most n - 1 at the start,
 * and each merge takes one and adds two. */
static void merge(struct work *w, size_t n) {
    struct symbol *symbols = w->symbols;
    for (size_t i = 0; i < n; i++) {
        symbols[i].prev = i > 0 ? (uint32_t)i - 1 : NONE;
        symbols[i].next = (uint32_t)i + 1;
    }
    w->n_heap = 0;
    for (size_t i = 0; i < n; i++)
        if (find_merge(w, (uint32_t)i, n))
            w->heap[w->n_heap++] = (uint64_t)symbols[i].rank << 32 | i;
    for (size_t i = w->n_heap / 2; i-- > 0;) sift_down(w->heap, w->n_heap, i);

    while (w->n_heap > 0) {
        uint32_t at = (uint32_t)w->heap[0], rank = (uint32_t)(w->heap[0] >> 32);
        w->heap[0] = w->heap[--w->n_heap];
        if (w->n_heap > 0) sift_down(w->heap, w->n_heap, 0);
        struct symbol *s = &symbols[at];
        if (s->rank != rank) continue; /* one of the two was merged meanwhile */
        struct symbol *gone = &symbols[s->next];
        gone->rank = NONE;
        s->id = s->into;
        s->next = gone->next;
        if (s->next < n) symbols[s->next].prev = at;
        if (find_merge(w, at, n)) push(w, (uint64_t)s->rank << 32 | at);
        if (s->prev != NONE && find_merge(w, s->prev, n))
            push(w, (uint64_t)symbols[s->prev].rank << 32 | s->prev);
    }
}

/* One piece of byte-level BPE.  A byte that is no token gives no id: real vocabularies lack some
 * control characters, and the unknown token, where there is one, ends texts. */
static int encode_piece(void *ctx, const char *s, size_t n) {
    struct work *w = ctx;
    const struct sm_tokenizer *t = w->t;
    if (t->whole.slots != NULL) {
        int32_t id = words_get(&t->whole, (struct sm_str){s, n});
        if (id >= 0) {
            emit(w, id);
            return SMALLM_OK;
        }
    }
    if (!reserve(w, n)) return no_room(w, n);
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->byte_ids[(uint8_t)s[i]];
        if (id >= 0) w->symbols[count++].id = id;
    }
    merge(w, count);
    for (size_t i = 0; i < count; i = w->symbols[i].next) emit(w, w->symbols[i].id);
    return SMALLM_OK;
}

/* A character that is no token: its bytes, or the unknown token once for a run of them. */
static void emit_bytes(struct work *w, const char *s, size_t n) {
    const struct sm_tokenizer *t = w->t;
    bool bytes = true;
    for (size_t i = 0; i < n; i++) bytes = bytes && t->byte_ids[(uint8_t)s[i]] >= 0;
    if (bytes) {
        for (size_t i = 0; i < n; i++) emit(w, t->byte_ids[(uint8_t)s[i]]);
    } else if (!w->unknown_before) {
        emit(w, t->unknown);
    }
    w->unknown_before = !bytes;
}

/* SentencePiece, a text that no merge crosses the ends of. */
static int encode_word(struct work *w, const char *s, size_t n) {
    const struct sm_tokenizer *t = w->t;
    if (!reserve(w, n)) return no_room(w, n);
    size_t count = 0, length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t c = sm_utf8_decode((const uint8_t *)s + i, &length);
        w->symbols[count++].id = find_letter(t, c);
    }
    merge(w, count);
    for (size_t i = 0; i < count; i = w->symbols[i].next) {
        int32_t id = w->symbols[i].id;
        length = id >= 0 ? t->pieces[id].n : sm_utf8_length((uint8_t)*s);
        if (id < 0) {
            emit_bytes(w, s, length);
        } else {
            emit(w, id);
            w->unknown_before = false;
        }
        s += length;
    }
    return SMALLM_OK;
}

/* A text without special tokens. */
static int encode_text(struct work *w, const char *s, size_t n) {
    if (!w->t->sentencepiece) return sm_pretok_split(w->t->pretok, s, n, encode_piece, w);
    size_t start = 0;
    for (size_t i = 1; i < n && w->t->space_starts_word; i++) {
        if (s[i] != ' ' || s[i - 1] == ' ') continue;
        int status = encode_word(w, s + start, i - start);
        if (status != SMALLM_OK) return status;
        start = i;
    }
    return start < n ? encode_word(w, s + start, n - start) : SMALLM_OK;
}

static int find_special(struct work *w, const struct trie *trie, const char *s, size_t n,
                        struct matches *m) {
    m->n = 0;
    if (trie->n_nodes == 0) return SMALLM_OK;
    uint32_t node = 0;
    for (size_t i = n; i-- > 0;) {
        node = trie_step(trie, node, (uint8_t)s[i]);
        if (trie->out[node] < 0) continue;
        if (!sm_grow(&m->list, &m->cap, m->n + 1, sizeof *m->list)) return no_room(w, n);
        m->list[m->n++] = (struct match){i, trie->out[node]};
    }
    return SMALLM_OK;
}

/* A text without control tokens.  In SentencePiece a space is put before it, which user-defined
 * tokens see, too; s[-1] may be overwritten for it. */
static int encode_fragment(struct work *w, char *s, size_t n) {
    const struct sm_tokenizer *t = w->t;
    if (n == 0) return SMALLM_OK;
    if (t->add_space) {
        *--s = ' ';
        n++;
    }
    w->unknown_before = false;
    int status = find_special(w, &t->user, s, n, &w->user);
    size_t from = 0;
    for (size_t k = w->user.n; k-- > 0 && status == SMALLM_OK;) {
        struct match m = w->user.list[k];
        if (m.at < from) continue;
        if (m.at > from) status = encode_text(w, s + from, m.at - from);
        emit(w, m.id);
        w->unknown_before = false;
        from = m.at + t->pieces[m.id].n;
    }
    if (status == SMALLM_OK && from < n) status = encode_text(w, s + from, n - from);
    return status;
}

int sm_tokenizer_encode(const struct sm_tokenizer *t, const char *text, size_t n_bytes,
                        uint32_t flags, int32_t *ids, size_t capacity, size_t *n_ids,
                        smallm_error *err) {
    struct work w = {.t = t, .err = err, .ids = ids, .capacity = capacity};
    char *copy = NULL;
    int status = SMALLM_OK;
    *n_ids = 0;
    if (n_bytes >= INT32_MAX)
        return sm_fail(err, SMALLM_E_ARGUMENT, "the text has %zu bytes; at most %d", n_bytes,
                       INT32_MAX - 1);
    size_t bad = utf8_valid(text, n_bytes);
    if (bad < n_bytes)
        return sm_fail(err, SMALLM_E_ARGUMENT, "the text is not valid UTF-8 at byte %zu (0x%02X)",
                       bad, (unsigned)(uint8_t)text[bad]);

    char *s = (char *)text; /* byte-level BPE never writes to it */
    size_t n = n_bytes, from = 0;
    if (t->sentencepiece) {
        copy = sm_alloc(n_bytes + 1);
        if (copy == NULL) {
            status = no_room(&w, n_bytes);
            goto done;
        }
        s = copy + 1;
        n = plain_spaces(text, n_bytes, s);
    }
    if ((flags & SMALLM_ADD_SPECIAL) && t->add_bos) emit(&w, t->bos);
    if (flags & SMALLM_PARSE_SPECIAL) status = find_special(&w, &t->control, s, n, &w.control);
    for (size_t k = w.control.n; k-- > 0 && status == SMALLM_OK;) {
        struct match m = w.control.list[k];
        if (m.at < from) continue;
        status = encode_fragment(&w, s + from, m.at - from);
        emit(&w, m.id);
        from = m.at + t->pieces[m.id].n;
    }
    if (status == SMALLM_OK) status = encode_fragment(&w, s + from, n - from);
    if ((flags & SMALLM_ADD_SPECIAL) && t->add_eos) emit(&w, t->eos);
    if (status == SMALLM_OK) *n_ids = w.n_ids;
done:
    sm_free(copy);
    sm_free(w.symbols);
    sm_free(w.heap);
    sm_free(w.control.list);
    sm_free(w.user.list);
    return status;
}

/* ---- decoding -------------------------------------------------------------------------------- */

struct sm_str sm_tokenizer_piece(const struct sm_tokenizer *t, int32_t id, bool first,
                                 uint32_t flags, char buf[4]) {
    (void)buf; /* bytes are pieces as all others: the tokenizer holds them */
    struct sm_str s = t->pieces[id];
    if (t->kinds[id] == KIND_CONTROL || t->kinds[id] == KIND_UNKNOWN)
        return (flags & SMALLM_SKIP_SPECIAL) ? nothing : s;
    if (first && t->add_space && s.n > 0 && s.s[0] == ' ') return (struct sm_str){s.s + 1, s.n - 1};
    return s;
}

int sm_tokenizer_decode(const struct sm_tokenizer *t, const int32_t *ids, size_t n_ids,
                        uint32_t flags, char *text, size_t capacity, size_t *n_bytes,
                        smallm_error *err) {
    size_t written = 0;
    bool first = true; /* after a control token, too: encoding adds a space there */
    *n_bytes = 0;
    for (size_t i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= t->n_vocab)
            return sm_fail(err, SMALLM_E_ARGUMENT, "token %zu is %d, not one of 0 .. %d", i,
                           (int)ids[i], (int)t->n_vocab - 1);
        char buf[4];
        struct sm_str s = sm_tokenizer_piece(t, ids[i], first, flags, buf);
        first = t->kinds[ids[i]] == KIND_CONTROL;
        if (written < capacity) memcpy(text + written, s.s, SM_MIN(s.n, capacity - written));
        written += s.n;
    }
    *n_bytes = written;
    return SMALLM_OK;
}
