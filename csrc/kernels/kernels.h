/* The numerical kernels: one struct of slots, and the contract every tier keeps bit for bit.
 *
 * generic/ defines the answer in plain C; the other tiers overlay the slots they do faster
 * (dispatch.c), and tests/c/check_kernels holds each of them to generic bit for bit.  Kernels never
 * see models, threads or files; they allocate nothing and cannot fail, except where a slot's
 * contract says that it reports non-finite numbers.
 *
 * THE CONTRACT
 *
 * fma(a, b, c) is one correctly rounded operation everywhere (fma.h); all other float operations
 * are single IEEE binary32 operations in the order written; the compiler may not contract.
 * tree16(v) adds 16 lanes as v[i] += v[i + 8] (i < 8), then + 4, + 2, + 1.
 *
 * Activations (prepare).  Q8_32, per block of 32 values: amax = max|x|; where amax < 2^-100 all is
 * zero; else d = amax / 127, id = 127 / amax, q = clamp(round_to_even(x * id), -127, 127),
 * sum = sum of q, s = d * (float)sum.  Q8_256: the same over blocks of 256, with the integer sums
 * per 16.  F32: the values themselves.  Rows are padded with zeros to the block.
 *
 * Matrix products (matmul).  out[t][r] = dot(row r, activations t).  A lane computes one output,
 * over blocks of k in ascending order, starting from acc = 0:
 *   Q4_0 Q5_0 Q8_0   acc = fma((float)isum, dw * da, acc),   isum = sum (code - offset) * q, exact
 *   IQ4_NL MXFP4     the same with the value that the format lists for a code: isum = sum value * q
 *   Q4_1 Q5_1        acc = fma((float)isum, dw * da, acc); acc = fma(mw, s, acc),
 *                    isum = sum code * q, exact
 *   K-quants         blocks of 256 in groups (Q4_K 128, Q5_K 64, Q6_K 32, Q2_K and Q3_K 256):
 *                    acc = fma((float)isum, dw * da, acc) per group, isum = sum over sub-blocks of
 *                    scale * sum code * q, exact in int32 and in float (code less its offset for
 *                    Q3_K and Q6_K); then, for Q2_K, Q4_K and Q5_K, once per 256:
 *                    acc = fma((float)msum, -(dminw * da), acc), msum = sum over sub-blocks of
 *                    min * sum q
 *   TQ1_0 TQ2_0      acc = fma((float)isum, dw * da, acc) per 256, isum = sum (code - 1) * q, exact
 *   IQ4_XS IQ1..IQ3  acc = fma((float)isum, dw * da, acc) per group (IQ4_XS 32, IQ2 and IQ3_XXS 64,
 *                    IQ3_S and IQ1 256), isum = sum over sub-blocks of 16 of scale * sum value * q,
 *                    exact in int32 and in float; values and scales are whole numbers (codes.def), and
 *                    dw is d / 8 for IQ1 and IQ2, d / 2 for IQ3_XXS
 *   F32 F16 BF16     acc = fma(w, x, acc) for each k ascending; NVFP4 likewise, w its value
 Adapters.  To the product of a matrix with x a pair (A, B) adds, before the bias:
 *   u_i = (A x)_i * (scale * (alpha / rank));  out_r = out_r + (B u)_r
 * A x, of the float32 x, and B u as for F32; each other operation rounded once.
 * dw, mw, dminw are the file's scales as float; da, s the activation's.
 *
 * Attention (attend, attend_fold).  Scores, probabilities and sums within one absolute chunk of
 * SM_CHUNK positions; only positions lo <= j < hi of the chunk are valid:
 *   s_j = q . k_j by acc = fma(q[d], k_j[d], acc), d ascending from acc = 0 (q is pre-scaled);
 *   with a cap, s_j = softcap(s_j, cap); with slopes, then s_j = fma(slope, (float)(j - at), s_j);
 *   with biases, then s_j = s_j + bias_j
 *   m = max s_j;  e_j = expf(s_j - m);  l = tree16 of lanes lane[j % 16] += e_j, j ascending
 *   o[d] = acc = fma(e_j, v_j[d], acc), j ascending from acc = 0; then + 0.0f
 * K and V are read as the cache holds them.  int8 is read as the code c; the score is then (q . c_j) *
 * dk_j, and o[d] = fma(e_j * dv_j, c_j[d], acc); the scales dk, dv of the codes are made as the
 * activations' are, one for each position and head (NaN and codes 0 where a value is not finite).
 * f16 rounds to nearest even and saturates at +-65504.  Chunks fold left in ascending order: the first is
 * copied; then M' = max(M, m), a = expf(M - M'), b = expf(m - M'), L = fma(L, a, l * b),
 * O = fma(O, a, o * b), M = M'.  The result is O * (1 / L).  A sink, a score that has no value, is
 * a chunk before the first: m = sink, l = 1, o = 0.
 *
 * expf is expf.h's polynomial, never libm's.  silu(x) = x / (1 + expf(-x)).
 * sigmoid(x) = 1 / (1 + expf(-x)).
 * gelu(x) = x / (1 + expf(-(x * fma(B, x * x, A)))), A = 2 sqrt(2 / pi), B = 0.044715 A: the tanh
 * form 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + exp(-2 u)).
 * gelu_erf: a = |x|; t = 1 / fma(P, a, 1); q = Q[0], then q = fma(q, t, Q[i]) for i = 1 .. 8;
 * h = expf(-(x * x * 0.5f)) * (q * t); x < 0: x * h, else fma(-x, h, x): the exact form
 * 0.5 x (1 + erf(x / sqrt 2)), whose error is below 2e-7 |x|.  h is 1 - that factor for |x|, which has
 * no step near 0 and no cancellation far from it.
 * geglu(gate, up) = gelu(gate) * up; geglu_erf the same with gelu_erf.
 * relu(x) = x < 0 ? 0 : x, where NaN stays.  relu2: r = relu(x); r * r.
 * softcap(x, cap): u = expf(x * (2 / cap)); cap * ((u - 1) / (u + 1)), which is cap tanh(x / cap).
 * swiglu_clamped: g = min(gate, 7), u = max(-7, min(up, 7)), where NaN stays;
 * out = g / (1 + expf(-(g * 1.702f))) * (u + 1).
 * relu2glu: r = gate < 0 ? 0 : gate, where NaN stays; out = (r * r) * up.
 * rms_norm: lanes lane[i % 16] = fma(x_i, x_i, lane), i ascending; ss = tree16;
 * r = 1 / sqrt(ss / n + eps) + (ss - ss), NaN where the squares overflow; out_i = (x_i * r) * w_i.
 * layer_norm: lanes lane[i % 16] += x_i, i ascending; mean = tree16 / n; d_i = x_i - mean; ss, r as
 * above, of d_i; out_i = fma(d_i * r, w_i, b_i), b_i = +0 where there is no b.
 * conv: out_i = acc, acc = b_i or +0, then acc = fma(w_j[i], x_j[i], acc), j ascending over the k taps.
 * ssm_step: u_i = x_i * dt; y_i = x_i * skip; then for each s ascending h_s[i] = fma(h_s[i], decay,
 * u_i * b_s), y_i = fma(h_s[i], c_s, y_i).  dt = softplus(z), decay = exp(dt * a), both by mathx.h in
 * double and then rounded, once for each token and head.
 * rope on a pair: (x0, x1) -> (fma(x0, c, -(x1 * s)), fma(x0, s, x1 * c)).
 *
 * Router (route).  Chosen are the n_used experts with the largest logits, of equal ones (-0 = +0) those
 * with the lower ids, and they are handed on by ascending id.  m = the largest logit;
 * e_i = expf(l_i - m), of all experts or of the chosen ones alone; l = tree16 of lanes
 * lane[i % 16] += e_i, i ascending, counted over those; weight_i = (e_i * (1 / l)) * scale.
 * The experts' results add up in that order: add_scaled, out_r = fma(weight, y_r, out_r).
 *
 * Quantizing weights (fit).  fit.h is the contract: sums over a sub-block go through its values in
 * order, one lane to a sub-block, each product and sum rounded once.
 */
