/* Tokenizers: see tokenizer.h.
 *
 * Control tokens are found first, then user-defined ones, and the rows of `models` say how the text
 * between them becomes ids.
 *
 * Normalizing is a part of it.  WordPiece and Unigram are defined with their normalizers, and byte-level
 * BPE of some families begins with Unicode's form NFC: a file may say so under
 * tokenizer.ggml.normalizer.nfc, as our converter's do, else the row of the pre-tokenizer does.  Special
 * tokens are found in the text as it came, and what comes back from ids is the normalized text. */
#include "tokenizer/vocab.h"

static const struct sm_token_model models[] = {
    {.name = "gpt2",
     .has_pretok = true,
     .bos = -1, .eos = -1, .unknown = -1,
     .load = sm_bpe_load_merges, .encode = sm_bpe_encode_bytes},
    {.name = "llama",
     .marks_spaces = true, .copies_text = true,
     .needs_scores = true, .needs_types = true, .needs_unknown = true,
     .bos = 1, .eos = 2, .unknown = 0, .add_bos = true, .add_space = true,
     .load = sm_bpe_load_scores, .encode = sm_bpe_encode_words},
    {.name = "bert",
     .marks_words = true,
     .needs_types = true, .needs_unknown = true,
     .bos = 101, .eos = 102, .unknown = 100, .add_bos = true, .add_eos = true, .add_space = true,
     .load = sm_wordpiece_load, .encode = sm_wordpiece_encode},
    {.name = "t5",
     .marks_spaces = true,
     .needs_scores = true, .needs_types = true, .needs_unknown = true,
     .bos = -1, .eos = 1, .unknown = 2, .add_eos = true,
     .load = sm_unigram_load, .encode = sm_unigram_encode},
};

static int load_model(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    struct sm_str name, pre = {"default", 7};
    bool found;
    int status = sm_gguf_get_string(b->g, "tokenizer.ggml.model", &name, &found, b->err);
    if (status != SMALLM_OK) return status;
    if (!found) return sm_vocab_missing(b, "tokenizer.ggml.model");
    for (size_t i = 0; i < SM_COUNT(models); i++)
        if (sm_str_is(name, models[i].name))
            t->model = &models[i];
    if (t->model == NULL)
        return sm_fail(b->err, SMALLM_E_UNSUPPORTED,
                       "%s: tokenizer.ggml.model is \"%s\"; known are %s, %s, %s, %s", b->path,
                       sm_vocab_show(b, 0, name), models[0].name, models[1].name, models[2].name,
                       models[3].name);
    if (!t->model->has_pretok) return SMALLM_OK;
    status = sm_gguf_get_string(b->g, "tokenizer.ggml.pre", &pre, &found, b->err);
    if (status != SMALLM_OK) return status;
    t->pretok = sm_pretok_find(pre.s, pre.n);
    if (t->pretok == NULL) {
        char names[1024];
        return sm_fail(b->err, SMALLM_E_UNSUPPORTED,
                       "%s: tokenizer.ggml.pre is \"%s\"; known are %s", b->path,
                       sm_vocab_show(b, 0, pre), sm_pretok_names(names, sizeof names));
    }
    t->nfc = sm_pretok_nfc(t->pretok);
    return sm_gguf_get_bool(b->g, "tokenizer.ggml.normalizer.nfc", &t->nfc, &found, b->err);
}

int sm_tokenizer_new(const struct sm_gguf *g, struct sm_tokenizer **out, smallm_error *err) {
    struct sm_vocab_load b = {.g = g, .path = sm_gguf_path(g), .err = err};
    b.t = sm_calloc(1, sizeof *b.t);
    if (b.t == NULL) return sm_vocab_no_memory(&b, "tables");
    int status = load_model(&b);
    if (status == SMALLM_OK) status = sm_vocab_load(&b);
    sm_free(b.raw.slots);
    sm_free(b.list);
    if (status != SMALLM_OK) {
        sm_tokenizer_free(b.t);
        return status;
    }
    *out = b.t;
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
    sm_trie_free(&t->control);
    sm_trie_free(&t->user);
    sm_trie_free(&t->tokens);
    sm_free(t->charsmap.units);
    sm_free(t->charsmap.strings);
    sm_free(t->scores);
    sm_free(t);
}

