/* Byte-pair encoding: see vocab.h.
 *
 * Both models merge neighbouring symbols, best first.  Byte-level BPE starts from bytes, and its
 * merges and their ranks are in the file; SentencePiece starts from characters, merges any two
 * tokens whose texts make a third, and ranks by the third's score.  At load both become one table,
 * (left, right) -> (rank, merged), so that one loop serves both. */
#include "vocab.h"

#define NONE UINT32_MAX

static const struct sm_str nothing = {"", 0};

static uint64_t pair_hash(int32_t left, int32_t right) {
    return sm_hash_mix((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * SM_HASH_BASE >> 32;
}

static const struct sm_pair *find_pair(const struct sm_tokenizer *t, int32_t left, int32_t right) {
    const struct sm_pair *p;
    for (size_t i = pair_hash(left, right) & t->pair_mask; (p = &t->pairs[i])->left >= 0;
         i = (i + 1) & t->pair_mask) {
        SM_WORK();
        if (p->left == left && p->right == right) return p;
    }
    return NULL;
}

static int32_t find_letter(const struct sm_tokenizer *t, uint32_t c) {
    size_t i = sm_hash_mix(c) & t->letter_mask;
    while (t->letters[i].id >= 0 && t->letters[i].c != c) i = (i + 1) & t->letter_mask;
    return t->letters[i].id;
}

/* ---- loading -------------------------------------------------------------------------------- */

static int add_merge(struct sm_vocab_load *b, int32_t left, int32_t right, uint32_t rank,
                     int32_t id) {
    if (!sm_grow(&b->list, &b->cap_list, b->n_list + 1, sizeof *b->list))
        return sm_vocab_no_memory(b, "merges");
    b->list[b->n_list++] = (struct sm_pair){left, right, rank, id};
    return SMALLM_OK;
}

static int load_merges(struct sm_vocab_load *b) {
    const char *key = "tokenizer.ggml.merges";
    int status = sm_vocab_strings(b, key, &b->merges);
    if (status != SMALLM_OK) return status;
    if (b->merges.n == 0) return sm_vocab_missing(b, key);
    if (b->merges.n >= NONE)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s has %zu entries", b->path, key,
                       b->merges.n);
    if (!sm_grow(&b->list, &b->cap_list, b->merges.n, sizeof *b->list))
        return sm_vocab_no_memory(b, "merges");
    struct merge_text {
        struct sm_str x, y;
        uint64_t left, right, both; /* hashes */
    } ahead[SM_HASHES_AHEAD];
    for (size_t i = 0; i < b->merges.n && status == SMALLM_OK; i++) {
        size_t at = i % SM_HASHES_AHEAD;
        for (size_t k = i; at == 0 && k < SM_MIN(i + SM_HASHES_AHEAD, b->merges.n); k++) {
            struct sm_str s = sm_gguf_array_string(&b->merges, k);
            const char *space = s.n > 2 ? memchr(s.s + 1, ' ', s.n - 2) : NULL;
            if (space == NULL)
                return sm_fail(b->err, SMALLM_E_CORRUPT,
                               "%s: %s, entry %zu is \"%s\", not two tokens with a space between",
                               b->path, key, k, sm_vocab_show(b, 0, s));
            struct merge_text *m = &ahead[k - i];
            m->x = (struct sm_str){s.s, (size_t)(space - s.s)};
            m->y = (struct sm_str){space + 1, s.n - m->x.n - 1};
            m->left = sm_hash_more(0, m->x.s, m->x.n);
            m->right = sm_hash_more(0, m->y.s, m->y.n);
            m->both = sm_hash_more(m->left, m->y.s, m->y.n);
            sm_words_prefetch(&b->raw, m->left);
            sm_words_prefetch(&b->raw, m->right);
            sm_words_prefetch(&b->raw, m->both);
        }
        const struct merge_text *m = &ahead[at];
        int32_t left = sm_words_find(&b->raw, m->left, m->x, nothing);
        int32_t right = sm_words_find(&b->raw, m->right, m->y, nothing);
        int32_t both = sm_words_find(&b->raw, m->both, m->x, m->y);
        if (left < 0 || right < 0 || both < 0)
            return sm_fail(b->err, SMALLM_E_CORRUPT,
                           "%s: %s, entry %zu is \"%s\", but %s is not a token", b->path, key, i,
                           sm_vocab_show(b, 0, sm_gguf_array_string(&b->merges, i)),
                           left < 0    ? "its first part"
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
 * are no tokens, no merge reaches it; SentencePiece's trainer makes no such files.
 *
 * Most of the time goes into waiting for memory: splits are looked at many at a time, each step of
 * which asks for what the next one reads. */
#define N_SPLITS 128

struct split {
    int32_t id;
    uint32_t rank;
    size_t at;            /* bytes of the left part */
    uint64_t left, right; /* hashes */
    int32_t left_id, right_id;
};

static int add_splits(struct sm_vocab_load *b, struct split *splits, size_t n) {
    const struct sm_words *w = &b->raw;
    const uint8_t *kinds = b->t->kinds;
    size_t kept = 0;
    for (size_t k = 0; k < n; k++) {
        struct split s = splits[k];
        s.right_id = sm_words_guess(w, s.right);
        if (s.right_id < 0) continue;
        s.left_id = sm_words_guess(w, s.left);
        if (s.left_id < 0) continue;
        SM_PREFETCH(&w->text[s.left_id]);
        SM_PREFETCH(&w->text[s.right_id]);
        splits[kept++] = s;
    }
    for (size_t k = 0; k < kept; k++) {
        SM_PREFETCH(w->text[splits[k].left_id].s);
        SM_PREFETCH(w->text[splits[k].right_id].s);
    }
    for (size_t k = 0; k < kept; k++) {
        const struct split *s = &splits[k];
        struct sm_str whole = sm_vocab_text(b, s->id);
        struct sm_str x = {whole.s, s->at}, y = {whole.s + x.n, whole.n - x.n};
        int32_t left = s->left_id, right = s->right_id;
        if (!sm_same_text(w->text[left], x)) left = sm_words_find(w, s->left, x, nothing);
        if (!sm_same_text(w->text[right], y)) right = sm_words_find(w, s->right, y, nothing);
        if (left < 0 || right < 0 || kinds[left] != SM_TOKEN_NORMAL || kinds[right] != SM_TOKEN_NORMAL)
            continue;
        int status = add_merge(b, left, right, s->rank, s->id);
        if (status != SMALLM_OK) return status;
    }
    return SMALLM_OK;
}

static int load_splits(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    uint64_t inverse = SM_HASH_BASE; /* of the base, by Newton's iteration */
    for (int i = 0; i < 6; i++) inverse *= 2 - SM_HASH_BASE * inverse;
    if (!sm_grow(&b->list, &b->cap_list, 2 * b->tokens.n, sizeof *b->list)) /* the usual number */
        return sm_vocab_no_memory(b, "merges");
    struct split splits[N_SPLITS];
    size_t n_splits = 0;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (t->kinds[id] != SM_TOKEN_NORMAL) continue;
        struct sm_str s = sm_vocab_text(b, id);
        uint32_t rank = score_rank(sm_gguf_array_float(&b->scores, (size_t)id));
        uint64_t whole = sm_hash_more(0, s.s, s.n), first = 0, power = 1; /* base^(bytes to come) */
        for (size_t i = 0; i < s.n; i++) power *= SM_HASH_BASE;
        for (size_t i = 0; i < s.n;) {
            size_t n = sm_utf8_length((uint8_t)s.s[i]);
            if (i + n >= s.n) break;
            first = sm_hash_more(first, s.s + i, n);
            for (size_t k = 0; k < n; k++) power *= inverse;
            i += n;
            uint64_t rest = whole - first * power;
            sm_words_prefetch(&b->raw, first);
            sm_words_prefetch(&b->raw, rest);
            splits[n_splits++] = (struct split){id, rank, i, first, rest, -1, -1};
            if (n_splits < N_SPLITS) continue;
            int status = add_splits(b, splits, n_splits);
            if (status != SMALLM_OK) return status;
            n_splits = 0;
        }
    }
    return add_splits(b, splits, n_splits);
}

static int build_pairs(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    size_t size = sm_hash_size(b->n_list);
    t->pairs = sm_calloc(size, sizeof *t->pairs);
    if (t->pairs == NULL) return sm_vocab_no_memory(b, "merges");
    for (size_t i = 0; i < size; i++) t->pairs[i].left = -1;
    t->pair_mask = size - 1;
    for (size_t k = 0; k < b->n_list; k++) {
        const struct sm_pair *p = &b->list[k];
        if (k + SM_HASHES_AHEAD < b->n_list) {
            const struct sm_pair *later = p + SM_HASHES_AHEAD;
            SM_PREFETCH(&t->pairs[pair_hash(later->left, later->right) & t->pair_mask]);
        }
        size_t i = pair_hash(p->left, p->right) & t->pair_mask;
        for (int probes = 0; t->pairs[i].left >= 0; i = (i + 1) & t->pair_mask) {
            if (t->pairs[i].left == p->left && t->pairs[i].right == p->right)
                return sm_fail(b->err, SMALLM_E_CORRUPT,
                               "%s: tokenizer.ggml.merges, entries %u and %u both merge \"%s\" and "
                               "\"%s\"", b->path, (unsigned)t->pairs[i].rank, (unsigned)p->rank,
                               sm_vocab_show(b, 0, sm_vocab_text(b, p->left)),
                               sm_vocab_show(b, 1, sm_vocab_text(b, p->right)));
            if (++probes == SM_MAX_PROBES) return sm_vocab_collides(b, "merges");
        }
        t->pairs[i] = *p;
    }
    return SMALLM_OK;
}

/* SentencePiece: tokens of one character. */
static int load_letters(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    size_t count = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t id = 0; id < t->n_vocab; id++) {
            struct sm_str s = t->pieces[id];
            if (t->kinds[id] != SM_TOKEN_NORMAL || s.n == 0) continue;
            if (s.n != sm_utf8_length((uint8_t)s.s[0])) continue;
            /* A token that is a literal space is never made: U+2581 stands for it. */
            if (s.s[0] == ' ' && sm_vocab_text(b, id).n == 1) continue;
            if (pass == 0) {
                count++;
                continue;
            }
            size_t length;
            uint32_t c = sm_utf8_decode((const uint8_t *)s.s, &length);
            size_t i = sm_hash_mix(c) & t->letter_mask;
            while (t->letters[i].id >= 0) i = (i + 1) & t->letter_mask; /* at most 0x110000 */
            t->letters[i] = (struct sm_letter){c, id};
        }
        if (pass == 1) break;
        size_t size = sm_hash_size(count);
        t->letters = sm_calloc(size, sizeof *t->letters);
        if (t->letters == NULL) return sm_vocab_no_memory(b, "tokens");
        for (size_t i = 0; i < size; i++) t->letters[i].id = -1;
        t->letter_mask = size - 1;
    }
    return SMALLM_OK;
}

/* Byte-level: pieces of normal tokens, where the pre-tokenizer's row looks for them. */
static int load_whole(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    if (!sm_pretok_whole_pieces(t->pretok)) return SMALLM_OK;
    if (!sm_words_init(&t->whole, t->pieces, (size_t)t->n_vocab))
        return sm_vocab_no_memory(b, "tokens");
    for (int32_t id = 0; id < t->n_vocab; id++) {
        if (t->kinds[id] != SM_TOKEN_NORMAL || t->pieces[id].n == 0) continue;
        struct sm_str s = t->pieces[id];
        uint64_t hash = sm_hash_more(0, s.s, s.n);
        if (sm_words_find(&t->whole, hash, s, nothing) >= 0) continue;
        if (!sm_words_add(&t->whole, hash, id)) return sm_vocab_collides(b, "tokens");
    }
    return SMALLM_OK;
}

int sm_bpe_load_merges(struct sm_vocab_load *b) {
    int status = load_merges(b);
    if (status == SMALLM_OK) status = build_pairs(b);
    if (status == SMALLM_OK) status = load_whole(b);
    return status;
}

int sm_bpe_load_scores(struct sm_vocab_load *b) {
    int status = load_splits(b);
    if (status == SMALLM_OK) status = build_pairs(b);
    if (status == SMALLM_OK) status = load_letters(b);
    return status;
}

/* ---- encoding ------------------------------------------------------------------------------- */

static void sift_down(uint64_t *heap, size_t n, size_t i) {
    uint64_t key = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        SM_WORK();
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

static void push(struct sm_encode *e, uint64_t key) {
    size_t i = e->n_heap++;
    while (i > 0 && e->heap[(i - 1) / 2] > key) {
        SM_WORK();
        e->heap[i] = e->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    e->heap[i] = key;
}

/* Looks up what symbol i can become together with the next one. */
static bool find_merge(const struct sm_encode *e, uint32_t i, size_t n) {
    struct sm_symbol *s = &e->symbols[i];
    s->rank = NONE;
    if (s->next >= n || s->id < 0 || e->symbols[s->next].id < 0) return false;
    const struct sm_pair *p = find_pair(e->t, s->id, e->symbols[s->next].id);
    if (p == NULL) return false;
    s->rank = p->rank;
    s->into = p->id;
    return true;
}

static bool reserve(struct sm_encode *e, size_t n) {
    return sm_grow(&e->symbols, &e->cap_symbols, n, sizeof *e->symbols) &&
           sm_grow(&e->heap, &e->cap_heap, 2 * n, sizeof *e->heap);
}

/* Merges symbols[0..n), whose ids are set, and links what remains; symbol 0 stays.  The heap has an
 * entry for every merge that is possible and some that no longer are: at most n - 1 at the start,
 * and each merge takes one and adds two. */
static void merge(struct sm_encode *e, size_t n) {
    struct sm_symbol *symbols = e->symbols;
    for (size_t i = 0; i < n; i++) {
        symbols[i].prev = i > 0 ? (uint32_t)i - 1 : NONE;
        symbols[i].next = (uint32_t)i + 1;
    }
    e->n_heap = 0;
    for (size_t i = 0; i < n; i++)
        if (find_merge(e, (uint32_t)i, n))
            e->heap[e->n_heap++] = (uint64_t)symbols[i].rank << 32 | i;
    for (size_t i = e->n_heap / 2; i-- > 0;) sift_down(e->heap, e->n_heap, i);

    while (e->n_heap > 0) {
        uint32_t at = (uint32_t)e->heap[0], rank = (uint32_t)(e->heap[0] >> 32);
        e->heap[0] = e->heap[--e->n_heap];
        if (e->n_heap > 0) sift_down(e->heap, e->n_heap, 0);
        struct sm_symbol *s = &symbols[at];
        if (s->rank != rank) continue; /* one of the two was merged meanwhile */
        struct sm_symbol *gone = &symbols[s->next];
        gone->rank = NONE;
        s->id = s->into;
        s->next = gone->next;
        if (s->next < n) symbols[s->next].prev = at;
        if (find_merge(e, at, n)) push(e, (uint64_t)s->rank << 32 | at);
        if (s->prev != NONE && find_merge(e, s->prev, n))
            push(e, (uint64_t)symbols[s->prev].rank << 32 | s->prev);
    }
}

/* One piece of byte-level BPE.  A byte that is no token gives no id: real vocabularies lack some
 * control characters, and the unknown token, where there is one, ends texts. */
static int encode_piece(void *ctx, const char *s, size_t n) {
    struct sm_encode *e = ctx;
    const struct sm_tokenizer *t = e->t;
    if (t->whole.slots != NULL) {
        int32_t id = sm_words_get(&t->whole, (struct sm_str){s, n});
        if (id >= 0) {
            sm_encode_emit(e, id);
            return SMALLM_OK;
        }
    }
    if (!reserve(e, n)) return sm_encode_no_memory(e, n);
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->byte_ids[(uint8_t)s[i]];
        if (id >= 0) e->symbols[count++].id = id;
    }
    merge(e, count);
    for (size_t i = 0; i < count; i = e->symbols[i].next) sm_encode_emit(e, e->symbols[i].id);
    return SMALLM_OK;
}

/* SentencePiece, a text that no merge crosses the ends of. */
static int encode_word(struct sm_encode *e, const char *s, size_t n) {
    const struct sm_tokenizer *t = e->t;
    if (!reserve(e, n)) return sm_encode_no_memory(e, n);
    size_t count = 0, length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t c = sm_utf8_decode((const uint8_t *)s + i, &length);
        e->symbols[count++].id = find_letter(t, c);
    }
    merge(e, count);
    for (size_t i = 0; i < count; i = e->symbols[i].next) {
        int32_t id = e->symbols[i].id;
        length = id >= 0 ? t->pieces[id].n : sm_utf8_length((uint8_t)*s);
        if (id < 0) {
            sm_encode_unknown(e, s, length);
        } else {
            sm_encode_emit(e, id);
            e->unknown_before = false;
        }
        s += length;
    }
    return SMALLM_OK;
}

int sm_bpe_encode_bytes(struct sm_encode *e, const char *s, size_t n) {
    struct sm_str text = {s, n};
    if (e->t->nfc && !sm_nfc(&e->nfc, text, &text)) return sm_encode_no_memory(e, n);
    if (text.n >= NONE)
        return sm_fail(e->err, SMALLM_E_ARGUMENT, "the text has %zu bytes in form NFC", text.n);
    return sm_pretok_split(e->t->pretok, text.s, text.n, encode_piece, e);
}

int sm_bpe_encode_words(struct sm_encode *e, const char *s, size_t n) {
    return sm_encode_by_words(e, s, n, encode_word);
}
