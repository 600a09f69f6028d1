// The table of contents: every operation that touches elements, with shapes and contracts. model/
// is written against this page; kernels/cpu/ is the readable truth, kernels/cuda/ the fast one,
// chosen when the program is linked.
//
// Dimensions
//   B T    sequences of a micro-batch, tokens of a sequence           R = B*T rows (tokens) of a
//   micro-batch C      hidden width            H KV D  heads, key/value heads, head size (H*D need
//   not be C) E K F  experts, experts per token (top_k), expert width           V  vocabulary P
//   pool tokens: the tokens a rank's experts see (R when ep = 1)   M  bound of the expert rows
//   (padded)
// Conventions
//   Outputs first, then inputs, weights, what forward saved, dimensions. Matrices are row-major; a
//   weight is (out, in): y = x W^T. Pointers are device pointers, never null unless said. R, P or M
//   may be 0: every function then still does its duty (I3). Activation gradients are OVERWRITTEN;
//   the three functions where paths meet say so: linear_backward_input_add, router_backward_add,
//   `residual` of rmsnorm_backward (I5). Weight gradients take `accumulate`: 0 writes every element
//   (zeros where no row contributes), 1 adds (I5). All reductions have a fixed order that depends
//   on shapes alone: the same bits whatever the number of threads (I8). Accumulation is fp32 or
//   better; a result is rounded once when stored as floatX.
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H
#include "device.h"
MOE_BEGIN_C

// ---- ends -----------------------------------------------------------------------------------
// out (R,C) = W[id]; ids (R) int in [0,V) (checked by the loader); W (V,C).
void embed_forward(floatX *out, const int *ids, const floatX *W, int64_t R, int64_t C);
// dW (V,C): row v gets the sum of dx over its positions in ascending order. accumulate 0: rows
// nobody looked up are zeroed. Row `pad` (-1: none) takes nothing (torch's padding_idx).
void embed_backward(gradX *dW, const floatX *dx /*(R,C)*/, const int *ids /*(R)*/, int accumulate,
                    int pad, int64_t R, int64_t V, int64_t C);
// Cross entropy and its gradient over a chunk of rows, in one pass: logits (N,V) becomes dlogits in
// place:
//   (softmax - onehot) * seed, exactly 0 where target < 0 (ignored). loss_sum[0] (double, device)
//   += sum over valid rows of -log p[target].
// backward = 0 leaves logits as they are.
void cross_entropy(floatX *logits, double *loss_sum, const int *targets /*(N)*/, real seed,
                   int backward, int64_t N, int64_t V);

// ---- dense ----------------------------------------------------------------------------------
// y (R,C) = x * rstd * w, rstd (R) = (mean(x^2) + eps)^-1/2. bf16: x*rstd is rounded before the
// product with w, as HF does. rstd may be 0 (not wanted).
void rmsnorm_forward(floatX *y, real *rstd, const floatX *x, const floatX *w, real eps, int64_t R,
                     int64_t C);
// With n = x*rstd, t = dy*w:  dx = residual + rstd * (t - n * mean(t*n)),  dw_j = sum_r dy_rj n_rj.
// residual (R,C) may be 0 (nothing added) or dx itself. This is where the residual path and the
// branch meet.
void rmsnorm_backward(floatX *dx, gradX *dw, const floatX *residual, const floatX *dy,
                      const floatX *x, const floatX *w, const real *rstd, int accumulate, int64_t R,
                      int64_t C);
// y = x W^T: y (R,O), x (R,N), W (O,N).
void linear_forward(floatX *y, const floatX *x, const floatX *W, int64_t R, int64_t O, int64_t N);
// dx (R,N) = dy W.  _add: dx += dy W (three projections read one input).
void linear_backward_input(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                           int64_t N);
void linear_backward_input_add(floatX *dx, const floatX *dy, const floatX *W, int64_t R, int64_t O,
                               int64_t N);
// dW (O,N) (+)= dy^T x.
void linear_backward_weight(gradX *dW, const floatX *dy, const floatX *x, int accumulate, int64_t R,
                            int64_t O, int64_t N);
// out = a + b, n elements; out may be a or b.
void add(floatX *out, const floatX *a, const floatX *b, size_t n);

