/* Any bytes as a text for good tokenizers, and any bytes as a tokenizer.
 *
 *   cmake -S . -B build-fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DSMALLM_FUZZ=ON
 *         -DSMALLM_SANITIZE=address,undefined,fuzzer-no-link
 *   build-fuzz/fuzz_tokenizer -runs=1000000 corpus
 *
 * The first byte of the input chooses: a text (ids in range, the text back, UTF-8 judged as a
 * second implementation does), a good file with bytes changed, or a vocabulary built from the
 * input, also with one allocation failing. */
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "tokenizer.h"
#include "tokenizer/nfc.h"
#include "tokenizer/pretok.h"

/* ---- GGUF images ----------------------------------------------------------------------------- */

struct image {
    uint8_t *bytes;
    size_t n, cap;
    size_t n_keys;
};

static void put(struct image *m, const void *p, size_t n) {
    if (m->n + n > m->cap) {
        m->cap = 2 * (m->n + n) + 256;
        m->bytes = realloc(m->bytes, m->cap);
        CHECK(m->bytes);
    }
    memcpy(m->bytes + m->n, p, n);
    m->n += n;
}

static void put_u32(struct image *m, uint32_t v) { put(m, &v, sizeof v); }
static void put_u64(struct image *m, uint64_t v) { put(m, &v, sizeof v); }
static void put_string(struct image *m, const char *s, size_t n) {
    put_u64(m, n);
    put(m, s, n);
}

static void begin(struct image *m) {
    *m = (struct image){0};
    put(m, "GGUF", 4);
    put_u32(m, 3);
    put_u64(m, 0); /* tensors */
    put_u64(m, 0); /* keys: end() */
}

static void key(struct image *m, const char *name, enum sm_gguf_kind kind) {
    char full[64];
    int n = snprintf(full, sizeof full, "tokenizer.ggml.%s", name);
    put_string(m, full, (size_t)n);
    put_u32(m, kind);
    m->n_keys++;
}

static void key_string(struct image *m, const char *name, const char *value) {
    key(m, name, SM_GGUF_STRING);
    put_string(m, value, strlen(value));
}

static void key_u32(struct image *m, const char *name, uint32_t value) {
    key(m, name, SM_GGUF_U32);
    put_u32(m, value);
}

static void key_bool(struct image *m, const char *name, bool value) {
    key(m, name, SM_GGUF_BOOL);
    put(m, &value, 1);
}

static void key_array(struct image *m, const char *name, enum sm_gguf_kind kind, size_t n) {
    key(m, name, SM_GGUF_ARRAY);
    put_u32(m, kind);
    put_u64(m, n);
}

static void end(struct image *m) {
    uint64_t n = m->n_keys;
    memcpy(m->bytes + 16, &n, sizeof n);
    static const uint8_t zeros[32];
    put(m, zeros, sizeof zeros - m->n % 32);
}

static int load(const struct image *m, struct sm_tokenizer **t) {
    smallm_error err = {.size = sizeof err};
    struct sm_gguf *g;
    int status = sm_gguf_open_memory(m->bytes, m->n, &g, &err);
    if (status != SMALLM_OK) {
        CHECK(err.code == status && err.message[0] != '\0');
        return status;
    }
    status = sm_tokenizer_new(g, t, &err);
    CHECK(status == SMALLM_OK || (err.code == status && err.message[0] != '\0'));
    sm_gguf_close(g);
    return status;
}

/* ---- good vocabularies ----------------------------------------------------------------------- */

enum { NORMAL = 1, UNKNOWN, CONTROL, USER, UNUSED, BYTE };