#ifndef SM_KERNELS_H
#define SM_KERNELS_H

#include "../quants/quants.h"

#define SM_PANEL_ROWS 16
#define SM_CHUNK 256          /* positions of an attention chunk */
#define SM_PAGE 64            /* positions of a KV page: a multiple of 16 that divides SM_CHUNK */
#define SM_CHUNK_PAGES (SM_CHUNK / SM_PAGE)
#define SM_HEAD_MAX 512       /* largest head size */
#define SM_TAPS_MAX 16        /* most taps of a convolution */
#define SM_EXPERTS_MAX 1024   /* most experts of a layer, and most that a token may use: */
#define SM_USED_MAX 64
#define SM_CLAMP_LIMIT 7.0f      /* of swiglu_clamped */
#define SM_CLAMP_ALPHA 1.702f
#define SM_GELU_A 0x1.988454p+0f /* the contract's A and B */
#define SM_GELU_B 0x1.2444f2p-4f
/* P and Q of gelu_erf.  erfc(a / sqrt 2) / 2 = exp(-a^2 / 2) t (Q[8] + Q[7] t + ...), minimax in relative
 * error, 4e-8, on 0 <= a <= 14.5. */
#define SM_GELU_ERF_P 0x1.666666p-2f
#define SM_GELU_ERF_Q                                                                          \
    {-0x1.ddb902p-6f, 0x1.26f9acp-3f, -0x1.05faa6p-2f, 0x1.464962p-3f, -0x1.7c4f8ap-6f,        \
     0x1.b057cep-4f,  0x1.eac9bap-4f, 0x1.1e70c2p-3f,  0x1.1df1c6p-3f}

