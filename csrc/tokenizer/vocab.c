/* The vocabulary: tokens, their bytes, special ids.  See vocab.h. */
#include "vocab.h"

#include <math.h>


#define MAX_SPECIAL_BYTES (1u << 20) /* of all control or user-defined tokens together */

static const struct sm_str nothing = {"", 0};

/* ---- hash tables ---------------------------------------------------------------------------- */

size_t sm_hash_size(size_t n) {
    size_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

int32_t sm_words_find(const struct sm_words *w, uint64_t h, struct sm_str a, struct sm_str b) {
    h = sm_hash_mix(h);
    for (size_t i = h & w->mask; w->slots[i] != 0; i = (i + 1) & w->mask) {
        SM_WORK();
        if ((w->slots[i] ^ h) >> 32 != 0) continue;
        uint32_t id = (uint32_t)w->slots[i] - 1;
        const struct sm_str *text = &w->text[id];
        if (text->n == a.n + b.n && memcmp(text->s, a.s, a.n) == 0 &&
            memcmp(text->s + a.n, b.s, b.n) == 0)
            return (int32_t)id;
    }
    return -1;
}

int32_t sm_words_get(const struct sm_words *w, struct sm_str s) {
    return sm_words_find(w, sm_hash_more(0, s.s, s.n), s, nothing);
}

bool sm_words_add(struct sm_words *w, uint64_t h, int32_t id) {
    h = sm_hash_mix(h);
    size_t i = h & w->mask;
    for (int probes = 0; w->slots[i] != 0; i = (i + 1) & w->mask)
        if (++probes == SM_MAX_PROBES) return false;
    w->slots[i] = (h >> 32 << 32) | ((uint32_t)id + 1);
    return true;
}

bool sm_words_init(struct sm_words *w, const struct sm_str *text, size_t n) {
    size_t size = sm_hash_size(n);
    w->text = text;
    w->mask = size - 1;
    w->slots = sm_calloc(size, sizeof *w->slots);
    return w->slots != NULL;
}

/* ---- loading -------------------------------------------------------------------------------- */

const char *sm_vocab_show(struct sm_vocab_load *b, int i, struct sm_str s) {
    return sm_printable(b->shown[i], sizeof b->shown[i], s.s, s.n);
}

int sm_vocab_no_memory(struct sm_vocab_load *b, const char *what) {
    return sm_fail(b->err, SMALLM_E_MEMORY, "%s: out of memory for the tokenizer's %s", b->path,
                   what);
}

int sm_vocab_collides(struct sm_vocab_load *b, const char *what) {
    return sm_fail(b->err, SMALLM_E_CORRUPT,
                   "%s: the tokenizer's %s are made to collide: more than %d share a place",
                   b->path, what, SM_MAX_PROBES);
}

/* An array of one element per token; n == 0 where the key is missing. */
static int get_array(struct sm_vocab_load *b, const char *key, bool (*fits)(enum sm_gguf_kind),
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

int sm_vocab_strings(struct sm_vocab_load *b, const char *key, struct sm_gguf_array *out) {
    return get_array(b, key, is_string, "strings", out);
}

static int check_count(struct sm_vocab_load *b, const char *key, size_t n) {
    if (n == 0 || n == b->tokens.n) return SMALLM_OK;
    return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s has %zu entries for %zu tokens", b->path, key,
                   n, b->tokens.n);
}

int sm_vocab_missing(struct sm_vocab_load *b, const char *key) {
    return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is missing or empty", b->path, key);
}

/* Tokens and their kinds; every text is in the raw table afterwards. */
static int load_tokens(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    struct sm_gguf_array types;
    int status = sm_vocab_strings(b, "tokenizer.ggml.tokens", &b->tokens);
    if (status != SMALLM_OK) return status;
    if (b->tokens.n == 0) return sm_vocab_missing(b, "tokenizer.ggml.tokens");
    if (b->tokens.n > INT32_MAX / 4)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %zu tokens; at most %d", b->path, b->tokens.n,
                       INT32_MAX / 4);
    t->n_vocab = (int32_t)b->tokens.n;
    status = get_array(b, "tokenizer.ggml.token_type", is_int, "integers", &types);
    if (status == SMALLM_OK) status = check_count(b, "tokenizer.ggml.token_type", types.n);
    if (status != SMALLM_OK) return status;
    if (types.n == 0 && t->model->needs_types) return sm_vocab_missing(b, "tokenizer.ggml.token_type");

    t->kinds = sm_alloc(b->tokens.n);
    t->ends = sm_calloc(b->tokens.n, sizeof *t->ends);
    if (t->kinds == NULL || t->ends == NULL || !sm_words_init(&b->raw, b->tokens.data, b->tokens.n))
        return sm_vocab_no_memory(b, "tokens");
    uint64_t hashes[SM_HASHES_AHEAD];
    for (int32_t id = 0; id < t->n_vocab; id++) {
        int32_t ahead = id % SM_HASHES_AHEAD;
        for (int32_t k = 0; ahead == 0 && k < SM_HASHES_AHEAD && id + k < t->n_vocab; k++) {
            struct sm_str s = sm_vocab_text(b, id + k);
            hashes[k] = sm_hash_more(0, s.s, s.n);
            sm_words_prefetch(&b->raw, hashes[k]);
        }
        struct sm_str s = sm_vocab_text(b, id);
        int64_t kind = types.n > 0 ? sm_gguf_array_int(&types, (size_t)id) : SM_TOKEN_NORMAL;
        if (kind < SM_TOKEN_UNDEFINED || kind > SM_TOKEN_BYTE)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: tokenizer.ggml.token_type of token %d is %lld, not 0 .. %d",
                           b->path, (int)id, (long long)kind, SM_TOKEN_BYTE);
        t->kinds[id] = (uint8_t)kind;
        size_t bad = sm_utf8_valid(s.s, s.n);
        if (bad < s.n)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: token %d (\"%s\") is not UTF-8 at its byte %zu", b->path, (int)id,
                           sm_vocab_show(b, 0, sm_vocab_text(b, id)), bad);
        if (s.n == 0) continue;
        int32_t same = sm_words_find(&b->raw, hashes[ahead], s, nothing);
        if (same >= 0)
            return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: tokens %d and %d are both \"%s\"",
                           b->path, (int)same, (int)id, sm_vocab_show(b, 0, sm_vocab_text(b, id)));
        if (!sm_words_add(&b->raw, hashes[ahead], id)) return sm_vocab_collides(b, "tokens");
    }
    return SMALLM_OK;
}

