// The table of contents: every operation that touches elements, with its shapes and its contract.
// model/ is written against this page. kernels/cpu/ is the readable implementation, kernels/cuda/
// the fast one; which of them is used is decided when the program is linked.
//
// Dimensions
//   B T      sequences of a micro-batch, tokens of a sequence
//   R        rows of a micro-batch, one for each token: B T
//   C        hidden width
//   H KV D   heads, key/value heads, head size (H D need not be C)
//   E K F    experts, experts for each token (top_k), expert width
//   V        vocabulary
//   P        pool tokens, which are the tokens that the experts of this rank see (R when ep = 1)
//   M        bound of the expert rows, padding included
// Conventions
//   Outputs come first, then inputs, weights, what forward saved, dimensions. Matrices are
//   row-major; a weight is (out, in), so y = x W^T. dx is the gradient of the loss by x.
//   Pointers are device pointers and never 0 unless the contract says so. R, P and M may be 0:
//   every function then still writes what it promises (I3, unused is zero).
//   Gradients of activations are overwritten. Where two paths meet, one function is named for it:
//   linear_backward_input_add, router_backward_add, `residual` of rmsnorm_backward.
//   Gradients of weights take `accumulate`: 0 writes every element, zeros where no row
//   contributes; 1 adds (I5, who adds and who overwrites).
//   Sums have an order that depends on shapes alone, so that any number of threads gives the same
//   bits (I8, deterministic). They are fp32 or better; a result is rounded once, when it is stored.
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H
#include "device.h"
MOE_BEGIN_C

// ---- ends -----------------------------------------------------------------------------------
// Copies rows of the embedding: out (R,C) = W[ids]. ids (R) are in [0,V), which the loader checks.
void embed_forward(floatX *out, const int *ids, const floatX *W /*(V,C)*/, int64_t R, int64_t C);
// Sums dx over the rows that looked up v, in ascending order, into row v of dW (V,C). The row of
// token `pad` (-1: none) takes nothing, as torch's padding_idx.
void embed_backward(gradX *dW, const floatX *dx /*(R,C)*/, const int *ids /*(R)*/, int accumulate,
                    int pad, int64_t R, int64_t V, int64_t C);
// Adds -log softmax(logits)[target], summed over the rows with target >= 0, to loss_sum[0] (a
// double on the device). Where `backward` is set, also turns logits (N,V) into their gradient
// (softmax - onehot) * seed, which is exactly 0 in rows with target < 0.
void cross_entropy(floatX *logits, double *loss_sum, const int *targets /*(N)*/, real seed,
                   int backward, int64_t N, int64_t V);

// ---- dense ----------------------------------------------------------------------------------
// Computes y (R,C) = x rstd w with rstd (R) = (mean(x^2) + eps)^-1/2; rstd may be 0 (not wanted).
// bf16 builds round x rstd before the product with w, as transformers does.
void rmsnorm_forward(floatX *y, real *rstd, const floatX *x, const floatX *w, real eps, int64_t R,
                     int64_t C);
// Computes, with n = x rstd and t = dy w:
//   dx = residual + rstd (t - n mean(t n)),   dw_j = sum over rows of dy_j n_j.
// This is where the residual path meets the branch. residual (R,C) may be 0 or dx itself.
void rmsnorm_backward(floatX *dx, gradX *dw, const floatX *residual, const floatX *dy,
                      const floatX *x, const floatX *w, const real *rstd, int accumulate, int64_t R,
                      int64_t C);
// Computes y (R,O) = x W^T from x (R,N) and W (O,N).
void linear_forward(floatX *y, const floatX *x, const floatX *W, int64_t R, int64_t O, int64_t N);
// Computes dx (R,N) = dy W; the second adds dy W to dx, for several maps that read one input.
void linear_backward_input(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                           int64_t N);
void linear_backward_input_add(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                               int64_t N);
// Computes dW (O,N) = dy^T x.
void linear_backward_weight(gradX *dW, const floatX *dy, const floatX *x, int accumulate, int64_t R,
                            int64_t O, int64_t N);
// Adds n elements: out = a + b. out may be a or b.
void add(floatX *out, const floatX *a, const floatX *b, size_t n);

// ---- attention ------------------------------------------------------------------------------
// `position` (R) is the place of each row in its document, which begins at 0 and rises by one a
// row: a row sees its own document only. 0 means that every sequence is one document, so that row r
// has the position r mod T.

