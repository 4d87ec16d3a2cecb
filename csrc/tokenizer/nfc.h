/* Unicode's canonical forms: decomposition of a character, and NFC of a text, to which some models'
 * tokenizers bring a text first. */
#ifndef SM_NFC_H
#define SM_NFC_H

#include "../gguf.h"

#define SM_NFC_PARTS 4 /* the most characters that one decomposes into */

/* Full canonical decomposition; returns how many characters, in canonical order. */
size_t sm_decompose(uint32_t c, uint32_t out[SM_NFC_PARTS]);

struct sm_nfc { /* all 0: new */
    char *text;
    uint32_t *chars; /* [cap_chars] of a part, then as many to sort them */
    size_t cap_text, cap_chars;
};

/* *out is in[0..n) in form NFC: itself where it is, else in f, at most 3 n bytes.  `in` is valid
 * UTF-8.  false: out of memory. */
bool sm_nfc(struct sm_nfc *f, struct sm_str in, struct sm_str *out);
void sm_nfc_free(struct sm_nfc *f);

#endif