/* Scratch a kernel call may use, SM_ALIGN-aligned and the thread's own; see struct users. */
#define SM_SCRATCH_BYTES ((size_t)1 << 20)

/* ---- activations ---------------------------------------------------------------------------- */

/* Rows of activations in one format.  k_pad = k rounded up to 32 (F32, Q8_32) or 256. */
struct sm_acts {
    size_t k, k_pad;
    size_t stride; /* of f and q: k_pad or a little more, lest all rows fall on the same cache lines */
    float *f;      /* F32:    [n][stride] */
    int8_t *q;     /* Q8_*:   [n][stride] */
    float *d;      /* Q8_32:  [n][k_pad / 32];  Q8_256: [n][k_pad / 256] */
    float *s;      /* Q8_32:  [n][k_pad / 32] */
    int16_t *sum;  /* Q8_32:  [n][k_pad / 32];  Q8_256: [n][k_pad / 16]: |sum| <= 32 * 127 */
};

static inline size_t sm_act_pad(enum sm_act act, size_t k) {
    return sm_round_up(k, act == SM_ACT_Q8_256 ? 256 : 32);
}
/* Bytes that sm_acts_place needs for n rows of k values. */
size_t sm_acts_bytes(enum sm_act act, size_t n, size_t k);
/* Points *a into `memory` (SM_ALIGN-aligned, sm_acts_bytes long). */
void sm_acts_place(struct sm_acts *a, enum sm_act act, size_t n, size_t k, void *memory);

/* Writes x [k] as row `row` of *a.  false where a value is infinite or NaN (the row is then
 * undefined). */
typedef bool sm_prepare_fn(struct sm_acts *a, size_t row, const float *x);

/* ---- weights: panels of 16 rows (panels.c; layouts in panels.h) --------------------------------- */

size_t sm_panel_bytes(enum sm_type t, size_t k);
/* rows: n_rows (1 .. 16) rows of the file, sm_row_bytes(t, k) apart. */
void sm_panel_pack(enum sm_type t, void *panel, const void *rows, size_t n_rows, size_t k);
/* Values of row `row` (0 .. 15) of a panel into out[k]: exactly what dequantizing the file gives. */
void sm_panel_row(enum sm_type t, const void *panel, size_t row, size_t k, float *out);

/* ---- slots ------------------------------------------------------------------------------------- */