static int load_scores(struct sm_vocab_load *b) {
    int status = get_array(b, "tokenizer.ggml.scores", is_float, "floats", &b->scores);
    if (status == SMALLM_OK) status = check_count(b, "tokenizer.ggml.scores", b->scores.n);
    if (status != SMALLM_OK) return status;
    if (b->scores.n == 0 && b->t->model->needs_scores) return sm_vocab_missing(b, "tokenizer.ggml.scores");
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

size_t sm_plain_spaces(const char *s, size_t n, char *out) {
    size_t written = 0;
    for (size_t i = 0; i < n;) {
        if (n - i >= 3 && memcmp(s + i, SM_SPACE_MARK, 3) == 0) {
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
static int load_pieces(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    int16_t byte_of[N_SYMBOLS];
    byte_symbols(byte_of);
    size_t total = 0;
    for (int32_t id = 0; id < t->n_vocab; id++) total += sm_vocab_text(b, id).n; /* all in memory */
    size_t size;
    if (!sm_mul((size_t)t->n_vocab, sizeof *t->pieces, &size)) return sm_vocab_no_memory(b, "tokens");
    t->pieces = sm_alloc(size);
    t->blob = sm_alloc(total);
    if (t->pieces == NULL || t->blob == NULL) return sm_vocab_no_memory(b, "tokens");
    for (size_t i = 0; i < 256; i++) t->byte_ids[i] = -1;
    t->space_starts_word = true;
    char *at = t->blob;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        struct sm_str s = sm_vocab_text(b, id);
        enum sm_token_kind kind = t->kinds[id];
        size_t n;
        if (t->model->marks_words) {
            bool word = kind == SM_TOKEN_NORMAL && s.n >= 3 && memcmp(s.s, SM_SPACE_MARK, 3) == 0;
            n = word ? s.n - 2 : s.n;
            memcpy(at, s.s + s.n - n, n);
            if (word) *at = ' ';
        } else if (t->model->marks_spaces) {
            n = sm_plain_spaces(s.s, s.n, at);
            if (kind == SM_TOKEN_BYTE) {
                int byte = byte_token(s);
                if (byte < 0)
                    return sm_fail(b->err, SMALLM_E_CORRUPT,
                                   "%s: token %d is of type byte, but its text is \"%s\", not like "
                                   "<0x0A>", b->path, (int)id, sm_vocab_show(b, 0, sm_vocab_text(b, id)));
                n = 1;
                *at = (char)byte;
                if (t->byte_ids[byte] < 0) t->byte_ids[byte] = id;
            }
        } else {
            bool plain = kind == SM_TOKEN_CONTROL || kind == SM_TOKEN_USER || kind == SM_TOKEN_UNKNOWN;
            n = plain ? 0 : decode_symbols(byte_of, s, at);
            if (n == 1) t->byte_ids[(uint8_t)*at] = id;
            if (n == 0) memcpy(at, s.s, n = s.n);
        }
        t->pieces[id] = (struct sm_str){at, n};
        for (size_t i = 1; i < n && kind == SM_TOKEN_NORMAL; i++)
            if (at[i] == ' ' && at[i - 1] != ' ') t->space_starts_word = false;
        at += n;
    }
    return SMALLM_OK;
}

/* A key that names a token.  Where it is missing *id stays as it is. */
static int load_id(struct sm_vocab_load *b, const char *key, int32_t *id) {
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

static int32_t of_kind(const struct sm_tokenizer *t, int32_t id, enum sm_token_kind kind) {
    return id >= 0 && id < t->n_vocab && t->kinds[id] == kind ? id : -1;
}

/* A flag that needs a token.  Where the file does not say, `set` and the token decide. */
static int load_flag(struct sm_vocab_load *b, const char *key, const char *id_key, int32_t id, bool set,
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

static int load_special(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    int32_t eom = -1;
    t->bos = of_kind(t, t->model->bos, SM_TOKEN_CONTROL);
    t->eos = of_kind(t, t->model->eos, SM_TOKEN_CONTROL);
    t->unknown = of_kind(t, t->model->unknown, SM_TOKEN_UNKNOWN);
    if (t->unknown < 0) t->unknown = of_kind(t, t->model->unknown, SM_TOKEN_CONTROL);
    t->eot = -1;
    /* WordPiece's texts begin with [CLS] and end in [SEP], under whichever key they are. */
    int status = SMALLM_OK;
    if (t->model->marks_words) status = load_id(b, "tokenizer.ggml.cls_token_id", &t->bos);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.bos_token_id", &t->bos);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eos_token_id", &t->eos);
    if (status == SMALLM_OK && t->model->marks_words)
        status = load_id(b, "tokenizer.ggml.seperator_token_id", &t->eos);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.unknown_token_id", &t->unknown);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eot_token_id", &t->eot);
    if (status == SMALLM_OK) status = load_id(b, "tokenizer.ggml.eom_token_id", &eom);
    if (status != SMALLM_OK) return status;
    for (size_t i = 0; i < SM_COUNT(end_texts); i++) {
        struct sm_str text = {end_texts[i], strlen(end_texts[i])};
        int32_t id = sm_words_get(&b->raw, text);
        if (id < 0 || t->kinds[id] != SM_TOKEN_CONTROL) continue;
        t->ends[id] = true;
        if (t->eot < 0) t->eot = id;
    }
    if (t->eos >= 0) t->ends[t->eos] = true;
    if (t->eot >= 0) t->ends[t->eot] = true;
    if (eom >= 0) t->ends[eom] = true;

    bool add_bos = t->model->add_bos || (t->pretok && sm_pretok_add_bos(t->pretok)), found;
    status = load_flag(b, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", t->bos,
                       add_bos, &t->add_bos);
    if (status == SMALLM_OK)
        status = load_flag(b, "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", t->eos,
                           t->model->add_eos, &t->add_eos);
    if (status != SMALLM_OK) return status;
    t->add_space = t->model->add_space;
    if (t->model->marks_spaces)
        status = sm_gguf_get_bool(b->g, "tokenizer.ggml.add_space_prefix", &t->add_space, &found,
                                  b->err);
    if (status != SMALLM_OK || !t->model->needs_unknown) return status;
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
static bool is_sought(const struct sm_tokenizer *t, int32_t id, enum sm_token_kind kind) {
    if (t->kinds[id] != kind) return false;
    return t->pieces[id].n > (kind == SM_TOKEN_CONTROL);
}

static int build_trie(struct sm_vocab_load *b, struct sm_trie *trie, enum sm_token_kind kind) {
    const struct sm_tokenizer *t = b->t;
    size_t n = 0, n_bytes = 0;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (!is_sought(t, id, kind)) continue;
        n_bytes += t->pieces[id].n;
        n++;
    }
    bool special = kind != SM_TOKEN_NORMAL;
    if (n_bytes > (special ? MAX_SPECIAL_BYTES : UINT32_MAX / 2))
        return sm_fail(b->err, SMALLM_E_CORRUPT,
                       "%s: control, user-defined or normal tokens have %zu bytes of text; at most "
                       "%u", b->path, n_bytes, special ? MAX_SPECIAL_BYTES : UINT32_MAX / 2);
    if (n == 0) return SMALLM_OK;
    int32_t *ids = sm_alloc(n * sizeof *ids);
    if (ids == NULL) return sm_vocab_no_memory(b, "tokens");
    n = 0;
    for (int32_t id = 0; id < t->n_vocab; id++)
        if (is_sought(t, id, kind)) ids[n++] = id;
    bool built = sm_trie_build(trie, t->pieces, ids, n, special);
    sm_free(ids);
    return built ? SMALLM_OK : sm_vocab_no_memory(b, "tokens");
}

int sm_vocab_load_tree(struct sm_vocab_load *b) {
    return build_trie(b, &b->t->tokens, SM_TOKEN_NORMAL);
}

int sm_vocab_load(struct sm_vocab_load *b) {
    int status = load_tokens(b);
    if (status == SMALLM_OK) status = load_scores(b);
    if (status == SMALLM_OK) status = load_pieces(b);
    if (status == SMALLM_OK) status = b->t->model->load(b);
    if (status == SMALLM_OK) status = load_special(b);
    if (status == SMALLM_OK) status = build_trie(b, &b->t->control, SM_TOKEN_CONTROL);
    if (status == SMALLM_OK) status = build_trie(b, &b->t->user, SM_TOKEN_USER);
    return status;
}
