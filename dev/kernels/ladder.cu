// Checks every rung of the ladder against the first and, on a GPU, times it.
//   make ladder              on a GPU: 8,192 tokens of Qwen3-30B-A3B's expert layer (C 2048, F 768,
//   128 experts, 8 of a token), median of 10 runs by CUDA events make test-cuemu-ladder   in the
//   emulator: small ragged shapes, checks alone; 'N passed, N failed' ladder [tokens]          the
//   number of tokens of the timed shape
//
// Tolerance. Two rungs add the same products in fp32 in another order and round to bf16, so an
// element of H may land on the neighbouring number, 2^-8 of its size away; twice that is allowed,
// and 1e-4 for the sums themselves. A is computed from the rounded H: with |silu'| < 1.1, one step
// of gate and one of up move it by at most 2^-8 (1.1 |gate up| + |silu(gate) up|), and its own
// rounding by 2^-8 |A|: 2^-6 |gate up| covers them.
#include "ladder.h"
#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

static const struct {
    const char *name;
    Rung *run;
    const char *kernel;
} rungs[] = { { "1_naive", up_naive, "auto" },
              { "2_tiles", up_tiles, "auto" },
              { "3_mma", up_mma, "auto" },
              { "4_wgmma", up_wgmma, "wgmma" },
              { "5_production, mma", up_production, "mma" },
              { "5_production, wgmma", up_production, "wgmma" } };
enum { RUNGS = sizeof rungs / sizeof rungs[0] };

static uint64_t state = 1;
static float uniform() { // [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) * 0x1p-52 - 1);
}
static uint16_t bf16_bits(float v) {
    __nv_bfloat16 b = __float2bfloat16(v);
    uint16_t bits;
    memcpy(&bits, &b, 2);
    return bits;
}
static float value(uint16_t bits) {
    unsigned wide = (unsigned)bits << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
}
template <class T> static T *device(const std::vector<T> &v) {
    T *p;
    CUDA_CHECK(cudaMalloc((void **)&p, v.size() * sizeof(T) + 16));
    device_upload(p, v.data(), v.size() * sizeof(T));
    return p;
}
static floatX *random_matrix(int64_t n, float scale) {
    std::vector<uint16_t> v((size_t)n);
    for (auto &x : v) x = bf16_bits(uniform() * scale);
    return (floatX *)device(v);
}
static std::vector<uint16_t> download(const floatX *p, int64_t n) {
    std::vector<uint16_t> v((size_t)n);
    device_download(v.data(), p, v.size() * 2);
    return v;
}
// The worst |difference| / tolerance over the rows in use: at most 1 is right. NaN counts as
// infinite.
static double worst(const std::vector<uint16_t> &H, const std::vector<uint16_t> &A,
                    const std::vector<uint16_t> &H1, const std::vector<uint16_t> &A1, int64_t rows,
                    int F) {
    double most = 0;
    auto see = [&](double difference, double tolerance) {
        if (!(difference <= most * tolerance))
            most = difference == difference ? difference / tolerance : INFINITY;
    };
    for (int64_t m = 0; m < rows; m++)
        for (int64_t f = 0; f < F; f++) {
            int64_t gate = m * 2 * F + f;
            int64_t up = gate + F;
            for (int64_t i : { gate, up })
                see(fabs(value(H[i]) - value(H1[i])), fabs(value(H1[i])) / 128 + 1e-4);
            see(fabs(value(A[m * F + f]) - value(A1[m * F + f])),
                fabs(value(H1[gate]) * value(H1[up])) / 64 + 1e-4);
        }
    return most;
}
// Median milliseconds of 10 runs.
static float time_of(Rung *run, floatX *H, floatX *A, const floatX *pool, const floatX *W1,
                     const RowIndex *plan, int C, int F) {
    cudaEvent_t start, stop;
    std::vector<float> times;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < 12; i++) { // the first two warm up
        float ms;
        CUDA_CHECK(cudaEventRecord(start, compute_stream()));
        run(H, A, pool, W1, plan, C, F);
        CUDA_CHECK(cudaEventRecord(stop, compute_stream()));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 2) times.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}
static int passed, failed;
static void climb(int P, int K, int E, int C, int F, bool timed) {
    int M = row_index_bound(P, K, E);
    std::vector<int> choice((size_t)P * K);
    for (int p = 0; p < P;
         p++) // K neighbouring experts, the last of all never: an expert without rows
        for (int k = 0, first = (int)((uniform() + 1) / 2 * (float)(E - K)); k < K; k++)
            choice[(size_t)p * K + k] = first + k;
    int *ids = device(choice);
    RowIndex plan = { device(std::vector<int>(M)),
                      device(std::vector<int>((size_t)P * K)),
                      device(std::vector<int>(E + 1)),
                      M,
                      P,
                      E,
                      K };
    row_index_build(&plan, ids, 0);
    int rows;
    device_download(&rows, plan.expert_row + E, sizeof rows);
    floatX *pool = random_matrix((int64_t)P * C, 2);
    floatX *W1 = random_matrix((int64_t)E * 2 * F * C, 2 / sqrtf((float)C));
    floatX *H = random_matrix((int64_t)M * 2 * F, 1), *A = random_matrix((int64_t)M * F, 1);
    std::vector<uint16_t> H1, A1;
    printf("%d tokens, %d of %d experts, C %d, F %d: %d rows with padding\n", P, K, E, C, F, rows);
    for (int i = 0; i < RUNGS; i++) {
        if (!experts_select(rungs[i].kernel)) {
            printf("     %-22s needs compute capability 9.0 and a build for sm_90a\n",
                   rungs[i].name);
            continue;
        }
        CUDA_CHECK(cudaMemsetAsync(H, 0xff, (size_t)M * 2 * F * sizeof(floatX), compute_stream()));
        CUDA_CHECK(cudaMemsetAsync(A, 0xff, (size_t)M * F * sizeof(floatX), compute_stream()));
        rungs[i].run(H, A, pool, W1, &plan, C, F);
        std::vector<uint16_t> H2 = download(H, (int64_t)M * 2 * F),
                              A2 = download(A, (int64_t)M * F);
        if (i == 0) {
            H1 = H2;
            A1 = A2;
        }
        double most = worst(H2, A2, H1, A1, rows, F);
        most <= 1 ? passed++ : failed++;
        printf("%4d %s %-22s largest difference %.2f of the tolerance", passed + failed,
               most <= 1 ? "ok    " : "FAILED", rungs[i].name, most);
        if (timed) {
            float ms = time_of(rungs[i].run, H, A, pool, W1, &plan, C, F);
            double speed = 4.0 * P * K * C * F / (ms * 1e-3);
            double peak = device_peak_flops();
            printf("  %9.3f ms %8.2f TFLOP/s %6.2f %%", ms, speed / 1e12,
                   peak > 0 ? 100 * speed / peak : NAN);
        }
        printf("\n");
        fflush(stdout);
    }
    experts_select("auto");
    for (void *p : { (void *)ids, (void *)plan.row_token, (void *)plan.token_row,
                     (void *)plan.expert_row, (void *)pool, (void *)W1, (void *)H, (void *)A })
        CUDA_CHECK(cudaFree(p));
}
int main(int argc, char **argv) {
    device_init(0, 0);
    printf("%s\n", device_describe());
    climb(60, 2, 4, 136, 72, false);
    climb(150, 1, 2, 64, 264, false);
#ifndef CUEMU
    climb(argc > 1 ? atoi(argv[1]) : 8192, 8, 128, 2048, 768, true);
#else
    (void)argc;
    (void)argv;
#endif
    device_finish();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