static size_t symbol(int byte, char out[2]) { /* byte-level BPE's character for a byte */
    int c = byte, next = 0x100;
    for (int b = 0; b <= byte; b++) {
        bool prints = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
        c = prints ? b : next++;
    }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

static const char *const merges[] = {
    "a a", "aa aa", "aaaa aaaa", "Ġ Ġ", "ĠĠ ĠĠ", "Ġ t", "h e", "Ġt he", "Ċ Ċ", "č Ċ", "1 2", "12 3",
    "' s", "Ã ©", "ð Ł", "ðŁ ĺ", "e Ġ", "' Ġ", "s t", "< |", "| >",
};
static const char *const specials[] = {"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|i"};
static const char *const users[] = {"  ",   "     ",
                                    "<tool>", "tool", "\xE2\x96\x81\xE2\x96\x81x", "1234"};
static const char *const pieces[] = {
    "\xE2\x96\x81", "a", "b", "t", "h", "e", "x", "1", "2", "3", ".", "<", ">", "|", "s", "\xC3\xA9",
    "\xE4\xB8\xAD", "\xE2\x96\x81t", "he", "\xE2\x96\x81the", "aa", "aaa", "aaaa", "aaaaa", "th", "ab",
    "\xE2\x96\x81\xE2\x96\x81", "\xE2\x96\x81\xE2\x96\x81\xE2\x96\x81", "12", "23", "e\xE2\x96\x81",
};

static void byte_level_image(struct image *m, const char *pre) {
    size_t n_merges = SM_COUNT(merges), n_specials = SM_COUNT(specials), n_users = SM_COUNT(users);
    begin(m);
    key_string(m, "model", "gpt2");
    key_string(m, "pre", pre);
    key_u32(m, "bos_token_id", 0);
    key_u32(m, "eos_token_id", 1);
    key_bool(m, "add_eos_token", true);
    key_array(m, "tokens", SM_GGUF_STRING, n_specials + 256 + n_merges + n_users);
    for (size_t i = 0; i < n_specials; i++) put_string(m, specials[i], strlen(specials[i]));
    for (int b = 0; b < 256; b++) {
        char s[2];
        put_string(m, s, symbol(b, s));
    }
    for (size_t i = 0; i < n_merges; i++) {
        char s[64];
        const char *space = strchr(merges[i], ' ');
        int n = snprintf(s, sizeof s, "%.*s%s", (int)(space - merges[i]), merges[i], space + 1);
        put_string(m, s, (size_t)n);
    }
    for (size_t i = 0; i < n_users; i++) put_string(m, users[i], strlen(users[i]));
    key_array(m, "token_type", SM_GGUF_I32, n_specials + 256 + n_merges + n_users);
    for (size_t i = 0; i < n_specials; i++) put_u32(m, CONTROL);
    for (size_t i = 0; i < 256 + n_merges; i++) put_u32(m, NORMAL);
    for (size_t i = 0; i < n_users; i++) put_u32(m, USER);
    key_array(m, "merges", SM_GGUF_STRING, n_merges);
    for (size_t i = 0; i < n_merges; i++) put_string(m, merges[i], strlen(merges[i]));
    end(m);
}

/* A map of characters in Darts' form: 'A' to "a", 'B' to nothing, U+00E9 to "e and a space", a tab
 * to a space.  Children of the root stand from 256 on, of 0xC3 from 512 on, values from 768 on. */
static void put_charsmap(struct image *m) {
    static const char strings[] = "a\0\0e \0 "; /* at 0, 2, 3 and 6 */
    uint32_t units[1024] = {0};
    units[0] = 256u << 10;
    static const struct {
        uint32_t at, label, value, text;
    } keys[] = {{256 ^ 'A', 'A', 768, 0}, {256 ^ 'B', 'B', 769, 2}, {512 ^ 0xA9, 0xA9, 770, 3},
                {256 ^ '\t', '\t', 771, 6}};
    units[256 ^ 0xC3] = 0xC3 | ((256u ^ 0xC3 ^ 512) << 10);
    for (size_t i = 0; i < SM_COUNT(keys); i++) {
        units[keys[i].at] = keys[i].label | 0x100 | ((keys[i].at ^ keys[i].value) << 10);
        units[keys[i].value] = 0x80000000u | keys[i].text;
    }
    key_array(m, "precompiled_charsmap", SM_GGUF_U8, 4 + sizeof units + sizeof strings);
    put_u32(m, sizeof units);
    put(m, units, sizeof units);
    put(m, strings, sizeof strings);
}

static void wordpiece_image(struct image *m, bool lowercase) {
    static const char *const texts[] = {
        "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\xE2\x96\x81" "a", "a", "b", "\xE2\x96\x81" "b", "he",
        "\xE2\x96\x81the", "\xE2\x96\x81" "1", "23", "\xE2\x96\x81.", "\xE2\x96\x81\xE4\xB8\xAD",
        "e", "x", "\xE2\x96\x81x", "\xCC\x81", "\xE1\x84\x80", "\xE2\x96\x81'", "s", "t", "<tool>",
    };
    size_t n = SM_COUNT(texts);
    begin(m);
    key_string(m, "model", "bert");
    key_bool(m, "normalizer.lowercase", lowercase);
    key_u32(m, "bos_token_id", 1);
    key_u32(m, "seperator_token_id", 2);
    key_u32(m, "unknown_token_id", 0);
    key_array(m, "tokens", SM_GGUF_STRING, n);
    for (size_t i = 0; i < n; i++) put_string(m, texts[i], strlen(texts[i]));
    key_array(m, "token_type", SM_GGUF_I32, n);
    for (size_t i = 0; i < n; i++) put_u32(m, i < 4 ? CONTROL : i + 1 == n ? USER : NORMAL);
    end(m);
}

static void sentencepiece_image(struct image *m, const char *model, bool bytes, bool prefix) {
    bool unigram = strcmp(model, "t5") == 0;
    size_t n_pieces = SM_COUNT(pieces), n_users = SM_COUNT(users), n_bytes = bytes ? 256 : 0;
    size_t n = 3 + n_bytes + n_pieces + n_users;
    begin(m);
    key_string(m, "model", model);
    key_bool(m, "add_space_prefix", prefix);
    if (unigram) {
        key_bool(m, "remove_extra_whitespaces", prefix);
        key_u32(m, "unknown_token_id", 0);
        key_u32(m, "eos_token_id", 2);
        put_charsmap(m);
    }
    key_array(m, "tokens", SM_GGUF_STRING, n);
    put_string(m, "<unk>", 5);
    put_string(m, "<s>", 3);
    put_string(m, "</s>", 4);
    for (unsigned b = 0; b < n_bytes; b++) {
        char s[8];
        put_string(m, s, (size_t)snprintf(s, sizeof s, "<0x%02X>", b));
    }
    for (size_t i = 0; i < n_pieces; i++) put_string(m, pieces[i], strlen(pieces[i]));
    for (size_t i = 0; i < n_users; i++) put_string(m, users[i], strlen(users[i]));
    key_array(m, "token_type", SM_GGUF_I32, n);
    put_u32(m, UNKNOWN);
    put_u32(m, CONTROL);
    put_u32(m, CONTROL);
    for (size_t i = 0; i < n_bytes; i++) put_u32(m, BYTE);
    for (size_t i = 0; i < n_pieces; i++) put_u32(m, NORMAL);
    for (size_t i = 0; i < n_users; i++) put_u32(m, USER);
    key_array(m, "scores", SM_GGUF_F32, n);
    for (size_t i = 0; i < n; i++) {
        float score = -(float)(i * 7 % 11); /* with ties */
        put(m, &score, sizeof score);
    }
    end(m);
}

static const char *const rows[] = {
    "gpt-2", "default", "smollm", "llama-bpe", "qwen2", "starcoder", "deepseek-llm",
    "deepseek-coder", "falcon", "deepseek-v3", "gpt-4o", "tekken", "qwen35",
};

/* After byte-level BPE: SentencePiece, without a prefix, without byte tokens; WordPiece twice, then
 * Unigram twice, which normalize. */
#define N_GOOD (SM_COUNT(rows) + 7)
static struct sm_tokenizer *good[N_GOOD];
static struct image images[N_GOOD];

static bool is_byte_level(size_t which) { return which < SM_COUNT(rows); }
static bool is_lossless(size_t which) { return which < SM_COUNT(rows) + 2; }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    for (size_t i = 0; i < N_GOOD; i++) {
        size_t k = i - SM_COUNT(rows);
        if (is_byte_level(i)) byte_level_image(&images[i], rows[i]);
        else if (k < 3) sentencepiece_image(&images[i], "llama", k != 2, k != 1);
        else if (k < 5) wordpiece_image(&images[i], k == 3);
        else sentencepiece_image(&images[i], "t5", k == 5, k == 5);
        CHECK(load(&images[i], &good[i]) == SMALLM_OK);
    }
    return 0;
}