// Fills cos and sin (T, D/2) with those of t theta^(-2j/D). The inverse frequency is computed in
// double and rounded to real, as in transformers' table.
void rope_table(real *cos, real *sin, double theta, int64_t T, int64_t D);
// Normalises every head by RMSNorm, then rotates its pairs (j, j + D/2) by the angle of the row's
// position: qn (R,H,D) and kn (R,KV,D) from q and k. Norm weights wq, wk (D).
void qk_norm_rope_forward(floatX *qn, floatX *kn, const floatX *q, const floatX *k,
                          const floatX *wq, const floatX *wk, const real *cos, const real *sin,
                          const int *position, real eps, int64_t R, int64_t T, int64_t H,
                          int64_t KV, int64_t D);
// Computes dq, dk and, summed over rows and heads, dwq and dwk (D). dq and dk may be dqn and dkn.
// The statistics of the norms are computed again from q and k.
void qk_norm_rope_backward(floatX *dq, floatX *dk, gradX *dwq, gradX *dwk, const floatX *dqn,
                           const floatX *dkn, const floatX *q, const floatX *k, const floatX *wq,
                           const floatX *wk, const real *cos, const real *sin, const int *position,
                           real eps, int accumulate, int64_t R, int64_t T, int64_t H, int64_t KV,
                           int64_t D);
// Computes causal softmax attention: o (B,T,H,D) and the natural log-sum-exp lse (B,H,T) of the
// scores, which are scaled by D^-1/2. q (B,T,H,D), k and v (B,T,KV,D); query head h reads key/value
// head h / (H/KV). Nothing in `workspace` needs to survive from forward to backward.
void attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                       const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                       int64_t KV, int64_t D);
// Computes dq, dk and dv, which must not overlap the inputs.
void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                        int64_t KV, int64_t D);
// Returns the bytes of `workspace` that the two need.
size_t attention_workspace(int64_t B, int64_t T, int64_t H, int64_t KV, int64_t D);
// Chooses a kernel of this backend ("auto"; cpu: "blas"; cuda: "cudnn", "flash"). Dies on any other
// name and lists the choices.
void attention_select(const char *name);

// ---- router ---------------------------------------------------------------------------------
// Statistics of one MoE layer, summed over the micro-batches, and later the ranks, of an update.
// All of them are on the device; a pointer may be 0 (not wanted).
typedef struct {
    int64_t *count; // (E)  how often each expert was chosen
    double *prob;   // (E)  sum over tokens of the softmax probability
    double *z;      // (2)  sums of logsumexp(logits)^2 and of the entropy of the softmax in nats
} RouterStats;
// Computes logits (R,E) = u W^T in fp32 whatever floatX is, p = softmax(logits), topk (R,K) = the
// ids of the K largest p, ascending by id, and score (R,K) = p there, divided by their sum if
// `normalize`. Ties go to the lowest id. bias (E) or 0 is added to p for the selection only. Where
// `given` is set, topk already holds the choice, K different ids in ascending order, and is only
// read. Adds to `stats`.
void router_forward(real *logits, int *topk, real *score, RouterStats stats,
                    const floatX *u /*(R,C)*/, const floatX *W /*(E,C)*/, const real *bias,
                    int given, int normalize, int64_t R, int64_t C, int64_t E, int64_t K);
// Computes dz (R,E), the gradient of the logits, then adds dz W to du (R,C), where the router meets
// the experts, and gives dW (E,C) = dz^T u. With S the chosen set, dz_e is the sum of
//   scores      score_e (dscore_e - c) on S, 0 elsewhere;  c = sum over S of score dscore
//               not normalised: p_e ([e in S] dscore_e - sum over S of p dscore)
//   balance     aux_scale p_e (f_e - sum over j of f_j p_j);  aux_scale = coefficient E / positions
//   z-loss      2 z_scale logsumexp(logits) p_e;              z_scale = coefficient / positions
// f (E), on the device, comes from router_share.
void router_backward_add(floatX *du, gradX *dW, real *dz, const real *dscore /*(R,K)*/,
                         const real *logits, const int *topk, const real *score, const floatX *u,
                         const floatX *W, const double *f, double aux_scale, double z_scale,
                         int normalize, int accumulate, int64_t R, int64_t C, int64_t E, int64_t K);
// Computes the share of choices f (E) = sum over layers of count (n_layers,E) / positions. The sum
// of f is K.
void router_share(double *f, const int64_t *count, double positions, int64_t n_layers, int64_t E);

