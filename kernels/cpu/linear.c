// Linear maps y = x W^T and their backward, linear_* of kernels.h: three matrix products over all
// threads.
//   y_ro = sum_n x_rn W_on   =>   dx_rn = sum_o dy_ro W_on,   dW_on = sum_r dy_ro x_rn.
#include "gemm.h"

void linear_forward(floatX *y, const floatX *x, const floatX *W, int64_t R, int64_t O, int64_t N) {
    kernel_begin("linear_forward", 2.0 * R * O * N);
    gemm_parallel_xx(0, 1, R, O, N, x, N, W, N, 0, y, O);
}
void linear_backward_input(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                           int64_t N) {
    kernel_begin("linear_backward_input", 2.0 * R * O * N);
    gemm_parallel_xx(0, 0, R, N, O, dy, O, W, N, 0, dx, N);
}
void linear_backward_input_add(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                               int64_t N) {
    kernel_begin("linear_backward_input_add", 2.0 * R * O * N);
    gemm_parallel_xx(0, 0, R, N, O, dy, O, W, N, 1, dx, N);
}
void linear_backward_weight(gradX *dW, const floatX *dy, const floatX *x, int accumulate, int64_t R,
                            int64_t O, int64_t N) {
    kernel_begin("linear_backward_weight", 2.0 * R * O * N);
    gemm_parallel_x(1, 0, O, N, R, dy, O, x, N, accumulate ? 1 : 0, &dW->v, N);
}
