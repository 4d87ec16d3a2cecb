/* Error text and versioned structs.  Owns no state. */
#include "base.h"

#include <stdarg.h>
#include <stdio.h>

#define STRUCT_MAX 65536 /* no public struct comes near: more is uninitialized memory */

/* Length of the valid UTF-8 character at s[0..n), or 0. */
static size_t utf8_length(const unsigned char *s, size_t n) {
    unsigned char c = s[0], low = 0x80, high = 0xBF;
    size_t len = c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3
               : c >= 0xF0 && c < 0xF5 ? 4 : 0;
    if (len == 0 || len > n) return 0;
    if (c == 0xE0) low = 0xA0;  /* overlong */
    if (c == 0xED) high = 0x9F; /* surrogates */
    if (c == 0xF0) low = 0x90;  /* overlong */
    if (c == 0xF4) high = 0x8F; /* beyond U+10FFFF */
    for (size_t i = 1; i < len; i++) {
        if (s[i] < low || s[i] > high) return 0;
        low = 0x80;
        high = 0xBF;
    }
    return len;
}

int sm_fail(smallm_error *err, int code, const char *fmt, ...) {
    if (!err) return code;
    /* Formatted aside first: an argument may be the message that is being replaced. */
    char text[sizeof err->message];
    va_list args;
    va_start(args, fmt);
    int length = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    size_t n = length < 0 ? 0 : SM_MIN((size_t)length, sizeof text - 1);
    size_t size = SM_MIN(err->size, sizeof *err);
    const size_t head = offsetof(smallm_error, message);
    if (size >= head) err->code = code;
    if (size <= head) return code;
    n = SM_MIN(n, size - head - 1);
    /* Paths may hold any byte and the cut may fall inside a character; the message stays UTF-8. */
    for (size_t i = 0; i < n;) {
        size_t len = utf8_length((const unsigned char *)text + i, n - i);
        if (len == 0) text[i] = '?';
        i += len ? len : 1;
    }
    memcpy(err->message, text, n);
    err->message[n] = 0;
    return code;
}

const char *sm_printable(char *buf, size_t cap, const char *s, size_t n) {
    if (cap == 0) return "";
    bool cut = n > cap - 1;
    size_t m = cut ? cap - 1 : n;
    for (size_t i = 0; i < m; i++) buf[i] = s[i] >= 0x20 && s[i] < 0x7F ? s[i] : '?';
    if (cut) {
        for (size_t i = m > 3 ? m - 3 : 0; i < m; i++) buf[i] = '.';
    }
    buf[m] = 0;
    return buf;
}

static int judge_size(size_t size, const char *what, smallm_error *err) {
    if (size >= sizeof(size_t) && size <= STRUCT_MAX) return SMALLM_OK;
    return sm_fail(err, SMALLM_E_ARGUMENT, "%s.size is %zu: set it to sizeof(%s)", what, size,
                   what);
}

int sm_read_struct(void *dst, size_t size, const void *src, const char *what, smallm_error *err) {
    memset(dst, 0, size);
    if (!src) return SMALLM_OK;
    size_t given;
    memcpy(&given, src, sizeof given);
    int rc = judge_size(given, what, err);
    if (rc == SMALLM_OK) memcpy(dst, src, SM_MIN(given, size));
    return rc;
}

int sm_write_struct(void *dst, const void *src, size_t size, const char *what, smallm_error *err) {
    if (!dst) return sm_fail(err, SMALLM_E_ARGUMENT, "%s is NULL", what);
    size_t given;
    memcpy(&given, dst, sizeof given);
    int rc = judge_size(given, what, err);
    if (rc != SMALLM_OK) return rc;
    size_t n = SM_MIN(given, size) - sizeof given;
    memcpy((char *)dst + sizeof given, (const char *)src + sizeof given, n);
    return SMALLM_OK;
}
