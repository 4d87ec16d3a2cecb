/* Characters: their class and lower case, their base without accents (tables in unicode.c, generated
 * by scripts/make_unicode.py), and decoding of UTF-8 that is known to be valid. */
#ifndef SM_UNICODE_H
#define SM_UNICODE_H

#include "base.h"

/* The general category: letters are Lu and Lt, Ll, Lm and Lo; marks are Mn, and Mc and Me; else its
 * first letter.  SM_CHAR_SPACE is the White_Space property (all of category Z, and the controls
 * U+0009..U+000D and U+0085). */
enum sm_char_class {
    SM_CHAR_OTHER, SM_CHAR_UPPER, SM_CHAR_LOWER, SM_CHAR_LETTER, SM_CHAR_NUMBER,
    SM_CHAR_NONSPACING_MARK, SM_CHAR_MARK, SM_CHAR_PUNCTUATION, SM_CHAR_SYMBOL, SM_CHAR_SPACE
};

#define SM_CHAR_CLASS_BLOCK 128u
#define SM_CHAR_CLASS_LIMIT 0xE0200u

extern const uint8_t sm_char_class_index[];  /* [SM_CHAR_CLASS_LIMIT / SM_CHAR_CLASS_BLOCK] */
extern const uint8_t sm_char_class_blocks[]; /* [blocks][SM_CHAR_CLASS_BLOCK] */

static inline enum sm_char_class sm_char_class(uint32_t c) {
    if (c >= SM_CHAR_CLASS_LIMIT) return SM_CHAR_OTHER;
    size_t block = sm_char_class_index[c / SM_CHAR_CLASS_BLOCK];
    return (enum sm_char_class)sm_char_class_blocks[block * SM_CHAR_CLASS_BLOCK +
                                                    c % SM_CHAR_CLASS_BLOCK];
}

#define SM_N_LOWER 1458u
#define SM_N_BASE 2055u

extern const struct sm_lower {
    uint32_t c, lower;
} sm_lower_table[]; /* [SM_N_LOWER] ascending by c; U+0130 is not there: it becomes two characters */

/* Canonical decompositions without their nonspacing marks; Hangul syllables are not there. */
extern const struct sm_base {
    uint32_t c, to[3]; /* 0: no more */
} sm_base_table[]; /* [SM_N_BASE] ascending by c */

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

#endif
