/* Pre-tokenizers: see pretok.h.
 *
 * A step looks at a span of text and cuts it at the matches of one expression: matches and what
 * lies between them are spans for the next step.  A matcher is asked at every character of a span
 * in turn and sees nothing outside of it, which is how a sequence of isolated splits is defined.
 *
 * Invariants: a matcher reads only s[0..n), is called with i < n at the start of a character, and
 * returns the end of the match that begins at i, or i where none does.  Its cost is proportional to
 * the bytes it matches, or constant where it fails, so that a step is linear in its span.
 * match_byte_digits looks at every byte instead, match_triple after it at parts of characters. */
#include "pretok.h"

#include "../utf8.h"
#include "unicode.h"

typedef size_t match_fn(const uint8_t *s, size_t i, size_t n);

#define MAX_STEPS 6

enum { WHOLE = 1, BOS = 2, NFC = 4 }; /* what pretok.h asks of a row */

struct sm_pretok {
    const char *name;
    int flags;
    match_fn *steps[MAX_STEPS + 1]; /* ends in NULL */
};

/* ---- parts of matchers ---------------------------------------------------------------------- */

#define BIT(class) (1u << (class))
#define LETTER (BIT(SM_CHAR_UPPER) | BIT(SM_CHAR_LOWER) | BIT(SM_CHAR_LETTER))
#define MARK (BIT(SM_CHAR_NONSPACING_MARK) | BIT(SM_CHAR_MARK))
#define WORD (LETTER | BIT(SM_CHAR_NUMBER))
#define NOT_SYMBOL (WORD | BIT(SM_CHAR_SPACE)) /* [^\s\p{L}\p{N}] is what these are not */

static enum sm_char_class class_at(const uint8_t *s, size_t i, size_t *length) {
    SM_WORK();
    return sm_char_class(sm_utf8_decode(s + i, length));
}

static bool class_in(const uint8_t *s, size_t i, size_t n, unsigned classes) {
    size_t length;
    return i < n && (BIT(class_at(s, i, &length)) & classes) != 0;
}

/* End of the run of characters of these classes that begins at i; i where there is none. */
static size_t run(const uint8_t *s, size_t i, size_t n, unsigned classes) {
    size_t length;
    while (i < n && (BIT(class_at(s, i, &length)) & classes) != 0) i += length;
    return i;
}

static bool is_newline(uint8_t c) { return c == '\r' || c == '\n'; }

static uint8_t lower(uint8_t c) { return c >= 'A' && c <= 'Z' ? (uint8_t)(c + 32) : c; }

/* 's|'t|'re|'ve|'m|'ll|'d; with `fold` in upper case, too, and then U+017F counts as an s. */
static size_t contraction(const uint8_t *s, size_t i, size_t n, bool fold) {
    if (s[i] != '\'' || n - i < 2) return i;
    uint8_t a = fold ? lower(s[i + 1]) : s[i + 1];
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    if (n - i < 3) return i;
    if (fold && s[i + 1] == 0xC5 && s[i + 2] == 0xBF) return i + 3;
    uint8_t b = fold ? lower(s[i + 2]) : s[i + 2];
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
    return i;
}

/* \s+(?!\S)|\s+ : of a run of white space, all but the last character where a word follows; with
 * `newlines` before it \s*[\r\n]+ : up to the last newline of the run. */
static size_t white_space(const uint8_t *s, size_t i, size_t n, bool newlines) {
    size_t end = i, last = i, newline = i;
    while (end < n) {
        size_t length;
        if (class_at(s, end, &length) != SM_CHAR_SPACE) break;
        last = end;
        end += length;
        if (newlines && is_newline(s[last])) newline = end;
    }
    if (newline > i) return newline;
    return end < n && last > i ? last : end;
}

/* \p{N}{1,D} */
static size_t digits(const uint8_t *s, size_t i, size_t n, int max) {
    for (; max > 0 && class_in(s, i, n, BIT(SM_CHAR_NUMBER)); max--) i += sm_utf8_length(s[i]);
    return i;
}

/* \s?X+ where X are the characters that `in` accepts. */
static size_t spaced_run(const uint8_t *s, size_t i, size_t n, bool (*in)(uint32_t c)) {
    size_t length, at = i;
    if (class_at(s, i, &length) == SM_CHAR_SPACE && i + length < n) at += length;
    size_t end = at;
    while (end < n && in(sm_utf8_decode(s + end, &length))) {
        SM_WORK();
        end += length;
    }
    if (end > at) return end;
    /* The character may be white space and an X as well. */
    return in(sm_utf8_decode(s + i, &length)) ? i + length : i;
}