/* out[t * ld + 16 p + r] for every token t < n_tokens, panel p < n_panels, row r < 16. */
struct sm_matmul {
    float *out;            /* [n_tokens][ld] */
    size_t ld;
    const uint8_t *panels; /* [n_panels][panel_bytes], SM_ALIGN-aligned */
    size_t panel_bytes, n_panels;
    const uint8_t *next;   /* panels as large that the thread will probably read next: a hint, or NULL */
    const struct sm_acts *acts; /* rows first .. first + n_tokens - 1 */
    size_t first, n_tokens;
    void *scratch;         /* SM_SCRATCH_BYTES */
};
typedef void sm_matmul_fn(const struct sm_matmul *m);

static inline size_t sm_kv_value_bytes(int kv_type) {
    return kv_type == SMALLM_KV_F32 ? 4 : kv_type == SMALLM_KV_F16 ? 2 : 1;
}
/* Bytes of K, or V, of one head in a page. */
static inline size_t sm_kv_part_bytes(int kv_type, size_t head) {
    size_t scales = kv_type == SMALLM_KV_Q8 ? SM_PAGE * sizeof(float) : 0;
    return SM_PAGE * head * sm_kv_value_bytes(kv_type) + scales;
}
/* The scales of an int8 page: head is a multiple of 4. */
static inline float *sm_kv_scales(const void *page, size_t head) {
    return (float *)(void *)((uintptr_t)page + SM_PAGE * head);
}

/* n_q queries against one chunk of one kv head; every query has lo < hi. */
struct sm_attend {
    const float *q;        /* [n_q][head], pre-scaled */
    const int16_t *lo, *hi; /* [n_q] valid positions of the chunk */
    size_t n_q, head;      /* n_q <= SM_ATTEND_MAX; head <= SM_HEAD_MAX, a multiple of 4 */
    float cap;             /* of the scores' soft cap; 0: none */
    const float *slope;    /* [n_q] ALiBi: what a score changes by per position; NULL: none */
    const int *at;         /* [n_q] with slopes: the query's position less the chunk's first */
    /* [n_q] pointers to [SM_CHUNK], what is added to the scores of the chunk's positions; NULL: none */
    const float *const *bias;
    const void *k[SM_CHUNK_PAGES]; /* pages: [SM_PAGE / 16][head][16] of kv_type; NULL past max(hi) */
    const void *v[SM_CHUNK_PAGES]; /* pages: [SM_PAGE][head] of kv_type; behind both, for int8, float
                                    * scales [SM_PAGE] */
    int kv_type;           /* smallm_kv_type */
    const void *next;      /* the first page the next call will read, a hint; or NULL */
    float *m, *l;          /* [n_q] out */
    float *o;              /* [n_q][head] out */
    void *scratch;         /* SM_SCRATCH_BYTES: n_q * SM_CHUNK floats of scores, and the rest free */
};
#define SM_ATTEND_MAX 64   /* queries of one call */
typedef void sm_attend_fn(const struct sm_attend *a);

/* out [n] from gate and up [n]; may work in place. */
typedef void sm_gated_fn(float *out, const float *gate, const float *up, size_t n);

/* One token of one head of a state space. */
struct sm_ssm_step {
    float *y;              /* [head] out; may be x */
    float *to;             /* [n_state][head] the state after the token; may be `from` */
    const float *from;     /* [n_state][head] and before it */
    const float *x;        /* [head] */
    const float *b, *c;    /* [n_state] how x enters the state, and how the state is read */
    float dt, decay, skip;
    size_t head, n_state;  /* head <= SM_HEAD_MAX */
};

/* The codes, scales and mins of n_blocks blocks of a format that can be written: out [n_blocks], of values
 * x [n_blocks * block_size], finite and at most SM_FIT_MAX in magnitude.  w, of the same shape, tells how
 * much an error matters: finite, of mean about 1; NULL: everywhere the same. */
typedef void sm_fit_fn(enum sm_type t, const float *x, const float *w, size_t n_blocks,
                       struct sm_codes *out);

struct sm_kernels {
    const char *name; /* the tier's, as SMALLM_ISA writes it */

