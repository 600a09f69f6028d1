// Element types of buffers, messages and files: conversion between the floating-point ones, each
// value rounded once, to nearest even. Offers kernels.h's convert. Bound by memory; used when
// weights are read and written.
#include "common.cuh"
#include <cuda_fp16.h>

static __device__ __forceinline__ double widen(__nv_bfloat16 x) {
    return (double)__bfloat162float(x);
}
static __device__ __forceinline__ double widen(__half x) { return (double)__half2float(x); }
static __device__ __forceinline__ double widen(float x) { return (double)x; }
static __device__ __forceinline__ double widen(double x) { return x; }
// double to float "to odd": cut, and where anything was lost set the last bit. A second rounding to
// half as many bits or fewer then gives what one rounding would have (float has 24 >= 11 + 2 bits).
static __device__ __forceinline__ float to_odd(double d) {
    float f = (float)d;
    double back = (double)f;
    unsigned bits = __float_as_uint(f);
    if (back != d && d == d) {
        if ((back > d) == (d > 0)) bits--; // rounded away from zero (or to infinity): one step back
        bits |= 1u;
    }
    return __uint_as_float(bits);
}
static __device__ __forceinline__ void narrow(double *to, double x) { *to = x; }
static __device__ __forceinline__ void narrow(float *to, double x) { *to = (float)x; }
static __device__ __forceinline__ void narrow(__nv_bfloat16 *to, double x) {
    *to = __float2bfloat16(to_odd(x));
}
static __device__ __forceinline__ void narrow(__half *to, double x) {
    *to = __float2half(to_odd(x));
}

// Eight elements a thread, 16 bytes at a time where the addresses allow it: one element at a time
// leaves too few bytes in flight.
template <class T> struct alignas(16) Eight { T x[8]; };
template <class To, class From>
static __global__ void convert_kernel(To *dst, const From *src, int64_t n, bool aligned) {
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < n;
         i += (int64_t)gridDim.x * blockDim.x * 8) {
        if (aligned && i + 8 <= n) {
            Eight<From> from = *(const Eight<From> *)(src + i);
            Eight<To> to;
#pragma unroll
            for (int l = 0; l < 8; l++) narrow(to.x + l, widen(from.x[l]));
            *(Eight<To> *)(dst + i) = to;
        } else
            for (int64_t j = i; j < n && j < i + 8; j++) narrow(dst + j, widen(src[j]));
    }
}
template <class To, class From> static void launch(void *dst, const void *src, size_t n) {
    bool aligned = ((size_t)dst | (size_t)src) % 16 == 0;
    convert_kernel<To, From>
        <<<grid_for(div_up((int64_t)n, 8), 256, 1 << 18), 256, 0, compute_stream()>>>(
            (To *)dst, (const From *)src, (int64_t)n, aligned);
    LAUNCHED();
}
template <class To> static void convert_to(void *dst, const void *src, Dtype from, size_t n) {
    if (from == DTYPE_F32)
        launch<To, float>(dst, src, n);
    else if (from == DTYPE_BF16)
        launch<To, __nv_bfloat16>(dst, src, n);
    else if (from == DTYPE_F16)
        launch<To, __half>(dst, src, n);
    else
        launch<To, double>(dst, src, n);
}
static int floating(Dtype d) {
    return d == DTYPE_F32 || d == DTYPE_BF16 || d == DTYPE_F16 || d == DTYPE_F64;
}
void convert(void *dst, Dtype to, const void *src, Dtype from, size_t n) {
    if (to != from && (!floating(to) || !floating(from)))
        die("conversion between element types %d and %d|only floating-point types convert", from,
            to);
    if (n == 0) return;
    if (to == from) return device_copy(dst, src, n * dtype_size(to));
    if (to == DTYPE_F32)
        convert_to<float>(dst, src, from, n);
    else if (to == DTYPE_BF16)
        convert_to<__nv_bfloat16>(dst, src, from, n);
    else if (to == DTYPE_F16)
        convert_to<__half>(dst, src, from, n);
    else
        convert_to<double>(dst, src, from, n);
}