/* ---- UTF-8, a second time: by decoding ------------------------------------------------------ */

/* Bytes of the character at s, or 0 where none begins there; *part: how many of the bytes present
 * could begin one (all of them where s ends too early: *cut). */
static size_t character(const uint8_t *s, size_t n, size_t *part, bool *cut) {
    *cut = false;
    *part = 1;
    size_t length = s[0] < 0x80         ? 1
                    : s[0] >> 5 == 0x06 ? 2
                    : s[0] >> 4 == 0x0E ? 3
                    : s[0] >> 3 == 0x1E ? 4
                                        : 0;
    if (length == 0) return 0;
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    uint32_t low = length == 1 ? s[0] : s[0] & (0x7Fu >> length), high;
    low <<= 6 * (length - 1);
    high = low | ((1u << (6 * (length - 1))) - 1);
    for (size_t k = 1;; k++) {
        /* The code points that may still come: is one of them a character of this length? */
        uint32_t from = SM_MAX(low, least[length]), to = SM_MIN(high, 0x10FFFFu);
        if (from >= 0xD800 && from <= 0xDFFF) from = 0xE000;
        if (to >= 0xD800 && to <= 0xDFFF) to = 0xD7FF;
        if (from > to) return 0;
        *part = k;
        if (k == length) return length;
        if (k >= n) {
            *cut = true;
            return 0;
        }
        if (s[k] >> 6 != 2) return 0;
        uint32_t bits = (uint32_t)(s[k] & 0x3F) << (6 * (length - 1 - k));
        low |= bits;
        high = low | ((1u << (6 * (length - 1 - k))) - 1);
    }
}

