// Checks of random numbers, optimizer, norms, initial weights and conversion of the CPU backend
// against slow truths. Build (one precision; -DMOE_BF16, -DMOE_FP64; with or without -fopenmp and
// -DMOE_BLAS -lopenblas) and run alone:
//   cc -O2 -march=native kernels/test_optimizer.c kernels/cpu/*.c kernels/fail.c -lm -o
//   build/test_optimizer && build/test_optimizer
#include "test.h"
#include "device.h"
#include "quant8.h"

// ---- random numbers -------------------------------------------------------------------------
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}
static double normal_below(double z) { return 0.5 * erfc(-z * 0.70710678118654752440); }
static void test_philox(void) {
    static const uint32_t vector[3][10] = {
        // known answers of the Random123 library: counter, key, result
        { 0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
          0x94fdcceb, 0x5001e420, 0x24126ea1 }
    };
    int same = 1;
    for (int i = 0; i < 3; i++) {
        Random128 c = { { vector[i][0], vector[i][1], vector[i][2], vector[i][3] } };
        Random128 r = philox4x32_10(c, vector[i][4], vector[i][5]);
        same &= memcmp(r.word, vector[i] + 6, 16) == 0;
    }
    check(same, "Philox4x32-10 gives the known answers");
}
static void test_normals(void) {
    check(random_uniform(0) > 0 && random_uniform(~(uint64_t)0) < 1 &&
              random_uniform(0) + random_uniform(~(uint64_t)0) == 1,
          "uniforms end inside (0,1)");
    double worst = 0;
    double worst_log = 0; // erfc and log are good to a few 1e-16 of their value; so is
                          // the inverse, up to the density's slope: |dz| < 1e-15 |z|
    for (int i = 0; i < 200000; i++) {
        double u = i < 100000 ? random_uniform(test_bits())
                              : random_uniform(test_bits() >> test_below(52));
        double z = inverse_normal(u);
        double density = exp(-z * z / 2) * 0.3989422804014327;
        double tail = z < 0 ? normal_below(z) - u : (1 - u) - normal_below(-z);
        double e = fabs(tail) / density / (fabs(z) + 0.1);
        double l = fabs(random_log(u) - log(u)) / (fabs(log(u)) + 1);
        worst = e > worst ? e : worst;
        worst_log = l > worst_log ? l : worst_log;
    }
    check(worst < 2e-15 && worst_log < 3e-16, "inverse normal and logarithm: errors %.2g, %.2g",
          worst, worst_log);
    enum { N = 1 << 20 };
    double *z = TEST_TAKE(double, N);
    double moment[4] = { 0 };
    double far = 0;
    double distance = 0;
    uint64_t hash = 0xcbf29ce484222325u;
    uint64_t id = tensor_id("model.layers.0.mlp.gate.weight");
    for (int i = 0; i < N; i++) {
        z[i] = random_normal(1234, id, (uint64_t)i);
        double p = 1;
        for (int k = 0; k < 4; k++) moment[k] += (p *= z[i]) / N;
        far += fabs(z[i]) > 4;
        uint64_t bits;
        memcpy(&bits, z + i, 8);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    qsort(z, N, sizeof *z, ascending);
    for (int i = 0; i < N; i++)
        distance = fmax(distance, fmax(fabs(normal_below(z[i]) - (double)i / N),
                                       fabs(normal_below(z[i]) - (i + 1.0) / N)));
    // Standard errors: moments 1..4 of N samples sqrt(1, 2, 15, 96) / sqrt(N) (5 of them); KS 1.95
    // / sqrt(N) is the 0.1 % point; |z| > 4: 66 of 2^20 expected, +-8.
    double s = 1 / sqrt((double)N);
    check(fabs(moment[0]) < 5 * s && fabs(moment[1] - 1) < 5 * s * sqrt(2) &&
              fabs(moment[2]) < 5 * s * sqrt(15) && fabs(moment[3] - 3) < 5 * s * sqrt(96),
          "normals: moments %.4f %.4f %.4f %.4f", moment[0], moment[1], moment[2], moment[3]);
    check(distance < 1.95 * s && far > 26 && far < 106,
          "normals: Kolmogorov-Smirnov distance %.2g, %g beyond 4", distance, far);
    check(hash == 0x349799bd50a23507u,
          "normals: the same bits as on every machine and compiler (hash %016llx)",
          (unsigned long long)hash);
    test_release("normals");
}
static void test_rounding_noise(void) {
    int inside = 1;
    int kept = 1;
    double bias = 0;
    for (int i = 0; i < 200; i++) {
        float x = (float)((test_uniform() - 0.5) * pow(10, test_uniform() * 60 - 30));
        float low, high;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits &= 0xffff0000u;
        memcpy(&low, &bits, 4);
        bits += 0x10000u;
        memcpy(&high, &bits, 4);
        double sum = 0;
        for (int j = 0; j < 4096; j++) {
            float y = bf16_to_float(
                bf16_stochastic(x, noise_bits(noise_block(7, 9, (uint64_t)i, (uint64_t)j >> 8), 2,
                                              (uint32_t)j & 255) >>
                                       16));
            inside &= y == low || y == high;
            sum += y;
        }
        bias += (sum / 4096 - x) / ((double)high - low);
        kept &= bf16_to_float(bf16_stochastic(low, 0xffff)) == low;
    }
    // A rounding is off by at most sqrt(1/4) steps in the root mean square: 200 * 4096 of them
    // average to 5.5e-4; 5 of those.
    check(inside && kept && fabs(bias / 200) < 2.8e-3, "stochastic rounding: bias %.1e steps",
          bias / 200);
    float top = 3.4e38f;
    check(bf16_stochastic(INFINITY, 0xffff) == 0x7f80 &&
              bf16_stochastic(-INFINITY, 0xffff) == 0xff80 &&
              isnan(bf16_to_float(bf16_stochastic(NAN, 0xffff))) &&
              isfinite(bf16_to_float(bf16_stochastic(top, 0xffff))) &&
              bf16_stochastic(0, 0xffff) == 0,
          "stochastic rounding: infinities, NaN, the largest number, 0");
    enum { NAMES = 48 * 128 * 3 };
    double *id = TEST_TAKE(double, NAMES); // 53 of 64 bits: still 2e-8 for a chance collision
    static const char *kind[3] = { "gate", "up", "down" };
    for (int i = 0, n = 0; i < 48 * 128; i++)
        for (int k = 0; k < 3; k++) {
            char name[96];
            snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s_proj.weight", i / 128,
                     i % 128, kind[k]);
            id[n++] = (double)(tensor_id(name) >> 11);
        }
    qsort(id, NAMES, sizeof *id, ascending);
    int distinct = 1;
    for (int i = 1; i < NAMES; i++) distinct &= id[i] != id[i - 1];
    check(distinct, "tensor names have distinct ids");
    test_release("noise");
}