// ---- experts: a pool, a row index, two linear maps ------------------------------------------
// Which pool token each expert row is, and back. Device pointers; each expert's rows are padded to
// device_row_tile(). M, P and K are upper bounds known to the host; E counts the local experts.
typedef struct {
    int *row_token;  // (M)    pool token of each row; -1: padding, reads as zeros
    int *token_row;  // (P,K)  rows of each pool token in ascending expert order; -1: not here
    int *expert_row; // (E+1)  first row of each expert; [E]: rows in use, padding included
    int64_t M, P, E, K;
} RowIndex;
// Returns the FLOPs of one product of all expert rows with a matrix (C,F): of the rows that P
// tokens can fill, K each, or of all M where a pool under expert parallelism bounds them below
// that.
static inline double expert_flops(const RowIndex *index, int64_t C, int64_t F) {
    double chosen = (double)index->P * index->K;
    return 2.0 * (chosen < index->M ? chosen : index->M) * (double)C * (double)F;
}
// Returns the smallest M that holds any routing of P tokens to K of the experts each.
int64_t row_index_bound(int64_t P, int64_t K, int64_t E_local);
// Fills the index from choice (P,K), ascending global expert ids (-1: none), of which it keeps the
// experts [first_expert, first_expert + E). Rows of an expert stand in the order of pool tokens.
void row_index_build(RowIndex *index, const int *choice, int first_expert);

// ---- routing over the ranks of an ep group --------------------------------------------------
// Who sends what to whom follows from everybody's choice: ids (sources*R, K) are the global experts
// of all tokens, ascending; rank j has the experts [j E/ranks, (j+1) E/ranks).
typedef struct {
    int64_t sources, ranks; // sources: `ranks` for tokens of their own, 1 for replicated ones
    int64_t R, K, E;        // R: tokens of a source
} RouteShape;
static inline int64_t route_table_size(RouteShape s) { return s.sources * s.ranks + s.ranks + 1; }
// A micro-batch's routing on one rank: what forward makes and backward needs again.
typedef struct {
    RowIndex index;  // from pool tokens to expert rows
    int *send_token; // (R,J) and sum_row (R,J): see route_lists; 0 where it does not exchange
    int *sum_row;
    int *table; // host memory: see route_table
} Route;
// Fills table (route_table_size): [i * ranks + j] = tokens of source i that chose an expert of rank
// j; then the expert rows of every rank, padded as row_index_build does; last the number of ids
// that are not in [0,E).
void route_table(int *table, const int *ids, RouteShape s);
// Fills what rank `me` needs for an uneven exchange (sources = ranks), with J = min(ranks, K):
// send_token (R,J), its token of every row that it sends, by destination, then token; sum_row
// (R,J), the rows of each of its tokens among them, ascending, -1 = none; choice (ranks*R, K), the
// ids of the tokens that it gets, by source, then token. What lies after the rows in use is
// undefined.
void route_lists(int *send_token, int *sum_row, int *choice, const int *ids, int me, RouteShape s);

// ---- the experts' products ------------------------------------------------------------------
// Computes H (M,2F) = pool[row_token] W1^T, gate in columns 0..F-1 and up in F..2F-1, and
// A (M,F) = silu(gate) up; A may be 0 (recomputation wants H alone).
void experts_up(floatX *H, floatX *A, const floatX *pool /*(P,C)*/, const floatX *W1 /*(E,2F,C)*/,
                const RowIndex *index, int64_t C, int64_t F);
// Computes Y (M,C) = A W2^T.
void experts_down(floatX *Y, const floatX *A, const floatX *W2 /*(E,C,F)*/, const RowIndex *index,
                  int64_t C, int64_t F);
// Computes out (P,C) = sum over k, in order, of score[p,k] Y[token_row[p,k]]. score (P,K) may be 0
// (all ones); a token without rows gets zeros.
void rows_weighted_sum(floatX *out, const floatX *Y, const real *score, const RowIndex *index,
                       int64_t C);
// Computes the backward of experts_down, rows_weighted_sum and SwiGLU in one. For row m, slot k of
// token p, of expert e, with g = dpool[p] W2[e], s = sigmoid(gate) and A computed again from H:
//   dscore[p,k] = <g, A_m>,   sA_m = score A_m (the operand of dW2),   dA = score g,
//   dH = [dA up s (1 + gate (1 - s)) | dA gate s].
// dH may be H. score may be 0 (all ones), and then dscore too. Slots that are not here get dscore
// 0, padding rows of dH and sA zeros.
void experts_down_backward(floatX *dH /*(M,2F)*/, floatX *sA /*(M,F)*/, real *dscore /*(P,K)*/,
                           const floatX *dpool /*(P,C)*/, const floatX *H, const floatX *W2,
                           const real *score /*(P,K)*/, const RowIndex *index, int64_t C,
                           int64_t F);