static bool check_utf8(const uint8_t *s, size_t n) {
    uint8_t *clean = malloc(3 * n + 1), *expected = malloc(3 * n + 1);
    CHECK(clean && expected);
    size_t n_expected = 0, complete = n, part;
    bool valid = true, cut;
    for (size_t i = 0; i < n;) {
        size_t length = character(s + i, n - i, &part, &cut);
        if (length > 0) {
            memcpy(expected + n_expected, s + i, length);
            n_expected += length;
            i += length;
            continue;
        }
        valid = false;
        if (cut) complete = i;
        memcpy(expected + n_expected, "\xEF\xBF\xBD", 3);
        n_expected += 3;
        i += part;
    }
    CHECK(sm_utf8_complete((const char *)s, n) == complete);
    CHECK(sm_utf8_clean((const char *)s, n, NULL) == n_expected);
    CHECK(sm_utf8_clean((const char *)s, n, (char *)clean) == n_expected);
    CHECK(memcmp(clean, expected, n_expected) == 0);
    free(clean);
    free(expected);
    return valid;
}

/* ---- texts ----------------------------------------------------------------------------------- */

/* Encodes and decodes; gives the text back in *back[*n_back], to be freed. */
static void round_trip(const struct sm_tokenizer *t, const uint8_t *s, size_t n, uint32_t flags,
                       char **back, size_t *n_back, int *status) {
    smallm_error err = {.size = sizeof err};
    size_t n_ids = 0, again = 0, n_bytes;
    *back = NULL;
    *status = sm_tokenizer_encode(t, (const char *)s, n, flags, NULL, 0, &n_ids, &err);
    if (*status != SMALLM_OK) {
        CHECK(err.code == *status && err.message[0] != '\0');
        return;
    }
    int32_t *ids = malloc((n_ids + 1) * sizeof *ids);
    CHECK(ids);
    *status = sm_tokenizer_encode(t, (const char *)s, n, flags, ids, n_ids, &again, &err);
    if (*status == SMALLM_OK) {
        struct sm_tokenizer_info info;
        sm_tokenizer_get_info(t, &info);
        size_t most = strcmp(info.model, "gpt2") == 0 ? 3 * n : n; /* form NFC may be longer */
        CHECK(again == n_ids && (n_ids <= most + 8 || strcmp(info.model, "t5") == 0));
        for (size_t i = 0; i < n_ids; i++)
            CHECK(ids[i] >= 0 && ids[i] < sm_tokenizer_n_vocab(t));
        CHECK(sm_tokenizer_decode(t, ids, n_ids, 0, NULL, 0, n_back, &err) == SMALLM_OK);
        *back = malloc(*n_back + 1);
        CHECK(*back);
        CHECK(sm_tokenizer_decode(t, ids, n_ids, 0, *back, *n_back, &n_bytes, &err) == SMALLM_OK);
        CHECK(n_bytes == *n_back);
        CHECK(sm_tokenizer_decode(t, ids, n_ids, SMALLM_SKIP_SPECIAL, NULL, 0, &n_bytes, &err) ==
              SMALLM_OK);
        CHECK(n_bytes <= *n_back);
    }
    free(ids);
}

