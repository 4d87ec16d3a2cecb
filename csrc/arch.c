/* The table of architectures, and the reading of their keys. */
#include "arch.h"

#include <math.h>
#include <stdio.h>

#include "kernels/kernels.h"

static const struct sm_arch archs[] = {
    {.name = "llama", .models = "Llama 2 and 3, Mistral, SmolLM2, TinyLlama, Gorilla",
     .rope = SM_ROPE_PAIRS},
    {.name = "mistral3", .models = "Ministral 3, Mistral Small 3.1", .rope = SM_ROPE_PAIRS},
    {.name = "qwen2", .models = "Qwen2, Qwen2.5", .rope = SM_ROPE_HALVES, .bias = SM_BIAS_QKV},
    {.name = "qwen3", .models = "Qwen3", .rope = SM_ROPE_HALVES, .qk_norm = SM_QK_NORM_HEAD},
    {.name = "gemma", .models = "Gemma", .rope = SM_ROPE_HALVES, .ffn = SM_FFN_GEGLU,
     .scaled_embeddings = true},
    {.name = "gemma2", .models = "Gemma 2", .rope = SM_ROPE_HALVES, .norms = SM_NORMS_AROUND,
     .ffn = SM_FFN_GEGLU, .window = 4096, .window_period = 2, .scaled_embeddings = true,
     .attn_cap = 50, .logit_cap = 30, .wide_layers = 46},
    {.name = "gemma3", .models = "Gemma 3 (text)", .rope = SM_ROPE_HALVES, .norms = SM_NORMS_AROUND,
     .qk_norm = SM_QK_NORM_HEAD, .ffn = SM_FFN_GEGLU, .window_period = 6, .local_base = 10000,
     .plain_windows = true, .scaled_embeddings = true, .wide_layers = 62},
    {.name = "olmo", .models = "OLMo", .rope = SM_ROPE_PAIRS, .norm = SM_NORM_LAYER_BARE},
    {.name = "olmo2", .models = "OLMo 2 and 3", .rope = SM_ROPE_HALVES, .norms = SM_NORMS_AFTER,
     .qk_norm = SM_QK_NORM_ROW, .window_period = 4, .plain_windows = true},
    {.name = "granite", .models = "Granite 3 and 4 (dense)", .rope = SM_ROPE_PAIRS, .rope_by_key = true,
     .divided_logits = true},
    {.name = "granitehybrid", .models = "Granite 4 H", .rope = SM_ROPE_PAIRS, .rope_by_key = true,
     .router = SM_ROUTER_CHOSEN, .may_be_dense = true, .divided_logits = true},
    {.name = "minicpm", .models = "MiniCPM, MiniCPM4", .rope = SM_ROPE_PAIRS, .divided_logits = true,
     .named_scales = true},
    {.name = "smollm3", .models = "SmolLM3", .rope = SM_ROPE_PAIRS, .unturned_period = 4},
    {.name = "stablelm", .models = "StableLM 2, StableLM 3B, Zephyr", .rope = SM_ROPE_HALVES,
     .norm = SM_NORM_LAYER, .qk_norm = SM_QK_NORM_HEADS, .parallel = SM_PARALLEL_IF_SHARED},
    {.name = "command-r", .models = "Command R, Aya 23", .rope = SM_ROPE_PAIRS,
     .norm = SM_NORM_LAYER_PLAIN, .qk_norm = SM_QK_NORM_HEADS, .parallel = SM_PARALLEL_SHARED},
    {.name = "cohere2", .models = "Command R7B", .rope = SM_ROPE_PAIRS, .norm = SM_NORM_LAYER_PLAIN,
     .parallel = SM_PARALLEL_SHARED, .window_period = 4, .turns_windows = true},
    {.name = "exaone", .models = "EXAONE 3 and 3.5", .rope = SM_ROPE_HALVES},
    {.name = "exaone4", .models = "EXAONE 4", .rope = SM_ROPE_HALVES, .norms = SM_NORMS_AFTER,
     .qk_norm = SM_QK_NORM_HEAD, .window_period = 4, .turns_windows = true},
    {.name = "hunyuan-dense", .models = "Hunyuan 0.5B to 7B", .rope = SM_ROPE_HALVES,
     .qk_norm = SM_QK_NORM_HEAD, .norms_turned = true},
    {.name = "ernie4_5", .models = "ERNIE 4.5 0.3B", .rope = SM_ROPE_PAIRS},
    {.name = "chatglm", .models = "GLM-4 9B, GLM-Edge", .rope = SM_ROPE_PAIRS, .gate_in_up = true},
    {.name = "glm4", .models = "GLM-4-0414, GLM-Z1", .rope = SM_ROPE_PAIRS, .norms = SM_NORMS_AROUND,
     .gate_in_up = true},
    {.name = "arcee", .models = "AFM 4.5B", .rope = SM_ROPE_PAIRS, .ffn = SM_FFN_RELU2},
    {.name = "nemotron", .models = "Nemotron-Mini, Minitron", .rope = SM_ROPE_HALVES,
     .norm = SM_NORM_LAYER, .ffn = SM_FFN_RELU2},
    {.name = "phi2", .models = "phi-1, phi-1.5, phi-2", .rope = SM_ROPE_HALVES,
     .norm = SM_NORM_LAYER, .ffn = SM_FFN_GELU, .bias = SM_BIAS_EVERYWHERE,
     .parallel = SM_PARALLEL_SHARED},
    {.name = "phi3", .models = "Phi-3, Phi-3.5, Phi-4-mini", .rope = SM_ROPE_HALVES,
     .gate_in_up = true},
    {.name = "gpt2", .models = "GPT-2, DistilGPT2", .rope = SM_ROPE_NONE, .norm = SM_NORM_LAYER,
     .ffn = SM_FFN_GELU, .bias = SM_BIAS_LAYERS},
    {.name = "starcoder", .models = "StarCoder, SantaCoder", .rope = SM_ROPE_NONE,
     .norm = SM_NORM_LAYER, .ffn = SM_FFN_GELU, .bias = SM_BIAS_LAYERS},
    {.name = "bloom", .models = "BLOOM, BLOOMZ", .rope = SM_ROPE_NONE, .norm = SM_NORM_LAYER,
     .embed_norm = true, .ffn = SM_FFN_GELU, .bias = SM_BIAS_LAYERS, .max_alibi = 8},
    {.name = "gptneox", .models = "Pythia, GPT-NeoX, Dolly 2", .rope = SM_ROPE_HALVES,
     .norm = SM_NORM_LAYER, .ffn = SM_FFN_GELU_ERF, .bias = SM_BIAS_LAYERS,
     .parallel = SM_PARALLEL_KEY},
    {.name = "starcoder2", .models = "StarCoder2", .rope = SM_ROPE_HALVES, .norm = SM_NORM_LAYER,
     .ffn = SM_FFN_GELU, .bias = SM_BIAS_LAYERS},
    {.name = "falcon", .models = "Falcon 7B, 11B and 40B", .rope = SM_ROPE_HALVES, .norm = SM_NORM_LAYER,
     .ffn = SM_FFN_GELU_ERF, .parallel = SM_PARALLEL_SECOND},
    {.name = "internlm2", .models = "InternLM2, InternLM2.5", .rope = SM_ROPE_PAIRS},
    {.name = "mpt", .models = "MPT", .rope = SM_ROPE_NONE, .norm = SM_NORM_LAYER_PLAIN,
     .ffn = SM_FFN_GELU_ERF},
    /* Its matrices' weights are ternary, which is the weight format's affair; so is how activations are
     * rounded, as int8 with a scale for each 256 where the model was trained with one for each token. */
    {.name = "bitnet", .models = "BitNet b1.58", .rope = SM_ROPE_HALVES, .sub_norms = true},
    {.name = "qwen2moe", .models = "Qwen1.5-MoE, Qwen2-MoE", .rope = SM_ROPE_HALVES,
     .bias = SM_BIAS_QKV, .router = SM_ROUTER_ALL, .shared_gate = true},
    {.name = "qwen3moe", .models = "Qwen3 with experts (Qwen3-30B-A3B)", .rope = SM_ROPE_HALVES,
     .qk_norm = SM_QK_NORM_HEAD, .router = SM_ROUTER_CHOSEN},
    {.name = "olmoe", .models = "OLMoE", .rope = SM_ROPE_HALVES, .qk_norm = SM_QK_NORM_ROW,
     .router = SM_ROUTER_ALL},
    {.name = "granitemoe", .models = "Granite 3 with experts", .rope = SM_ROPE_PAIRS,
     .rope_by_key = true, .divided_logits = true, .router = SM_ROUTER_CHOSEN},
    {.name = "gpt-oss", .models = "gpt-oss", .rope = SM_ROPE_HALVES, .yarn_exact = true,
     .window_period = 2, .sinks = true, .ffn_norm = "post_attention_norm.weight",
     .ffn = SM_FFN_SWIGLU_CLAMPED, .bias = SM_BIAS_LAYERS, .router = SM_ROUTER_CHOSEN},
    {.name = "lfm2", .models = "LFM2", .rope = SM_ROPE_HALVES, .qk_norm = SM_QK_NORM_HEAD,
     .output_norm = "token_embd_norm.weight"},
    {.name = "mamba2", .models = "Mamba 2, Codestral Mamba"},
    {.name = "t5", .models = "T5, T5 v1.1, Flan-T5, mT5, UMT5", .has_encoder = true, .rope = SM_ROPE_NONE,
     .ffn = SM_FFN_GEGLU, .relu_ungated = true, .unscaled = true, .biased_distances = true,
     .scaled_head = true, .output_norm = "dec.output_norm.weight"},
    {.name = "bert", .models = "BERT, RoBERTa, XLM-R, MiniLM, bge, e5", .is_encoder = true,
     .rope = SM_ROPE_NONE, .norm = SM_NORM_LAYER, .norms = SM_NORMS_OF_SUM, .ffn = SM_FFN_GELU_ERF,
     .bias = SM_BIAS_LAYERS},
    {.name = "nomic-bert", .models = "nomic-embed-text v1 and v1.5", .is_encoder = true,
     .rope = SM_ROPE_HALVES, .norm = SM_NORM_LAYER, .norms = SM_NORMS_OF_SUM},
    {.name = "modern-bert", .models = "ModernBERT, gte-modernbert, granite-embedding R2", .is_encoder = true,
     .rope = SM_ROPE_HALVES, .norm = SM_NORM_LAYER_PLAIN, .embed_norm = true, .ffn = SM_FFN_GEGLU_ERF,
     .gate_in_up = true, .window_period = 3, .window_later = true},
};

