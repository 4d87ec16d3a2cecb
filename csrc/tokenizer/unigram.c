/* Unigram: the tokens whose scores sum to the most.  See vocab.h.
 *
 * A text is first normalized as SentencePiece does: the longest match of the file's map of characters
 * (a double array over bytes) is replaced, spaces at both ends and repeated ones go where the file
 * says so, and a space is put before it.  Then the best path is found, word by word where no token
 * crosses words: the sums are of doubles, and begin with each word. */
#include <math.h>

#include "vocab.h"

/* Bounds of the files we take, far above those of real ones: they bound the work for a character. */
#define MAX_KEY 64          /* bytes of what the map replaces */
#define MAX_REPLACEMENT 256 /* bytes of what it puts there */
#define MAX_TOKEN 1024      /* bytes */
#define MAX_MAP (1u << 24)  /* bytes of the whole map */

#define UNKNOWN_PENALTY 10.0 /* below the lowest score */

/* ---- the map of characters ------------------------------------------------------------------ */

/* A unit of the double array has the byte that leads to it, whether its children hold a value, and
 * the distance to them: a child stands at (where the children are) ^ (its byte). */
static uint32_t unit_label(uint32_t unit) { return unit & 0x800000FFu; }
static bool unit_has_value(uint32_t unit) { return (unit >> 8 & 1) != 0; }
static uint32_t unit_offset(uint32_t unit) { return unit >> 10 << ((unit & 0x200u) >> 6); }
static uint32_t unit_value(uint32_t unit) { return unit & 0x7FFFFFFFu; }

/* Where the children of unit i are, or NONE where that is outside of the array. */
#define NONE UINT32_MAX
static uint32_t children_of(const struct sm_charsmap *m, uint32_t i) {
    uint32_t at = i ^ unit_offset(m->units[i]);
    return at < m->n_units ? at : NONE;
}

static bool is_value(const struct sm_charsmap *m, uint32_t at) {
    uint32_t value = unit_value(m->units[at]);
    if (value >= m->n_strings || ((uint8_t)m->strings[value] & 0xC0) == 0x80) return false;
    return strlen(m->strings + value) <= MAX_REPLACEMENT;
}

/* Every way through the array ends within MAX_KEY bytes, in values that are texts.  Ways meet again:
 * heights[i] is 1 and what is below unit i once that is known. */
static bool is_sound(const struct sm_charsmap *m, uint8_t *heights) {
    struct step {
        uint32_t unit, children, byte;
        uint8_t height;
    } way[MAX_KEY + 1];
    size_t depth = 0;
    way[0] = (struct step){0, children_of(m, 0), 0, 0};
    if (way[0].children == NONE) return false;
    for (;;) {
        struct step *s = &way[depth];
        if (++s->byte == 256) {
            heights[s->unit] = (uint8_t)(s->height + 1);
            if (depth == 0) return true;
            way[depth - 1].height = SM_MAX(way[depth - 1].height, heights[s->unit]);
            depth--;
            continue;
        }
        uint32_t i = s->children ^ s->byte;
        if (i >= m->n_units || unit_label(m->units[i]) != s->byte) continue;
        if (heights[i] > 0) {
            s->height = SM_MAX(s->height, heights[i]);
            if (depth + heights[i] > MAX_KEY) return false;
            continue;
        }
        uint32_t children = children_of(m, i);
        if (children == NONE || depth == MAX_KEY) return false;
        if (unit_has_value(m->units[i]) && !is_value(m, children)) return false;
        way[++depth] = (struct step){i, children, 0, 0};
    }
}

