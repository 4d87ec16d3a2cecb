/* smallm: small quantized language models on ordinary CPUs.
 *
 * The only public C header.  The Python binding is generated from the section between the two
 * BINDING marks, which therefore holds plain declarations only.
 *
 * Conventions
 *   - A function that can fail returns SMALLM_OK (0) or a negative smallm_status and, where it takes
 *     a `smallm_error *` (may be NULL), fills it with the code and a message that names the file, key
 *     or tensor, the value found and the value allowed.
 *   - Public structs begin with `size`: set it to sizeof(the struct) before the call.  A smaller
 *     size (an older caller) reads the missing fields as zero.  Zero is every field's default.
 *   - Strings are UTF-8.  A `const char *` that comes with a length need not end in NUL.
 *   - The library never exits, aborts, prints or touches the network.
 *   - After fork() every object of the parent is dead in the child: calls on it return
 *     SMALLM_E_FORKED, and the free/close functions do nothing.
 */
#ifndef SMALLM_H
#define SMALLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__) && !defined(_WIN32)
#pragma GCC visibility push(default)
#endif

/* ---- BEGIN BINDING ---- */

enum smallm_status {
    SMALLM_OK = 0,
    SMALLM_AGAIN = 1,          /* nothing yet: call again */
    SMALLM_DONE = 2,           /* nothing more will come */
    SMALLM_E_ARGUMENT = -1,    /* an argument is out of its range */
    SMALLM_E_MEMORY = -2,      /* an allocation failed */
    SMALLM_E_IO = -3,          /* reading the file failed */
    SMALLM_E_NOT_FOUND = -4,   /* no such file */
    SMALLM_E_CORRUPT = -5,     /* the file contradicts itself or its format */
    SMALLM_E_UNSUPPORTED = -6, /* well formed, but of a kind this version cannot run */
    SMALLM_E_CONTEXT = -7,     /* more tokens than the context holds */
    SMALLM_E_BUDGET = -8,      /* would need more memory than memory_limit */
    SMALLM_E_CANCELLED = -9,   /* cancelled by the caller */
    SMALLM_E_CLOSED = -10,     /* the engine is closed */
    SMALLM_E_FORKED = -11,     /* called in a child of fork() */
    SMALLM_E_NUMERIC = -12     /* an activation became infinite or NaN */
};

typedef struct smallm_error {
    size_t size;
    int32_t code;       /* a smallm_status */
    char message[1012]; /* NUL-terminated UTF-8 */
} smallm_error;

/* "0.1.0" */
const char *smallm_version(void);

/* ---- the machine -------------------------------------------------------------------------- */

typedef struct smallm_cpu_info {
    size_t size;
    char isa[16];            /* tier in use: the best one, or SMALLM_ISA's */
    char available[128];     /* tiers this CPU can run, comma-separated, best last */
    char brand[64];          /* the CPU's own name, or "" */
    int32_t n_threads;       /* default thread count: min(affinity, quota, physical cores) */
    int32_t n_logical;       /* logical processors this process may use */
    uint64_t total_memory;   /* bytes; the container's limit where there is one */
} smallm_cpu_info;

/* Fails with SMALLM_E_ARGUMENT where SMALLM_ISA names a tier that is unknown or that this CPU lacks. */
int smallm_cpu(smallm_cpu_info *out, smallm_error *err);

/* ---- models ------------------------------------------------------------------------------- */

typedef struct smallm_model smallm_model; /* immutable once open; any thread may use it */

typedef struct smallm_model_params {
    size_t size;
    int32_t n_threads;     /* threads that pack the weights; 0: the default count */
    uint64_t memory_limit; /* bytes for packed weights, 0: none; judged before they are allocated */
} smallm_model_params;

/* Opens a GGUF file (or the first part of a split one), judges all of it, then packs the weights.
 * `params` may be NULL.  On success *out is the caller's, to be freed with smallm_model_free. */