// ---- attention ------------------------------------------------------------------------------
// cos, sin (T, D/2): angle t * theta^(-2j/D), inverse frequency computed in double and rounded to
// fp32 as HF's table is (fp64 builds: not rounded).
void rope_table(real *cos, real *sin, double theta, int64_t T, int64_t D);
// Per head RMSNorm, then rotation of pairs (j, j+D/2): qn (R,H,D), kn (R,KV,D) from q (R,H,D), k
// (R,KV,D); norm weights wq, wk (D). Row r is rotated as
// position[r]; position (R) 0: r mod T.
void qk_norm_rope_forward(floatX *qn, floatX *kn, const floatX *q, const floatX *k,
                          const floatX *wq, const floatX *wk, const real *cos, const real *sin,
                          const int *position, real eps, int64_t R, int64_t T, int64_t H,
                          int64_t KV, int64_t D);
// dq, dk from dqn, dkn; they may be the same buffers (in place). dwq, dwk (D) sum over rows and
// heads. The norm statistics are recomputed from q and k.
void qk_norm_rope_backward(floatX *dq, floatX *dk, gradX *dwq, gradX *dwk, const floatX *dqn,
                           const floatX *dkn, const floatX *q, const floatX *k, const floatX *wq,
                           const floatX *wk, const real *cos, const real *sin, const int *position,
                           real eps, int accumulate, int64_t R, int64_t T, int64_t H, int64_t KV,
                           int64_t D);
// Causal softmax attention, scale D^-1/2, query head h reads KV head h / (H/KV): o (B,T,H,D), lse
// (B,H,T) natural log-sum-exp of the scaled scores; q (B,T,H,D), k v (B,T,KV,D). workspace:
// attention_workspace() bytes, contents need not survive from forward to backward. position (B,T)
// is the place of each row in its document: row t sees keys t - position[t] .. t. 0: one document a
// sequence.
void attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                       const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                       int64_t KV, int64_t D);
void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                        int64_t KV, int64_t D);
size_t attention_workspace(int64_t B, int64_t T, int64_t H, int64_t KV, int64_t D);
// "auto" or a kernel of this backend (cpu: "blas"; cuda: "cudnn", "flash"); dies naming the
// choices.
void attention_select(const char *name);

// ---- router ---------------------------------------------------------------------------------
// One row of statistics per MoE layer, summed over the micro-batches (and later the ranks) of an
// update; all on the device.
typedef struct {
    int64_t *count; // (E)  how often each expert was chosen
    double *prob;   // (E)  sum over tokens of the softmax probability
    double *z; // (2)  [0] sum of logsumexp(logits)^2, [1] sum of the entropy of the softmax in nats
} RouterStats;
// logits (R,E) fp32 = u W^T whatever floatX is; p = softmax(logits); topk (R,K) = the K largest of
// p (of p + bias where bias (E) is given: selection only), ties to the lowest id, then sorted
// ASCENDING by expert id; score (R,K) = p there, divided by their sum if normalize. Adds to stats
// (may be all zero pointers: not wanted). given: topk holds the choice already, K different ids in
// ascending order, and is only read.
void router_forward(real *logits, int *topk, real *score, RouterStats stats,
                    const floatX *u /*(R,C)*/, const floatX *W /*(E,C)*/, const real *bias,
                    int given, int normalize, int64_t R, int64_t C, int64_t E, int64_t K);
// With S the chosen set, c = sum over S of score*dscore:
//   normalised: dz_e = score_e (dscore_e - c) on S, 0 elsewhere.  Not: dz_e = p_e ([e in S]
//   dscore_e - sum over S of p dscore). aux:  dz_e += aux_scale * p_e (f_e - sum_j f_j p_j), f (E)
//   device, = pooled share of choices (sum K), aux_scale = coef * E / pooled positions z:    dz_e
//   += 2 z_scale * lse * p_e,        z_scale = coef / pooled positions
// du (R,C) += dz W (it meets the experts' gradient here);  dW (E,C) (+)= dz^T u.   dz (R,E)
// scratch, holds dz on return.
void router_backward_add(floatX *du, gradX *dW, real *dz, const real *dscore /*(R,K)*/,
                         const real *logits, const int *topk, const real *score, const floatX *u,
                         const floatX *W, const double *f, double aux_scale, double z_scale,
                         int normalize, int accumulate, int64_t R, int64_t C, int64_t E, int64_t K);
// f (E) double = sum over rows of count (n_layers,E) / positions: what router_backward_add takes.
// Pooled over layers or one layer (n_layers = 1).
void router_share(double *f, const int64_t *count, double positions, int64_t n_layers, int64_t E);

