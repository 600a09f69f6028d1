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

// v = scale * the minifloat.
static inline MOE_HD float v8_decode(uint8_t code, float scale) {
    uint32_t bits = ((uint32_t)code + QUANT8_BASE) << 20;
    float x;
    memcpy(&x, &bits, 4);
    return code ? x * scale : 0.0f;
}
// ratio = v / scale in [0,1]; 20 random bits: added below the kept bits of the float they carry
// with the probability of the dropped part, as in bf16_stochastic. positive: v > 0 (the ratio may
// have underflowed).
static inline MOE_HD uint8_t v8_encode(float ratio, int positive, uint32_t random20) {
    uint32_t bits;
    memcpy(&bits, &ratio, 4);
    int32_t code = (int32_t)((bits + (random20 & 0xfffffu)) >> 20) - QUANT8_BASE;
    if (code < 1) code = 1;
    if (code > 255) code = 255;
    return (uint8_t)(positive ? code : 0);
}
// What u is multiplied with before m8_encode; a block of nothing gets codes 0.
static inline MOE_HD float m8_inverse(float scale) {
    return scale > 1e-30f ? 127.0f / scale : 0.0f;
}
static inline MOE_HD float m8_decode(uint8_t code, float scale) {
    return (float)(int8_t)code * (scale * (1.0f / 127));
}
// x = 127 u / scale in [-127,127]; in 16.16 fixed point the lowest 16 bits are the probability of
// rounding up.
static inline MOE_HD uint8_t m8_encode(float x, uint32_t random16) {
    float clipped = x > -127.0f ? x : -127.0f; // NaN too becomes a number
    if (clipped > 127.0f) clipped = 127.0f;
    return (uint8_t)(((int32_t)(clipped * 65536.0f) + (int32_t)(random16 & 0xffffu)) >> 16);
}
// U above; a huge number where exact AdamW has no bound either.
static inline double adam_bound(double beta1, double beta2) {
    double room = (1 - beta2) * (1 - beta1 * beta1 / beta2);
    return room > 0 ? (1 - beta1) / sqrt(room) : 1e30;
}
// The order in one block, for both backends, with new m and v (fp32) and the Noise of the block:
//   v = min(v, QUANT8_V_MAX);  v_scale = max v;
//   v8 = v8_encode(v / v_scale, v > 0, noise_bits(noise, 0, i) >> 12);
//   s = sqrt(v8_decode(v8, v_scale));  u = s > 0 ? clip(m / s, -U, U) : 0;  m_scale = max |u|;
//   m8 = m8_encode(u * m8_inverse(m_scale), noise_bits(noise, 1, i) >> 16).
// Parameters without a master copy round with noise_bits(noise, 2, i) >> 16.
#endif