// ---- optimizer ------------------------------------------------------------------------------
enum { TENSOR = 1000 }; // three whole blocks and a shorter one
static double *zeros(size_t n) {
    double *d = TEST_TAKE(double, n);
    memset(d, 0, n * sizeof *d);
    return d;
}
typedef struct {
    OptimizerState s;
    gradX *grad;
    size_t n;
} Shard;
static Shard take_shard(size_t n, int kind, int master) {
    Shard shard = { { 0 }, 0, n };
    OptimizerState *s = &shard.s;
    s->param = TEST_TAKE(floatX, n);
    s->grad = shard.grad = (gradX *)TEST_TAKE(real, n);
    s->master = master ? TEST_TAKE(real, n) : 0;
    for (size_t i = 0; i < n; i++) {
        store(s->param + i, 0);
        shard.grad[i].v = 0;
    }
    if (master) memset(s->master, 0, n * sizeof(real));
    if (kind != OPT_ADAMW8) {
        memset(s->m = TEST_TAKE(real, n), 0, n * sizeof(real));
        memset(s->v = TEST_TAKE(real, n), 0, n * sizeof(real));
        if (kind == OPT_SGD)
            memset(s->m, 0xff, n * sizeof(real)); // the first step must not read it
    } else {
        size_t blocks = n / 256 + 8;
        memset(s->m8 = TEST_TAKE(uint8_t, n), 0, n);
        memset(s->v8 = TEST_TAKE(uint8_t, n), 0, n);
        memset(s->m_scale = TEST_TAKE(float, blocks), 0, blocks * 4);
        memset(s->v_scale = TEST_TAKE(float, blocks), 0, blocks * 4);
    }
    return shard;
}
static OptimizerStep take_step(OptimizerKind kind, int64_t t) {
    OptimizerStep o = { kind, 0.01, 0.9, 0.9, 0.999, 1e-8, 0.1, t, 77, t, 1 };
    return o;
}
// One tensor in one segment against the same tensor cut at 256 (a block of 8-bit state; else
// anywhere, here 101) and 768 into a shuffled shard; and the formula in doubles.
static void test_update(OptimizerKind kind, int master, const char *name) {
    Shard one = take_shard(TENSOR, kind, master);
    Shard cut = take_shard(TENSOR + 200, kind, master);
    int64_t at = kind == OPT_ADAMW8 ? 256 : 101;
    Segment whole = { 42, 0, TENSOR, 0, 0, 1 };
    Segment parts[3] = { { 42, 768, 232, 0, 0, 1 },
                         { 42, 0, at, 240, 1, 1 },
                         { 42, at, 768 - at, 500, 2, 1 } };
    double *p = test_random(TENSOR, 1, 0);
    double *m = zeros(TENSOR);
    double *v = zeros(TENSOR);
    double rounding = 0;
    for (int i = 0; i < TENSOR; i++) {
        store(one.s.param + i, (real)p[i]);
        if (master) one.s.master[i] = (real)p[i];
    }
    for (int j = 0; j < 3; j++) {
        memcpy(cut.s.param + parts[j].offset, one.s.param + parts[j].first,
               parts[j].count * sizeof(floatX));
        if (master)
            memcpy(cut.s.master + parts[j].offset, one.s.master + parts[j].first,
                   parts[j].count * sizeof(real));
    }
    real scale = 0.5;
    for (int t = 1; t <= 5; t++) {
        OptimizerStep o = take_step(kind, t);
        for (int i = 0; i < TENSOR; i++) {
            double g = (double)(one.grad[i].v = (real)test_normal()) * 0.5;
            if (kind == OPT_SGD) {
                g += o.weight_decay * p[i];
                m[i] = t == 1 ? g : o.momentum * m[i] + g;
                p[i] -= o.lr * m[i];
            } else {
                p[i] -= o.lr * o.weight_decay * p[i];
                m[i] += (1 - o.beta1) * (g - m[i]);
                v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
                p[i] -= o.lr / (1 - pow(o.beta1, t)) * m[i] /
                        (sqrt(v[i]) / sqrt(1 - pow(o.beta2, t)) + o.eps);
            }
        }
        for (int j = 0; j < 3; j++)
            memcpy(cut.grad + parts[j].offset, one.grad + parts[j].first,
                   parts[j].count * sizeof(gradX));
        test_threads(1);
        optimizer_update(&one.s, &whole, 1, &o, &scale);
        test_threads(2);
        optimizer_update(&cut.s, parts, 3, &o, &scale);
    }
    int same = 1;
    for (int j = 0; j < 3; j++) {
        int64_t a = parts[j].offset;
        int64_t b = parts[j].first;
        int64_t n = parts[j].count;
        same &= memcmp(cut.s.param + a, one.s.param + b, n * sizeof(floatX)) == 0;
        if (master) same &= memcmp(cut.s.master + a, one.s.master + b, n * sizeof(real)) == 0;
        if (kind != OPT_ADAMW8)
            same &= memcmp(cut.s.m + a, one.s.m + b, n * sizeof(real)) == 0;
        else {
            same &= memcmp(cut.s.m8 + a, one.s.m8 + b, n) == 0 &&
                    memcmp(cut.s.v8 + a, one.s.v8 + b, n) == 0;
            same &= memcmp(cut.s.m_scale + parts[j].qblock, one.s.m_scale + b / 256, 4) == 0 &&
                    memcmp(cut.s.v_scale + parts[j].qblock, one.s.v_scale + b / 256, 4) == 0;
        }
    }
    check(same, "%s: the same bits wherever the shard is cut, 1 and 2 threads", name);
    double *got = TEST_TAKE(double, TENSOR);
    double *nearest = TEST_TAKE(double, TENSOR);
    for (int i = 0; i < TENSOR; i++) {
        got[i] = master ? (double)one.s.master[i] : (double)load(one.s.param + i);
        nearest[i] = (double)load(one.s.param + i);
        rounding = fmax(rounding, master ? fabs(nearest[i] - (double)round_x(one.s.master[i])) : 0);
    }
    // 5 steps of a few fp32 roundings: 3e-7; stochastic bf16: 5 roundings of up to 2^-8. 8-bit:
    // five steps of 0.01, m off by 2 % and v by 12 % at worst.
    double error = test_error(got, p, TENSOR);
    double bound = sizeof(real) == 8 ? 1e-14 : 3e-7;
    if (kind == OPT_ADAMW8) bound = 2e-3;
    if (sizeof(floatX) == 2 && !master) bound += 5 * 0x1p-8;
    check(error < bound && rounding == 0, "%s: torch's formula to %.1e", name, error);
    OptimizerStep o = take_step(kind, 6);
    real bad = (real)NAN;
    floatX *before = TEST_TAKE(floatX, TENSOR);
    memcpy(before, one.s.param, TENSOR * sizeof(floatX));
    optimizer_update(&one.s, &whole, 1, &o, &bad);
    check(memcmp(before, one.s.param, TENSOR * sizeof(floatX)) == 0,
          "%s: a scale that is not finite changes nothing", name);
    test_release(name);
}
// Noisy quadratics: loss = mean of (p - 1)^2 / 2, the gradient of element i scaled by 10^U(-2,2)
// (AdamW should not care) and with noise of size 1.
static double quadratic(OptimizerKind kind, double *drift) {
    enum { N = 4096, STEPS = 300 };
    Shard shard = take_shard(N, kind, 1);
    Segment all = { 5, 0, N, 0, 0, 0 };
    double loss = 0;
    double mean = 0;
    real one = 1;
    test_state = 99;
    for (int t = 1; t <= STEPS; t++) {
        OptimizerStep o = take_step(kind, t);
        uint64_t keep = test_state;
        test_state = 7; // the scales: the same in every step
        double *size = TEST_TAKE(double, N);
        for (int i = 0; i < N; i++) size[i] = pow(10, 4 * test_uniform() - 2);
        test_state = keep;
        for (int i = 0; i < N; i++)
            shard.grad[i].v = (real)(size[i] * ((double)shard.s.master[i] - 1 + test_normal()));
        optimizer_update(&shard.s, &all, 1, &o, &one);
        free(test_piece[--test_pieces].memory);
    }
    for (int i = 0; i < N; i++) {
        loss += pow((double)shard.s.master[i] - 1, 2) / 2 / N;
        mean += (double)shard.s.master[i] / N;
    }
    *drift = mean;
    return loss;
}
static void test_adamw8(void) {
    double mean, mean8;
    double exact = quadratic(OPT_ADAMW, &mean);
    double coded = quadratic(OPT_ADAMW8, &mean8);
    test_release("quadratic");
    check(coded < 1.05 * exact + 1e-4 && fabs(mean8 - mean) < 0.01,
          "300 noisy steps: loss %.5f with 8-bit moments, %.5f exact (from 0.5); mean %.4f, %.4f",
          coded, exact, mean8, mean);
    // Outliers: |update| <= lr sqrt(bc2)/bc1 U, whatever the gradients were. Kind 0: 1e-6 with one
    // 1e4 in a block; 1: magnitudes from 1e-15 to 1e10; 2: half the block falls silent; 3: growth
    // by beta2 / beta1 a step, for which the bound is an equality.
    enum { N = 512 };
    for (int kind = 0; kind < 4; kind++) {
        Shard shard = take_shard(N, OPT_ADAMW8, 1);
        Segment all = { 6, 0, N, 0, 0, 0 };
        double worst = 0;
        double moved = 0;
        real one = 1;
        for (int t = 1; t <= 200; t++) {
            OptimizerStep o = take_step(OPT_ADAMW8, t);
            o.lr = 1;
            for (int i = 0; i < N; i++) {
                double g = t > 100 ? 0 : 1;
                if (kind == 0 || (kind > 1 && i % 2)) g = 1e-6 * test_normal();
                if (kind == 1) g = test_normal() * pow(10, 25 * test_uniform() - 15);
                if (kind == 3)
                    g = 1e-9 * pow(0.999 / 0.9, t) * (i % 2 ? -1 : 1) *
                        (1 + 0.13 * (i % 7)); // v of most falls between codes
                shard.grad[i].v = (real)(kind == 0 && t % 50 == 5 && i == 17 ? 1e4 : g);
                shard.s.master[i] = 0;
            }
            optimizer_update(&shard.s, &all, 1, &o, &one);
            double limit =
                sqrt(1 - pow(o.beta2, t)) / (1 - pow(o.beta1, t)) * adam_bound(o.beta1, o.beta2);
            for (int i = 0; i < N; i++) {
                double size = fabs((double)shard.s.master[i]) / limit;
                worst = size <= worst ? worst : size;
                moved += t < 5 && size > 0.01;
            }
        }
        // 1e-4: fp32 rounding of the bound's two sides (the 8-bit step itself never exceeds it)
        check(worst <= 1.0001 && moved > 4 * N * 0.4,
              "8-bit moments, gradients of kind %d: the largest update is %.3f of exact AdamW's "
              "bound",
              kind, worst);
        test_release("outliers");
    }
    int monotone = 1;
    int zero = v8_decode(0, 5) == 0 && v8_encode(0, 0, ~0u) == 0 && v8_encode(0, 1, 0) == 1 &&
               v8_encode(1, 1, ~0u) == 255 && v8_decode(255, 3) == 3;
    for (int c = 1; c < 256; c++) {
        monotone &= v8_decode((uint8_t)c, 1) > v8_decode((uint8_t)(c - 1), 1) &&
                    v8_encode(v8_decode((uint8_t)c, 1), 1, 0xfffff) == c;
        if (c != 128) monotone &= m8_encode((float)(int8_t)c, 1, ~0u) == c;
    }
    int ends = 1;
    for (float x = 1e-29f; x < 1e38f; x *= 1.37f)
        ends &= m8_encode(x, m8_inverse(x), ~0u) == 127 &&
                (int8_t)m8_encode(-x, m8_inverse(x), 0) == -127;
    check(zero && monotone && ends, "codes: exact values stay, 0 is only 0, the ends hold");
    double sum = 0;
    double sum_m = 0;
    double x = 0.0123;
    for (uint32_t i = 0; i < 1 << 16; i++) {
        Noise noise = noise_block(3, 4, i >> 8, 5);
        sum += (double)v8_decode(v8_encode((float)x, 1, noise_bits(noise, 0, i & 255) >> 12), 1) /
               65536;
        sum_m += (double)(int8_t)m8_encode(-7.3f, 1, noise_bits(noise, 0, i & 255)) / 65536;
    }
    check(fabs(sum / x - 1) < 1e-3 && fabs(sum_m + 7.3) < 0.01, "codes are unbiased: %.5f, %.4f",
          sum / x, sum_m); // 5 sigma: 6 % / 256 * 5 / 2 and 5 * 0.5 / 256
}
// Five updates of a shard with known numbers: fp32 builds have the bits of every machine, compiler
// and backend.
static void test_adamw8_bits(void) {
    enum { N = 1000 };
    Shard shard = take_shard(N, OPT_ADAMW8, 1);
    Segment all = { 9, 0, N, 0, 0, 1 };
    Noise noise = noise_block(1, 2, 3, 4);
    real scale = (real)0.3;
    uint64_t hash = 0;
    for (int i = 0; i < N; i++) shard.s.master[i] = (real)((i % 7 - 3) * 0x1p-5);
    for (int t = 1; t <= 5; t++) {
        OptimizerStep o = take_step(OPT_ADAMW8, t);
        for (int i = 0; i < N; i++) {
            double x = (int32_t)noise_bits(noise, t % 4, (uint32_t)i) * 0x1p-40;
            shard.grad[i].v = (real)(float)(x * x * x);
        }
        optimizer_update(&shard.s, &all, 1, &o, &scale);
    }
    for (int i = 0; i < N; i++) {
        uint32_t bits = quant8_bits((float)shard.s.master[i]);
        hash = mix64(hash ^ bits ^ (uint64_t)shard.s.m8[i] << 32 ^ (uint64_t)shard.s.v8[i] << 40);
    }
    for (int i = 0; i < 4; i++)
        hash = mix64(hash ^ quant8_bits(shard.s.m_scale[i]) ^
                     (uint64_t)quant8_bits(shard.s.v_scale[i]) << 32);
    check(sizeof(real) == 8 || hash == 0x3aef655feee54b4e, "8-bit AdamW: known bits (hash %016llx)",
          (unsigned long long)hash);
    test_release("bits");
}
// The error bounds that quant8.h derives, over every exponent.
static void test_quant8_roots(void) {
    Quant8Roots roots = quant8_roots();
    double root = 0;
    double high = 0;
    double quotient = 0;
    for (float x = 1.2e-38f; x < 3e38f; x *= 1.00011f) {
        double error = sqrt(2) * (double)quant8_half_root(x) / sqrt((double)x) - 1;
        root = fmax(root, fabs(error));
        high = fmax(high, error);
        if (x < 2.4e-38f || x > 4e37f) continue;
        error = (double)quant8_reciprocal(x) * (double)x - 1;
        quotient = fmax(quotient, fabs(error));
        high = fmax(high, error);
    }
    int table = 1;
    for (int c = 1; c < 256; c++) {
        uint8_t code = (uint8_t)c;
        float exact = sqrtf(v8_decode(code, 1));
        table &= v8_root(roots.root[v8_entry(code) % 16], code) == exact &&
                 v8_inverse_root(roots.inverse[v8_entry(code) % 16], code) == 1 / exact;
    }
    check(root < 4.8e-6 && quotient < 2.3e-6 && high < 3e-7 && table && quant8_half_root(0) == 0,
          "8-bit AdamW: roots within %.1e, inverses %.1e (%.0e above), roots of codes exact", root,
          quotient, high);
}
static void test_norms(void) {
    enum { N = 200000 };
    gradX *g = test_grad(test_random_real(N, 1, 0), N);
    Segment cut[4] = { { 1, 0, 65536, 0, 0, 1 },
                       { 1, 65536, N - 65536 - 7, 65536, 0, 1 },
                       { 2, 0, 7, N - 7, 0, 1 },
                       { 3, 0, 0, 0, 0, 1 } };
    double sums[2][4];
    double truth[3] = { 0 };
    double total;
    for (int run = 0; run < 2; run++) {
        test_threads(run + 1);
        gradient_squares(sums[run], g, cut, 4);
    }
    for (int i = 0; i < N; i++)
        truth[(i >= 65536) + (i >= N - 7)] += (double)g[i].v * (double)g[i].v;
    int ok = memcmp(sums[0], sums[1], sizeof sums[0]) == 0 && sums[0][3] == 0;
    for (int i = 0; i < 3; i++)
        ok &= fabs(sums[0][i] / truth[i] - 1) < 1e-13; // 2e5 additions of 1e-16, in 16 lanes
    check(ok, "gradient_squares sums each segment");
    real norm, scale;
    clip_scale(&norm, &scale, sums[0], 4, 1);
    sum_in_order(&total, sums[0], 4);
    double n = sqrt(total);
    check(fabs((double)norm / n - 1) < 1e-6 && fabs((double)scale * (n + 1e-6) - 1) < 1e-6,
          "clip_scale: norm %g", (double)norm);
    clip_scale(&norm, &scale, sums[0], 4, 1e6);
    ok = scale == 1;
    clip_scale(&norm, &scale, sums[0], 4, 0);
    ok &= scale == 1;
    sums[0][1] = INFINITY;
    clip_scale(&norm, &scale, sums[0], 4, 0);
    check(ok && isnan(scale) && !isfinite(norm),
          "clip_scale: below the limit 1, no limit 1, NaN where the norm is not finite");
    float factor[4] = { 2, 1, 0, 3 };
    real a = g[5].v;
    real b = g[70000].v;
    gradient_scale(g, cut, 4, factor);
    check(g[5].v == 2 * a && g[70000].v == b && g[N - 1].v == 0, "gradient_scale");
    floatX *p = TEST_TAKE(floatX, 2000);
    floatX *q = TEST_TAKE(floatX, 2000);
    real *master = TEST_TAKE(real, 2000);
    Segment whole = { 77, 0, 1001, 3, 0, 1 };
    Segment parts[2] = { { 77, 255, 746, 0, 0, 1 }, { 77, 0, 255, 1000, 0, 1 } };
    init_segments(p, master, &whole, 1, 12, 0.02);
    init_segments(q, 0, parts, 2, 12, 0.02);
    ok = memcmp(p + 3, q + 1000, 255 * sizeof *p) == 0 && memcmp(p + 258, q, 746 * sizeof *p) == 0;
    for (int i = 0; i < 1001; i++)
        ok &= master[3 + i] == (real)(0.02 * random_normal(12, 77, (uint64_t)i)) &&
              load(p + 3 + i) == round_x(master[3 + i]);
    init_segments(q, 0, parts, 1, 12, -1);
    check(ok && load(q) == 1 && load(q + 744) == 1,
          "init_segments: layout-free, one normal per index; ones");
    test_release("norms");
}

