// What every CPU kernel shares: reading and writing floatX, an exponential that compilers can
// vectorise, parallel loops, scratch.
//
//   load, store          one floatX <-> real; store rounds bf16 to nearest even, NaN stays NaN
//   load_row, store_row  the same for n elements
//   view_row             n elements as reals, without a copy where floatX is a real
//   exp_real             e^x: fp32 builds a branch-free polynomial (within 2 units in the last
//                        place over the whole range, including denormals, 0, +inf and NaN), fp64
//                        builds libm's
//   row_sum, row_dot, row_max   reductions over n reals in 16 fixed lanes: vector speed, one order
//   OMP(...)             an OpenMP pragma, or nothing in builds without OpenMP
//   scratch              memory of the calling thread that only grows
#ifndef MOE_CPU_MATH_H
#define MOE_CPU_MATH_H
#include "../kernels.h"
#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
MOE_BEGIN_C

// ---- threads --------------------------------------------------------------------------------
// Same bits for any number of threads (I8, deterministic): a parallel loop runs over items whose
// number follows from shapes alone; an item is computed by one thread, in one order. Sums over
// items are added afterwards in item order. Then the schedule does not touch a single bit.
#ifdef _OPENMP
#define MOE_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define OMP(...) MOE_PRAGMA(omp __VA_ARGS__)
#else
#define OMP(...)
#endif
#define PARALLEL_FOR OMP(parallel for schedule(static))          // equal items
// An equal loop that touches `bytes` of memory: it stays on its thread where waking the others
// costs more than they save. That is some 20 microseconds, in which one thread moves about so many
// bytes.
enum { PARALLEL_BYTES = 1 << 17 };
#define PARALLEL_FOR_BYTES(bytes) \
    OMP(parallel for schedule(static) if ((size_t)(bytes) >= PARALLEL_BYTES))
#define PARALLEL_TILES OMP(parallel for schedule(dynamic, 1))    // few, heavy or uneven items
static inline int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
// 0 .. thread_count() - 1 within a parallel loop.
static inline int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
// Returns `bytes` of memory that belong to the calling thread until it asks for the same slot
// again: 64-byte aligned, contents undefined, grown on demand and never shrunk, so that nothing is
// allocated once every shape was seen (I10, no allocation after the first step). Slots keep nested
// users apart.
enum { SCRATCH_PACK, SCRATCH_PANEL, SCRATCH_LOCAL, SCRATCH_LOCAL2, SCRATCH_SHARED, SCRATCH_SLOTS };
void *scratch(int slot, size_t bytes);
#define SCRATCH(slot, type, count) ((type *)scratch((slot), (count) * sizeof(type)))