struct cover {
    const char *at;
};

static int take_piece(void *ctx, const char *s, size_t n) {
    struct cover *c = ctx;
    CHECK(n > 0 && s == c->at);
    c->at = s + n;
    return 0;
}

static void check_same_nfc(struct sm_str a, struct sm_str b) {
    struct sm_nfc f[2] = {{0}, {0}};
    struct sm_str normal[2], again;
    CHECK(sm_nfc(&f[0], a, &normal[0]) && sm_nfc(&f[1], b, &normal[1]));
    CHECK(normal[0].n == normal[1].n && memcmp(normal[0].s, normal[1].s, normal[0].n) == 0);
    CHECK(normal[0].n <= 3 * a.n && sm_utf8_valid(normal[0].s, normal[0].n) == normal[0].n);
    CHECK(sm_nfc(&f[1], normal[0], &again) && again.n == normal[0].n);
    CHECK(memcmp(again.s, normal[0].s, again.n) == 0);
    sm_nfc_free(&f[0]);
    sm_nfc_free(&f[1]);
}

static void fuzz_text(size_t which, uint32_t flags, const uint8_t *s, size_t n) {
    const struct sm_tokenizer *t = good[which];
    bool valid = check_utf8(s, n);
    char *back;
    size_t n_back;
    int status;
    flags &= SMALLM_PARSE_SPECIAL;
    round_trip(t, s, n, flags, &back, &n_back, &status);
    CHECK(status == (valid ? SMALLM_OK : SMALLM_E_ARGUMENT));
    if (!valid) return;
    if (is_byte_level(which)) {
        const char *name = rows[which];
        const struct sm_pretok *pretok = sm_pretok_find(name, strlen(name));
        struct cover c = {(const char *)s};
        CHECK(sm_pretok_split(pretok, c.at, n, take_piece, &c) == 0);
        CHECK(c.at == (const char *)s + n);
        if (!sm_pretok_nfc(pretok)) CHECK(n_back == n && memcmp(back, s, n) == 0);
        check_same_nfc((struct sm_str){c.at - n, n}, (struct sm_str){back, n_back});
    } else if (is_lossless(which)) { /* U+2581 comes back as the space it stands for */
        size_t i = 0, k = 0;
        while (i < n && k < n_back) {
            bool mark = n - i >= 3 && memcmp(s + i, "\xE2\x96\x81", 3) == 0;
            CHECK((uint8_t)back[k++] == (mark ? ' ' : s[i]));
            i += mark ? 3 : 1;
        }
        CHECK(i == n && k == n_back);
    }
    free(back);
}

/* ---- hostile vocabularies ------------------------------------------------------------------- */

static const char hostile_text[] =
    " the<s>  aa\xE2\x96\x81\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80 12345\r\n\n<|im_end|></s>\tx'S\0b"
    "e\xCC\x81\xCC\xA3";

static void try_vocabulary(const struct image *m, long fail_at) {
    struct sm_tokenizer *t;
    sm_test_fail_alloc(fail_at);
    int status = load(m, &t);
    if (status == SMALLM_OK) {
        char *back;
        size_t n_back;
        round_trip(t, (const uint8_t *)hostile_text, sizeof hostile_text - 1,
                   SMALLM_ADD_SPECIAL | SMALLM_PARSE_SPECIAL, &back, &n_back, &status);
        CHECK(status == SMALLM_OK || (fail_at > 0 && status == SMALLM_E_MEMORY));
        free(back);
        struct sm_tokenizer_info info;
        sm_tokenizer_get_info(t, &info);
        CHECK(info.bos < sm_tokenizer_n_vocab(t) && info.eos < sm_tokenizer_n_vocab(t));
        CHECK(info.eos < 0 || sm_tokenizer_is_eog(t, info.eos));
        for (int32_t id = 0; id < sm_tokenizer_n_vocab(t); id++) {
            char buf[4];
            struct sm_str s = sm_tokenizer_piece(t, id, id & 1, 0, buf);
            for (size_t i = 0; i < s.n; i++) CHECK(s.s[i] == s.s[i]);
        }
        sm_tokenizer_free(t);
    }
    sm_test_fail_alloc(0);
}

