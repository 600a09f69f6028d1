// Two bytes of optimizer state for each parameter: the 8-bit codes of AdamW's moments, shared by
// both backends. Blocks are 256 elements of the tensor (I4, layout-free numbers), each with two
// fp32 scales. Codes of zero bytes mean zero, so a cleared buffer is a valid initial state.
//
//   v   an unsigned minifloat of v / v_scale with 5 bits of exponent and 3 of mantissa; v_scale is
//       the block's largest v. Range 2.9e-10 to 1, steps of 6 to 12 % everywhere. Code 0 is kept
//       for v = 0: a v > 0 below the range is rounded up to code 1.
//   m   int8, linear, of u = m / sqrt(v8), v8 being the v just stored: m8 = 127 u / m_scale;
//       m_scale is the block's largest |u|.
// Both are rounded stochastically: v moves by 0.1 % a step (beta2 = 0.999) and m decays by 10 %,
// less than half a code step, so rounding to nearest would freeze them. The noise of random.h
// depends on (tensor, index, step), so codes are deterministic and do not depend on the layout.
//
// Why m is kept in units of sqrt(v). AdamW divides by sqrt(v). Where both moments are quantised
// against their block's maximum, one outlier sends its neighbours' v to 0 (or m up to its smallest
// code) and the quotient explodes. Exact AdamW cannot do that: by Cauchy-Schwarz
//   |m| = (1-b1) |sum b1^i g_i| <= U sqrt(v),   U = (1-b1) / sqrt((1-b2) (1 - b1^2/b2)),
// which is 7.3 for 0.9, 0.999 and needs b1^2 < b2. So |u| <= U, and clipping u to U loses nothing
// but rounding of v. What is decoded obeys the bound by construction: |m8| <= U sqrt(v8), and
// m8 = 0 where v8 = 0. One more step keeps it, again by Cauchy-Schwarz:
//   (b1 |m8| + (1-b1) |g|)^2 <= (b1^2 U^2 / b2 + (1-b1)^2 / (1-b2)) (b2 v8 + (1-b2) g^2)
//                             = U^2 v_new.
// Hence |m| / sqrt(v) <= U for every parameter, step and gradient, outliers included: an update is
// never larger than exact AdamW's bound. An element more than 10^9.5 below its block's largest v is
// stepped too carefully until the outlier has decayed, never too far.
//
// Chosen by experiment: 4096 noisy quadratics whose gradients spread over d decades inside each
// block, lr 0.01. Loss after 300 / 3000 steps, then the largest |update| / lr (exact AdamW: 0.0042
// / 0.0026 and 1.2 at every d):
//                              d = 0            d = 2            d = 4              d = 6
//   dynamic code book          .0042/.0025 1.2  .0043/.0026 70   983/14433 4e5      3102/6e6 1e7
//     (both moments, nearest)
//   int8 2x/(1+|x|) m, uint8   .0042/.0025 1.2  .0044/.0027 2    522/60644 2e6      20/2845 4e5
//     sqrt(v), blocks of 32
//   this                       .0043/.0026 1.3  .0043/.0026 1.4  .0043/.0026 1.4    .034/.0024 1.3
// With 6 bits of exponent and 2 of mantissa d = 6 gives .0044 / .0027, but every other column is 1
// to 5 % worse; with 4 and 4, d = 4 starves (.089 / .0073).
#ifndef MOE_QUANT8_H
#define MOE_QUANT8_H
#include "random.h"

#define QUANT8_V_MAX 3e38f // a square that overflowed must not make a scale infinite
enum { QUANT8_BLOCK = 256 };
// Code c stands for the float with the bits (c + BASE) << 20, so that 255 is 1.0f.
enum { QUANT8_BASE = (0x3f800000 >> 20) - 255 };

// Divisions and roots, exact to the last bit, would take most of an update on a GPU. So there are
// a few for each block, and elements are multiplied with their results; the root of a code is read
// from a table, and what is left is approximated. Everything is made of operations that IEEE 754
// rounds correctly and of integers, and a product that is added to something is an explicit fma, so
// that both backends have the same bits.
static inline MOE_HD float quant8_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline MOE_HD uint32_t quant8_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
// The smaller; y where x is NaN.
static inline MOE_HD float quant8_min(float x, float y) {
#if defined(__CUDA_ARCH__)
    return fminf(x, y); // one instruction, where the other line is two
#else
    return x < y ? x : y;
#endif
}
// sqrt(x / 2) of a positive float to 4.8e-6, never above it by more than rounding; 0 for 0. Half of
// a float's bits are a guess at half its logarithm. Newton's step w (3/2 - x w^2) turns an error e
// of w = 1/sqrt(2 x) into -3/2 e^2: 3.4e-2, 1.8e-3, 4.6e-6. Below x = 2^-126 it is too small.
static inline MOE_HD float quant8_half_root(float x) {
    float w = quant8_float(0x5ef75a86u - (quant8_bits(x) >> 1));
    for (int i = 0; i < 2; i++) w *= fmaf(-(x * w), w, 1.5f);
    return x * w;
}
// 1 / x for x in [2^-125, 2^125] to 2.3e-6, never above it by more than rounding. The guess y has
// 0.950 <= x y <= 1.052; y (2 - x y) would be 0.9973 to 1 times the truth, 2.00143 centres that to
// 1 +- 1.44e-3, and Newton's step squares the error.
static inline MOE_HD float quant8_reciprocal(float x) {
    float y = quant8_float(0x7ef33800u - quant8_bits(x));
    y *= fmaf(-x, y, 2.00143f);
    return fmaf(y, fmaf(-x, y, 1.0f), y);
}
// Roots of the codes and their inverses, as sqrtf(v8_decode(code, 1)) rounds them. The bits c +
// BASE of a code are an exponent and 3 bits of mantissa; a root is that of the lowest 4 of them,
// its entry in a table, times a power of two.
typedef struct {
    uint32_t root[16], inverse[16]; // bits of floats, less what v8_root and v8_inverse_root add
} Quant8Roots;

