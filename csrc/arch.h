/* Architectures: one row each, holding only what the file does not say.
 *
 * Sizes and constants come from the file's keys, options from the tensors that are there
 * (tensors.def).  No other file knows an architecture's name. */
#ifndef SM_ARCH_H
#define SM_ARCH_H

#include "gguf.h"

enum sm_rope_style {
    SM_ROPE_PAIRS /* turns neighbours (x[2 i], x[2 i + 1]) */
};

struct sm_arch {
    const char *name; /* general.architecture, and the prefix of its keys */
    enum sm_rope_style rope;
};

struct sm_hparams {
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;
    int head;           /* size of one head's q, k and v */
    int n_rot;          /* leading dimensions of a head that rope turns, even */
    int window;         /* positions a query sees, its own included; 0: all */
    float norm_eps;
    double rope_base;   /* pair i turns by position * rope_scale / factor[i] * base^(-2 i / n_rot) */
    double rope_scale;
};

/* The row the file asks for.  SMALLM_E_UNSUPPORTED lists those there are. */
int sm_arch_find(const struct sm_gguf *g, const struct sm_arch **out, smallm_error *err);

/* Reads and judges all hyperparameters.  n_vocab is what the key vocab_size says, 0 where it is
 * missing: the tokenizer decides. */
int sm_arch_read(const struct sm_arch *arch, const struct sm_gguf *g, struct sm_hparams *h,
                 smallm_error *err);

#endif
