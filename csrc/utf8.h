/* UTF-8 that may be cut short or wrong.  sm_utf8_length and sm_utf8_decode, for valid text, are in
 * unicode.h. */
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

#endif