struct range {
    uint32_t first, last;
};

static bool in_ranges(const struct range *ranges, size_t n, uint32_t c) {
    size_t low = 0;
    while (low < n) {
        size_t middle = (low + n) / 2;
        if (c > ranges[middle].last) low = middle + 1;
        else if (c < ranges[middle].first) n = middle;
        else return true;
    }
    return false;
}

/* ---- matchers ------------------------------------------------------------------------------- */

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t match_gpt2(const uint8_t *s, size_t i, size_t n) {
    size_t end = contraction(s, i, n, false);
    if (end > i) return end;
    size_t length, at = i + (s[i] == ' ' && i + 1 < n);
    enum sm_char_class class = class_at(s, at, &length);
    if (class == SM_CHAR_SPACE) return white_space(s, i, n, false);
    return run(s, at + length, n, BIT(class) & LETTER       ? LETTER
                                  : class == SM_CHAR_NUMBER ? BIT(SM_CHAR_NUMBER)
                                                            : ~NOT_SYMBOL);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?W+|\p{N}{1,D}| ?[^\s\p{N}W]+[\r\n]*|
 * \s*[\r\n]+|\s+(?!\S)|\s+ where W are letters, or letters and marks. */
static size_t words(const uint8_t *s, size_t i, size_t n, unsigned word, int max_digits) {
    size_t end = contraction(s, i, n, true);
    if (end > i) return end;
    size_t length;
    enum sm_char_class class = class_at(s, i, &length);
    if (BIT(class) & word) return run(s, i + length, n, word);
    if (class == SM_CHAR_NUMBER) return digits(s, i, n, max_digits);
    if (!is_newline(s[i]) && class_in(s, i + length, n, word))
        return run(s, i + length, n, word);
    size_t at = i + (s[i] == ' ');
    end = run(s, at, n, ~(NOT_SYMBOL | word));
    if (end == at) return white_space(s, i, n, true);
    for (; end < n && is_newline(s[end]); end++) SM_WORK();
    return end;
}

static size_t match_llama3(const uint8_t *s, size_t i, size_t n) {
    return words(s, i, n, LETTER, 3);
}
static size_t match_qwen2(const uint8_t *s, size_t i, size_t n) {
    return words(s, i, n, LETTER, 1);
}
static size_t match_qwen35(const uint8_t *s, size_t i, size_t n) {
    return words(s, i, n, LETTER | MARK, 1);
}

/* Words of an upper and a lower part, [UO]*[LO]+ or else [UO]+[LO]*, where U is \p{Lu}\p{Lt}, L is
 * \p{Ll} and O, which may be in either part, is \p{Lm}\p{Lo}\p{M}.  The first wants something in its
 * lower part: where no \p{Ll} follows the run of [UO] that is the last O in it. */
#define EITHER (BIT(SM_CHAR_LETTER) | MARK)
#define UPPER (BIT(SM_CHAR_UPPER) | EITHER)
#define LOWER (BIT(SM_CHAR_LOWER) | EITHER)

static size_t lower_ended(const uint8_t *s, size_t i, size_t n) {
    size_t last = i, length;
    while (i < n) {
        enum sm_char_class class = class_at(s, i, &length);
        if (class == SM_CHAR_LOWER) return run(s, i, n, LOWER);
        if (!(BIT(class) & UPPER)) break;
        i += length;
        if (BIT(class) & EITHER) last = i;
    }
    return last;
}

/* [^\r\n\p{L}\p{N}]?[UO]*[LO]+C|[^\r\n\p{L}\p{N}]?[UO]+[LO]*C|\p{N}{1,D}| ?[^\s\p{L}\p{N}]+[\r\n/]*|
 * \s*[\r\n]+|\s+(?!\S)|\s+ where C is (?i:'s|'t|'re|'ve|'m|'ll|'d)? or nothing. */
static size_t cased_words(const uint8_t *s, size_t i, size_t n, int max_digits, bool contractions) {
    size_t length;
    enum sm_char_class class = class_at(s, i, &length);
    if (class == SM_CHAR_NUMBER) return digits(s, i, n, max_digits);
    size_t starts[2], n_starts = 0, end; /* of words: after a character before them, and here */
    if (!is_newline(s[i]) && !(BIT(class) & LETTER)) starts[n_starts++] = i + length;
    if (BIT(class) & (LETTER | MARK)) starts[n_starts++] = i;
    for (size_t k = 0; k < 2 * n_starts; k++) {
        size_t start = starts[k % n_starts];
        end = k < n_starts ? lower_ended(s, start, n) : run(s, start, n, UPPER);
        if (end > start) return contractions && end < n ? contraction(s, end, n, true) : end;
    }
    size_t at = i + (s[i] == ' ');
    end = run(s, at, n, ~NOT_SYMBOL);
    if (end == at) return white_space(s, i, n, true);
    for (; end < n && (is_newline(s[end]) || s[end] == '/'); end++) SM_WORK();
    return end;
}

static size_t match_gpt4o(const uint8_t *s, size_t i, size_t n) {
    return cased_words(s, i, n, 3, true);
}
static size_t match_tekken(const uint8_t *s, size_t i, size_t n) {
    return cased_words(s, i, n, 1, false);
}

/* [!-/:-@[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|
 * \s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t match_deepseek3(const uint8_t *s, size_t i, size_t n) {
    const unsigned symbol = BIT(SM_CHAR_PUNCTUATION) | BIT(SM_CHAR_SYMBOL);
    size_t length, end = i + 1;
    enum sm_char_class class = class_at(s, i, &length);
    if (s[i] < 0x80 && (BIT(class) & symbol)) {
        for (; end < n && lower(s[end]) >= 'a' && lower(s[end]) <= 'z'; end++) SM_WORK();
        if (end > i + 1) return end;
    }
    if (BIT(class) & (LETTER | MARK)) return run(s, i + length, n, LETTER | MARK);
    if (!is_newline(s[i]) && !(BIT(class) & symbol) && class_in(s, i + length, n, LETTER | MARK))
        return run(s, i + length, n, LETTER | MARK);
    size_t at = i + (s[i] == ' ');
    end = run(s, at, n, symbol);
    if (end == at) return white_space(s, i, n, true);
    for (; end < n && is_newline(s[end]); end++) SM_WORK();
    return end;
}

/* \p{N}{1,3} */
static size_t match_three_digits(const uint8_t *s, size_t i, size_t n) {
    return digits(s, i, n, 3);
}

/* [U+3040-U+30FF U+4E00-U+9FA5]+ */
static size_t match_kana_or_han(const uint8_t *s, size_t i, size_t n) {
    while (i < n) {
        size_t length;
        SM_WORK();
        uint32_t c = sm_utf8_decode(s + i, &length);
        if (!(c >= 0x3040 && c <= 0x30FF) && !(c >= 0x4E00 && c <= 0x9FA5)) break;
        i += length;
    }
    return i;
}

/* \p{N} */
static size_t match_digit(const uint8_t *s, size_t i, size_t n) {
    return class_in(s, i, n, BIT(SM_CHAR_NUMBER)) ? i + sm_utf8_length(s[i]) : i;
}

/* \p{N}+ */
static size_t match_digits(const uint8_t *s, size_t i, size_t n) {
    return run(s, i, n, BIT(SM_CHAR_NUMBER));
}

/* \p{N}+ among the characters that byte-level BPE writes bytes as: digits, and the bytes of
 * U+00B2, U+00B3, U+00B9 and U+00BC .. U+00BE in Latin-1, wherever they occur. */
static size_t match_byte_digits(const uint8_t *s, size_t i, size_t n) {
    while (i < n && ((s[i] >= '0' && s[i] <= '9') || s[i] == 0xB2 || s[i] == 0xB3 || s[i] == 0xB9 ||
                     (s[i] >= 0xBC && s[i] <= 0xBE))) {
        SM_WORK();
        i++;
    }
    return i;
}

/* [0-9][0-9][0-9] */
static size_t match_triple(const uint8_t *s, size_t i, size_t n) {
    if (n - i < 3) return i;
    for (size_t k = i; k < i + 3; k++)
        if (s[k] < '0' || s[k] > '9') return i;
    return i + 3;
}

static size_t punctuation(const uint8_t *s, size_t i, size_t n, const char *symbols) {
    while (i < n) {
        size_t length;
        enum sm_char_class class = class_at(s, i, &length);
        bool symbol = class == SM_CHAR_SYMBOL && length == 1 && strchr(symbols, s[i]) != NULL;
        if (class != SM_CHAR_PUNCTUATION && !symbol) break;
        i += length;
    }
    return i;
}

/* [\p{P}$+<=>^~|]+, and with ` as well all of ASCII's punctuation. */
static size_t match_default_marks(const uint8_t *s, size_t i, size_t n) {
    return punctuation(s, i, n, "$+<=>^~|");
}
static size_t match_falcon_marks(const uint8_t *s, size_t i, size_t n) {
    return punctuation(s, i, n, "$+<=>^~|`");
}

/* [\r\n] */
static size_t match_newline(const uint8_t *s, size_t i, size_t n) {
    (void)n;
    return i + is_newline(s[i]);
}

/* \s+$ : a run of white space matches from its start or not at all, which keeps this linear. */
static size_t match_trailing_space(const uint8_t *s, size_t i, size_t n) {
    size_t before = i;
    while (before > 0 && (s[--before] & 0xC0) == 0x80) continue;
    if (before < i && class_in(s, before, n, BIT(SM_CHAR_SPACE))) return i;
    return run(s, i, n, BIT(SM_CHAR_SPACE)) == n ? n : i;
}

static bool is_letter(uint32_t c) { return (BIT(sm_char_class(c)) & LETTER) != 0; }
static bool is_punctuation(uint32_t c) { return sm_char_class(c) == SM_CHAR_PUNCTUATION; }

/* The letters with case that deepseek-llm's expression lists one by one. */
static bool is_cased_letter(uint32_t c) {
    static const struct range ranges[] = {
        {0x41, 0x5A}, {0x61, 0x7A}, {0xB5, 0xB5}, {0xC0, 0xD6}, {0xD8, 0xF6}, {0xF8, 0x1BA},
        {0x1BC, 0x1BF}, {0x1C4, 0x293}, {0x295, 0x2AF}, {0x370, 0x373}, {0x376, 0x377},
        {0x37B, 0x37D}, {0x37F, 0x37F}, {0x386, 0x386}, {0x388, 0x38A}, {0x38C, 0x38C},
        {0x38E, 0x3A1}, {0x3A3, 0x3F5}, {0x3F7, 0x481}, {0x48A, 0x52F}, {0x531, 0x556},
        {0x10A0, 0x10C5}, {0x13A0, 0x13F5}, {0x13F8, 0x13FD}, {0x1C90, 0x1CBA}, {0x1CBD, 0x1CBF},
        {0x1D00, 0x1D2B}, {0x1D6B, 0x1D77}, {0x1D79, 0x1D9A}, {0x1E00, 0x1F15}, {0x1F18, 0x1F1D},
        {0x1F20, 0x1F45}, {0x1F48, 0x1F4D}, {0x1F50, 0x1F57}, {0x1F59, 0x1F59}, {0x1F5B, 0x1F5B},
        {0x1F5D, 0x1F5D}, {0x1F5F, 0x1F7D}, {0x1F80, 0x1FB4}, {0x1FB6, 0x1FBC}, {0x1FBE, 0x1FBE},
        {0x1FC2, 0x1FC4}, {0x1FC6, 0x1FCC}, {0x1FD0, 0x1FD3}, {0x1FD6, 0x1FDB}, {0x1FE0, 0x1FEC},
        {0x1FF2, 0x1FF4}, {0x1FF6, 0x1FFC}, {0x2102, 0x2102}, {0x2107, 0x2107}, {0x210A, 0x2113},
        {0x2115, 0x2115}, {0x2119, 0x211D}, {0x2124, 0x2124}, {0x2126, 0x2126}, {0x2128, 0x2128},
        {0x212A, 0x212D}, {0x212F, 0x2134}, {0x2139, 0x2139}, {0x213C, 0x213F}, {0x2145, 0x2149},
        {0x214E, 0x214E}, {0x2183, 0x2184}, {0x2C00, 0x2C7B}, {0x2C7E, 0x2CE4}, {0x2CEB, 0x2CEE},
        {0x2CF2, 0x2CF3}, {0xA640, 0xA66D}, {0xA680, 0xA69B}, {0xA722, 0xA76F}, {0xA771, 0xA787},
        {0xA78B, 0xA78E}, {0xAB70, 0xABBF}, {0xFB00, 0xFB06}, {0xFB13, 0xFB17}, {0xFF21, 0xFF3A},
        {0xFF41, 0xFF5A}, {0x10400, 0x1044F}, {0x104B0, 0x104D3}, {0x104D8, 0x104FB},
        {0x10C80, 0x10CB2}, {0x10CC0, 0x10CF2}, {0x118A0, 0x118DF}, {0x1E900, 0x1E943},
    };
    return in_ranges(ranges, SM_COUNT(ranges), c);
}

/* [!-/:-~], their full-width forms, quotation marks and the CJK space, comma and full stop. */
static bool is_western_mark(uint32_t c) {
    static const struct range ranges[] = {
        {0x21, 0x2F}, {0x3A, 0x7E}, {0x2018, 0x201F}, {0x3000, 0x3002}, {0xFF01, 0xFF0F},
        {0xFF1A, 0xFF5E},
    };
    return in_ranges(ranges, SM_COUNT(ranges), c);
}

static size_t match_letters(const uint8_t *s, size_t i, size_t n) {
    return spaced_run(s, i, n, is_letter);
}
static size_t match_marks(const uint8_t *s, size_t i, size_t n) {
    return spaced_run(s, i, n, is_punctuation);
}
static size_t match_cased_letters(const uint8_t *s, size_t i, size_t n) {
    return spaced_run(s, i, n, is_cased_letter);
}
static size_t match_western_marks(const uint8_t *s, size_t i, size_t n) {
    return spaced_run(s, i, n, is_western_mark);
}

/* [U+0800-U+9FA5 U+AC00-U+D7FF]+ */
static size_t match_asian(const uint8_t *s, size_t i, size_t n) {
    while (i < n) {
        size_t length;
        SM_WORK();
        uint32_t c = sm_utf8_decode(s + i, &length);
        if (!(c >= 0x800 && c <= 0x9FA5) && !(c >= 0xAC00 && c <= 0xD7FF)) break;
        i += length;
    }
    return i;
}

/* ---- the rows -------------------------------------------------------------------------------- */

/* The names are those of llama.cpp's files, which has one for each hash of a tokenizer's answers: many
 * are the same.  falcon's tokenizer takes digits apart only after it has written bytes as
 * characters.  What is punctuation there comes from a table of Unicode 8: the hundred or so characters
 * that became it since, or ceased to be it, are cut here as in today's Unicode, as in llama.cpp. */
static const struct sm_pretok rows[] = {
    {"gpt-2", 0, {match_gpt2}},
    {"phi-2", 0, {match_gpt2}},
    {"gpt-neox", NFC, {match_gpt2}},
    {"mpt", NFC, {match_gpt2}},
    {"olmo", NFC, {match_gpt2}},
    {"modern-bert", NFC, {match_gpt2}},
    {"roberta-bpe", 0, {match_gpt2}},
    {"jina-v1-en", 0, {match_gpt2}},
    {"jina-v2-es", 0, {match_gpt2}},
    {"jina-v2-de", 0, {match_gpt2}},
    {"jina-v2-code", 0, {match_gpt2}},
    {"jina-es", 0, {match_gpt2}},
    {"jina-de", 0, {match_gpt2}},
    {"exaone4", 0, {match_gpt2}},
    {"trillion", 0, {match_gpt2}},
    {"granite-docling", 0, {match_gpt2}},
    {"gigachat", 0, {match_gpt2}},
    {"a.x-4.0", 0, {match_gpt2}},
    {"mellum", 0, {match_gpt2}},
    {"jais", 0, {match_gpt2}},
    {"smollm", 0, {match_digit, match_gpt2}},
    {"starcoder", 0, {match_digit, match_gpt2}},
    {"refact", 0, {match_digit, match_gpt2}},
    {"command-r", NFC, {match_digit, match_gpt2}},
    {"exaone", 0, {match_digit, match_gpt2}},
    {"codeshell", 0, {match_digit, match_gpt2}},
    {"minerva-7b", 0, {match_digit, match_gpt2}},
    {"mellum2", 0, {match_digit, match_gpt2}},
    {"llama-bpe", WHOLE | BOS, {match_llama3}},
    {"llama3", WHOLE | BOS, {match_llama3}},
    {"llama-v3", WHOLE | BOS, {match_llama3}},
    {"lfm2", WHOLE | BOS, {match_llama3}},
    {"falcon3", WHOLE | BOS, {match_llama3}},
    {"falcon-h1", WHOLE | BOS, {match_llama3}},
    {"pixtral", WHOLE | BOS, {match_llama3}},
    {"midm-2.0", WHOLE | BOS, {match_llama3}},
    {"jina-v5-nano", WHOLE | BOS, {match_llama3}},
    {"minicpm5", WHOLE, {match_three_digits, match_llama3}},
    {"dbrx", 0, {match_llama3}},
    {"smaug-bpe", 0, {match_llama3}},
    {"glm4", 0, {match_llama3}},
    {"chatglm-bpe", 0, {match_llama3}},
    {"qwen2", NFC, {match_qwen2}},
    {"deepseek-r1-qwen", NFC, {match_qwen2}},
    {"stablelm2", 0, {match_qwen2}},
    {"megrez", 0, {match_qwen2}},
    {"hunyuan", 0, {match_qwen2}},
    {"solar-open", 0, {match_qwen2}},
    {"grok-2", 0, {match_qwen2}},
    {"kormo", 0, {match_qwen2}},
    {"f2llmv2", NFC, {match_qwen2}},
    {"qwen35", NFC, {match_qwen35}},
    {"gpt-4o", 0, {match_gpt4o}},
    {"llama4", 0, {match_gpt4o}},
    {"kanana2", 0, {match_gpt4o}},
    {"talkie", 0, {match_gpt4o}},
    {"minimax-m2", 0, {match_gpt4o}},
    {"tekken", WHOLE | BOS, {match_tekken}},
    {"deepseek-v3", 0, {match_three_digits, match_kana_or_han, match_deepseek3}},
    {"hunyuan-dense", 0, {match_three_digits, match_kana_or_han, match_deepseek3}},
    {"joyai-llm", 0, {match_three_digits, match_kana_or_han, match_deepseek3}},
    {"hy_v4", 0, {match_three_digits, match_kana_or_han, match_deepseek3}},
    {"falcon", 0, {match_falcon_marks, match_gpt2, match_byte_digits, match_triple}},
    {"default", 0, {match_default_marks, match_gpt2, match_digits, match_triple}},
    {"deepseek-coder", 0, 
     {match_newline, match_letters, match_marks, match_asian, match_digit}},
    {"deepseek-llm", 0, 
     {match_newline, match_cased_letters, match_western_marks, match_trailing_space, match_asian,
      match_digit}},
};

const struct sm_pretok *sm_pretok_find(const char *name, size_t n) {
    for (size_t i = 0; i < SM_COUNT(rows); i++)
        if (strlen(rows[i].name) == n && memcmp(rows[i].name, name, n) == 0) return &rows[i];
    return NULL;
}

const char *sm_pretok_name(const struct sm_pretok *p) { return p->name; }
bool sm_pretok_whole_pieces(const struct sm_pretok *p) { return (p->flags & WHOLE) != 0; }
bool sm_pretok_add_bos(const struct sm_pretok *p) { return (p->flags & BOS) != 0; }
bool sm_pretok_nfc(const struct sm_pretok *p) { return (p->flags & NFC) != 0; }

const char *sm_pretok_names(char *buf, size_t cap) {
    size_t at = 0;
    for (size_t i = 0; i < SM_COUNT(rows); i++) {
        const char *parts[] = {i > 0 ? ", " : "", rows[i].name};
        for (size_t k = 0; k < 2; k++) {
            size_t n = SM_MIN(strlen(parts[k]), cap - 1 - at);
            memcpy(buf + at, parts[k], n);
            at += n;
        }
    }
    buf[at] = '\0';
    return buf;
}

static int split(match_fn *const *steps, const uint8_t *s, size_t n, sm_piece_fn *piece,
                 void *ctx) {
    if (*steps == NULL) return piece(ctx, (const char *)s, n);
    size_t gap = 0, i = 0;
    while (i < n) {
        SM_WORK();
        size_t end = (*steps)(s, i, n);
        if (end == i) {
            i += *steps == match_byte_digits ? 1 : sm_utf8_length(s[i]);
            continue;
        }
        int rc = 0;
        if (gap < i) rc = split(steps + 1, s + gap, i - gap, piece, ctx);
        if (rc == 0) rc = split(steps + 1, s + i, end - i, piece, ctx);
        if (rc != 0) return rc;
        gap = i = end;
    }
    return gap < n ? split(steps + 1, s + gap, n - gap, piece, ctx) : 0;
}

int sm_pretok_split(const struct sm_pretok *p, const char *text, size_t n, sm_piece_fn *piece,
                    void *ctx) {
    return split(p->steps, (const uint8_t *)text, n, piece, ctx);
}