int sm_arch_find(const struct sm_gguf *g, const struct sm_arch **out, smallm_error *err) {
    struct sm_str name = {"", 0};
    bool found;
    int status = sm_gguf_get_string(g, "general.architecture", &name, &found, err);
    if (status != SMALLM_OK) return status;
    if (!found)
        return sm_fail(err, SMALLM_E_CORRUPT, "%s: the key general.architecture is missing",
                       sm_gguf_path(g));
    char known[600] = ""; /* a test finds the last row's name in it */
    for (size_t i = 0; i < SM_COUNT(archs); i++) {
        const char *row = archs[i].name;
        if (sm_str_is(name, row)) {
            *out = &archs[i];
            return SMALLM_OK;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ", row);
    }
    char shown[64];
    return sm_fail(err, SMALLM_E_UNSUPPORTED,
                   "%s: general.architecture is \"%s\"; this version runs: %s", sm_gguf_path(g),
                   sm_printable(shown, sizeof shown, name.s, name.n), known);
}

/* Reading one architecture's keys: stops at the first failure. */
struct reader {
    const struct sm_arch *arch;
    const struct sm_gguf *g;
    smallm_error *err;
    int status;
    char key[128];
    const char *asked[128]; /* [n_asked] names that were looked for: judge_rest refuses all others */
    size_t n_asked;
};

static const char *full_key(struct reader *r, const char *name) {
    if (r->n_asked < SM_COUNT(r->asked)) r->asked[r->n_asked++] = name;
    snprintf(r->key, sizeof r->key, "%s.%s", r->arch->name, name);
    return r->key;
}

#define NO_DEFAULT INT64_MIN

static int read_int(struct reader *r, const char *name, int64_t missing, int64_t low, int64_t high) {
    if (r->status != SMALLM_OK) return 0;
    const char *key = full_key(r, name);
    int64_t value = missing;
    bool found = false;
    r->status = sm_gguf_get_int(r->g, key, &value, &found, r->err);
    if (r->status != SMALLM_OK) return 0;
    if (!found) {
        if (missing == NO_DEFAULT)
            r->status = sm_fail(r->err, SMALLM_E_CORRUPT, "%s: the key %s is missing",
                                sm_gguf_path(r->g), key);
        return (int)missing;
    }
    if (value < low || value > high)
        r->status = sm_fail(r->err, SMALLM_E_CORRUPT, "%s: %s is %lld; allowed are %lld to %lld",
                            sm_gguf_path(r->g), key, (long long)value, (long long)low,
                            (long long)high);
    return (int)value;
}

/* low < value <= high, also as a float; or `missing`: where that is NaN the key must be there */
static double read_float(struct reader *r, const char *name, double missing, double low,
                         double high) {
    if (r->status != SMALLM_OK) return missing;
    const char *key = full_key(r, name);
    double value = missing;
    bool found = false;
    r->status = sm_gguf_get_float(r->g, key, &value, &found, r->err);
    if (r->status != SMALLM_OK) return missing;
    if (!found && isnan(missing))
        r->status = sm_fail(r->err, SMALLM_E_CORRUPT, "%s: the key %s is missing",
                            sm_gguf_path(r->g), key);
    else if (found && !((float)value > low && value <= high))
        r->status = sm_fail(r->err, SMALLM_E_CORRUPT,
                            "%s: %s is %g; allowed are values above %g up to %g",
                            sm_gguf_path(r->g), key, value, low, high);
    return value;
}

/* As read_float, where 0 in the file, too, stands for none. */
static double read_limit(struct reader *r, const char *name, double high) {
    const char *key = full_key(r, name);
    double value = 0;
    bool found;
    if (r->status == SMALLM_OK) r->status = sm_gguf_get_float(r->g, key, &value, &found, r->err);
    return value == 0 ? 0 : read_float(r, name, 0, 0, high);
}

static void refuse(struct reader *r, const char *key, const char *found, const char *allowed) {
    if (r->status == SMALLM_OK)
        r->status = sm_fail(r->err, SMALLM_E_UNSUPPORTED, "%s: %s is %s; this version runs %s",
                            sm_gguf_path(r->g), key, found, allowed);
}

/* rope.scaling.*: none, linear, yarn, or longrope, whose factors are tensors; so are Llama 3's, which
 * has no type. */
static void read_rope_scaling(struct reader *r, struct sm_hparams *h) {
    struct sm_str type = {"none", 4};
    bool found = false;
    h->rope_scale[0] = 1;
    if (r->status == SMALLM_OK)
        r->status = sm_gguf_get_string(r->g, full_key(r, "rope.scaling.type"), &type, &found, r->err);
    if (r->status != SMALLM_OK) return;
    bool linear = sm_str_is(type, "linear");
    h->yarn.used = sm_str_is(type, "yarn");
    h->long_rope = sm_str_is(type, "longrope");
    if (!linear && !h->yarn.used && !h->long_rope && !sm_str_is(type, "none")) {
        char shown[32];
        refuse(r, r->key, sm_printable(shown, sizeof shown, type.s, type.n),
               "none, linear, yarn and longrope");
        return;
    }
    double factor = read_float(r, "rope.scale_linear", 1, 1e-3, 1e6); /* the key's name before 2024 */
    factor = read_float(r, "rope.scaling.factor", factor, 1e-3, 1e6);
    if (linear || h->yarn.used || !found) h->rope_scale[0] = 1 / factor;
    if (!h->yarn.used) return;
    h->yarn.context = read_int(r, "rope.scaling.original_context_length", h->n_ctx_train, 1, 1 << 24);
    h->yarn.fast = read_float(r, "rope.scaling.yarn_beta_fast", 32, 0, 1e6);
    h->yarn.slow = read_float(r, "rope.scaling.yarn_beta_slow", 1, 0, 1e6);
    h->yarn.magnitude = read_float(r, "rope.scaling.yarn_attn_factor", 0, 0, 1e3);
    h->yarn.log_multiplier = read_limit(r, "rope.scaling.yarn_log_multiplier", 1e3);
    if (read_float(r, "rope.scaling.yarn_ext_factor", 1, -1e6, 1e6) != 1)
        refuse(r, r->key, "not 1", "1");
}

/* expert_*: how many, how large, how they are chosen. */
static void read_experts(struct reader *r, struct sm_hparams *h) {
    bool has_router = r->arch->router != SM_ROUTER_NONE, must = has_router && !r->arch->may_be_dense;
    h->n_expert = read_int(r, "expert_count", must ? NO_DEFAULT : 0, must, SM_EXPERTS_MAX);
    if (h->n_expert == 0) {
        /* What these say is of experts, and some dense files have them. */
        full_key(r, "expert_used_count");
        full_key(r, "expert_shared_feed_forward_length");
        return;
    }
    if (!has_router)
        refuse(r, full_key(r, "expert_count"), "not 0", "this architecture without experts");
    h->n_used = read_int(r, "expert_used_count", NO_DEFAULT, 1, SM_MIN(h->n_expert, SM_USED_MAX));
    h->n_ff_expert = read_int(r, "expert_feed_forward_length", h->n_ff, 1, 1 << 18);
    h->n_ff_shared = read_int(r, "expert_shared_feed_forward_length", 0, 0, 1 << 18);
    h->expert_scale = (float)read_float(r, "expert_weights_scale", 1, 0, 1e6);
    if (read_int(r, "expert_group_count", 0, 0, 1 << 16) > 1)
        refuse(r, full_key(r, "expert_group_count"), "more than 1", "experts in one group");
    /* The softmax over the chosen ones is that over all, divided by the sum of what was chosen. */
    bool normed = r->arch->router == SM_ROUTER_CHOSEN, found;
    if (r->status == SMALLM_OK)
        r->status = sm_gguf_get_bool(r->g, full_key(r, "expert_weights_norm"), &normed, &found, r->err);
    enum { SOFTMAX = 1, SIGMOID, SOFTMAX_OF_CHOSEN };
    int function = read_int(r, "expert_gating_func", SOFTMAX, 0, INT32_MAX);
    if (function != SOFTMAX && function != SOFTMAX_OF_CHOSEN)
        refuse(r, full_key(r, "expert_gating_func"), function == SIGMOID ? "2 (sigmoid)" : "unknown",
               "1 (softmax) and 3 (softmax of the chosen)");
    h->router = normed || function == SOFTMAX_OF_CHOSEN ? SM_ROUTER_CHOSEN : SM_ROUTER_ALL;
}

/* The sizes of what carries a state: a convolution's, or a state space's. */
static void read_mixers(struct reader *r, struct sm_hparams *h) {
    h->conv_kernel = read_int(r, "shortconv.l_cache", 0, 2, SM_TAPS_MAX);
    h->conv_width = h->n_embd;
    h->ssm_group = 1;
    int inner = read_int(r, "ssm.inner_size", 0, 1, 1 << 18);
    if (inner == 0) return;
    h->conv_kernel = read_int(r, "ssm.conv_kernel", NO_DEFAULT, 2, SM_TAPS_MAX);
    h->ssm_state = read_int(r, "ssm.state_size", NO_DEFAULT, 1, 1 << 12);
    h->n_ssm_head = read_int(r, "ssm.time_step_rank", NO_DEFAULT, 1, 1 << 12);
    h->ssm_group = read_int(r, "ssm.group_count", NO_DEFAULT, 1, 1 << 12);
    if (r->status != SMALLM_OK) return;
    if (inner % h->n_ssm_head != 0 || inner / h->n_ssm_head > SM_HEAD_MAX ||
        h->n_ssm_head % h->ssm_group != 0) {
        r->status = sm_fail(r->err, SMALLM_E_CORRUPT,
                            "%s: %s.ssm: inner_size %d in %d heads (time_step_rank) in %d groups; "
                            "allowed are whole heads of at most %d values in equal groups",
                            sm_gguf_path(r->g), r->arch->name, inner, h->n_ssm_head, h->ssm_group,
                            SM_HEAD_MAX);
        return;
    }
    h->ssm_head = inner / h->n_ssm_head;
    h->conv_width = inner + 2 * h->ssm_group * h->ssm_state;
}

/* An array with a value for each layer, whole numbers or (flags) booleans; n is 0 where the key is not
 * an array. */
static struct sm_gguf_array read_array(struct reader *r, const struct sm_hparams *h, const char *name,
                                       bool flags) {
    struct sm_gguf_array a = {.n = 0};
    if (r->status != SMALLM_OK) return a;
    const char *key = full_key(r, name);
    size_t at = sm_gguf_find(r->g, key);
    if (at == SIZE_MAX || sm_gguf_kind(r->g, at) != SM_GGUF_ARRAY) return a;
    r->status = sm_gguf_get_array(r->g, key, &a, r->err);
    if (r->status != SMALLM_OK) return a;
    bool whole = a.kind <= SM_GGUF_I32 || a.kind == SM_GGUF_U64 || a.kind == SM_GGUF_I64;
    if (a.n != (size_t)h->n_layer || !(flags ? a.kind == SM_GGUF_BOOL : whole))
        r->status = sm_fail(r->err, SMALLM_E_CORRUPT,
                            "%s: %s has %zu values of kind %s; allowed is one number or %d %s",
                            sm_gguf_path(r->g), key, a.n, sm_gguf_kind_name(a.kind), h->n_layer,
                            flags ? "flags of kind bool" : "whole ones");
    return a;
}

/* attention.head_count and head_count_kv, the latter one number or one for each layer: layers
 * without kv heads carry a state, where the file has one. */
static void read_heads(struct reader *r, struct sm_hparams *h) {
    int least = h->conv_kernel > 0 ? 0 : 1;
    h->n_head = read_int(r, "attention.head_count", NO_DEFAULT, least, 1024);
    struct sm_gguf_array each = read_array(r, h, "attention.head_count_kv", false);
    if (each.n == 0) h->n_head_kv = read_int(r, "attention.head_count_kv", h->n_head, least, h->n_head);
    for (int i = 0; i < h->n_layer && r->status == SMALLM_OK; i++) {
        int64_t n = each.n > 0 ? sm_gguf_array_int(&each, (size_t)i) : h->n_head_kv;
        bool other = n > 0 && n <= h->n_head && h->n_head_kv > 0 && n != h->n_head_kv;
        if (n < least || n > h->n_head || other) {
            r->status = sm_fail(r->err, other ? SMALLM_E_UNSUPPORTED : SMALLM_E_CORRUPT,
                                "%s: %s is %lld in layer %d; allowed are %d to %d, and in all layers "
                                "with kv heads the same", sm_gguf_path(r->g), r->key, (long long)n, i,
                                least, h->n_head);
            return;
        }
        if (n > 0) h->n_head_kv = (int)n;
        h->recurrent[i] = n == 0;
        if (n == 0) h->n_state_layer++;
        else h->n_kv_layer++;
    }
    if (h->n_kv_layer == 0) h->n_head = 0;
    if (r->arch->is_encoder) h->n_kv_layer = SM_MIN(h->n_kv_layer, 1);
}

/* The window's size, and which layers have it: a period or a flag for each layer. */
static void read_window(struct reader *r, struct sm_hparams *h) {
    static const char pattern[] = "attention.sliding_window_pattern";
    h->window = read_int(r, "attention.sliding_window", r->arch->window, 0, 1 << 24);
    struct sm_gguf_array flags = read_array(r, h, pattern, true);
    int period = r->arch->window_period;
    if (flags.n == 0) period = read_int(r, pattern, period, 0, SM_LAYERS_MAX);
    for (int i = 0; i < h->n_layer && r->status == SMALLM_OK && h->window > 0; i++)
        h->windowed[i] = flags.n > 0   ? sm_gguf_array_int(&flags, (size_t)i) != 0
                         : period == 0 || i % period != (r->arch->window_later ? 0 : period - 1);
}

/* Factors and soft caps; keys come before what the row says. */
static void read_scales(struct reader *r, struct sm_hparams *h) {
    const struct sm_arch *arch = r->arch;
    double width = arch->wide_layers == h->n_layer ? (double)h->n_embd / h->n_head : h->head;
    h->attn_scale = (float)read_float(r, "attention.scale", arch->unscaled ? 1 : 1 / sqrt(width), 0, 1e6);
    h->temperature = (float)read_limit(r, "attention.temperature_scale", 1e3);
    h->temperature_length = read_int(r, "attention.temperature_length", h->n_ctx_original, 1, 1 << 24);
    h->attn_cap = (float)read_float(r, "attn_logit_softcapping", arch->attn_cap, 0, 1e6);
    h->logit_cap = (float)read_float(r, "final_logit_softcapping", arch->logit_cap, 0, 1e6);
    h->qkv_limit = (float)read_limit(r, "attention.clamp_kqv", 1e6);
    double one = arch->named_scales ? NAN : 1; /* NAN: the key must be there */
    double embed_scale = arch->scaled_embeddings ? sqrt((double)h->n_embd) : one;
    h->embed_scale = (float)read_float(r, "embedding_scale", embed_scale, 0, 1e6);
    h->residual_scale = (float)read_float(r, "residual_scale", one, 0, 1e6);
    bool plain = h->ffn == SM_FFN_RELU || sm_gguf_find_tensor(r->g, "output.weight") == NULL;
    double head_scale = arch->scaled_head && plain ? 1 / sqrt((double)h->n_embd) : one;
    double logit_scale = read_float(r, "logit_scale", head_scale, 1e-6, 1e6);
    h->logit_scale = (float)(arch->divided_logits ? 1 / logit_scale : logit_scale);
    h->max_alibi = read_limit(r, "attention.max_alibi_bias", 1e3);
    if (h->max_alibi == 0) h->max_alibi = arch->max_alibi;
}

/* hidden_activation: what the gate goes through, in files that say; and whether there is one. */
static void read_activation(struct reader *r, struct sm_hparams *h) {
    static const struct {
        const char *name;
        enum sm_ffn_kind kind;
    } known[] = {{"gelu", SM_FFN_GEGLU_ERF}, {"silu", SM_FFN_SWIGLU}, {"relu2", SM_FFN_RELU2GLU}};
    struct sm_str name = {"", 0};
    bool found;
    h->ffn = r->arch->ffn;
    if (r->arch->relu_ungated && sm_gguf_find_tensor(r->g, "dec.blk.0.ffn_gate.weight") == NULL)
        h->ffn = SM_FFN_RELU;
    bool exact = h->ffn == SM_FFN_GEGLU_ERF; /* elsewhere a gelu might be either form */
    if ((h->ffn != SM_FFN_SWIGLU && !exact) || r->status != SMALLM_OK) return;
    r->status = sm_gguf_get_string(r->g, full_key(r, "hidden_activation"), &name, &found, r->err);
    if (r->status != SMALLM_OK || !found) return;
    for (size_t i = exact ? 0 : 1; i < SM_COUNT(known); i++)
        if (sm_str_is(name, known[i].name)) {
            h->ffn = known[i].kind;
            return;
        }
    char shown[32];
    refuse(r, r->key, sm_printable(shown, sizeof shown, name.s, name.n),
           exact ? "gelu, silu and relu2" : "silu and relu2");
}

/* The layers of a decoder alone, or of a decoder and of the encoder beside it. */
static void read_layers(struct reader *r, struct sm_hparams *h) {
    h->n_layer = read_int(r, "block_count", NO_DEFAULT, 1, SM_LAYERS_MAX);
    h->decoder_start = -1;
    if (!r->arch->has_encoder) return;
    h->n_encoder = h->n_layer;
    h->n_layer = read_int(r, "decoder_block_count", h->n_encoder, 1, SM_LAYERS_MAX);
    h->decoder_start = read_int(r, "decoder_start_token_id", NO_DEFAULT, 0, (1 << 24) - 1);
}

/* What an embedding is made of: the mean where the file does not say. */
static void read_pooling(struct reader *r, struct sm_hparams *h) {
    enum { NONE, MEAN, CLS, LAST, RANK };
    switch (read_int(r, "pooling_type", NONE, NONE, RANK)) {
    case CLS: h->pooling = SM_POOLING_FIRST; break;
    case LAST: h->pooling = SM_POOLING_LAST; break;
    case RANK: refuse(r, r->key, "4 (rank)", "0 (none), 1 (mean), 2 (first) and 3 (last)"); break;
    default: h->pooling = SM_POOLING_MEAN;
    }
}

/* Keys of the architecture that may be there and say nothing, or nothing that tensors do not say. */
static const char *const idle[] = {
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", /* the other norm's */
    "expert_shared_count", "rope.scaling.finetuned", "tensor_data_layout",
    "use_parallel_residual",
};

static bool is_one_of(const char *const *names, size_t n, struct sm_str name) {
    for (size_t i = 0; i < n; i++)
        if (sm_str_is(name, names[i])) return true;
    return false;
}

/* A key of the architecture that nothing here reads is a step that would be left out: refused, unless
 * it is 0, false or empty. */
static void judge_rest(struct reader *r) {
    size_t prefix = strlen(full_key(r, ""));
    for (size_t i = 0; i < sm_gguf_n_keys(r->g) && r->status == SMALLM_OK; i++) {
        struct sm_str key = sm_gguf_key(r->g, i);
        if (key.n < prefix || memcmp(key.s, r->key, prefix) != 0) continue;
        struct sm_str name = {key.s + prefix, key.n - prefix};
        if (is_one_of(r->asked, r->n_asked, name) || is_one_of(idle, SM_COUNT(idle), name)) continue;
        char value[32], shown[96], printable[32];
        if (sm_gguf_format(r->g, i, value, sizeof value) < 0) snprintf(value, sizeof value, "an array");
        if (strcmp(value, "0") == 0 || strcmp(value, "false") == 0 || value[0] == 0) continue;
        sm_printable(shown, sizeof shown, key.s, key.n);
        refuse(r, shown, sm_printable(printable, sizeof printable, value, strlen(value)),
               "files without this key, which it does not know");
    }
}

int sm_arch_read(const struct sm_arch *arch, const struct sm_gguf *g, struct sm_hparams *h,
                 smallm_error *err) {
    struct reader r = {.arch = arch, .g = g, .err = err};
    memset(h, 0, sizeof *h);
    h->n_vocab = read_int(&r, "vocab_size", 0, 1, 1 << 24);
    h->n_ctx_train = read_int(&r, "context_length", NO_DEFAULT, 1, 1 << 24);
    h->n_embd = read_int(&r, "embedding_length", NO_DEFAULT, 1, 1 << 16);
    read_layers(&r, h);
    read_mixers(&r, h);
    read_heads(&r, h);
    h->n_ff = read_int(&r, "feed_forward_length", NO_DEFAULT, h->n_kv_layer > 0 ? 1 : 0, 1 << 18);
    read_window(&r, h);
    h->norm_eps = (float)read_float(&r, arch->norm == SM_NORM_RMS ? "attention.layer_norm_rms_epsilon"
                                                                  : "attention.layer_norm_epsilon",
                                    NAN, 0, 0.1);
    h->rope_base[0] = read_float(&r, "rope.freq_base", 10000, 1, 1e12);
    read_rope_scaling(&r, h);
    double local_base = arch->local_base != 0 ? arch->local_base : h->rope_base[0];
    h->rope_base[1] = read_float(&r, "rope.freq_base_swa", local_base, 1, 1e12);
    h->rope_scale[1] = arch->plain_windows ? 1 : h->rope_scale[0];
    h->rope_magnitude = read_float(&r, "rope.scaling.attn_factor", 1, 0, 1e3);
    h->n_ctx_original = read_int(&r, "rope.scaling.original_context_length", h->n_ctx_train, 1, 1 << 24);
    bool two = h->rope_base[1] != h->rope_base[0] || h->rope_scale[1] != h->rope_scale[0] ||
               (arch->plain_windows && h->yarn.used);
    bool turns = arch->rope != SM_ROPE_NONE, found;
    if (r.status == SMALLM_OK && arch->rope_by_key)
        r.status = sm_gguf_get_bool(g, full_key(&r, "rope.scaling.finetuned"), &turns, &found, err);
    h->n_rope = !turns ? 0 : h->window > 0 && two ? 2 : 1;
    if (r.status != SMALLM_OK) return r.status;

    const char *path = sm_gguf_path(g);
    bool attends = h->n_kv_layer > 0;
    if (attends && h->n_head % h->n_head_kv != 0)
        return sm_fail(err, SMALLM_E_CORRUPT,
                       "%s: %s.attention.head_count_kv is %d, which does not divide head_count %d",
                       path, arch->name, h->n_head_kv, h->n_head);
    int head = attends ? h->n_embd / h->n_head : 0;
    h->head = read_int(&r, "attention.key_length", head, 1, SM_HEAD_MAX);
    int value_length = read_int(&r, "attention.value_length", h->head, 1, SM_HEAD_MAX);
    h->n_rot = read_int(&r, "rope.dimension_count", h->head, 2, SM_HEAD_MAX);
    if (arch->biased_distances)
        h->n_buckets = read_int(&r, "attention.relative_buckets_count", NO_DEFAULT, 4, SM_BUCKETS_MAX);
    read_experts(&r, h);
    read_activation(&r, h);
    read_scales(&r, h);
    read_pooling(&r, h);
    bool causal = !arch->is_encoder;
    if (r.status == SMALLM_OK && arch->parallel == SM_PARALLEL_KEY) {
        h->parallel = true;
        r.status = sm_gguf_get_bool(g, full_key(&r, "use_parallel_residual"), &h->parallel, &found, err);
    }
    if (r.status == SMALLM_OK)
        r.status = sm_gguf_get_bool(g, full_key(&r, "attention.causal"), &causal, &found, err);
    if (r.status == SMALLM_OK && causal == arch->is_encoder)
        refuse(&r, r.key, causal ? "true" : "false",
               arch->is_encoder ? "this architecture with false" : "causal models");
    if (arch->is_encoder && h->window > 0 && arch->window_period == 0)
        refuse(&r, full_key(&r, "attention.sliding_window"), "not 0", "this architecture without windows");
    if (arch->is_encoder && h->n_state_layer > 0)
        refuse(&r, full_key(&r, "attention.head_count_kv"), "0 in a layer", "encoders that attend");
    judge_rest(&r);
    if (r.status != SMALLM_OK) return r.status;

    if (arch->has_encoder && (h->window > 0 || h->n_state_layer > 0))
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "%s: a layer has %s; beside an encoder this version runs layers that attend to all "
                       "of their text", path, h->window > 0 ? "a window" : "no attention");
    if (value_length != h->head)
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "%s: attention.value_length is %d and key_length %d; this version needs them equal",
                       path, value_length, h->head);
    if (h->head % 4 != 0 || h->head > SM_HEAD_MAX || (attends && h->head == 0))
        return sm_fail(err, SMALLM_E_UNSUPPORTED,
                       "%s: a head has %d values; allowed are multiples of 4, from 4 to %d", path, h->head,
                       SM_HEAD_MAX);
    if (h->n_rot % 2 != 0 || h->n_rot > h->head)
        return sm_fail(err, SMALLM_E_CORRUPT,
                       "%s: %s.rope.dimension_count is %d; allowed are even numbers up to the head's %d",
                       path, arch->name, h->n_rot, h->head);
    return SMALLM_OK;
}

struct sm_layer_plan sm_arch_plan(const struct sm_arch *arch, const struct sm_hparams *h, int layer) {
    if (layer >= h->n_layer)
        return (struct sm_layer_plan){.rope = -1, .mixer = SM_MIXER_ATTENTION};
    bool windowed = h->windowed[layer];
    bool turns = arch->unturned_period == 0 || (layer + 1) % arch->unturned_period != 0;
    if (h->n_rope == 0) turns = false;
    if (arch->turns_windows && h->window > 0) turns = windowed;
    int rank = 0;
    for (int i = 0; i < layer && !arch->is_encoder; i++) rank += h->recurrent[i] == h->recurrent[layer];
    int behind = arch->is_encoder ? h->window / 2 : 0;
    return (struct sm_layer_plan){.window = !windowed ? 0 : arch->is_encoder ? behind + 1 : h->window,
                                  .behind = windowed ? behind : 0,
                                  .rope = !turns ? -1 : h->n_rope == 2 && windowed ? 1 : 0,
                                  .mixer = !h->recurrent[layer] ? SM_MIXER_ATTENTION
                                           : h->n_ssm_head > 0  ? SM_MIXER_SSM
                                                                : SM_MIXER_CONV,
                                  .rank = rank};
}
