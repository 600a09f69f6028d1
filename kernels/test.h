// A small harness for kernel tests: numbered checks, random inputs, memory with guards, comparison
// against a slow truth.
//
// The truth of a kernel is a naive function of doubles that passes every number which an op-by-op
// implementation would store through Q(). With test_rounding = 0 Q is the identity: the reference.
// With 1 it rounds to bf16: the naive bf16 version, whose error bounds ours in bf16 builds (at most
// twice: FlashAttention's rule). Inputs are drawn on floatX's grid, so all three start from the
// same numbers.
#ifndef MOE_TEST_H
#define MOE_TEST_H
#include "cpu/math.h"
#include "fail.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

// ---- checks ---------------------------------------------------------------------------------
static int test_passed, test_failed;
MOE_PRINTF(2, 3) static inline int check(int ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%4d %s ", test_passed + test_failed + 1, ok ? "ok    " : "FAILED");
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    ok ? test_passed++ : test_failed++;
    return ok;
}
// Comparisons are counted into the group under way; a group is one numbered line. Failed
// comparisons print themselves.
static int group_comparisons, group_failures;
MOE_PRINTF(2, 3) static inline int compare(int ok, const char *format, ...) {
    group_comparisons++;
    if (ok) return 1;
    va_list args;
    va_start(args, format);
    printf("     ");
    vprintf(format, args);
    va_end(args);
    printf("\n");
    group_failures++;
    return 0;
}
// The closing line and the exit status.
static inline int test_summary(void) {
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}

// ---- memory: freed together, 64 guard bytes behind every piece, filled with NaN (0xff) ------
enum { TEST_PIECES = 4096, TEST_GUARD = 64 };
static struct {
    char *memory;
    size_t bytes;
} test_piece[TEST_PIECES];
static int test_pieces;
static inline void *test_take(size_t bytes) {
    if (test_pieces == TEST_PIECES)
        die("test.h: more than %d pieces|call test_release between tests", TEST_PIECES);
    char *p = (char *)xmalloc(bytes + TEST_GUARD, "a test buffer");
    memset(p, 0xff, bytes);
    memset(p + bytes, 0xa5, TEST_GUARD);
    test_piece[test_pieces].memory = p;
    test_piece[test_pieces++].bytes = bytes;
    return p;
}
#define TEST_TAKE(type, count) ((type *)test_take((count) * sizeof(type)))
// Frees everything taken; a damaged guard is a failed comparison.
static inline void test_release(const char *name) {
    int damaged = 0;
    for (int i = 0; i < test_pieces; i++) {
        for (int g = 0; g < TEST_GUARD; g++)
            damaged += test_piece[i].memory[test_piece[i].bytes + g] != (char)0xa5;
        free(test_piece[i].memory);
    }
    test_pieces = 0;
    compare(!damaged, "%s: wrote %d bytes behind a buffer", name, damaged);
}
// Ends a group: one numbered line, memory freed.
static inline void test_group(const char *name) {
    test_release(name);
    check(group_failures == 0, "%s (%d comparisons)", name, group_comparisons);
    group_comparisons = group_failures = 0;
}

