// The number types of the whole program. Model code moves pointers to them and cannot touch what
// they point at: floatX and gradX are structs of one number, so that `*x + *y` does not compile in
// C and a device pointer is never read by mistake.
//
//   floatX   activations and weights: float (PRECISION=fp32, the default), bf16 (PRECISION=bf16),
//            double (PRECISION=fp64, for finite differences)
//   gradX    gradients of weights: float, or double in the fp64 build
//   real     what stays fp32 whatever floatX is: router logits, scores, norm statistics,
//            log-sum-exp, losses; double in the fp64 build
#ifndef MOE_TYPES_H
#define MOE_TYPES_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(MOE_BF16)
typedef struct {
    uint16_t bits;
} floatX;
typedef float real;
#define PRECISION_NAME "bf16"
#elif defined(MOE_FP64)
typedef struct {
    double v;
} floatX;
typedef double real;
#define PRECISION_NAME "fp64"
#else
typedef struct {
    float v;
} floatX;
typedef float real;
#define PRECISION_NAME "fp32"
#endif
typedef struct {
    real v;
} gradX;

// bf16 on the HOST.
static inline float bf16_to_float(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
// Nearest even: adding 0x7fff, or 0x8000 where the kept bit is odd, carries exactly when the
// dropped half is above (or a tie against an odd number); infinity cannot carry. A NaN could carry
// into infinity or zero: it is cut instead, and made quiet.
static inline uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t quiet = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// One element on the HOST as a float: for printing and sampling, never in a loop over a model.
static inline float floatx_to_float(floatX x) {
#if defined(MOE_BF16)
    return bf16_to_float(x.bits);
#else
    return (float)x.v;
#endif
}

// Element types of buffers, messages and files.
typedef enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_F64, DTYPE_I32, DTYPE_I64, DTYPE_U8 } Dtype;
static inline size_t dtype_size(Dtype d) {
    switch (d) {
    case DTYPE_U8: return 1;
    case DTYPE_BF16:
    case DTYPE_F16: return 2;
    case DTYPE_F32:
    case DTYPE_I32: return 4;
    case DTYPE_F64:
    case DTYPE_I64: return 8;
    }
    return 0;
}
#if defined(MOE_BF16)
#define DTYPE_FLOATX DTYPE_BF16
#define DTYPE_REAL DTYPE_F32
#elif defined(MOE_FP64)
#define DTYPE_FLOATX DTYPE_F64
#define DTYPE_REAL DTYPE_F64
#else
#define DTYPE_FLOATX DTYPE_F32
#define DTYPE_REAL DTYPE_F32
#endif

#ifdef __cplusplus
#define MOE_BEGIN_C extern "C" {
#define MOE_END_C }
#else
#define MOE_BEGIN_C
#define MOE_END_C
#endif
#endif
