// CRC32C and sums of byte ranges: see file.h. Bit 31 - k of a number is the coefficient of x^k,
// so that a byte's lowest bit comes first, as the instructions have it.
#include "file.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#define POLYNOMIAL 0x82f63b78u

// ---- polynomials ----------------------------------------------------------------------------
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1) { // without branches: half of the bits would be guessed wrong
        product ^= b & (0u - (a >> 31));
        b = b >> 1 ^ (POLYNOMIAL & (0u - (b & 1)));
    }
    return product;
}

// x^(8 n): what n further bytes multiply a remainder by.
static uint32_t shift_by(int64_t n) {
    uint32_t power = 1u << 31;
    uint32_t square = 1u << 23;
    for (; n; n >>= 1) {
        if (n & 1) power = multiply(power, square);
        square = multiply(square, square);
    }
    return power;
}

uint32_t checksum_join(uint32_t first, uint32_t second, int64_t bytes) {
    return multiply(shift_by(bytes), first) ^ second;
}

// ---- bytes ----------------------------------------------------------------------------------
static uint32_t by_table(uint32_t c, const unsigned char *p, size_t n) {
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++)
            table[i] = table[i] & 1 ? table[i] >> 1 ^ POLYNOMIAL : table[i] >> 1;
    }
    while (n--) c = c >> 8 ^ table[(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)
#define HAS_INSTRUCTION __builtin_cpu_supports("sse4.2")
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC_8(c, p) _mm_crc32_u64(c, load_8(p))
#define CRC_1(c, p) _mm_crc32_u8((uint32_t)(c), *(p))
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#define HAS_INSTRUCTION 1
#define CRC_TARGET
#define CRC_8(c, p) __crc32cd((uint32_t)(c), load_8(p))
#define CRC_1(c, p) __crc32cb((uint32_t)(c), *(p))
#endif

#ifdef HAS_INSTRUCTION
static uint64_t load_8(const unsigned char *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// The instruction takes three cycles and one can start every cycle: three thirds of a block go side
// by side.
CRC_TARGET static uint32_t by_instruction(uint32_t c, const unsigned char *p, size_t n) {
    enum { THIRD = 1 << 14 };
    uint32_t shift = n >= 3 * THIRD ? shift_by(THIRD) : 0;
    for (; n >= 3 * THIRD; n -= 3 * THIRD, p += 3 * THIRD) {
        uint64_t first = c;
        uint64_t second = 0;
        uint64_t third = 0;
        for (size_t i = 0; i < THIRD; i += 8) {
            first = CRC_8(first, p + i);
            second = CRC_8(second, p + THIRD + i);
            third = CRC_8(third, p + 2 * THIRD + i);
        }
        c = multiply(shift, (uint32_t)first) ^ (uint32_t)second;
        c = multiply(shift, c) ^ (uint32_t)third;
    }
    uint64_t rest = c;
    for (; n >= 8; n -= 8, p += 8) rest = CRC_8(rest, p);
    for (; n; n--, p++) rest = CRC_1(rest, p);
    return (uint32_t)rest;
}
#endif

uint32_t checksum(uint32_t sum, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
#ifdef HAS_INSTRUCTION
    if (HAS_INSTRUCTION) return ~by_instruction(~sum, p, n);
#endif
    return ~by_table(~sum, p, n);
}

// ---- ranges ---------------------------------------------------------------------------------
// Joins `next` to `last` where it follows it.
static int joined(SumRange *last, const SumRange *next) {
    if (last->file != next->file || last->end != next->begin) return 0;
    last->sum = checksum_join(last->sum, next->sum, next->end - next->begin);
    last->end = next->end;
    return 1;
}

void sums_append(SumList *s, SumRange r) {
    if (s->n == s->room) {
        s->room = s->room ? 2 * s->room : 64;
        s->range = (SumRange *)xrealloc(s->range, s->room, sizeof r, "checksums");
    }
    s->range[s->n++] = r;
}

void sums_add(SumList *s, int file, int64_t begin, const void *data, int64_t bytes) {
    SumRange r = { file, checksum(0, data, bytes), begin, begin + bytes };
    if (bytes && (!s->n || !joined(&s->range[s->n - 1], &r))) sums_append(s, r);
}

static int by_place(const void *a, const void *b) {
    const SumRange *x = (const SumRange *)a;
    const SumRange *y = (const SumRange *)b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end < y->end) - (x->end > y->end);
}

static int same(const SumRange *a, const SumRange *b) {
    return a->file == b->file && a->begin == b->begin && a->end == b->end && a->sum == b->sum;
}

void sums_sort(SumList *s) {
    int n = 0;
    if (s->n) qsort(s->range, s->n, sizeof *s->range, by_place);
    for (int i = 0; i < s->n; i++)
        if (!i || !same(&s->range[i], &s->range[n - 1])) s->range[n++] = s->range[i];
    s->n = n;
    n = 0;
    for (int i = 0; i < s->n; i++)
        if (!n || !joined(&s->range[n - 1], &s->range[i])) s->range[n++] = s->range[i];
    s->n = n;
}

void sums_free(SumList *s) {
    free(s->range);
    memset(s, 0, sizeof *s);
}
