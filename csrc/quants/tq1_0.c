/* TQ1_0: 256 values d * (digit - 1), digits of base 3, five to a byte.
 *
 * A byte holds the fraction 0.d0 d1 d2 d3 d4 as ceil(256 * fraction), so that digit i is the whole part
 * of 3 * (3^i * byte mod 256) / 256: 0, 1 or 2 whatever the byte. */
#include "block.h"

struct block {
    uint8_t five[48]; /* byte j < 32 holds values 32 i + j, byte 32 + j values 160 + 16 i + j, */
    uint8_t four[4];  /* and byte j of these values 240 + 4 i + j, in digit i */
    uint8_t d[2];     /* float16 */
};
_Static_assert(sizeof(struct block) == 54, "as in quants.def");

/* Digits 0 .. n_digits - 1 of n bytes into digits [n_digits][n]. */
static inline void split(const uint8_t *bytes, size_t n, int n_digits, uint8_t *digits) {
    for (size_t j = 0; j < n; j++) {
        uint8_t rest = bytes[j];
        for (int i = 0; i < n_digits; i++, rest = (uint8_t)(rest * 3))
            digits[(size_t)i * n + j] = (uint8_t)(rest * 3 >> 8);
    }
}

static inline void take(const struct block *b, struct sm_parts *p) {
    uint8_t code[256];
    split(b->five, 32, 5, code);
    split(b->five + 32, 16, 5, code + 160);
    split(b->four, 4, 4, code + 240);
    p->d = sm_u16_at(b->d);
    p->m = 0;
    sm_place_codes(code, 2, 0, p->plane);
}
SM_DEFINE_PARTS(tq1_0)

size_t sm_find_nonfinite_tq1_0(const void *blocks, size_t n_blocks) {
    return sm_find_bad_f16(blocks, n_blocks, sizeof(struct block), offsetof(struct block, d), 1);
}

/* The other way round: ceil(256 fraction). */
static inline void join(const uint8_t *digits, size_t n, int n_digits, uint8_t *bytes) {
    for (size_t j = 0; j < n; j++) {
        unsigned number = 0; /* of five digits, 0 .. 242 */
        for (int i = 0; i < 5; i++)
            number = 3 * number + (i < n_digits ? digits[(size_t)i * n + j] : 0u);
        bytes[j] = (uint8_t)((number * 256 + 242) / 243);
    }
}

static inline void put(struct block *b, const struct sm_codes *c) {
    sm_put_f16(b->d, c->d);
    join(c->code, 32, 5, b->five);
    join(c->code + 160, 16, 5, b->five + 32);
    join(c->code + 240, 4, 4, b->four);
}
SM_DEFINE_PUT(tq1_0)
