// Both ends of the model: embedding look-up with its scatter-add, and cross entropy with its
// gradient in one pass. Offers kernels.h's section "ends".
#include "math.h"

void embed_forward(floatX *out, const int *ids, const floatX *W, int64_t R, int64_t C) {
    kernel_begin("embed_forward", 0);
    PARALLEL_FOR_BYTES(R * C * sizeof *out)
    for (int64_t r = 0; r < R; r++) memcpy(out + r * C, W + ids[r] * C, C * sizeof(floatX));
}
// out_r = W[id_r]  =>  dW_v = sum over r with id_r = v of dx_r. Threads share the columns, not the
// rows: every element sums its rows in ascending order (I8, deterministic), and no two threads
// write the same element.
void embed_backward(gradX *dW, const floatX *dx, const int *ids, int accumulate, int pad, int64_t R,
                    int64_t V, int64_t C) {
    kernel_begin("embed_backward", 0);
    enum { STRIP = 64 }; // columns of an item: one or more cache lines of every row
    if (!accumulate) device_zero(dW, V * C * sizeof *dW);
    PARALLEL_FOR_BYTES(R * C * sizeof *dx)
    for (int64_t c0 = 0; c0 < C; c0 += STRIP) {
        int64_t n = lesser(STRIP, C - c0);
        for (int64_t r = 0; r < R; r++) {
            if (ids[r] == pad) continue;
            gradX *to = dW + ids[r] * C + c0;
            const floatX *from = dx + r * C + c0;
            for (int64_t c = 0; c < n; c++) to[c].v += load(from + c);
        }
    }
}

// With m = max over j of x_j and s = sum over j of e^(x_j - m):
//   -log p_t = log s + m - x_t,   its derivative by x_j = e^(x_j - m) / s - [j = t].
// e^(x - m) goes to a row of scratch, so that bf16 logits are read once and rounded once.
static double cross_entropy_row(floatX *x, int target, real seed, int backward, int64_t V) {
    if (target < 0) {
        if (backward) memset(x, 0, V * sizeof *x);
        return 0;
    }
    real *e = SCRATCH(SCRATCH_LOCAL, real, V);
    const real *logits = view_row(x, e, V);
    real most = row_max(logits, V);
    real at_target = logits[target];
    for (int64_t i = 0; i < V; i++) e[i] = exp_real(logits[i] - most);
    // Pieces in double: beside the 1 of a sure target, 1e5 terms of 1e-9 would not move a float.
    double total = 0;
    for (int64_t i = 0; i < V; i += 1024) total += (double)row_sum(e + i, lesser(1024, V - i));
    real sum = (real)total;
    real scale = seed / sum;
    if (backward) {
        for (int64_t i = 0; i < V; i++) store(x + i, e[i] * scale);
        store(x + target, (e[target] / sum - 1) * seed);
    }
    return log(total) + ((double)most - (double)at_target);
}
void cross_entropy(floatX *logits, double *loss_sum, const int *targets, real seed, int backward,
                   int64_t N, int64_t V) {
    kernel_begin("cross_entropy", 0);
    double *loss = SCRATCH(SCRATCH_SHARED, double, N);
    double sum = 0;
    PARALLEL_FOR_BYTES(N * V * sizeof *logits)
    for (int64_t r = 0; r < N; r++)
        loss[r] = cross_entropy_row(logits + r * V, targets[r], seed, backward, V);
    for (int r = 0; r < N; r++) sum += loss[r];
    loss_sum[0] += sum;
}
