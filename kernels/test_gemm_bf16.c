// Products of bf16 panels (cpu/gemm_bf16.c) against plain loops, on any processor: the names of the
// instructions are those of bf16_interpreter.h. Both kernels, all layouts, edges, odd k, k = 0,
// sums that are added.
#include "bf16_interpreter.h"
#define gemm_bf16_kind test_gemm_bf16_kind
#define gemm_bf16_padded test_gemm_bf16_padded
#define gemm_bf16_a_size test_gemm_bf16_a_size
#define gemm_bf16_b_size test_gemm_bf16_b_size
#define gemm_bf16_pack_a test_gemm_bf16_pack_a
#define gemm_bf16_pack_b test_gemm_bf16_pack_b
#define gemm_bf16_add test_gemm_bf16_add
#include "test.h"
#include "cpu/gemm_bf16.c"

// One shape: C = old + op(A) op(B) in double, against the kernel; what surrounds C stays.
static void test_shape(GemmBf16 kind, int ta, int tb, int64_t m, int64_t n, int64_t k) {
    int64_t lda = (ta ? m : k) + 3, ldb = (tb ? k : n) + 1, ldc = n + 2;
    size_t na = (ta ? k : m) * lda, nb = (tb ? n : k) * ldb;
    uint16_t *A = TEST_TAKE(uint16_t, na), *B = TEST_TAKE(uint16_t, nb);
    for (size_t i = 0; i < na; i++) A[i] = float_to_bf16((float)test_normal());
    for (size_t i = 0; i < nb; i++) B[i] = float_to_bf16((float)test_normal());
    float *C = TEST_TAKE(float, m *ldc), *old = TEST_TAKE(float, m *ldc);
    for (int64_t i = 0; i < m * ldc; i++) C[i] = old[i] = (float)test_normal();
    uint16_t *a = TEST_TAKE(uint16_t, gemm_bf16_a_size(m, k));
    uint16_t *b = TEST_TAKE(uint16_t, gemm_bf16_b_size(n, k));
    gemm_bf16_pack_a(a, A, lda, ta, m, k);
    gemm_bf16_pack_b(b, B, ldb, tb, n, k);
    gemm_bf16_add(kind, C, ldc, a, b, m, n, k);
    double worst = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double sum = (double)old[i * ldc + j];
            for (int64_t p = 0; j < n && p < k; p++) {
                int64_t a = ta ? p * lda + i : i * lda + p, b = tb ? j * ldb + p : p * ldb + j;
                sum += (double)bf16_to_float(A[a]) * (double)bf16_to_float(B[b]);
            }
            double error =
                fabs((double)C[i * ldc + j] - sum) / (j < n ? sqrt((double)k + 1) : 1e-9);
            if (!(error <= worst)) worst = error;
        }
    compare(worst < 2e-6, "%s, layout %d %d, %d x %d x %d: error %.3g",
            kind == GEMM_AMX ? "tiles" : "vectors", ta, tb, (int)m, (int)n, (int)k, worst);
    test_release("a product");
}
int main(void) {
    const int sizes[][3] = { { 1, 1, 1 },    { 12, 32, 2 },  { 13, 33, 3 },  { 32, 32, 32 },
                             { 31, 31, 31 }, { 33, 65, 33 }, { 5, 7, 0 },    { 40, 17, 127 },
                             { 0, 5, 5 },    { 5, 0, 5 },    { 70, 96, 65 }, { 24, 64, 512 } };
    for (int layout = 0; layout < 4; layout++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            test_shape(GEMM_AVX512, layout & 1, layout / 2, sizes[i][0], sizes[i][1], sizes[i][2]);
            test_shape(GEMM_AMX, layout & 1, layout / 2, sizes[i][0], sizes[i][1], sizes[i][2]);
        }
    compare(!tiles_misused && !tiles_configured, "tiles are configured before use and released");
    test_group("bf16 products by vdpbf16ps and by AMX tiles, interpreted");
    return test_summary();
}