int smallm_model_open(const char *path, const smallm_model_params *params, smallm_model **out,
                      smallm_error *err);

/* NULL is allowed.  Close every engine of the model first. */
void smallm_model_free(smallm_model *model);

typedef struct smallm_model_info {
    size_t size;
    char architecture[64];
    char formats[256];     /* weight formats by bytes, e.g. "Q4_1 69 %, Q8_0 31 %" */
    uint64_t n_params;     /* all, those of experts a token does not use included */
    uint64_t n_file_bytes; /* tensor data in the file */
    uint64_t n_packed_bytes;
    uint64_t n_token_bytes; /* weight bytes read to decode one token: of experts, those of the chosen */
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff, head_size; /* an encoder's
                                layers are counted, too */
    int32_t bos, eos, eot;   /* token ids, -1: none */
    bool add_bos, add_eos;
    char tokenizer[32];      /* "gpt2" (byte-level BPE), "llama" (SentencePiece BPE), "bert" (WordPiece)
                                or "t5" (Unigram) */
    char pre_tokenizer[32];
    double load_s;           /* seconds smallm_model_open took */
    int32_t decoder_start;   /* encoder-decoders: the token that an answer begins with; else -1 */
} smallm_model_info;

int smallm_model_get_info(const smallm_model *model, smallm_model_info *out, smallm_error *err);

/* The file's scalar and string metadata (arrays are left out), each as text: numbers in decimal,
 * bools "true" / "false".  Entry `i` in file order; SMALLM_DONE past the last one.  The pointers live
 * as long as the model; both strings end in NUL, which *n_value does not count. */
int smallm_model_metadata(const smallm_model *model, size_t i, const char **key, const char **value,
                          size_t *n_value);

/* ---- adapters ----------------------------------------------------------------------------- */

/* LoRA matrices for a model, to be named by requests; immutable once open; any thread may use it, in any
 * number of requests, with other adapters and none beside it. */
typedef struct smallm_adapter smallm_adapter;

typedef struct smallm_adapter_params {
    size_t size;
    uint64_t memory_limit; /* bytes for its matrices, 0: none; judged before they are allocated */
} smallm_adapter_params;

/* Opens a GGUF adapter (general.type "adapter", adapter.type "lora") for `model`, which must outlive
 * it, and judges all of it: architecture, names and shapes have to be the model's.  `params` may be
 * NULL.  On success *out is the caller's, to be freed with smallm_adapter_free. */
int smallm_adapter_open(const smallm_model *model, const char *path,
                        const smallm_adapter_params *params, smallm_adapter **out,
                        smallm_error *err);

/* NULL is allowed, as are requests that name it and still run: its memory goes when the last of them
 * has been freed and no engine keeps a text that was made with it. */
void smallm_adapter_free(smallm_adapter *adapter);

typedef struct smallm_adapter_info {
    size_t size;
    uint64_t n_bytes;   /* in memory */
    int32_t n_matrices; /* of the model that it changes */
    int32_t rank;       /* the largest */
} smallm_adapter_info;

int smallm_adapter_get_info(const smallm_adapter *adapter, smallm_adapter_info *out,
                            smallm_error *err);

/* ---- text <-> tokens ----------------------------------------------------------------------- */

enum smallm_token_flags {
    SMALLM_ADD_SPECIAL = 1,   /* tokenize: add BOS / EOS as the file asks */
    SMALLM_PARSE_SPECIAL = 2, /* tokenize: "<|im_start|>" in the text becomes that token */
    SMALLM_SKIP_SPECIAL = 4   /* detokenize: control tokens give no text */
};

/* Writes at most `capacity` ids and always sets *n_ids to the number there are: with
 * *n_ids > capacity call again with room.  n_bytes + 8 ids suffice, unless the model's tokenizer
 * normalizes the text first and makes it longer so (Unigram; Unicode's form NFC).
 * SMALLM_E_ARGUMENT: the text is not valid UTF-8 (the message names the byte's position). */
