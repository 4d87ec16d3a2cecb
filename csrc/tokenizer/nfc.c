/* Unicode's canonical forms: see nfc.h.
 *
 * A character that has neither flag of unicode.h is a boundary: nothing that NFC does crosses its
 * start.  A text is looked at up to the first character that could be otherwise in NFC; what lies
 * between the boundaries around it is decomposed, put in order and composed, and so on: linear. */
#include "nfc.h"

#include "../utf8.h"
#include "unicode.h"

/* Hangul syllables are arithmetic: leading consonant, vowel, trailing consonant or none. */
enum { S_FIRST = 0xAC00, L_FIRST = 0x1100, V_FIRST = 0x1161, T_NONE = 0x11A7 };
enum { N_L = 19, N_V = 21, N_T = 28, N_S = N_L * N_V * N_T };

#define FLAGS (SM_CHAR_ORDERED | SM_CHAR_CHANGES)
#define FIRST_LEAD 0xCCu /* begins U+0300, the first character with a flag */

static const struct sm_decomposition *find_decomposition(uint32_t c) {
    size_t low = 0, high = SM_N_DECOMPOSITIONS;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (sm_decomposition_table[middle].c == c) return &sm_decomposition_table[middle];
        if (sm_decomposition_table[middle].c < c) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

size_t sm_decompose(uint32_t c, uint32_t out[SM_NFC_PARTS]) {
    uint32_t i = c - S_FIRST;
    if (i < N_S) {
        out[0] = L_FIRST + i / (N_V * N_T);
        out[1] = V_FIRST + i / N_T % N_V;
        out[2] = T_NONE + i % N_T;
        return out[2] == T_NONE ? 2 : 3;
    }
    /* Only a decomposition's first character decomposes again. */
    uint32_t last[SM_NFC_PARTS];
    size_t n_last = 0, n = 1;
    const struct sm_decomposition *d;
    while (n_last + 1 < SM_NFC_PARTS && c >= 0xC0 && (d = find_decomposition(c)) != NULL) {
        c = d->first;
        if (d->second != 0) last[n_last++] = d->second;
    }
    out[0] = c;
    while (n_last > 0) out[n++] = last[--n_last];
    return n;
}

/* The character that two become, or 0. */
static uint32_t compose(uint32_t a, uint32_t b) {
    if (a - L_FIRST < N_L && b - V_FIRST < N_V)
        return S_FIRST + ((a - L_FIRST) * N_V + (b - V_FIRST)) * N_T;
    if (a - S_FIRST < N_S && (a - S_FIRST) % N_T == 0 && b - T_NONE - 1 < N_T - 1)
        return a + (b - T_NONE);
    size_t low = 0, high = SM_N_COMPOSITIONS;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct sm_decomposition *d = &sm_decomposition_table[sm_composition_table[middle]];
        if (d->first == a && d->second == b) return d->c;
        if (d->first < a || (d->first == a && d->second < b)) low = middle + 1;
        else high = middle;
    }
    return 0;
}

/* The canonical combining class. */
static uint32_t order_of(uint32_t c) {
    if (!(sm_char_bits(c) & SM_CHAR_ORDERED)) return 0;
    size_t low = 0, high = SM_N_ORDERED;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (sm_ordered_table[middle] >> 8 <= c) low = middle;
        else high = middle;
    }
    return sm_ordered_table[low] & 0xFF;
}

/* The boundary before the first character that NFC may have otherwise; n where there is none.
 * i is a boundary. */
static size_t unchanged(const uint8_t *s, size_t i, size_t n) {
    size_t boundary = i, length;
    uint32_t before = 0;
    while (i < n) {
        uint64_t eight;
        if (n - i >= sizeof eight) {
            memcpy(&eight, s + i, sizeof eight);
            if ((eight & 0x8080808080808080u) == 0) {
                i += sizeof eight;
                boundary = i - 1;
                before = 0;
                continue;
            }
        }
        SM_WORK();
        uint32_t c = sm_utf8_decode(s + i, &length);
        unsigned flags = s[i] < FIRST_LEAD ? 0 : sm_char_bits(c) & FLAGS;
        if (flags == 0) {
            boundary = i;
            before = 0;
        } else {
            uint32_t order = (flags & SM_CHAR_CHANGES) ? 0 : order_of(c);
            if (order < before || order == 0) return boundary;
            before = order;
        }
        i += length;
    }
    return n;
}

