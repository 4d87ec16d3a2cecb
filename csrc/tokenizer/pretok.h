/* Pre-tokenizers: how byte-level BPE cuts text into pieces that no merge crosses.
 *
 * One row per name in tokenizer.ggml.pre.  Each is a sequence of splitting steps, and each step is
 * a hand-written scanner that decides as the model's own expression does, in linear time. */
#ifndef SM_PRETOK_H
#define SM_PRETOK_H

#include "../base.h"

struct sm_pretok;

const struct sm_pretok *sm_pretok_find(const char *name, size_t n); /* NULL: no such row */
const char *sm_pretok_name(const struct sm_pretok *p);

/* The names of all rows, "a, b, c", cut to cap bytes and ending in NUL.  Returns buf. */
const char *sm_pretok_names(char *buf, size_t cap);

/* A piece that is a token as a whole becomes that token, whatever the merges say. */
bool sm_pretok_whole_pieces(const struct sm_pretok *p);

/* Where the file does not say: BOS is added; a text is first brought to Unicode's form NFC. */
bool sm_pretok_add_bos(const struct sm_pretok *p);
bool sm_pretok_nfc(const struct sm_pretok *p);

/* Takes one piece, n > 0.  Pieces come in order and cover the text. */
typedef int sm_piece_fn(void *ctx, const char *s, size_t n);

/* Cuts text[0..n), which is valid UTF-8.  Ends early with what `piece` returns if that is not 0. */
int sm_pretok_split(const struct sm_pretok *p, const char *text, size_t n, sm_piece_fn *piece,
                    void *ctx);

#endif
