/* expf, the same bits on every tier: vector versions use these constants and this order.
 *
 * Maximum error 0.902 units in the last place over -87.3 < x <= 88.37 (every float tried).
 * x <= -87.3 gives 0; above 88.37 the result stays at expf(88.37); NaN gives NaN. */
#ifndef SM_EXPF_H
#define SM_EXPF_H

#include "../fma.h"

#define SM_EXPF_MIN (-87.3f)        /* the results below would come near the subnormals */
#define SM_EXPF_MAX 88.37f          /* largest x with round(x / ln 2) <= 127 */
#define SM_EXPF_LOG2E 0x1.715476p+0f
#define SM_EXPF_MAGIC 0x1.8p+23f    /* adding it rounds to an integer, found in the low bits */
/* ln 2 = HI - LO; HI is short, so that n * HI and x - n * HI are exact. */
#define SM_EXPF_LN2_HI 0x1.63p-1f
#define SM_EXPF_LN2_LO 0x1.bd0106p-13f
/* exp(r) = 1 + r + r^2 (C2 + C3 r + ...), minimax on |r| <= 0.3466. */
#define SM_EXPF_C2 0x1.fffffcp-2f
#define SM_EXPF_C3 0x1.555492p-3f
#define SM_EXPF_C4 0x1.5558aap-5f
#define SM_EXPF_C5 0x1.12396cp-7f
#define SM_EXPF_C6 0x1.6a5232p-10f

static inline float sm_expf(float x) {
    /* The comparisons are written so that NaN passes through. */
    float y = SM_EXPF_MAX < x ? SM_EXPF_MAX : x;
    y = SM_EXPF_MIN > y ? SM_EXPF_MIN : y;
    float t = sm_fma(y, SM_EXPF_LOG2E, SM_EXPF_MAGIC);
    float n = t - SM_EXPF_MAGIC;
    float r = sm_fma(n, -SM_EXPF_LN2_HI, y);
    r = sm_fma(n, SM_EXPF_LN2_LO, r);
    float p = sm_fma(SM_EXPF_C6, r, SM_EXPF_C5);
    p = sm_fma(p, r, SM_EXPF_C4);
    p = sm_fma(p, r, SM_EXPF_C3);
    p = sm_fma(p, r, SM_EXPF_C2);
    p = sm_fma(p, r, 1.0f);
    p = sm_fma(p, r, 1.0f);
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits << 23) + 0x3f800000u; /* 2^n */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x <= SM_EXPF_MIN ? 0.0f : p * scale;
}

/* cap tanh(x / cap) */
static inline float sm_softcap(float x, float cap) {
    float u = sm_expf(x * (2.0f / cap));
    return cap * ((u - 1.0f) / (u + 1.0f));
}

#endif