    sm_prepare_fn *prepare[SM_ACT_COUNT];
    sm_matmul_fn *matmul[SM_TYPE_COUNT];

    sm_attend_fn *attend;
    /* Folds (m, l, o[head]) of the next chunk into (*M, *L, O[head]). */
    void (*attend_fold)(float *M, float *L, float *O, float m, float l, const float *o, size_t head);
    /* out[head] = O * (1 / L) */
    void (*attend_finish)(float *out, const float *O, float L, size_t head);
    /* Writes one position's K and V of one kv head into its page at slot (0 .. SM_PAGE - 1). */
    void (*kv_store)(int kv_type, void *k_page, void *v_page, size_t slot, const float *k,
                     const float *v, size_t head);

    /* Norms, softcap, sigmoid, relu, relu2 and all that is a gelu or a glu may work in place.  b may be
     * NULL. */
    void (*rms_norm)(float *out, const float *x, const float *w, size_t n, float eps);
    void (*layer_norm)(float *out, const float *x, const float *w, const float *b, size_t n, float eps);
    /* x[0 .. 2 n_pairs) in place, neighbours (x[2 i], x[2 i + 1]) turn by (cos[i], sin[i]). */
    void (*rope_pairs)(float *x, const float *cos, const float *sin, size_t n_pairs);
    /* The same for (x[i], x[i + n_pairs]). */
    void (*rope_halves)(float *x, const float *cos, const float *sin, size_t n_pairs);
    sm_gated_fn *swiglu;   /* silu(gate) * up */
    sm_gated_fn *swiglu_clamped;
    sm_gated_fn *geglu;    /* gelu(gate) * up */
    sm_gated_fn *geglu_erf; /* gelu_erf(gate) * up */
    sm_gated_fn *relu2glu; /* relu(gate)^2 * up */
    void (*gelu)(float *out, const float *x, size_t n);
    void (*gelu_erf)(float *out, const float *x, size_t n);
    void (*relu)(float *out, const float *x, size_t n);
    void (*relu2)(float *out, const float *x, size_t n);
    void (*softcap)(float *out, const float *x, float cap, size_t n);
    void (*sigmoid)(float *out, const float *x, size_t n);
    void (*silu)(float *out, const float *x, size_t n); /* may work in place */
    /* Causal convolution of n channels of one token with k taps: x [k] are rows of the token and its
     * k - 1 predecessors, oldest first, w [k][stride]; bias [n] or NULL.  out may be x[k - 1]. */
    void (*conv)(float *out, const float *const *x, const float *w, size_t stride, const float *bias,
                 size_t k, size_t n);
    void (*ssm_step)(const struct sm_ssm_step *a);
    void (*scale)(float *out, const float *x, float a, size_t n);
    void (*add)(float *out, const float *x, size_t n);                        /* out += x */
    void (*add_scaled)(float *out, const float *x, float a, size_t n);        /* out += a * x */
    /* ids, weights [n_used] of one token from logits [n_expert]; of_chosen: the softmax is over the
     * chosen ones alone.  false where a logit is infinite or NaN (nothing is then written). */
    bool (*route)(uint16_t *ids, float *weights, size_t n_used, const float *logits, size_t n_expert,
                  bool of_chosen, float scale);
    void (*peaks)(float *out, const float *x, size_t n);                      /* peaks.h */
    sm_fit_fn *fit;
};

/* The process's kernels: the best tier of isas.def that the CPU can run, or SMALLM_ISA's.
 * SMALLM_E_ARGUMENT where that names an unknown tier or one the CPU lacks. */
int sm_kernels_get(const struct sm_kernels **out, smallm_error *err);

/* Names of the tiers this CPU can run, comma-separated, best last, as many as fit. */
void sm_kernels_available(char *out, size_t capacity);

/* For tests.  Tier `i` of isas.def (0: generic) with all lower tiers below it; false past the last.
 * *usable: the CPU can run it; where not, *out holds its name alone. */
bool sm_kernels_tier(size_t i, struct sm_kernels *out, bool *usable);

#endif
