// Products of bf16 panels (cpu/gemm_bf16.c) against plain loops, on any processor: the names of the
// instructions are those of bf16_interpreter.h. Both kernels, all layouts, edges, odd k, k = 0,
// sums that are added.
#include "bf16_interpreter.h"
#define gemm_bf16_kind test_gemm_bf16_kind
#define gemm_bf16_padded test_gemm_bf16_padded
#define gemm_bf16_a_size test_gemm_bf16_a_size
#define gemm_bf16_b_size test_gemm_bf16_b_size
#define gemm_bf16_pack test_gemm_bf16_pack
#define gemm_bf16 test_gemm_bf16
#include "test.h"
#include "cpu/gemm_bf16.c"

// One shape: beta C + op(A) op(B) in double, against the kernel, whose results are fp32 in place or
// rounded to bf16 elsewhere; what surrounds them stays. With beta 0 C is NaN.
static void test_shape(GemmBf16 kind, int ta, int tb, int64_t m, int64_t n, int64_t k, int beta,
                       int rounded) {
    int64_t lda = (ta ? m : k) + 3;
    int64_t ldb = (tb ? k : n) + 1;
    int64_t ldc = n + 2;
    size_t na = (ta ? k : m) * lda;
    size_t nb = (tb ? n : k) * ldb;
    uint16_t *A = TEST_TAKE(uint16_t, na), *B = TEST_TAKE(uint16_t, nb);
    for (size_t i = 0; i < na; i++) A[i] = float_to_bf16((float)test_normal());
    for (size_t i = 0; i < nb; i++) B[i] = float_to_bf16((float)test_normal());
    float *C = TEST_TAKE(float, m *ldc);
    float *old = TEST_TAKE(float, m *ldc);
    uint16_t *X = TEST_TAKE(uint16_t, m * ldc);
    for (int64_t i = 0; i < m * ldc; i++) {
        X[i] = float_to_bf16((float)test_normal());
        old[i] = bf16_to_float(X[i]);
        C[i] = beta || i % ldc >= n ? old[i] : (float)NAN;
    }
    uint16_t *a = TEST_TAKE(uint16_t, gemm_bf16_a_size(m, k));
    uint16_t *b = TEST_TAKE(uint16_t, gemm_bf16_b_size(n, k));
    gemm_bf16_pack(a, A, lda, !ta, m, k, 1);
    gemm_bf16_pack(b, B, ldb, tb, n, k, 0);
    gemm_bf16(kind, C, ldc, rounded ? X : 0, ldc, a, b, m, n, k, beta);
    double worst = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double sum = beta || j >= n ? (double)old[i * ldc + j] : 0;
            for (int64_t p = 0; j < n && p < k; p++) {
                int64_t a = ta ? p * lda + i : i * lda + p;
                int64_t b = tb ? j * ldb + p : p * ldb + j;
                sum += (double)bf16_to_float(A[a]) * (double)bf16_to_float(B[b]);
            }
            double got = (double)(rounded ? bf16_to_float(X[i * ldc + j]) : C[i * ldc + j]);
            double unit = sqrt((double)k + 1) + (rounded ? fabs(sum) * 2000 : 0);
            double error = fabs(got - sum) / (j < n ? unit : 1e-9);
            if (!(error <= worst)) worst = error;
        }
    compare(worst < 2e-6, "%s, layout %d %d, %d x %d x %d, beta %d, %s: error %.3g",
            kind == GEMM_AMX ? "tiles" : "vectors", ta, tb, (int)m, (int)n, (int)k, beta,
            rounded ? "bf16" : "fp32", worst);
    test_release("a product");
}
int main(void) {
    const int sizes[][3] = { { 1, 1, 1 },    { 12, 32, 2 },  { 13, 33, 3 },  { 32, 32, 32 },
                             { 31, 31, 31 }, { 33, 65, 33 }, { 5, 7, 0 },    { 40, 17, 127 },
                             { 0, 5, 5 },    { 5, 0, 5 },    { 70, 96, 65 }, { 24, 64, 512 } };
    for (int layout = 0; layout < 4; layout++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (int kind = 0; kind < 8; kind++)
                test_shape(kind & 1 ? GEMM_AMX : GEMM_AVX512, layout & 1, layout / 2, sizes[i][0],
                           sizes[i][1], sizes[i][2], kind / 2 & 1, kind / 4);
    compare(!tiles_misused && !tiles_configured, "tiles are configured before use and released");
    test_group("bf16 products by vdpbf16ps and by AMX tiles, interpreted");
    return test_summary();
}