/* Bytes of a good file replaced: position (2 bytes), value. */
static void fuzz_mutated(size_t which, const uint8_t *s, size_t n) {
    const struct image *from = &images[which];
    struct image m = {0};
    put(&m, from->bytes, from->n);
    for (size_t i = 0; i + 3 <= n; i += 3) m.bytes[(s[i] | (size_t)s[i + 1] << 8) % m.n] = s[i + 2];
    try_vocabulary(&m, 0);
    free(m.bytes);
}

struct reader {
    const uint8_t *s;
    size_t n, at;
};

static uint8_t next(struct reader *r) { return r->at < r->n ? r->s[r->at++] : 0; }

/* A vocabulary from the input: well-formed GGUF, texts of few letters, so that they collide. */
static void fuzz_built(const uint8_t *s, size_t n) {
    static const char *const letters[] = {
        "a", "b", "\xE2\x96\x81", " ", "Ġ", "<", "s", ">", "t", "h", "e", "1", "\xC3\xA9", "\xF0\x9F",
        "\xE4\xB8\xAD", "<0x0A>",
    };
    struct reader r = {s, n, 0};
    struct image m;
    uint8_t options = next(&r);
    static const char *const kinds[] = {"gpt2", "llama", "bert", "t5"};
    long fail_at = options & 2 ? 1 + next(&r) % 64 : 0;
    size_t n_tokens = 1 + next(&r) % 48, n_merges = next(&r) % 32;
    char texts[48][40];
    size_t lengths[48];
    for (size_t i = 0; i < n_tokens; i++) {
        lengths[i] = 0;
        for (uint8_t k = next(&r) % 6; k > 0; k--) {
            const char *letter = letters[next(&r) % SM_COUNT(letters)];
            memcpy(texts[i] + lengths[i], letter, strlen(letter));
            lengths[i] += strlen(letter);
        }
    }
    begin(&m);
    key_string(&m, "model", kinds[(options & 1) + (options >> 5 & 2)]);
    key_string(&m, "pre", rows[next(&r) % SM_COUNT(rows)]);
    key_array(&m, "tokens", SM_GGUF_STRING, n_tokens);
    for (size_t i = 0; i < n_tokens; i++) put_string(&m, texts[i], lengths[i]);
    key_array(&m, "token_type", SM_GGUF_I32, n_tokens - (options >> 2 & 1));
    for (size_t i = 0; i < n_tokens - (options >> 2 & 1); i++) put_u32(&m, next(&r) % 7);
    key_array(&m, "scores", SM_GGUF_F32, n_tokens);
    for (size_t i = 0; i < n_tokens; i++) {
        float score = (float)(int8_t)next(&r);
        put(&m, &score, sizeof score);
    }
    key_array(&m, "merges", SM_GGUF_STRING, n_merges);
    for (size_t i = 0; i < n_merges; i++) {
        size_t x = next(&r) % n_tokens, y = next(&r) % n_tokens;
        put_u64(&m, lengths[x] + 1 + lengths[y]);
        put(&m, texts[x], lengths[x]);
        put(&m, " ", 1);
        put(&m, texts[y], lengths[y]);
    }
    if (options & 8) key_u32(&m, "unknown_token_id", next(&r) % (n_tokens + 1));
    if (options & 16) key_u32(&m, "eos_token_id", next(&r) % n_tokens);
    if (options & 32) key_bool(&m, "add_space_prefix", next(&r) & 1);
    end(&m);
    try_vocabulary(&m, fail_at);
    free(m.bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *s, size_t n) {
    if (n < 3) return 0;
    size_t which = s[1] % N_GOOD;
    if (s[0] % 4 < 2) fuzz_text(which, s[2], s + 3, n - 3);
    else if (s[0] % 4 == 2) fuzz_mutated(which, s + 2, n - 2);
    else fuzz_built(s + 1, n - 1);
    return 0;
}
