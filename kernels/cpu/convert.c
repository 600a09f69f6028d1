// Element types of buffers, messages and files: conversion between the floating-point ones, each
// value rounded once, to nearest even. Offers kernels.h's convert.
#include "../fail.h"
#include "math.h"

// Elements converted at a time: two buffers that stay in the first cache level.
enum { BLOCK = 1024 };

// ---- fp16 -----------------------------------------------------------------------------------
// sign 1, exponent 5 (bias 15), fraction 10. The 15 bits after the sign, moved to fp32's place,
// read as 2^-112 times the value, subnormals included; the product with 2^112 is exact. All ones in
// the exponent stay all ones.
static inline float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
    bits |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}
// Normal results: round the 13 bits that go. Below 2^-14: adding 1/2 (whose last bit is 2^-24,
// fp16's smallest step) lets the addition round. From 65520 on: infinity.
static inline uint16_t float_to_half(float f) {
    uint32_t bits, small_bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    float small;
    memcpy(&small, &magnitude, 4);
    small = (magnitude < 0x38800000u ? small : 0.0f) + 0.5f;
    memcpy(&small_bits, &small, 4);
    uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small_bits - 0x3f000000u : normal;
    if (magnitude >= 0x477ff000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)(sign | half);
}
// double to float "to odd": cut, and where anything was lost set the last bit. A second rounding to
// half as many bits or fewer then gives what one rounding would have (float has 24 >= 11 + 2 bits).
static inline float double_to_odd(double d) {
    float f = (float)d;
    double back = f;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (back != d && d == d) {
        if ((back > d) == (d > 0)) bits--; // rounded away from zero (or to infinity): one step back
        bits |= 1u;
    }
    memcpy(&f, &bits, 4);
    return f;
}

// ---- conversion -----------------------------------------------------------------------------
static int floating(Dtype d) {
    return d == DTYPE_F32 || d == DTYPE_BF16 || d == DTYPE_F16 || d == DTYPE_F64;
}
static void read_floats(float *out, const void *src, Dtype from, size_t at, size_t n, int narrow) {
    const uint16_t *u = (const uint16_t *)src + at;
    const double *d = (const double *)src + at;
    if (from == DTYPE_F32)
        memcpy(out, (const float *)src + at, n * 4);
    else if (from == DTYPE_BF16)
        for (size_t i = 0; i < n; i++) out[i] = bf16_to_float(u[i]);
    else if (from == DTYPE_F16)
        for (size_t i = 0; i < n; i++) out[i] = half_to_float(u[i]);
    else if (narrow)
        for (size_t i = 0; i < n; i++) out[i] = double_to_odd(d[i]);
    else
        for (size_t i = 0; i < n; i++) out[i] = (float)d[i];
}
static void write_floats(void *dst, Dtype to, const float *in, size_t at, size_t n) {
    uint16_t *u = (uint16_t *)dst + at;
    if (to == DTYPE_F32)
        memcpy((float *)dst + at, in, n * 4);
    else if (to == DTYPE_BF16)
        for (size_t i = 0; i < n; i++) u[i] = float_to_bf16(in[i]);
    else if (to == DTYPE_F16)
        for (size_t i = 0; i < n; i++) u[i] = float_to_half(in[i]);
    else
        for (size_t i = 0; i < n; i++) ((double *)dst)[at + i] = in[i];
}
void convert(void *dst, Dtype to, const void *src, Dtype from, size_t n) {
    if (to != from && (!floating(to) || !floating(from)))
        die("conversion between element types %d and %d|only floating-point types convert", from,
            to);
    size_t size = dtype_size(to);
    PARALLEL_FOR_BYTES(n * size)
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t count = n - at < BLOCK ? n - at : BLOCK;
        float buffer[BLOCK];
        if (to == from)
            memcpy((char *)dst + at * size, (const char *)src + at * size, count * size);
        else {
            read_floats(buffer, src, from, at, count, size == 2);
            write_floats(dst, to, buffer, at, count);
        }
    }
}