int32_t sm_tokenizer_n_vocab(const struct sm_tokenizer *t) { return t->n_vocab; }

bool sm_tokenizer_is_eog(const struct sm_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_vocab && t->ends[id];
}

bool sm_tokenizer_is_control(const struct sm_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_vocab && t->kinds[id] == SM_TOKEN_CONTROL;
}

void sm_tokenizer_get_info(const struct sm_tokenizer *t, struct sm_tokenizer_info *out) {
    *out = (struct sm_tokenizer_info){
        .model = t->model->name,
        .pre = t->pretok == NULL ? "" : sm_pretok_name(t->pretok),
        .bos = t->bos,
        .eos = t->eos,
        .eot = t->eot,
        .add_bos = t->add_bos,
        .add_eos = t->add_eos,
    };
}

/* ---- encoding -------------------------------------------------------------------------------- */

int sm_encode_no_memory(struct sm_encode *e, size_t n) {
    return sm_fail(e->err, SMALLM_E_MEMORY, "out of memory for tokenizing %zu bytes", n);
}

void sm_encode_unknown(struct sm_encode *e, const char *s, size_t n) {
    const struct sm_tokenizer *t = e->t;
    bool bytes = true;
    for (size_t i = 0; i < n; i++) bytes = bytes && t->byte_ids[(uint8_t)s[i]] >= 0;
    if (bytes) {
        for (size_t i = 0; i < n; i++) sm_encode_emit(e, t->byte_ids[(uint8_t)s[i]]);
    } else if (!e->unknown_before) {
        sm_encode_emit(e, t->unknown);
    }
    e->unknown_before = !bytes;
}

int sm_encode_by_words(struct sm_encode *e, const char *s, size_t n,
                       int (*encode)(struct sm_encode *e, const char *s, size_t n)) {
    size_t start = 0;
    for (size_t i = 1; i < n && e->t->space_starts_word; i++) {
        if (s[i] != ' ' || s[i - 1] == ' ') continue;
        int status = encode(e, s + start, i - start);
        if (status != SMALLM_OK) return status;
        start = i;
    }
    return start < n ? encode(e, s + start, n - start) : SMALLM_OK;
}

static int find_special(struct sm_encode *e, const struct sm_trie *trie, const char *s, size_t n,
                        struct sm_matches *m) {
    m->n = 0;
    if (trie->n_nodes == 0) return SMALLM_OK;
    uint32_t node = 0;
    for (size_t i = n; i-- > 0;) {
        node = sm_trie_step(trie, node, (uint8_t)s[i]);
        if (trie->id[node] < 0) continue;
        if (!sm_grow(&m->list, &m->cap, m->n + 1, sizeof *m->list))
            return sm_encode_no_memory(e, n);
        m->list[m->n++] = (struct sm_match){i, trie->id[node]};
    }
    return SMALLM_OK;
}

/* A text without control tokens.  In SentencePiece a space is put before it, which user-defined
 * tokens see, too; s[-1] may be overwritten for it. */
static int encode_fragment(struct sm_encode *e, char *s, size_t n) {
    const struct sm_tokenizer *t = e->t;
    if (n == 0) return SMALLM_OK;
    if (t->model->copies_text && t->add_space) {
        *--s = ' ';
        n++;
    }
    e->unknown_before = false;
    int status = find_special(e, &t->user, s, n, &e->user);
    size_t from = 0;
    for (size_t k = e->user.n; k-- > 0 && status == SMALLM_OK;) {
        struct sm_match m = e->user.list[k];
        if (m.at < from) continue;
        if (m.at > from) status = t->model->encode(e, s + from, m.at - from);
        sm_encode_emit(e, m.id);
        e->unknown_before = false;
        from = m.at + t->pieces[m.id].n;
    }
    if (status == SMALLM_OK && from < n) status = t->model->encode(e, s + from, n - from);
    return status;
}