int smallm_tokenize(const smallm_model *model, const char *text, size_t n_bytes, uint32_t flags,
                    int32_t *ids, size_t capacity, size_t *n_ids, smallm_error *err);

/* Writes at most `capacity` bytes (no NUL) and always sets *n_bytes to the number there are.
 * The bytes are the tokens' own: an id sequence cut inside a character gives cut UTF-8.  The ids of a
 * text give it back, as the tokenizer normalizes it where it does.
 * SMALLM_E_ARGUMENT: an id is outside 0 .. n_vocab-1. */
int smallm_detokenize(const smallm_model *model, const int32_t *ids, size_t n_ids, uint32_t flags,
                      char *text, size_t capacity, size_t *n_bytes, smallm_error *err);

/* ---- generating ---------------------------------------------------------------------------- */

typedef struct smallm_engine smallm_engine;   /* one thread that owns a batch; any thread may call */
typedef struct smallm_request smallm_request; /* one prompt and its answer; one thread pulls at a time */

/* Q8: int8 with a float scale for each position and head: half of F16's memory. */
enum smallm_kv_type { SMALLM_KV_F16 = 0, SMALLM_KV_F32 = 1, SMALLM_KV_Q8 = 2 };

typedef struct smallm_engine_params {
    size_t size;
    int32_t n_threads;     /* 0: SMALLM_THREADS, else the default count; 1 .. 256 */
    int32_t n_ctx;         /* positions a sequence may hold; 0: the trained length */
    int32_t n_batch;       /* tokens in one forward pass, 1 .. 2048; 0: 512.  A text that an encoder reads
                            * is one pass, however long: scratch then grows with it */
    int32_t kv_type;       /* smallm_kv_type */
    uint64_t memory_limit; /* bytes for KV cache, states and scratch, 0: none */
    int32_t timers;        /* 1: keeps smallm_engine_timer's sums; 0: only where SMALLM_TIMERS=1 */
    int32_t statistics;    /* 1: keeps smallm_engine_statistic's sums; texts then share no cache */
} smallm_engine_params;

/* `params` may be NULL.  The model must outlive the engine. */
int smallm_engine_open(const smallm_model *model, const smallm_engine_params *params,
                       smallm_engine **out, smallm_error *err);

/* Cancels what runs, waits for the engine's thread, frees.  NULL is allowed.  Requests stay valid
 * (they report SMALLM_E_CLOSED) until smallm_request_free. */
void smallm_engine_close(smallm_engine *engine);

typedef struct smallm_engine_info {
    size_t size;
    int32_t n_threads, n_ctx, n_batch, kv_type;
    uint64_t n_cache_bytes;   /* KV pages and states allocated so far */
    uint64_t n_scratch_bytes;
    uint64_t n_forward;       /* forward passes run */
    uint64_t n_tokens;        /* tokens those passes held */
    int32_t n_running;        /* requests running or waiting */
} smallm_engine_info;

int smallm_engine_get_info(smallm_engine *engine, smallm_engine_info *out, smallm_error *err);

typedef struct smallm_timer {
    size_t size;
    char name[32];  /* "wait", "attention", "matmul Q4_1", ... */
    double seconds; /* summed over the threads */
} smallm_timer;

/* Where the engine's threads spent the time of the forward passes so far: entry `i`; SMALLM_DONE past
 * the last one, which is the first one where timers are not kept. */
int smallm_engine_timer(smallm_engine *engine, size_t i, smallm_timer *out, smallm_error *err);

typedef struct smallm_statistic {
    size_t size;
    char name[64];     /* of a tensor that is a matrix of the model's layers */
    int32_t n_experts; /* whose matrices it holds; else 1 */
    int32_t n_cols;
} smallm_statistic;

