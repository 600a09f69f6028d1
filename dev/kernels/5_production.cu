// Rung 5, what the program runs: kernels/cuda/experts_hopper.cu (its header has the picture), and
// on other cards kernels/cuda/experts.cu. Nothing is copied here: the last rung is the production
// file, so the two cannot drift apart.
//
// What is new: one block a multiprocessor walks over the tiles; a producer warpgroup fills a ring
// of three stages (TMA for weights, cp.async through row_token for rows) while two consumer
// warpgroups multiply 128 x 256; results leave by TMA under the next tile's products. Why faster:
// the tensor cores wait for nothing but the L2 cache, and a tile twice as high halves the weights'
// traffic. What limits it: 85 FLOPs a byte of L2 traffic x some 6 TB/s, and SwiGLU between tiles.
// Expected: 45 to 52 % of 989 TFLOP/s. experts.cu (mma.sync, four stages of cp.async): 35 to 45 %.
#include "ladder.h"

void up_production(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
                   int C, int F) {
    experts_up(H, A, pool, W1, plan, C, F);
}
