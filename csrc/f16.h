/* float16 and bfloat16 <-> float32.  Widening is exact, narrowing rounds to nearest even; values
 * too large become infinite, NaNs stay NaNs (quiet).  The hardware's and the portable version agree
 * bit for bit.  Only static inline functions: every tier compiles its own. */
#ifndef SM_F16_H
#define SM_F16_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline float sm_float_of_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
static inline uint32_t sm_bits_of_float(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float sm_f16_to_f32(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    /* Without branches, so that loops over it are vectors'. */
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 1023u;
    uint32_t normal = (exponent + 112) << 23 | fraction << 13;
    uint32_t special = 0x7F800000u | fraction << 13 | (uint32_t)(fraction != 0) << 22;
    uint32_t small = sm_bits_of_float((float)(int32_t)fraction * 0x1p-24f); /* exact and normal as a float */
    uint32_t is_special = 0u - (exponent == 31), is_small = 0u - (exponent == 0);
    return sm_float_of_bits(sign | (small & is_small) | (special & is_special) |
                            (normal & ~(is_small | is_special)));
#endif
}

static inline uint16_t sm_f32_to_f16(float x) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t u = sm_bits_of_float(x), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (a >> 13 & 1023u));
    if (a >= 0x47800000u) return (uint16_t)(sign | 0x7C00u); /* 65536 and up */
    if (a >= 0x38800000u) { /* normal: a carry out of the fraction moves the exponent */
        a -= UINT32_C(112) << 23;
        return (uint16_t)(sign | (a + 0xFFFu + (a >> 13 & 1u)) >> 13);
    }
    /* Subnormal: the unit is 2^-24, so adding 0.5 rounds in hardware at just that bit. */
    uint32_t r = sm_bits_of_float(sm_float_of_bits(a) + 0.5f) - 0x3F000000u;
    return (uint16_t)(sign | r);
#endif
}

static inline float sm_bf16_to_f32(uint16_t h) { return sm_float_of_bits((uint32_t)h << 16); }
static inline uint16_t sm_f32_to_bf16(float x) {
    uint32_t u = sm_bits_of_float(x);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

/* A float16 as it lies in a file's block, at any alignment. */
static inline uint16_t sm_u16_at(const uint8_t p[2]) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t sm_u32_at(const uint8_t p[4]) {
    return sm_u16_at(p) | (uint32_t)sm_u16_at(p + 2) << 16;
}
static inline float sm_f16_at(const uint8_t p[2]) { return sm_f16_to_f32(sm_u16_at(p)); }
static inline bool sm_f16_is_finite_at(const uint8_t p[2]) { return (p[1] & 0x7Cu) != 0x7Cu; }

#endif
