// Linear maps y = x W^T and their backward (linear_... of kernels.h, gemm of common.cuh), through
// cuBLASLt with a cache of plans.
//   y_ro = sum_n x_rn W_on   =>   dx_rn = sum_o dy_ro W_on,   dW_on = sum_r dy_ro x_rn.
// FLOPs: 2 R O N each. Bytes: each operand once if the L2 cache holds a wave's panels; 1,000 FLOPs
// a byte at R = 32k, O = N = 2048, so the tensor cores are the limit.
//
// cuBLASLt is column-major: a row-major (m,n) matrix is its (n,m) matrix with leading dimension n.
// So C = op(A) op(B) row-major is C^T = op(B)^T op(A)^T column-major: its first operand is our B,
// its second our A, and neither needs a new transposition flag.
//
// The heuristic costs about 100 us a shape, so a plan (descriptors and algorithm) is kept for each
// (transpositions, sizes, alignment, beta, type). The same shape always takes the same algorithm,
// and partial sums of split-K are only ever added in fp32, in a fixed order (I8, deterministic).
#include "common.cuh"
#include <cublasLt.h>
#include <stdio.h>

static void cublas_check(cublasStatus_t status, const char *call) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    die("cuBLASLt: status %d in %s|a driver older than the toolkit, or an error of an earlier "
        "kernel",
        (int)status, call);
}
#define CUBLAS_CHECK(call) cublas_check((call), #call)

enum { PLANS = 512, WORKSPACE = 32 << 20 }; // workspace: what NVIDIA recommends for Hopper
typedef struct {
    int64_t m, n, k, lda;
    int ta, tb, beta, c_real, align_a, align_b, align_c;
} Shape;
typedef struct {
    Shape shape;
    int used;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} GemmPlan;
static GemmPlan plans[PLANS]; // open addressing; shapes of a run are some dozens
static cublasLtHandle_t handle;
static void *workspace;

void gemm_init(void) {
    CUBLAS_CHECK(cublasLtCreate(&handle));
    CUDA_CHECK(cudaMalloc(&workspace, WORKSPACE));
}
static void plan_destroy(GemmPlan *p) {
    cublasLtMatmulDescDestroy(p->product);
    cublasLtMatrixLayoutDestroy(p->a);
    cublasLtMatrixLayoutDestroy(p->b);
    cublasLtMatrixLayoutDestroy(p->c);
    p->used = 0;
}
void gemm_finish(void) {
    for (int i = 0; i < PLANS; i++)
        if (plans[i].used) plan_destroy(&plans[i]);
    CUDA_CHECK(cudaFree(workspace));
    CUBLAS_CHECK(cublasLtDestroy(handle));
}
const char *gemm_library(void) {
    static char text[64];
    size_t v = cublasLtGetVersion();
    snprintf(text, sizeof text, "cuBLASLt %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
    return text;
}
static int alignment(const void *p) { // largest power of two up to 256 that divides the address
    size_t bits = (size_t)p | 256;
    return (int)(bits & (0 - bits));
}
static void plan_create(GemmPlan *p, const Shape *s) {
    cudaDataType_t x = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    cudaDataType_t c = s->c_real ? CUDA_R_32F : x;
    cublasOperation_t first = s->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t second = s->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                                sizeof first));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                                sizeof second));
    // columns of the column-major view: B (k,n) is (n,k) there, B (n,k) is (k,n)
    int64_t b_rows = s->tb ? s->k : s->n;
    int64_t b_columns = s->tb ? s->n : s->k;
    CUBLAS_CHECK(
        cublasLtMatrixLayoutCreate(&p->a, x, (uint64_t)b_rows, (uint64_t)b_columns, b_rows));
    int64_t a_rows = s->ta ? s->m : s->k;
    int64_t a_columns = s->ta ? s->k : s->m;
    CUBLAS_CHECK(
        cublasLtMatrixLayoutCreate(&p->b, x, (uint64_t)a_rows, (uint64_t)a_columns, s->lda));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&p->c, c, (uint64_t)s->n, (uint64_t)s->m, s->n));
    cublasLtMatmulPreference_t wish;
    size_t bytes = WORKSPACE;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint32_t align_a = (uint32_t)s->align_b;
    uint32_t align_b = (uint32_t)s->align_a;
    uint32_t align_c = (uint32_t)s->align_c;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&wish));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c));
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(handle, p->product, p->a, p->b, p->c, p->c, wish, 1,
                                                &best, &found));
    if (!found)
        die("cuBLASLt has no algorithm for a product of (%lld,%lld) by (%lld,%lld)|change "
            "--micro-batch",
            (long long)s->m, (long long)s->k, (long long)s->k, (long long)s->n);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(wish));
    p->shape = *s;
    p->algorithm = best.algo;
    p->used = 1;
}
static GemmPlan *plan_for(const Shape *s) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < sizeof *s; i++)
        hash = (hash ^ ((const unsigned char *)s)[i]) * 0x100000001b3u;
    int home = (int)(hash % PLANS);
    int at = home;
    for (int i = 0; i < PLANS && plans[at].used; i++, at = (at + 1) % PLANS)
        if (!memcmp(&plans[at].shape, s, sizeof *s)) return &plans[at];
    if (plans[at].used)
        plan_destroy(&plans[at = home]); // full: the oldest user of this place leaves
    plan_create(&plans[at], s);
    return &plans[at];
}
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
          const floatX *B, int beta, void *C, int c_real) {
    if (m == 0 || n == 0) return;
    if (k == 0) {
        if (!beta) device_zero(C, (size_t)m * n * (c_real ? sizeof(float) : sizeof(floatX)));
        return;
    }
    Shape s;
    memset(&s, 0, sizeof s); // compared by bytes, padding included
    s.m = m;
    s.n = n;
    s.k = k;
    s.lda = lda;
    s.ta = ta;
    s.tb = tb;
    s.beta = beta;
    s.c_real = c_real;
    s.align_a = alignment(A);
    s.align_b = alignment(B);
    s.align_c = alignment(C);
    GemmPlan *p = plan_for(&s);
    float one = 1;
    float keep = (float)beta;
    CUBLAS_CHECK(cublasLtMatmul(handle, p->product, &one, B, p->a, A, p->b, &keep, C, p->c, C, p->c,
                                &p->algorithm, workspace, WORKSPACE, compute_stream()));
}

void linear_forward(floatX *y, const floatX *x, const floatX *W, int64_t R, int64_t O, int64_t N) {
    kernel_begin("linear_forward", 2.0 * R * O * N);
    gemm(0, 1, R, O, N, x, N, W, 0, y, 0);
}
void linear_backward_input(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                           int64_t N) {
    kernel_begin("linear_backward_input", 2.0 * R * O * N);
    gemm(0, 0, R, N, O, dy, O, W, 0, dx, 0);
}
void linear_backward_input_add(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                               int64_t N) {
    kernel_begin("linear_backward_input_add", 2.0 * R * O * N);
    gemm(0, 0, R, N, O, dy, O, W, 1, dx, 0);
}
void linear_backward_weight(gradX *dW, const floatX *dy, const floatX *x, int accumulate, int64_t R,
                            int64_t O, int64_t N) {
    kernel_begin("linear_backward_weight", 2.0 * R * O * N);
    gemm(1, 0, O, N, R, dy, O, x, accumulate ? 1 : 0, dW, 1);
}