// ---- random inputs --------------------------------------------------------------------------
static uint64_t test_state = 1;
static inline uint64_t test_bits(void) { // splitmix64
    uint64_t z = test_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static inline int test_below(int n) { return (int)(test_bits() % (uint64_t)n); }
static inline double test_uniform(void) { return (double)(test_bits() >> 11) * 0x1p-53; }
// Nearly normal (sum of four uniforms), standard deviation 1.
static inline double test_normal(void) {
    return (test_uniform() + test_uniform() + test_uniform() + test_uniform() - 2) *
           1.7320508075688772;
}
// n numbers scale * normal + shift, on floatX's grid / on real's grid.
static inline double *test_random(size_t n, double scale, double shift) {
    double *d = TEST_TAKE(double, n);
    for (size_t i = 0; i < n; i++) d[i] = (double)round_x((real)(scale * test_normal() + shift));
    return d;
}
static inline double *test_random_real(size_t n, double scale, double shift) {
    double *d = TEST_TAKE(double, n);
    for (size_t i = 0; i < n; i++) d[i] = (double)(real)(scale * test_normal() + shift);
    return d;
}

// ---- conversions into fresh buffers ---------------------------------------------------------
static inline floatX *test_x(const double *d, size_t n) {
    floatX *x = TEST_TAKE(floatX, n);
    for (size_t i = 0; i < n; i++) store(x + i, (real)d[i]);
    return x;
}
static inline real *test_real(const double *d, size_t n) {
    real *x = TEST_TAKE(real, n);
    for (size_t i = 0; i < n; i++) x[i] = (real)d[i];
    return x;
}
static inline gradX *test_grad(const double *d, size_t n) { return (gradX *)test_real(d, n); }
static inline double *from_x(const floatX *x, size_t n) {
    double *d = TEST_TAKE(double, n);
    for (size_t i = 0; i < n; i++) d[i] = (double)load(x + i);
    return d;
}
static inline double *from_real(const real *x, size_t n) {
    double *d = TEST_TAKE(double, n);
    for (size_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}
static inline double *from_grad(const gradX *x, size_t n) { return from_real((const real *)x, n); }

// ---- comparison -----------------------------------------------------------------------------
static int test_rounding;
static inline double Q(double v) {
    return test_rounding ? (double)bf16_to_float(float_to_bf16((float)v)) : v;
}
// |a - b| / |b| in the 2-norm (|a| where b = 0); NaN counts as infinite.
static inline double test_error(const double *a, const double *b, size_t n) {
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    double e = norm > 0 ? sqrt(difference / norm) : sqrt(difference);
    return isnan(e) ? INFINITY : e;
}
// fp64: sums of a few hundred terms, 1e-16 each. fp32: 6e-8 a rounding, sums of up to 1000 terms in
// a random walk or better: 2e-6; kernels whose terms cancel say a larger `slack`. bf16: twice the
// naive bf16 error, plus the fp32 bound for what both compute without rounding to bf16.
static inline int check_close(const char *name, const double *got, const double *truth,
                              const double *naive_bf16, size_t n, double slack) {
    double error = test_error(got, truth, n);
    double bound = slack * (sizeof(real) == 8 ? 1e-13 : 2e-6);
    if (sizeof(floatX) == 2) bound += 2 * test_error(naive_bf16, truth, n);
    return compare(error <= bound, "%s: error %.3g above %.3g", name, error, bound);
}
// Central differences in fp64 builds: analytic[i] against (f(x_i + h) - f(x_i - h)) / 2h for up to
// `samples` of the n elements of x. h = 1e-5: truncation h^2 f''' ~ 1e-10 and cancellation 1e-16
// |f| / h ~ 1e-11, against the largest gradient: 1e-7 leaves room for steep functions.
static inline int check_gradient(const char *name, const double *analytic, double *x, size_t n,
                                 int samples, double (*f)(void *), void *context) {
    double largest = 1e-3;
    double worst = 0;
    for (size_t i = 0; i < n; i++)
        if (fabs(analytic[i]) > largest) largest = fabs(analytic[i]);
    for (size_t s = 0; s < n && s < (size_t)samples; s++) {
        size_t i = n <= (size_t)samples ? s : (size_t)(test_bits() % n);
        const double h = 1e-5;
        const double keep = x[i];
        x[i] = keep + h;
        double up = f(context);
        x[i] = keep - h;
        double down = f(context);
        x[i] = keep;
        double e = fabs((up - down) / (2 * h) - analytic[i]) / largest;
        if (!(e <= worst)) worst = e;
    }
    return compare(worst <= 1e-7, "%s: finite differences deviate by %.3g of the largest gradient",
                   name, worst);
}
static inline double test_dot(const double *a, const double *b, size_t n) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
// n threads from now on. The runtime may end the threads of a larger team, and their scratch would
// be lost with them: freed first, it grows again.
static inline void test_threads(int n) {
    device_finish();
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}
#endif