// Computes dX (M,C) = dH W1, which rows_weighted_sum without scores brings back to the pool.
void experts_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *index,
                         int64_t C, int64_t F);
// Computes dW1 (E,2F,C) = dH^T pool[row_token] and dW2 (E,C,F) = dpool[row_token]^T sA.
void experts_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool,
                   const floatX *dH, const floatX *sA, const RowIndex *index, int accumulate,
                   int64_t C, int64_t F);

// ---- rows for the exchange of tokens --------------------------------------------------------
// Copies rows of row_bytes bytes (a multiple of 4): out[i] = in[index[i]] for i < n; index -1 gives
// zeros.
void rows_gather(void *out, const void *in, const int *index /*(n)*/, int64_t n, size_t row_bytes);
// Computes out (R,C) = sum over j = 0..J-1, in order, of in[index[r,j]]; index -1 adds nothing. The
// second does the same for reals, which gradients of scores are.
void rows_sum(floatX *out, const floatX *in, const int *index /*(R,J)*/, int64_t R, int64_t J,
              int64_t C);
void rows_sum_real(real *out, const real *in, const int *index /*(R,J)*/, int64_t R, int64_t J,
                   int64_t C);

// ---- optimizer: works on segments of flat shards and knows no ranks -------------------------
// A contiguous piece of one Hugging Face tensor. The same offset addresses the parameter, master,
// gradient and state buffers of a shard.
typedef struct {
    uint64_t tensor;      // identity of the tensor for random numbers: tensor_id of random.h
    int64_t first, count; // elements [first, first + count) of that tensor
    int64_t offset;       // where they stand in the shard
    int64_t qblock;       // first 256-element block of the 8-bit state
    float decay;          // 1 where weight decay applies, else 0
} Segment;
typedef enum { OPT_SGD, OPT_ADAMW, OPT_ADAMW8 } OptimizerKind;
// Buffers of one shard of n elements; those that the optimizer does not use are 0.
typedef struct {
    floatX *param;            // (n)
    real *master;             // (n) fp32 copy, or 0: bf16 parameters are rounded stochastically
    const gradX *grad;        // (n)
    real *m, *v;              // (n) momentum or first moment; second moment
    uint8_t *m8, *v8;         // (n) 8-bit codes of the moments
    float *m_scale, *v_scale; // scales of each 256-element block (quant8.h)
} OptimizerState;
typedef struct {
    OptimizerKind kind;
    double lr, momentum, beta1, beta2, eps, weight_decay;
    int64_t t;         // step of the bias correction, from 1
    uint64_t seed;     // of stochastic rounding
    int64_t step;      // of stochastic rounding
    double grad_scale; // known to the host (--update layer); multiplied with the device's scale
} OptimizerStep;
// Updates every segment, with torch's formulas, which cpu/optimizer.c gives. The gradient is first
// multiplied by scale[0] (the clip scale, on the device); where that is not finite nothing changes.
void optimizer_update(const OptimizerState *s, const Segment *segments, int n_segments,
                      const OptimizerStep *o, const real *scale);
// Computes sums[i] (double, on the device) = the sum of squares of segment i's gradient, in an
// order that depends on (tensor, first, count) alone.
void gradient_squares(double *sums, const gradX *grad, const Segment *segments, int n_segments);
// Computes total[0] = in[0] + in[1] + ... + in[n-1] in this order; doubles on the device.
void sum_in_order(double *total, const double *in, int n);
// Multiplies the gradient of segment i by factor[i] (n_segments floats on the device).
void gradient_scale(gradX *grad, const Segment *segments, int n_segments, const float *factor);
// Computes norm[0] = the root of sums[0] + ... + sums[n-1] and scale[0] = min(1, clip / (norm +
// 1e-6)), or 1 where clip is 0; NaN where the norm is not finite.
void clip_scale(real *norm, real *scale, const double *sums, int n, double clip);
// Fills segments of param, and of master unless it is 0, with normal numbers of standard deviation
// std that depend on (seed, tensor, index) alone; with ones where std < 0.
void init_segments(floatX *param, real *master, const Segment *segments, int n_segments,
                   uint64_t seed, double std);
// Converts n elements between floating-point types, each rounded once to nearest even. Dies on
// other types unless they are equal.
void convert(void *dst, Dtype to, const void *src, Dtype from, size_t n);
MOE_END_C
#endif
