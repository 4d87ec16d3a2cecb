/* Norms, rotations and activations on vectors of 8. */
#include <math.h>

#include "../../peaks.h"
#include "../tier.h"
#include "expf.h"

/* x[i .. i + 8), zeros from n on. */
static inline __m256 load(const float *x, size_t i, size_t n) {
    if (i + 8 <= n) return _mm256_loadu_ps(x + i);
    return i < n ? _mm256_maskload_ps(x + i, lanes_below(n - i)) : _mm256_setzero_ps();
}
static inline void store(float *x, size_t i, size_t n, __m256 v) {
    if (i + 8 <= n)
        _mm256_storeu_ps(x + i, v);
    else
        _mm256_maskstore_ps(x + i, lanes_below(n - i), v);
}

void SM_NAME(sm_rms_norm)(float *out, const float *x, const float *w, size_t n, float eps) {
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __m256 a = load(x, i, n), b = load(x, i + 8, n);
        lo = _mm256_fmadd_ps(a, a, lo);
        hi = _mm256_fmadd_ps(b, b, hi);
    }
    float ss = tree16(lo, hi);
    __m256 r = _mm256_set1_ps(1.0f / sqrtf(ss / (float)n + eps) + (ss - ss));
    for (size_t i = 0; i < n; i += 8)
        store(out, i, n, _mm256_mul_ps(_mm256_mul_ps(load(x, i, n), r), load(w, i, n)));
}

/* x[i .. i + 8) - mean, zeros from n on. */
static inline __m256 centred(const float *x, size_t i, size_t n, __m256 mean) {
    __m256 d = _mm256_sub_ps(load(x, i, n), mean);
    if (i + 8 <= n) return d;
    return i < n ? _mm256_and_ps(d, _mm256_castsi256_ps(lanes_below(n - i))) : _mm256_setzero_ps();
}

void SM_NAME(sm_layer_norm)(float *out, const float *x, const float *w, const float *b, size_t n,
                            float eps) {
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        lo = _mm256_add_ps(lo, load(x, i, n));
        hi = _mm256_add_ps(hi, load(x, i + 8, n));
    }
    __m256 mean = _mm256_set1_ps(tree16(lo, hi) / (float)n);
    lo = hi = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __m256 c = centred(x, i, n, mean), d = centred(x, i + 8, n, mean);
        lo = _mm256_fmadd_ps(c, c, lo);
        hi = _mm256_fmadd_ps(d, d, hi);
    }
    float ss = tree16(lo, hi);
    __m256 r = _mm256_set1_ps(1.0f / sqrtf(ss / (float)n + eps) + (ss - ss));
    for (size_t i = 0; i < n; i += 8) {
        __m256 d = _mm256_mul_ps(centred(x, i, n, mean), r);
        __m256 bias = b != NULL ? load(b, i, n) : _mm256_setzero_ps();
        store(out, i, n, _mm256_fmadd_ps(d, load(w, i, n), bias));
    }
}

void SM_NAME(sm_rope_pairs)(float *x, const float *cos, const float *sin, size_t n_pairs) {
    size_t i = 0;
    for (; i + 4 <= n_pairs; i += 4) {
        __m128 c = _mm_loadu_ps(cos + i), s = _mm_loadu_ps(sin + i);
        __m256 cs = _mm256_set_m128(_mm_unpackhi_ps(c, s), _mm_unpacklo_ps(c, s));
        __m256 sc = _mm256_set_m128(_mm_unpackhi_ps(s, c), _mm_unpacklo_ps(s, c));
        __m256 v = _mm256_loadu_ps(x + 2 * i);
        /* Even lanes x0 c - x1 s, odd lanes x0 s + x1 c. */
        v = _mm256_fmaddsub_ps(_mm256_moveldup_ps(v), cs,
                               _mm256_mul_ps(_mm256_movehdup_ps(v), sc));
        _mm256_storeu_ps(x + 2 * i, v);
    }
    for (; i < n_pairs; i++) {
        float x0 = x[2 * i], x1 = x[2 * i + 1];
        x[2 * i] = sm_fma(x0, cos[i], -(x1 * sin[i]));
        x[2 * i + 1] = sm_fma(x0, sin[i], x1 * cos[i]);
    }
}