static int load_charsmap(struct sm_vocab_load *b) {
    const char *key = "tokenizer.ggml.precompiled_charsmap";
    struct sm_charsmap *m = &b->t->charsmap;
    struct sm_gguf_array a;
    int status = sm_gguf_get_array(b->g, key, &a, b->err);
    if (status != SMALLM_OK || a.n == 0) return status;
    if (a.kind != SM_GGUF_U8 && a.kind != SM_GGUF_I8)
        return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: %s is an array of %s, not of bytes", b->path,
                       key, sm_gguf_kind_name(a.kind));
    uint32_t n_bytes = 0;
    if (a.n > sizeof n_bytes) memcpy(&n_bytes, a.data, sizeof n_bytes);
    if (n_bytes == 0 || n_bytes % 4 != 0 || n_bytes >= a.n - sizeof n_bytes || a.n > MAX_MAP)
        return sm_fail(b->err, SMALLM_E_CORRUPT,
                       "%s: %s has %zu bytes, at most %u, and says that %u of them are its tree",
                       b->path, key, a.n, MAX_MAP, (unsigned)n_bytes);
    const char *strings = (const char *)a.data + sizeof n_bytes + n_bytes;
    m->n_units = n_bytes / 4;
    m->n_strings = a.n - sizeof n_bytes - n_bytes;
    m->units = sm_alloc(n_bytes);
    m->strings = sm_alloc(m->n_strings);
    uint8_t *heights = sm_calloc(m->n_units, 1);
    if (m->units == NULL || m->strings == NULL || heights == NULL) {
        sm_free(heights);
        return sm_vocab_no_memory(b, "map of characters");
    }
    memcpy(m->units, (const char *)a.data + sizeof n_bytes, n_bytes);
    memcpy(m->strings, strings, m->n_strings);
    bool sound = m->strings[m->n_strings - 1] == '\0' &&
                 sm_utf8_valid(m->strings, m->n_strings) == m->n_strings && is_sound(m, heights);
    sm_free(heights);
    if (sound) return SMALLM_OK;
    return sm_fail(b->err, SMALLM_E_CORRUPT,
                   "%s: %s is not a map of at most %d bytes to texts of at most %d", b->path, key,
                   MAX_KEY, MAX_REPLACEMENT);
}

/* What stands for the start of s[0..n), n > 0; *taken are the bytes it stands for. */
static struct sm_str replace(const struct sm_charsmap *m, const char *s, size_t n, size_t *taken) {
    struct sm_str out = {s, *taken = sm_utf8_length((uint8_t)*s)};
    if (m->n_units == 0) return out;
    uint32_t at = children_of(m, 0);
    for (size_t i = 0; i < n && s[i] != '\0'; i++) {
        SM_WORK();
        uint32_t unit_at = at ^ (uint8_t)s[i];
        if (unit_at >= m->n_units || unit_label(m->units[unit_at]) != (uint8_t)s[i]) break;
        at = children_of(m, unit_at);
        /* No match ends inside of a character. */
        if (!unit_has_value(m->units[unit_at]) || (i + 1 < n && ((uint8_t)s[i + 1] & 0xC0) == 0x80))
            continue;
        const char *text = m->strings + unit_value(m->units[at]);
        out = (struct sm_str){text, strlen(text)};
        *taken = i + 1;
    }
    return out;
}

/* The text as it is searched, with plain spaces, to e->normal[*n_out]. */
static int normalize(struct sm_encode *e, const char *s, size_t n, size_t *n_out) {
    const struct sm_tokenizer *t = e->t;
    size_t taken, at = 0;
    bool space_before = t->merge_spaces; /* spaces that follow are dropped */
    for (size_t i = 0; i < n; i += taken) {
        struct sm_str r = replace(&t->charsmap, s + i, n - i, &taken);
        if (!sm_grow(&e->normal, &e->cap_normal, at + r.n + 1, 1)) return sm_encode_no_memory(e, n);
        bool dropped = space_before && r.n == 1 && *r.s == ' ';
        if (at == 0 && t->add_space && !dropped) e->normal[at++] = ' ';
        for (; space_before && r.n > 0 && *r.s == ' '; r.n--) r.s++;
        if (r.n == 0) continue;
        space_before = t->merge_spaces && r.s[r.n - 1] == ' ';
        at += sm_plain_spaces(r.s, r.n, e->normal + at);
    }
    while (t->merge_spaces && at > 0 && e->normal[at - 1] == ' ') at--;
    *n_out = at;
    if (at < UINT32_MAX) return SMALLM_OK;
    return sm_fail(e->err, SMALLM_E_ARGUMENT, "the text has %zu bytes once it is normalized", at);
}