// ---- experts: a pool, a row index, two linear maps ------------------------------------------
typedef struct {     // device pointers; M is a static bound, each expert's rows padded to
                     // device_row_tile()
    int *row_token;  // (M)    pool token of each row, -1 = padding, reads as zeros
    int *token_row;  // (P,K)  rows of each pool token in ascending expert order, -1 = not here
    int *expert_row; // (E+1)  first row of each (local) expert; [E] = rows in use including padding
    int64_t M, P, E, K; // upper bounds known to the host; E = local experts
} RowIndex;
// FLOPs of one product of all expert rows with a matrix (C,F): of the rows that P tokens can fill,
// K each, or of all M where an expert parallel pool bounds them below that.
static inline double expert_flops(const RowIndex *plan, int64_t C, int64_t F) {
    double chosen = (double)plan->P * plan->K;
    return 2.0 * (chosen < plan->M ? chosen : plan->M) * (double)C * (double)F;
}
// The smallest M for a pool of P tokens that chose K of the experts each.
int64_t row_index_bound(int64_t P, int64_t K, int64_t E_local);
// Fills the plan from choice (P,K) global expert ids ascending (-1 = none), keeping experts [first,
// first + E). Rows of an expert stand in pool-token order (stable). n_pool (device int, may be 0 =
// P): tokens of the pool in use; later entries of choice are not read and their token_row is -1.
void row_index_build(RowIndex *plan, const int *choice, const int *n_pool, int first_expert);
// The plan of a dense MLP: one expert that every one of R tokens chose (K = 1, E = 1).
void row_index_dense(RowIndex *plan, int64_t R);

// ---- routing over the ranks of an ep group --------------------------------------------------
// Who sends what to whom follows from everybody's choice: ids (sources*R, K) are the global experts
// of all tokens, ascending, and rank j has experts [j * E/ranks, (j+1) * E/ranks).
typedef struct {
    int64_t sources, ranks; // sources: ranks for tokens of their own, 1 for replicated ones
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

// H (M,2F) = pool[row_token] W1^T, gate columns 0..F-1, up columns F..2F-1;  A (M,F) = silu(gate) *
// up, A may be 0 (recompute wants H alone).
void experts_up(floatX *H, floatX *A, const floatX *pool /*(P,C)*/, const floatX *W1 /*(E,2F,C)*/,
                const RowIndex *plan, int64_t C, int64_t F);
// Y (M,C) = A W2^T.
void experts_down(floatX *Y, const floatX *A, const floatX *W2 /*(E,C,F)*/, const RowIndex *plan,
                  int64_t C, int64_t F);
// out (P,C) = sum over k, in order, of score[p,k] * Y[token_row[p,k]]; score (P,K), 0 = all ones;
// -1 rows add nothing, a token with none gets zeros.
void rows_weighted_sum(floatX *out, const floatX *Y, const real *score, const RowIndex *plan,
                       int64_t C);
// The backward of experts_down, rows_weighted_sum and SwiGLU in one: for row m of token p =
// row_token[m], slot k, expert e, with g = dpool[p] W2[e]:
//   dscore[p,k] = <g, A_m>;  sA_m = score * A_m (the operand of dW2);  dA = score * g;
//   dH = [ dA * up * s(gate) (1 + gate (1 - s(gate))) | dA * gate * s(gate) ],  s = sigmoid, A from
//   H.  dH may be H (in place).
// score 0 = all ones (dscore may then be 0 too). Slots with token_row -1 get dscore 0; padding rows
// of dH and sA get zeros.
void experts_down_backward(floatX *dH /*(M,2F)*/, floatX *sA /*(M,F)*/, real *dscore /*(P,K)*/,
                           const floatX *dpool /*(P,C)*/, const floatX *H, const floatX *W2,
                           const real *score /*(P,K)*/, const RowIndex *plan, int64_t C, int64_t F);
// dX (M,C) = dH W1: combined into the pool's gradient by rows_weighted_sum(score = 0).
void experts_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *plan,
                         int64_t C, int64_t F);
// dW1 (E,2F,C) (+)= dH^T pool[row_token];  dW2 (E,C,F) (+)= dpool[row_token]^T sA.  An expert
// without rows is written as zeros (accumulate 0) or left (1).
void experts_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool,
                   const floatX *dH, const floatX *sA, const RowIndex *plan, int accumulate,
                   int64_t C, int64_t F);