// ---- conversion -----------------------------------------------------------------------------
static double half_value(uint16_t h) { // the definition
    int e = h >> 10 & 31;
    int f = h & 1023;
    double v = e ? ldexp(1024 + f, e - 25) : ldexp(f, -24);
    if (e == 31) v = f ? NAN : INFINITY;
    return h & 0x8000 ? -v : v;
}
static void test_convert(void) {
    enum { ALL = 65536 };
    uint16_t *h = TEST_TAKE(uint16_t, ALL);
    uint16_t *back = TEST_TAKE(uint16_t, ALL);
    float *f = TEST_TAKE(float, ALL);
    double *d = TEST_TAKE(double, ALL);
    int ok = 1;
    int exact = 1;
    int nearest = 1;
    for (int i = 0; i < ALL; i++) h[i] = (uint16_t)i;
    convert(f, DTYPE_F32, h, DTYPE_F16, ALL);
    convert(d, DTYPE_F64, h, DTYPE_F16, ALL);
    convert(back, DTYPE_F16, f, DTYPE_F32, ALL);
    for (int i = 0; i < ALL; i++) {
        double v = half_value(h[i]);
        ok &= isnan(v) ? isnan(f[i]) && isnan(d[i])
                       : (double)f[i] == v && d[i] == v && (signbit(f[i]) != 0) == h[i] >> 15;
        exact &= isnan(v) ? isnan(half_value(back[i])) : back[i] == h[i];
    }
    convert(f, DTYPE_F32, h, DTYPE_BF16, ALL);
    convert(back, DTYPE_BF16, f, DTYPE_F32, ALL);
    for (int i = 0; i < ALL; i++)
        exact &= isnan(f[i]) ? isnan(bf16_to_float(back[i])) : back[i] == h[i];
    check(ok && exact, "every fp16 and bf16 number survives fp32 and fp64");
    // Nearest even from doubles around the midpoint of every pair of fp16 (bf16) neighbours, off by
    // less than fp32 can see: a second rounding would show.
    for (int type = 0; type < 2; type++) {
        Dtype to = type ? DTYPE_BF16 : DTYPE_F16;
        int top = type ? 0x7f80 : 0x7c00;
        for (int i = 0; i < top - 1; i++) {
            double a = type ? (double)bf16_to_float((uint16_t)i) : half_value((uint16_t)i);
            double b =
                type ? (double)bf16_to_float((uint16_t)(i + 1)) : half_value((uint16_t)(i + 1));
            d[i] = (i % 2 ? -1 : 1) * (a + b) / 2 * (1 + (i % 3 - 1) * 0x1p-50);
        }
        convert(back, to, d, DTYPE_F64, top - 1);
        for (int i = 0; i < top - 1; i++) {
            int up[3] = { 0, i & 1, 1 };
            int want = i + up[i % 3];
            nearest &= (back[i] & 0x7fff) == want && back[i] >> 15 == (i & 1);
        }
    }
    float edge[4] = { 65519.99f, 65520, -1e30f, 0x1p-25f };
    convert(back, DTYPE_F16, edge, DTYPE_F32, 4);
    check(nearest && back[0] == 0x7bff && back[1] == 0x7c00 && back[2] == 0xfc00 && back[3] == 0,
          "rounding is to nearest even, once; fp16 overflows at 65520");
    double big[3] = { 1e300, -1e39, 1e-320 };
    convert(back, DTYPE_BF16, big, DTYPE_F64, 3);
    convert(f, DTYPE_F32, big, DTYPE_F64, 3);
    check(back[0] == 0x7f80 && back[1] == 0xff80 && back[2] == 0 && f[0] == INFINITY && f[2] == 0,
          "doubles out of range");
    floatX *x = test_x(test_random(5000, 1, 0), 5000);
    real *r = TEST_TAKE(real, 5000);
    convert(r, DTYPE_REAL, x, DTYPE_FLOATX, 5000);
    for (int i = ok = 0; i < 5000; i++) ok += r[i] == load(x + i);
    check(ok == 5000, "floatX to real");
    test_release("convert");
}

int main(void) {
    device_init(0, 2);
    printf("kernels: random, optimizer, norms, init, convert; " PRECISION_NAME ", %s\n",
           device_describe());
    test_philox();
    test_normals();
    test_rounding_noise();
    test_update(OPT_SGD, 1, "SGD, master");
    test_update(OPT_SGD, 0, "SGD, no master");
    test_update(OPT_ADAMW, 1, "AdamW, master");
    test_update(OPT_ADAMW, 0, "AdamW, no master");
    test_update(OPT_ADAMW8, 1, "AdamW 8-bit, master");
    test_update(OPT_ADAMW8, 0, "AdamW 8-bit, no master");
    test_adamw8();
    test_adamw8_bits();
    test_quant8_roots();
    test_norms();
    test_convert();
    test_group("nothing was written behind a buffer");
    device_finish();
    return test_summary();
}