/* ---- the best path -------------------------------------------------------------------------- */

int sm_unigram_load(struct sm_vocab_load *b) {
    struct sm_tokenizer *t = b->t;
    bool found;
    int status = sm_gguf_get_bool(b->g, "tokenizer.ggml.remove_extra_whitespaces",
                                  &t->merge_spaces, &found, b->err);
    if (status == SMALLM_OK) status = load_charsmap(b);
    if (status == SMALLM_OK) status = sm_vocab_load_tree(b);
    if (status != SMALLM_OK) return status;
    t->scores = sm_alloc(b->tokens.n * sizeof *t->scores); /* no more bytes than pieces have */
    if (t->scores == NULL) return sm_vocab_no_memory(b, "scores");
    double least = INFINITY;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        t->scores[id] = (float)sm_gguf_array_float(&b->scores, (size_t)id);
        if (t->kinds[id] != SM_TOKEN_NORMAL) continue;
        least = SM_MIN(least, t->scores[id]);
        if (t->pieces[id].n > MAX_TOKEN)
            return sm_fail(b->err, SMALLM_E_CORRUPT, "%s: token %d has %zu bytes; at most %d",
                           b->path, (int)id, t->pieces[id].n, MAX_TOKEN);
    }
    t->unknown_score = isfinite(least) ? least - UNKNOWN_PENALTY : 0;
    return SMALLM_OK;
}

/* best[i] is the best path to byte i of s[0..n), n > 0; where no path ends, id is PATH_NONE. */
#define PATH_NONE (-2)
#define PATH_UNKNOWN (-1)

static void offer(struct sm_path *to, double score, size_t start, int32_t id) {
    if (to->id == PATH_NONE || score > to->score) *to = (struct sm_path){score, (uint32_t)start, id};
}

static int encode_word(struct sm_encode *e, const char *s, size_t n) {
    const struct sm_tokenizer *t = e->t;
    const struct sm_trie *tokens = &t->tokens;
    if (!sm_grow(&e->best, &e->cap_best, n + 1, sizeof *e->best)) return sm_encode_no_memory(e, n);
    struct sm_path *best = e->best;
    for (size_t i = 1; i <= n; i++) best[i].id = PATH_NONE;
    best[0] = (struct sm_path){0, 0, PATH_UNKNOWN};
    for (size_t i = 0, length; i < n; i += length) {
        length = sm_utf8_length((uint8_t)s[i]);
        double score = best[i].score;
        bool single = false;
        uint32_t node = 0;
        for (size_t k = i; k < n && tokens->n_nodes > 0; k++) {
            node = sm_trie_child(tokens, node, (uint8_t)s[k]);
            if (node == 0) break;
            int32_t id = tokens->id[node];
            if (id < 0) continue;
            single = single || k + 1 - i == length;
            offer(&best[k + 1], score + t->scores[id], i, id);
        }
        if (!single) offer(&best[i + length], score + t->unknown_score, i, PATH_UNKNOWN);
    }
    /* From the end to the start, then in the order of the text: starts point forward now. */
    uint32_t next = (uint32_t)n;
    for (size_t i = n; i > 0;) {
        uint32_t start = best[i].start;
        best[i].start = next;
        next = (uint32_t)i;
        i = start;
    }
    for (size_t from = 0, i = next; from < n;) {
        if (best[i].id == PATH_UNKNOWN) {
            sm_encode_unknown(e, s + from, i - from);
        } else {
            sm_encode_emit(e, best[i].id);
            e->unknown_before = false;
        }
        from = i;
        i = best[i].start;
    }
    return SMALLM_OK;
}

int sm_unigram_encode(struct sm_encode *e, const char *s, size_t n) {
    size_t n_normal = 0;
    int status = normalize(e, s, n, &n_normal);
    return status == SMALLM_OK ? sm_encode_by_words(e, e->normal, n_normal, encode_word) : status;
}