// ---- rows and numbers for the exchange ------------------------------------------------------
// out[i] = in[index[i]] for i < n: rows of row_bytes bytes (a multiple of 4); index -1 gives zeros.
void rows_gather(void *out, const void *in, const int *index /*(n)*/, int64_t n, size_t row_bytes);
// out (R,C) = sum over j = 0..J-1, in order, of in[index[r,j]] (-1 adds nothing); floatX rows, and
// the same for real rows (`score` gradients).
void rows_sum(floatX *out, const floatX *in, const int *index /*(R,J)*/, int64_t R, int64_t J,
              int64_t C);
void rows_sum_real(real *out, const real *in, const int *index /*(R,J)*/, int64_t R, int64_t J,
                   int64_t C);

// ---- optimizer: works on segments of flat shards, knows no ranks ----------------------------
// A contiguous piece of one Hugging Face tensor. The same offset addresses parameter, master,
// gradient and state buffers of a block's shard.
typedef struct {
    uint64_t tensor;      // identity of the HF tensor for random numbers (I4): a hash of its name
    int64_t first, count; // elements [first, first + count) of that tensor
    int64_t offset;       // where they stand in the shard
    int64_t qblock; // first 256-element block of the 8-bit state; block i covers tensor elements
                    // first + 256 i ...
    float decay;    // 1 where weight decay applies, else 0
} Segment;
typedef enum { OPT_SGD, OPT_ADAMW, OPT_ADAMW8 } OptimizerKind;
typedef struct {       // buffers of one shard; unused ones are 0
    floatX *param;     // (n)
    real *master;      // (n) fp32 copy, or 0: then bf16 parameters are rounded stochastically
    const gradX *grad; // (n)
    real *m, *v;       // (n) momentum or first moment; second moment
    uint8_t *m8, *v8;  // (n) 8-bit codes
    float *m_scale, *v_scale; // (blocks) scales of each 256-element block (quant8.h)
} OptimizerState;
typedef struct {
    OptimizerKind kind;
    double lr, momentum, beta1, beta2, eps, weight_decay;
    int64_t t;         // 1-based step of the bias correction
    uint64_t seed;     // of stochastic rounding
    int64_t step;      // counter of stochastic rounding
    double grad_scale; // known to the host (--update layer clips by the previous step's norm),
                       // multiplied with the device's scale; 1 = none
} OptimizerStep;
// One update of every segment (n_segments, host array). grad is multiplied by scale[0] (device; the
// clip scale) first; a scale that is not finite leaves everything untouched. SGD: torch's, coupled
// decay: g += wd*p; buf = mu*buf + g (first step: buf = g); p -= lr*buf. AdamW: torch's formula.
void optimizer_update(const OptimizerState *s, const Segment *segments, int n_segments,
                      const OptimizerStep *o, const real *scale);
// sums[i] (double, device) = sum of squares of segment i's gradient, i < n_segments; the order of
// summation depends on (tensor, first, count) alone.
void gradient_squares(double *sums, const gradX *grad, const Segment *segments, int n_segments);
// total[0] = in[0] + in[1] + ... in order (device doubles); n = 0 gives 0.
void sum_in_order(double *total, const double *in, int n);
// grad[segment i] *= factor[i] (device, n_segments floats): utilisation scaling.
void gradient_scale(gradX *grad, const Segment *segments, int n_segments, const float *factor);
// norm[0] = sqrt(sum of sums[0..n)), scale[0] = clip > 0 ? min(1, clip / (norm + 1e-6)) : 1; NaN
// where the norm is not finite. sums: device, in order.
void clip_scale(real *norm, real *scale, const double *sums, int n, double clip);
// Fills segments of param (and master, if not 0) with N(0, std^2) from kernels/random.h, keyed by
// (seed, tensor, index); std < 0: all ones.
void init_segments(floatX *param, real *master, const Segment *segments, int n_segments,
                   uint64_t seed, double std);
// Element-wise conversion between floatX, real, fp32, bf16 (round to nearest even), fp16, fp64.
// Device buffers.
void convert(void *dst, Dtype to, const void *src, Dtype from, size_t n);
// flag[0] (int, device) |= 1 if any of n elements is not finite.
void check_finite(int *flag, const void *x, Dtype type, size_t n);
MOE_END_C
#endif