/* What the engine has multiplied matrix `i` of the model's layers with so far; SMALLM_DONE past the last
 * one, which is the first one where statistics are not kept.  squares: NULL, or room for
 * [n_experts][n_cols] sums of squares; counts: NULL, or room for [n_experts] numbers of tokens that these
 * are sums over, 0: that expert was not chosen.  The same sums come from any number of threads and
 * whatever n_chunk.  SMALLM_E_ARGUMENT: a request runs; SMALLM_E_CANCELLED: a pass broke off, as one was
 * cancelled, so that the sums are not of whole texts. */
int smallm_engine_statistic(smallm_engine *engine, size_t i, smallm_statistic *out, double *squares,
                            uint64_t *counts, smallm_error *err);

/* Sampling, applied in this order: penalties, bias, mask, top_k, typical, top_p, min_p, temperature. */
typedef struct smallm_sampling {
    size_t size;
    float temperature;       /* 0: greedy (ties go to the lower id); >= 0 */
    int32_t top_k;           /* keep the k most probable; 0: all */
    float top_p;             /* keep the fewest with this mass; 0 or 1: all */
    float min_p;             /* drop below min_p * the best probability; 0: none; < 1 */
    float typical_p;         /* locally typical mass; 0 or 1: all */
    float repeat_penalty;    /* logits of recent tokens / by this (* where negative); 0 or 1: none */
    float frequency_penalty; /* subtracted per occurrence */
    float presence_penalty;  /* subtracted once */
    int32_t repeat_last_n;   /* window of the three penalties in tokens; 0: none, -1: the context */
    uint64_t seed;
    const int32_t *bias_ids; /* [n_bias] */
    const float *bias;       /* [n_bias], added to logits; -INFINITY forbids */
    size_t n_bias;
    const uint32_t *allowed; /* [(n_vocab + 31) / 32] bit i of word w allows token 32 w + i; NULL: all */
} smallm_sampling;

typedef struct smallm_request_params {
    size_t size;
    const int32_t *tokens;   /* [n_tokens] the prompt, at least 1 */
    size_t n_tokens;
    int32_t max_tokens;      /* >= 0; generation also ends where the context does */
    int32_t n_logprobs;      /* alternatives reported with each token, 0 .. 64; -1: not even its own */
    smallm_sampling sampling;
    const char *const *stop; /* [n_stop] strings that end the answer and are not part of it */
    const size_t *stop_len;  /* [n_stop] bytes, each > 0 */
    size_t n_stop;
    float *logits;           /* NULL, or [n_logits][n_vocab]: filled with the logits of the prompt's last
                                n_logits tokens; the caller keeps it alive until the request is done
                                or freed */
    int32_t n_chunk;         /* tokens prefilled in one pass, 1 .. n_batch; 0: n_batch */
    float adapter_scale;     /* what `adapter` adds is multiplied by this; 0: 1 */
    smallm_adapter *adapter; /* of the engine's model, or NULL: the model alone */
    /* Encoder-decoders: [n_source] the text that the encoder reads, in one pass; 1 .. n_ctx.  `tokens`
     * are then what the answer begins with, the model's decoder_start first.  Other models have none. */
    const int32_t *source;
    size_t n_source;
    float *embedding;        /* NULL, or [n_embd]: filled with one vector for all tokens, pooled from the
                                last layer's as the model says (mean where it does not), of any length.
                                The caller keeps it alive as with logits, with which it does not go;
                                max_tokens is 0 */
    size_t n_logits;         /* rows of `logits`, at most n_tokens; 0: n_tokens */
} smallm_request_params;

/* Everything in `params` but `logits` and `embedding` is copied, and the adapter is held.  *out is
 * the caller's, to be freed with smallm_request_free.  SMALLM_E_CONTEXT: the prompt alone exceeds
 * n_ctx. */
int smallm_engine_submit(smallm_engine *engine, const smallm_request_params *params,
                         smallm_request **out, smallm_error *err);

