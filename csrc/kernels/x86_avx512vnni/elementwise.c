/* SwiGLU, also clamped, GELU, GEGLU and soft caps on vectors of 16, the last one masked.  Norms and
 * rotations gain nothing over AVX2. */
#include "../tier.h"
#include "expf.h"

/* Lanes of the vector at i that lie below n. */
static inline __mmask16 lanes(size_t i, size_t n) {
    return n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
}

void SM_NAME(sm_swiglu)(float *out, const float *gate, const float *up, size_t n) {
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, expf16(_mm512_xor_ps(g, sign))));
        _mm512_mask_storeu_ps(out + i, mask,
                              _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}

/* min_ps and max_ps return their second operand where it is NaN. */
void SM_NAME(sm_swiglu_clamped)(float *out, const float *gate, const float *up, size_t n) {
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    const __m512 limit = _mm512_set1_ps(SM_CLAMP_LIMIT), alpha = _mm512_set1_ps(SM_CLAMP_ALPHA);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 g = _mm512_min_ps(limit, _mm512_maskz_loadu_ps(mask, gate + i));
        __m512 u = _mm512_min_ps(limit, _mm512_maskz_loadu_ps(mask, up + i));
        u = _mm512_max_ps(_mm512_xor_ps(limit, sign), u);
        __m512 e = expf16(_mm512_xor_ps(_mm512_mul_ps(g, alpha), sign));
        g = _mm512_div_ps(g, _mm512_add_ps(one, e));
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(g, _mm512_add_ps(u, one)));
    }
}

void SM_NAME(sm_geglu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 g = gelu16(_mm512_maskz_loadu_ps(mask, gate + i));
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}

void SM_NAME(sm_relu2glu)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 r = _mm512_max_ps(_mm512_setzero_ps(), _mm512_maskz_loadu_ps(mask, gate + i));
        r = _mm512_mul_ps(_mm512_mul_ps(r, r), _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(out + i, mask, r);
    }
}

void SM_NAME(sm_gelu)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        _mm512_mask_storeu_ps(out + i, mask, gelu16(_mm512_maskz_loadu_ps(mask, x + i)));
    }
}

static __m512 gelu_erf16(__m512 v) {
    static const float Q[] = SM_GELU_ERF_Q;
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    __m512 t = _mm512_fmadd_ps(_mm512_set1_ps(SM_GELU_ERF_P), _mm512_andnot_ps(sign, v), one);
    __m512 q = _mm512_set1_ps(Q[0]);
    t = _mm512_div_ps(one, t);
    for (size_t j = 1; j < SM_COUNT(Q); j++) q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(Q[j]));
    __m512 square = _mm512_mul_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(0.5f));
    __m512 h = _mm512_mul_ps(expf16(_mm512_xor_ps(square, sign)), _mm512_mul_ps(q, t));
    __mmask16 below = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mul_ps(_mm512_fnmadd_ps(v, h, v), below, v, h);
}

void SM_NAME(sm_gelu_erf)(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        _mm512_mask_storeu_ps(out + i, mask, gelu_erf16(_mm512_maskz_loadu_ps(mask, x + i)));
    }
}

void SM_NAME(sm_geglu_erf)(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 g = gelu_erf16(_mm512_maskz_loadu_ps(mask, gate + i));
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}

void SM_NAME(sm_softcap)(float *out, const float *x, float cap, size_t n) {
    const __m512 c = _mm512_set1_ps(cap), twice = _mm512_set1_ps(2.0f / cap);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(i, n);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        _mm512_mask_storeu_ps(out + i, mask, softcap16(v, c, twice));
    }
}