/* ---- a part between boundaries: characters, each below its order: order << 24 | c ------------ */

#define CHAR(x) ((x) & 0xFFFFFFu)
#define ORDER(x) ((x) >> 24)

/* Stable: marks of the same order stay as they are. */
static void sort_marks(uint32_t *marks, size_t n, uint32_t *sorted) {
    size_t at[256] = {0}, from = 0;
    for (size_t i = 0; i < n; i++) at[ORDER(marks[i])]++;
    for (size_t order = 0; order < 256; order++) {
        size_t count = at[order];
        at[order] = from;
        from += count;
    }
    for (size_t i = 0; i < n; i++) sorted[at[ORDER(marks[i])]++] = marks[i];
    memcpy(marks, sorted, n * sizeof *marks);
}

static void put_in_order(uint32_t *chars, size_t n, uint32_t *spare) {
    for (size_t from = 0, to; from < n; from = to + 1) {
        bool sorted = true;
        for (to = from; to < n && ORDER(chars[to]) != 0; to++)
            sorted = sorted && (to == from || ORDER(chars[to - 1]) <= ORDER(chars[to]));
        if (!sorted) sort_marks(chars + from, to - from, spare);
    }
}

/* Joins each character to the last one of order 0 before it, unless one between them is of order 0
 * or of no lower order.  Returns how many characters are left. */
static size_t compose_part(uint32_t *chars, size_t n) {
    size_t kept = 0, starter = n; /* n: none yet */
    for (size_t i = 0; i < n; i++) {
        SM_WORK();
        uint32_t order = ORDER(chars[i]);
        if (starter < n && (kept - 1 == starter || ORDER(chars[kept - 1]) < order)) {
            uint32_t joined = compose(chars[starter], CHAR(chars[i]));
            if (joined != 0) {
                chars[starter] = joined;
                continue;
            }
        }
        if (order == 0) starter = kept;
        chars[kept++] = chars[i];
    }
    return kept;
}

/* Decomposes s from *i up to the next boundary, which *i is set to.  false: out of memory. */
static bool decompose_part(struct sm_nfc *f, const uint8_t *s, size_t n, size_t *i, size_t *n_chars) {
    size_t end = *i, count = 0, length;
    do {
        uint32_t parts[SM_NFC_PARTS], c = sm_utf8_decode(s + end, &length);
        if (count > 0 && (sm_char_bits(c) & FLAGS) == 0) break;
        size_t n_parts = sm_decompose(c, parts);
        if (!sm_grow(&f->chars, &f->cap_chars, 2 * (count + n_parts), sizeof *f->chars)) return false;
        for (size_t k = 0; k < n_parts; k++) {
            SM_WORK();
            f->chars[count++] = order_of(parts[k]) << 24 | parts[k];
        }
        end += length;
    } while (end < n);
    *i = end;
    *n_chars = count;
    return true;
}

bool sm_nfc(struct sm_nfc *f, struct sm_str in, struct sm_str *out) {
    const uint8_t *s = (const uint8_t *)in.s;
    size_t n = in.n, written = 0, n_chars, i = 0;
    for (;;) {
        size_t from = i;
        i = unchanged(s, from, n);
        if (i == n && from == 0) {
            *out = in;
            return true;
        }
        if (!sm_grow(&f->text, &f->cap_text, written + (i - from), 1)) return false;
        if (i > from) memcpy(f->text + written, s + from, i - from);
        written += i - from;
        if (i == n) break;
        if (!decompose_part(f, s, n, &i, &n_chars)) return false;
        put_in_order(f->chars, n_chars, f->chars + n_chars);
        n_chars = compose_part(f->chars, n_chars);
        if (!sm_grow(&f->text, &f->cap_text, written + 4 * n_chars, 1)) return false;
        for (size_t k = 0; k < n_chars; k++)
            written += sm_utf8_encode(CHAR(f->chars[k]), f->text + written);
    }
    *out = (struct sm_str){f->text, written};
    return true;
}

void sm_nfc_free(struct sm_nfc *f) {
    sm_free(f->text);
    sm_free(f->chars);
}