enum smallm_finish {
    SMALLM_FINISH_NONE = 0, /* still running */
    SMALLM_FINISH_STOP = 1, /* an end-of-generation token or a stop string */
    SMALLM_FINISH_LENGTH = 2,
    SMALLM_FINISH_CANCELLED = 3,
    SMALLM_FINISH_ERROR = 4
};

typedef struct smallm_chunk {
    size_t size;
    int32_t token;       /* -1: only held-back text */
    float logprob;       /* natural log of the token's probability before sampling cuts; NaN if not asked */
    const char *text;    /* [n_text] whole UTF-8 characters; may be empty while a stop string or a
                            character could still be completed.  Valid until the next call */
    size_t n_text;
    const int32_t *top_ids;      /* [n_top] most probable first */
    const float *top_logprobs;   /* [n_top] */
    int32_t n_top;
    int32_t finish;      /* smallm_finish; other than NONE on the last chunk */
} smallm_chunk;

/* Waits at most timeout_ms (0: only looks) for the next token.  SMALLM_OK: *out is filled;
 * SMALLM_AGAIN: nothing yet; SMALLM_DONE: the answer has ended.  Negative: the request failed.
 * The engine never waits for the reader.  Where tokens come faster than every 10 ms it wakes a reader
 * that waits about that often, and several are then there at once. */
int smallm_request_next(smallm_request *request, int32_t timeout_ms, smallm_chunk *out,
                        smallm_error *err);

/* Takes effect before the next phase of a forward pass.  Any thread may call it. */
void smallm_request_cancel(smallm_request *request);

typedef struct smallm_request_stats {
    size_t size;
    /* tokens; n_cached of the prompt came from the cache; a source is part of it */
    int32_t n_prompt, n_cached, n_completion;
    int32_t n_chunks;     /* forward passes that held a part of the prompt */
    int32_t finish;       /* smallm_finish */
    double queue_s, prefill_s, decode_s, ttft_s; /* seconds; ttft: submit to first token */
} smallm_request_stats;

int smallm_request_get_stats(smallm_request *request, smallm_request_stats *out, smallm_error *err);

/* Cancels if it still runs and waits until the engine no longer touches it.  NULL is allowed. */
void smallm_request_free(smallm_request *request);

/* ---- weight formats ------------------------------------------------------------------------ */

typedef struct smallm_format {
    size_t size;
    char name[16];          /* "Q4_K" */
    uint32_t id;            /* its number in GGUF files */
    int32_t n_block_values; /* a row is whole blocks of this many values */
    int32_t n_block_bytes;
    bool writable;          /* smallm_quantize can write it */
} smallm_format;

/* Format `i` of those this version reads; SMALLM_DONE past the last one. */
int smallm_get_format(size_t i, smallm_format *out, smallm_error *err);

typedef struct smallm_quantize_params {
    size_t size;
    uint32_t from, to;       /* formats' ids; equal ones are written anew */
    const void *in;          /* [n_rows] rows of n_cols values in `from` */
    void *out;               /* [n_rows] rows of n_cols values in `to` */
    size_t n_in, n_out;      /* bytes, which have to be what the shape says */
    size_t n_rows, n_cols;   /* n_cols: whole blocks of both formats */
    const float *importance; /* [n_cols] how much errors in a column matter, >= 0, of any scale, as
                                of the inputs' mean squares; NULL: all alike */
    int32_t n_threads;       /* 0: the default count */
} smallm_quantize_params;

/* Writes numbers in another weight format, as near as it can: sum importance * error^2 is made small.
 * The same bytes come on every machine, from any number of threads.  Runs until it is done; calls may
 * run at the same time.  SMALLM_E_CORRUPT: a value is infinite or NaN; SMALLM_E_UNSUPPORTED: a value
 * is beyond the format's range, or a format is unknown or only read; the message says which. */
int smallm_quantize(const smallm_quantize_params *params, smallm_error *err);

/* ---- END BINDING ---- */

#if defined(__GNUC__) && !defined(_WIN32)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