void SM_NAME(sm_rope_halves)(float *x, const float *cos, const float *sin, size_t n_pairs) {
    for (size_t i = 0; i < n_pairs; i += 8) {
        __m256 c = load(cos, i, n_pairs), s = load(sin, i, n_pairs);
        __m256 x0 = load(x, i, n_pairs), x1 = load(x + n_pairs, i, n_pairs);
        store(x, i, n_pairs, _mm256_fmsub_ps(x0, c, _mm256_mul_ps(x1, s)));
        store(x + n_pairs, i, n_pairs, _mm256_fmadd_ps(x0, s, _mm256_mul_ps(x1, c)));
    }
}

void SM_NAME(sm_swiglu)(float *out, const float *gate, const float *up, size_t n) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 8) {
        __m256 g = load(gate, i, n);
        __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, expf8(_mm256_xor_ps(g, sign))));
        store(out, i, n, _mm256_mul_ps(silu, load(up, i, n)));
    }
}

/* min_ps and max_ps return their second operand where it is NaN. */
void SM_NAME(sm_swiglu_clamped)(float *out, const float *gate, const float *up, size_t n) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    const __m256 limit = _mm256_set1_ps(SM_CLAMP_LIMIT), alpha = _mm256_set1_ps(SM_CLAMP_ALPHA);
    for (size_t i = 0; i < n; i += 8) {
        __m256 g = _mm256_min_ps(limit, load(gate, i, n));
        __m256 u = _mm256_min_ps(limit, load(up, i, n));
        u = _mm256_max_ps(_mm256_xor_ps(limit, sign), u);
        __m256 e = expf8(_mm256_xor_ps(_mm256_mul_ps(g, alpha), sign));
        store(out, i, n, _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), _mm256_add_ps(u, one)));
    }
}

void SM_NAME(sm_geglu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 8)
        store(out, i, n, _mm256_mul_ps(gelu8(load(gate, i, n)), load(up, i, n)));
}

void SM_NAME(sm_relu2glu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 r = _mm256_max_ps(_mm256_setzero_ps(), load(gate, i, n));
        store(out, i, n, _mm256_mul_ps(_mm256_mul_ps(r, r), load(up, i, n)));
    }
}

void SM_NAME(sm_gelu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 8) store(out, i, n, gelu8(load(x, i, n)));
}

static __m256 gelu_erf8(__m256 v) {
    static const float Q[] = SM_GELU_ERF_Q;
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    __m256 t = _mm256_fmadd_ps(_mm256_set1_ps(SM_GELU_ERF_P), _mm256_andnot_ps(sign, v), one);
    __m256 q = _mm256_set1_ps(Q[0]);
    t = _mm256_div_ps(one, t);
    for (size_t j = 1; j < SM_COUNT(Q); j++) q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(Q[j]));
    __m256 square = _mm256_mul_ps(_mm256_mul_ps(v, v), _mm256_set1_ps(0.5f));
    __m256 h = _mm256_mul_ps(expf8(_mm256_xor_ps(square, sign)), _mm256_mul_ps(q, t));
    __m256 below = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_blendv_ps(_mm256_fnmadd_ps(v, h, v), _mm256_mul_ps(v, h), below);
}

void SM_NAME(sm_gelu_erf)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 8) store(out, i, n, gelu_erf8(load(x, i, n)));
}

void SM_NAME(sm_geglu_erf)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 8)
        store(out, i, n, _mm256_mul_ps(gelu_erf8(load(gate, i, n)), load(up, i, n)));
}

void SM_NAME(sm_softcap)(float *out, const float *x, float cap, size_t n) {
    const __m256 c = _mm256_set1_ps(cap), twice = _mm256_set1_ps(2.0f / cap);
    for (size_t i = 0; i < n; i += 8) store(out, i, n, softcap8(load(x, i, n), c, twice));
}

void SM_NAME(sm_peaks)(float *out, const float *x, size_t n) {
    const size_t n_whole = n / SM_PEAK;
    for (size_t i = 0; i < n_whole; i++, x += SM_PEAK) {
        __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
        bool nan = _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
        __m256 top = _mm256_max_ps(a, b);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        out[i] = nan ? __builtin_nanf("") : _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four))) + 0.0f;
    }
    if (n % SM_PEAK != 0) sm_peaks(out + n_whole, x, n % SM_PEAK);
}
