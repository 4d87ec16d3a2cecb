/* UTF-8 that may be cut short or wrong, and decoding and writing of what is valid. */
#ifndef SM_UTF8_H
#define SM_UTF8_H

#include "base.h"

/* Position of the first byte that does not belong to valid UTF-8; n where all of it is. */
size_t sm_utf8_valid(const char *s, size_t n);

/* Length of the longest prefix of s[0..n) that does not end inside a UTF-8 character which more
 * bytes could still complete.  Bytes that can never become valid count as complete. */
size_t sm_utf8_complete(const char *s, size_t n);

/* Copies s[0..n) to out, replacing each maximal invalid part by U+FFFD (3 bytes); out may be NULL
 * (only counts).  Returns the bytes needed: at most 3 n. */
size_t sm_utf8_clean(const char *s, size_t n, char *out);

/* Bytes of the character that begins with `lead`. */
static inline size_t sm_utf8_length(uint8_t lead) {
    return lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

/* The character at s, which begins one in valid UTF-8; *n is set to its bytes. */
static inline uint32_t sm_utf8_decode(const uint8_t *s, size_t *n) {
    if (s[0] < 0x80) {
        *n = 1;
        return s[0];
    }
    *n = sm_utf8_length(s[0]);
    if (*n == 2) return (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu);
    if (*n == 3) return (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu);
    return (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
}

/* Writes a character; returns its bytes. */
static inline size_t sm_utf8_encode(uint32_t c, void *out) {
    uint8_t *s = out;
    if (c < 0x80) {
        s[0] = (uint8_t)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) s[i] = (uint8_t)(0x80 | (c & 0x3F));
    s[0] = (uint8_t)((0xF00u >> n & 0xF0) | c);
    return n;
}

#endif
