/* UTF-8: see utf8.h. */
#include "utf8.h"

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

size_t sm_utf8_valid(const char *text, size_t n) {
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