// ---- floatX <-> real ------------------------------------------------------------------------
#if defined(MOE_BF16)
static inline real load(const floatX *x) { return bf16_to_float(x->bits); }
static inline void store(floatX *x, real v) { x->bits = float_to_bf16(v); }
#else
static inline real load(const floatX *x) { return x->v; }
static inline void store(floatX *x, real v) { x->v = v; }
#endif
// v as floatX would keep it.
static inline real round_x(real v) {
    floatX x;
    store(&x, v);
    return load(&x);
}
static inline void load_row(real *dst, const floatX *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = load(src + i);
}
static inline void store_row(floatX *dst, const real *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) store(dst + i, src[i]);
}
// n elements as reals: x itself where floatX is a real, else converted into buffer (n).
static inline const real *view_row(const floatX *x, real *buffer, int64_t n) {
#if defined(MOE_BF16)
    load_row(buffer, x, n);
    return buffer;
#else
    (void)buffer;
    (void)n;
    return &x->v;
#endif
}
// Correctly rounded in fp32 too: 53 >= 2*24 + 2 bits.
static inline real square_root(real x) { return (real)sqrt((double)x); }
static inline real larger(real a, real b) { return a > b ? a : b; }
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- exponential ----------------------------------------------------------------------------
#if defined(MOE_FP64)
static inline real exp_real(real x) { return exp(x); }
#else
// x = n ln2 + r, |r| <= ln2/2: e^x = 2^n e^r. n by adding 1.5 * 2^23 (rounds to an integer in the
// low mantissa bits); ln2 in two parts, the first with 9 trailing zeros so that n * LN2_HIGH is
// exact; e^r by a minimax polynomial (Cephes expf, 2e-8 relative). 2^n in two factors, so that
// results from denormal to just below overflow are right. Beyond +-105 (results 0 and +inf) x is
// clamped, on its bits: NaN passes, and a compiler that must keep floating-point traps can still
// vectorise it, which it cannot with a comparison of floats.
static inline float exp_polynomial(float r) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
}
static inline real exp_real(real x) {
    const float MAGIC = 12582912.0f;
    const float LOG2E = 1.44269504088896341f;
    const float LN2_HIGH = 0.693359375f;
    const float LN2_LOW = -2.12194440e-4f;
    const int32_t LIMIT = 0x42d20000;    // the bits of 105
    const int32_t INFINITE = 0x7f800000; // and of infinity
    int32_t bits, magnitude;
    memcpy(&bits, &x, 4);
    magnitude = bits & 0x7fffffff;
    // LIMIT instead of magnitude, the sign stays.
    bits ^= ((magnitude > LIMIT) & (magnitude <= INFINITE)) ? magnitude ^ LIMIT : 0;
    float c;
    memcpy(&c, &bits, 4);
    float shifted = c * LOG2E + MAGIC;
    float n = shifted - MAGIC;
    float r = (c - n * LN2_HIGH) - n * LN2_LOW;
    memcpy(&bits, &shifted, 4);
    int32_t k = (int32_t)((uint32_t)bits - 0x4b400000u);
    int32_t half = k >> 1;
    uint32_t u1 = ((uint32_t)half + 127u) << 23;
    uint32_t u2 = ((uint32_t)k - (uint32_t)half + 127u) << 23;
    float s1, s2;
    memcpy(&s1, &u1, 4);
    memcpy(&s2, &u2, 4);
    return exp_polynomial(r) * s1 * s2;
}
#endif
static inline real sigmoid(real x) { return 1 / (1 + exp_real(-x)); }
static inline real silu(real x) { return x / (1 + exp_real(-x)); }

// ---- reductions over a row ------------------------------------------------------------------
// LANES partial results, element i going to lane i mod LANES, added pairwise at the end: a compiler
// may keep them in vectors without reordering anything, and the error of a sum grows with n/LANES.
enum { REDUCE_LANES = 16 };
static inline real lanes_sum(real *part) {
    for (int w = REDUCE_LANES / 2; w > 0; w /= 2)
        for (int l = 0; l < w; l++) part[l] += part[l + w];
    return part[0];
}
static inline real row_sum(const real *x, int64_t n) {
    real part[REDUCE_LANES] = { 0 };
    int64_t i = 0;
    for (; i + REDUCE_LANES <= n; i += REDUCE_LANES)
        for (int l = 0; l < REDUCE_LANES; l++) part[l] += x[i + l];
    for (int l = 0; l < n - i; l++) part[l] += x[i + l];
    return lanes_sum(part);
}
static inline real row_dot(const real *x, const real *y, int64_t n) {
    real part[REDUCE_LANES] = { 0 };
    int64_t i = 0;
    for (; i + REDUCE_LANES <= n; i += REDUCE_LANES)
        for (int l = 0; l < REDUCE_LANES; l++) part[l] += x[i + l] * y[i + l];
    for (int l = 0; l < n - i; l++) part[l] += x[i + l] * y[i + l];
    return lanes_sum(part);
}
// -inf for n = 0; a NaN may or may not be seen.
static inline real row_max(const real *x, int64_t n) {
    enum { LANES = 2 * REDUCE_LANES }; // wide enough for gcc 12 to keep them in vectors
    real part[LANES];
    real most = -(real)INFINITY;
    int64_t i = 0;
    for (int l = 0; l < LANES; l++) part[l] = most;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] = larger(part[l], x[i + l]);
    for (; i < n; i++) most = larger(most, x[i]);
    for (int w = LANES / 2; w > 0; w /= 2)
        for (int l = 0; l < w; l++) part[l] = larger(part[l], part[l + w]);
    return larger(most, part[0]);
}
MOE_END_C
#endif