int sm_tokenizer_encode(const struct sm_tokenizer *t, const char *text, size_t n_bytes,
                        uint32_t flags, int32_t *ids, size_t capacity, size_t *n_ids,
                        smallm_error *err) {
    struct sm_encode e = {.t = t, .err = err, .ids = ids, .capacity = capacity};
    char *copy = NULL;
    int status = SMALLM_OK;
    *n_ids = 0;
    if (n_bytes >= INT32_MAX)
        return sm_fail(err, SMALLM_E_ARGUMENT, "the text has %zu bytes; at most %d", n_bytes,
                       INT32_MAX - 1);
    size_t bad = sm_utf8_valid(text, n_bytes);
    if (bad < n_bytes)
        return sm_fail(err, SMALLM_E_ARGUMENT, "the text is not valid UTF-8 at byte %zu (0x%02X)",
                       bad, (unsigned)(uint8_t)text[bad]);

    char *s = (char *)text; /* written to only where it is a copy */
    size_t n = n_bytes, from = 0;
    if (t->model->copies_text) {
        copy = sm_alloc(n_bytes + 1);
        if (copy == NULL) {
            status = sm_encode_no_memory(&e, n_bytes);
            goto done;
        }
        s = copy + 1;
        n = sm_plain_spaces(text, n_bytes, s);
    }
    if ((flags & SMALLM_ADD_SPECIAL) && t->add_bos) sm_encode_emit(&e, t->bos);
    if (flags & SMALLM_PARSE_SPECIAL) status = find_special(&e, &t->control, s, n, &e.control);
    for (size_t k = e.control.n; k-- > 0 && status == SMALLM_OK;) {
        struct sm_match m = e.control.list[k];
        if (m.at < from) continue;
        status = encode_fragment(&e, s + from, m.at - from);
        sm_encode_emit(&e, m.id);
        from = m.at + t->pieces[m.id].n;
    }
    if (status == SMALLM_OK) status = encode_fragment(&e, s + from, n - from);
    if ((flags & SMALLM_ADD_SPECIAL) && t->add_eos) sm_encode_emit(&e, t->eos);
    if (status == SMALLM_OK) *n_ids = e.n_ids;
done:
    sm_free(copy);
    sm_free(e.symbols);
    sm_free(e.heap);
    sm_free(e.normal);
    sm_nfc_free(&e.nfc);
    sm_free(e.best);
    sm_free(e.control.list);
    sm_free(e.user.list);
    return status;
}

/* ---- decoding -------------------------------------------------------------------------------- */

struct sm_str sm_tokenizer_piece(const struct sm_tokenizer *t, int32_t id, bool first,
                                 uint32_t flags, char buf[4]) {
    (void)buf; /* bytes are pieces as all others: the tokenizer holds them */
    struct sm_str s = t->pieces[id];
    if (t->kinds[id] == SM_TOKEN_CONTROL || t->kinds[id] == SM_TOKEN_UNKNOWN)
        return (flags & SMALLM_SKIP_SPECIAL) ? (struct sm_str){"", 0} : s;
    if (first && t->add_space && s.n > 0 && s.s[0] == ' ') return (struct sm_str){s.s + 1, s.n - 1};
    return s;
}

int sm_tokenizer_decode(const struct sm_tokenizer *t, const int32_t *ids, size_t n_ids,
                        uint32_t flags, char *text, size_t capacity, size_t *n_bytes,
                        smallm_error *err) {
    size_t written = 0;
    bool first = true; /* after a control token, too, where encoding adds a space there */
    *n_bytes = 0;
    for (size_t i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= t->n_vocab)
            return sm_fail(err, SMALLM_E_ARGUMENT, "token %zu is %d, not one of 0 .. %d", i,
                           (int)ids[i], (int)t->n_vocab - 1);
        char buf[4];
        struct sm_str s = sm_tokenizer_piece(t, ids[i], first, flags, buf);
        first = t->kinds[ids[i]] == SM_TOKEN_CONTROL;
        if (t->model->marks_words) first = written + s.n == 0;
        if (written < capacity) memcpy(text + written, s.s, SM_MIN(s.n, capacity - written));
        written += s.n;
    }
    *n_bytes = written;
    return SMALLM_OK;
}
