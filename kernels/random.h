// Random numbers that depend on (seed, tensor, index, step) and on nothing else (I4, layout-free
// numbers): no state, no order, the same bits on every rank, in every layout, with every number of
// threads, on CPUs and GPUs.
//
//   philox           Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128
//                    bits of a key and a counter
//   random_uniform   double in (0,1): odd multiples of 2^-53, never 0 or 1
//   random_normal    N(0,1) for element `index` of a tensor, by inversion (AS241), absolute error
//                    below 1e-15 |z|, |z| <= 8.3
//   Noise            cheap bits for rounding: one Philox for each 256-element block, an integer
//                    hash for each element
//   tensor_id        64-bit identity of a Hugging Face tensor name
//
// The same bits everywhere: normals use only operations that IEEE 754 rounds correctly, which are
// double + - * /, sqrt and fma. Compilers may contract a*b + c to an fma or not, so every product
// that is added to something is an explicit fma here (or exact: a power of two), and nothing is
// left to contract. libm's log and the like differ between machines in the last bit and are not
// used.
#ifndef MOE_RANDOM_H
#define MOE_RANDOM_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__CUDACC__)
#define MOE_HD __host__ __device__
#else
#define MOE_HD
#endif

// Users of the generator: separate streams of one (seed, tensor).
enum { RANDOM_INIT = 1, RANDOM_ROUNDING = 2, RANDOM_SAMPLE = 4 };
typedef struct {
    uint32_t word[4];
} Random128;

// 64-bit finaliser of SplitMix64: a bijection in which every input bit flips every output bit with
// probability 1/2.
static inline MOE_HD uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
// Ten rounds; constants and test vectors are those of the Random123 library.
static inline MOE_HD Random128 philox4x32_10(Random128 counter, uint32_t key0, uint32_t key1) {
    uint32_t c0 = counter.word[0];
    uint32_t c1 = counter.word[1];
    uint32_t c2 = counter.word[2];
    uint32_t c3 = counter.word[3];
    for (int round = 0; round < 10; round++, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u) {
        uint64_t a = (uint64_t)0xd2511f53u * c0;
        uint64_t b = (uint64_t)0xcd9e8d57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
        c3 = (uint32_t)a;
    }
    Random128 r = { { c0, c1, c2, c3 } };
    return r;
}
// 128 bits for (seed, tensor; index, step, purpose). seed and tensor are hashed into the 64-bit
// key; index (64 bits), step (56 bits) and purpose (8 bits) are the counter, so that within one key
// nothing repeats.
static inline MOE_HD Random128 philox(uint64_t seed, uint64_t tensor, uint64_t index, uint64_t step,
                                      int purpose) {
    uint64_t key = mix64(mix64(seed + 0x9e3779b97f4a7c15u) + tensor);
    uint32_t last = ((uint32_t)(step >> 32) & 0xffffffu) | (uint32_t)purpose << 24;
    Random128 counter = { { (uint32_t)index, (uint32_t)(index >> 32), (uint32_t)step, last } };
    return philox4x32_10(counter, (uint32_t)key, (uint32_t)(key >> 32));
}
// The upper or lower 64 of 128 bits.
static inline MOE_HD uint64_t random_half(Random128 r, int half) {
    return (uint64_t)r.word[2 * half + 1] << 32 | r.word[2 * half];
}
// 64 random bits to an odd multiple of 2^-53: k + 1/2 of 52 bits needs 53 bits, so it and 1 - u are
// exact, and u is symmetric about 1/2.
static inline MOE_HD double random_uniform(uint64_t bits) {
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}

