/* Text <-> token ids: byte-level BPE, SentencePiece BPE, WordPiece and Unigram, as the GGUF file
 * describes them.
 *
 * Immutable once made; any thread may use it.  No input costs more than n log n.
 * tokenizer/ holds the vocabulary and a file for each kind of model; pretok.c splits text before
 * byte-level BPE (one table row per pre-tokenizer), nfc.c normalizes it. */
#ifndef SM_TOKENIZER_H
#define SM_TOKENIZER_H

#include "gguf.h"
#include "utf8.h"

struct sm_tokenizer;

/* Reads and judges tokenizer.ggml.* : model, pre, tokens, scores, token_type, merges, the special
 * ids, add_bos_token, add_eos_token, add_space_prefix, normalizer.*.  SMALLM_E_CORRUPT: counts that
 * disagree, duplicate or malformed tokens or merges, ids out of range; SMALLM_E_UNSUPPORTED: a
 * tokenizer model or pre-tokenizer that is not in our tables (the message lists those that are).
 * Everything needed from `g` is copied. */
int sm_tokenizer_new(const struct sm_gguf *g, struct sm_tokenizer **out, smallm_error *err);
void sm_tokenizer_free(struct sm_tokenizer *t); /* NULL allowed */

int32_t sm_tokenizer_n_vocab(const struct sm_tokenizer *t);

/* As smallm_tokenize / smallm_detokenize in smallm.h. */
int sm_tokenizer_encode(const struct sm_tokenizer *t, const char *text, size_t n_bytes, uint32_t flags,
                        int32_t *ids, size_t capacity, size_t *n_ids, smallm_error *err);
int sm_tokenizer_decode(const struct sm_tokenizer *t, const int32_t *ids, size_t n_ids, uint32_t flags,
                        char *text, size_t capacity, size_t *n_bytes, smallm_error *err);

/* The bytes that token `id` (in range) adds to a text, without allocating: *s may point into the
 * tokenizer or to `buf`.  SentencePiece's leading-space rule is not applied here: `first` says that
 * this is the first token of a text, whose added space prefix is dropped. */
struct sm_str sm_tokenizer_piece(const struct sm_tokenizer *t, int32_t id, bool first, uint32_t flags,
                                 char buf[4]);

bool sm_tokenizer_is_eog(const struct sm_tokenizer *t, int32_t id); /* ends a generation */
bool sm_tokenizer_is_control(const struct sm_tokenizer *t, int32_t id);

struct sm_tokenizer_info {
    const char *model, *pre;         /* tokenizer.ggml.model; the pre-tokenizer's row name or "" */
    int32_t bos, eos, eot;           /* -1: none */
    bool add_bos, add_eos;
};
void sm_tokenizer_get_info(const struct sm_tokenizer *t, struct sm_tokenizer_info *out);

#endif