static inline Quant8Roots quant8_roots(void) {
    Quant8Roots r;
    for (uint32_t i = 0; i < 16; i++) {
        float root = sqrtf(quant8_float((0x3f0u + i) << 20));
        r.root[i] = quant8_bits(root) - (0x3f0u << 19);
        r.inverse[i] = quant8_bits(1 / root) + (0x3f0u << 19);
    }
    return r;
}
static inline MOE_HD int v8_entry(uint8_t code) { return code + QUANT8_BASE; } // modulo 16
static inline MOE_HD float v8_root(uint32_t entry, uint8_t code) {
    return quant8_float(entry + ((((uint32_t)code + QUANT8_BASE) & ~15u) << 19));
}
static inline MOE_HD float v8_inverse_root(uint32_t entry, uint8_t code) {
    return quant8_float(entry - ((((uint32_t)code + QUANT8_BASE) & ~15u) << 19));
}

// v = scale * the minifloat.
static inline MOE_HD float v8_decode(uint8_t code, float scale) {
    return code ? quant8_float(((uint32_t)code + QUANT8_BASE) << 20) * scale : 0.0f;
}
// ratio = v / scale in [0,1]; 20 random bits: added below the kept bits of the float they carry
// with the probability of the dropped part, as in bf16_stochastic. positive: v > 0 (the ratio may
// have underflowed).
static inline MOE_HD uint8_t v8_encode(float ratio, int positive, uint32_t random20) {
    int32_t code = (int32_t)((quant8_bits(ratio) + (random20 & 0xfffffu)) >> 20) - QUANT8_BASE;
    if (code < 1) code = 1;
    if (code > 255) code = 255;
    return (uint8_t)(positive ? code : 0);
}
// m = code * unit * root, where unit = m_scale / 127 * sqrt(v_scale) and root is v8_root.
static inline MOE_HD float m8_unit(float m_scale, float v_scale) {
    return m_scale * (1.0f / 127) * sqrtf(v_scale);
}
// What m / root is multiplied with before m8_encode, from its largest magnitude in the block; a
// block of nothing gets codes 0. Slightly less than 127 / largest, so that no rounding of the
// product leaves the codes; m shrinks by 8e-7.
static inline MOE_HD float m8_inverse(float largest) {
    return largest > 1e-30f ? 126.9999f / largest : 0.0f;
}
// u * inverse lies in [-127,127]. Added to 384 it becomes fixed point, with 15 bits below the point
// in the mantissa of a float in [256,512): they are the probability of rounding up.
static inline MOE_HD uint8_t m8_encode(float u, float inverse, uint32_t random15) {
    uint32_t fixed = quant8_bits(fmaf(u, inverse, 384.0f)) + (128u << 15);
    return (uint8_t)((fixed + (random15 & 0x7fffu)) >> 15);
}
// One step of AdamW for a gradient that is scaled already. m and v: beta1 and beta2 times the old
// moments, which become the new ones; root_scale: sqrt(2) / sqrt(bc2). Returns
// m / (sqrt(v) / sqrt(bc2) + eps), within 1e-5.
static inline MOE_HD float quant8_step(float *m, float *v, float g, float lerp, float square,
                                       float root_scale, float eps) {
    *m = fmaf(lerp, g, *m);
    *v = quant8_min(fmaf(square * g, g, *v), QUANT8_V_MAX);
    return *m * quant8_reciprocal(fmaf(quant8_half_root(*v), root_scale, eps));
}
// U above; a huge number where exact AdamW has no bound either.
static inline double adam_bound(double beta1, double beta2) {
    double room = (1 - beta2) * (1 - beta1 * beta1 / beta2);
    return room > 0 ? (1 - beta1) / sqrt(room) : 1e30;
}
// The order in one block, for both backends, with new m and v (fp32) and the Noise of the block:
//   v_scale = max v;  bits = noise_bits(noise, 0, i);
//   v8 = v8_encode(v * (1 / v_scale), v > 0, bits >> 12);
//   u = v8 ? clip(m * inverse root of v8, -U sqrt(v_scale), U sqrt(v_scale)) : 0;
//   m8 = m8_encode(u, m8_inverse(max |u|), bits);  m_scale = max |u| / sqrt(v_scale).
// Parameters without a master copy round with noise_bits(noise, 2, i) >> 16.
//
// What the approximations change. v_scale's reciprocal moves v / v_scale by 2 units in the last
// place, 2e-6 of a step between codes: the probability of rounding up. Roots of codes and their
// inverses are exact to a unit in the last place, so m decoded is m encoded, and the bound holds to
// 3e-7 in each step (it does not add up: every step clips). The step itself is off by 7e-6 at most,
// m8's shrinking included by 8e-6, where the noise of the codes is 1e-2. Below v = 1e-38 the root
// is too small, which matters only where eps is below 1e-19; eps must be at least 1e-30.
#endif