// Natural logarithm of a positive normal double. x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m =
// 2 atanh(s), s = (m-1)/(m+1): |s| <= 0.1716, and the series 1 + s^2/3 + s^4/5 ... to s^22/23
// leaves out less than 2e-20. Error below 1.5e-16 |log x| + 1e-16.
static inline MOE_HD double random_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double m;
    memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e++;
    }
    double s = (m - 1) / (m + 1);
    double q = s * s;
    double p = 1.0 / 23;
    for (int k = 21; k > 0; k -= 2) p = fma(p, q, 1.0 / k);
    return fma((double)e, 0.69314718055994530942, 2 * s * p);
}
// The polynomial of degree 7 with these coefficients, from the highest power down.
static inline MOE_HD double polynomial(const double coefficient[8], double x) {
    double p = coefficient[0];
    for (int i = 1; i < 8; i++) p = fma(p, x, coefficient[i]);
    return p;
}
// z with Phi(z) = u, 0 < u < 1: algorithm AS241, PPND16 (Applied Statistics 37 (1988) 477),
// relative error about 1e-16.
static inline MOE_HD double inverse_normal(double u) {
    // Coefficients from the highest power down: |u - 1/2| <= 0.425, then r <= 5, then the tail.
    const double CENTRE_N[8] = { 2.5090809287301226727e+3, 3.3430575583588128105e+4,
                                 6.7265770927008700853e+4, 4.5921953931549871457e+4,
                                 1.3731693765509461125e+4, 1.9715909503065514427e+3,
                                 1.3314166789178437745e+2, 3.3871328727963666080e+0 };
    const double CENTRE_D[8] = { 5.2264952788528545610e+3, 2.8729085735721942674e+4,
                                 3.9307895800092710610e+4, 2.1213794301586595867e+4,
                                 5.3941960214247511077e+3, 6.8718700749205790830e+2,
                                 4.2313330701600911252e+1, 1.0 };
    const double MIDDLE_N[8] = { 7.74545014278341407640e-4, 2.27238449892691845833e-2,
                                 2.41780725177450611770e-1, 1.27045825245236838258e+0,
                                 3.64784832476320460504e+0, 5.76949722146069140550e+0,
                                 4.63033784615654529590e+0, 1.42343711074968357734e+0 };
    const double MIDDLE_D[8] = { 1.05075007164441684324e-9, 5.47593808499534494600e-4,
                                 1.51986665636164571966e-2, 1.48103976427480074590e-1,
                                 6.89767334985100004550e-1, 1.67638483018380384940e+0,
                                 2.05319162663775882187e+0, 1.0 };
    const double TAIL_N[8] = { 2.01033439929228813265e-7, 2.71155556874348757815e-5,
                               1.24266094738807843860e-3, 2.65321895265761230930e-2,
                               2.96560571828504891230e-1, 1.78482653991729133580e+0,
                               5.46378491116411436990e+0, 6.65790464350110377720e+0 };
    const double TAIL_D[8] = { 2.04426310338993978564e-15, 1.42151175831644588870e-7,
                               1.84631831751005468180e-5,  7.86869131145613259100e-4,
                               1.48753612908506148525e-2,  1.36929880922735805310e-1,
                               5.99832206555887937690e-1,  1.0 };
    double q = u - 0.5;
    if (q > -0.425 && q < 0.425) {
        double r = fma(-q, q, 0.180625);
        return q * polynomial(CENTRE_N, r) / polynomial(CENTRE_D, r);
    }
    double r = sqrt(-random_log(q < 0 ? u : 1 - u));
    double z;
    if (r <= 5)
        z = polynomial(MIDDLE_N, r - 1.6) / polynomial(MIDDLE_D, r - 1.6);
    else
        z = polynomial(TAIL_N, r - 5) / polynomial(TAIL_D, r - 5);
    return q < 0 ? -z : z;
}
// Elements 2j and 2j+1 of a tensor take the two halves of Philox block j.
static inline MOE_HD Random128 random_normal_block(uint64_t seed, uint64_t tensor, uint64_t index) {
    return philox(seed, tensor, index >> 1, 0, RANDOM_INIT);
}
static inline MOE_HD double random_normal(uint64_t seed, uint64_t tensor, uint64_t index) {
    return inverse_normal(
        random_uniform(random_half(random_normal_block(seed, tensor, index), (int)(index & 1))));
}

// ---- noise for stochastic rounding ----------------------------------------------------------
// Philox once per 256-element block of the tensor; within a block a 32-bit hash (two
// multiplications, avalanche bias 0.11, found by the hash-prospector search) of key + position *
// golden ratio. Rounding needs bits that are uniform and uncorrelated, not a generator that passes
// BigCrush, and this costs 7 operations an element instead of 100.
typedef Random128 Noise;
static inline MOE_HD Noise noise_block(uint64_t seed, uint64_t tensor, uint64_t block,
                                       uint64_t step) {
    return philox(seed, tensor, block, step, RANDOM_ROUNDING);
}
// 32 bits of stream 0..3 for position 0..255 of the block.
static inline MOE_HD uint32_t noise_bits(Noise noise, int stream, uint32_t position) {
    uint32_t x = noise.word[stream] + position * 0x9e3779b9u;
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0x735a2d97u;
    return x ^ (x >> 15);
}
// fp32 to bf16, rounding up with the probability of the dropped part: adding 16 random bits below
// the kept half carries exactly that often, so the expectation is x. x is bf16 already: unchanged.
// What would carry past the largest finite number is cut instead (a finite weight must not become
// infinite); infinity and NaN stay (NaN made quiet).
static inline MOE_HD uint16_t bf16_stochastic(float x, uint32_t random16) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t magnitude = u & 0x7fffffffu;
    uint32_t up = u + (random16 & 0xffffu);
    if (magnitude > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((up & 0x7fffffffu) >= 0x7f800000u ? u >> 16 : up >> 16);
}

// FNV-1a over the name (byte 0 ends it), then mix64. Tensors are named as in per-expert Hugging
// Face checkpoints
// ("model.layers.3.mlp.experts.7.up_proj.weight"): the identity of a number survives every layout.
// 18,867 names collide with probability 1e-11.
static inline MOE_HD uint64_t tensor_id(const char *hf_name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const char *c = hf_name; *c; c++) hash = (hash ^ (uint8_t)*c) * 0x100000001b3u;
    return mix64(hash);
}
#endif
