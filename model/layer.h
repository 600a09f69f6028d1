// One transformer layer, forward and backward, of one micro-batch. Reads like the paper:
//
//   h = norm(x);  q, k, v = h Wq', h Wk', h Wv';  qn, kn = rope(norm(q)), rope(norm(k));  o =
//   attention(qn, kn, v);  mid = x + o Wo' u = norm(mid);  topk, score = router(u);  pool =
//   dispatch(u);  H = pool[rows] W1';  A = silu(gate) up;  Y = A W2';  out = mid +
//   combine(combine(score, Y))
//
// A dense MLP is an expert that every token chose with score 1. Each direction is three stages
// around the two exchanges, so that the step can keep several micro-batches in flight (DESIGN 4):
// _start ends with dispatch_start, _experts lies between dispatch and combine, _finish begins with
// combine_wait.
#ifndef MOE_LAYER_H
#define MOE_LAYER_H
#include "params.h"
#include "../parallel/dispatch.h"
#include "../parallel/heads.h"
MOE_BEGIN_C

// A layer's weights, pointers into its gathered blocks; and its gradients, the same shape in the
// gradient buffers. Shapes: here local_heads = heads of this rank, local_experts = experts here.
typedef struct {
    const floatX *attn_norm, *mlp_norm; // (C)
    const floatX *q, *k, *v;       // (local_heads*D,C) (local_kv_heads*D,C) (local_kv_heads*D,C)
    const floatX *q_norm, *k_norm; // (D)
    const floatX *o;               // (C,local_heads*D)
    const floatX *router;          // (E,C), 0 in dense layers
    const floatX *up, *down;       // (local_experts,2F,C) (local_experts,C,F); dense: (2I,C) (C,I)
} LayerWeights;
typedef struct {
    gradX *attn_norm, *mlp_norm, *q, *k, *v, *q_norm, *k_norm, *o, *router, *up, *down;
} LayerGrads;

// Saved by forward for backward, per (layer, micro-batch). What is not kept points into the slot's
// scratch and is recomputed; x and the routing are always kept (I7).
typedef struct {
    floatX *x;            // (R,C)   layer input
    int *topk;            // (R,K)   ascending expert ids
    real *score, *logits; // (R,K) (R,E)
    floatX *q, *k, *v,
        *o;    // (attention_rows,local_heads*D) (attention_rows,local_kv_heads*D)
               // (attention_rows,local_kv_heads*D) (attention_rows,local_heads*D)   before norm and
               // rope; attention output
    real *lse; // (attention_rows/T,local_heads,T)
    floatX *mid;      // (R,C)   after attention's residual
    floatX *H;        // (M,2F)  gate and up before SwiGLU, actual rows
    floatX *pool;     // (P,C)   what the experts saw, where tokens travel; else recomputed from mid
    real *pool_score; // (P,K)   and the scores that came along
    int has_attention, has_experts; // which of the two groups, q..mid and H..pool_score, are kept
} Saved;

// What crosses stages of a micro-batch in flight: one per slot.
typedef struct {
    floatX *u, *y;        // (R,C) normed mid; forward: combined output, backward: du
    real *rstd;           // (R)   of u
    real *dscore;         // (R,K)
    Dispatcher *exchange; // 0 in a model without experts
    RowIndex plan;
    Saved scratch; // where unkept q, k, v, o, lse and mid live
} InFlight;

// Scratch that no other micro-batch shares in time, and constants of the run.
typedef struct {
    const Config *c;
    int B, T, R;                     // micro-batch: sequences, tokens of each, rows
    int local_heads, local_kv_heads; // heads of this rank
    int attention_rows;              // rows that attention sees here: R, or ep * R with split heads
    int moves;                       // tokens travel to experts (ep > 1, not allreduce)
    Heads *heads;                    // 0: heads are not split
    RowIndex dense;                  // of dense MLP layers
    real *cos, *sin;                 // (T,D/2)
    floatX *h;                       // (R,C)
    floatX *qn, *kn;            // (attention_rows,local_heads*D) (attention_rows,local_kv_heads*D)
    floatX *dq, *dk, *dv, *d_o; // gradients of q, k, v (attention_rows, ...), of attention's output
                                // (attention_rows,local_heads*D)
    floatX *dh;                 // (attention_rows,C)
    floatX *H, *A, *Y;          // (M,2F) unkept, (M,F), (M,C); dense layers: (R,2I), (R,I), (R,C)
    real *rstd, *dz;            // (R) (R,E)
    void *attention;            // attention_workspace()
} Workspace;

typedef struct {               // what the router's gradient needs beside the layer's own tensors
    const double *share;       // (E) f of the auxiliary loss, pooled
    double aux_scale, z_scale; // coef * E / positions, coef / positions
} RouterLoss;

// Buffers of the work area and of a slot, from an arena (which may be counting), for micro-batches
// of B sequences of T tokens.
void workspace_create(Workspace *w, const Model *m, const Grid *g, int B, int T, Arena *arena);
void workspace_free(Workspace *w);
void in_flight_create(InFlight *s, const Workspace *w, const Grid *g, Arena *arena);
void in_flight_free(InFlight *s);
// Bytes of the two groups of Saved; rows and pool as the routing made them (the group's largest, so
// that all ranks decide alike).
size_t saved_attention_bytes(const Workspace *w);
size_t saved_expert_bytes(const Workspace *w, int layer, int64_t rows, int64_t pool);
// Point a group into memory of that size (0: into the scratch), and set its has_ flag.
void saved_attention_place(Saved *k, const Workspace *w, const InFlight *s, char *memory);
void saved_expert_place(Saved *k, const Workspace *w, int layer, int64_t rows, int64_t pool,
                        char *memory);
LayerWeights layer_weights(const Model *m, int layer, const floatX *dense, const floatX *local);
LayerGrads layer_grads(const Model *m, int layer, gradX *dense, gradX *local);

// ---- forward --------------------------------------------------------------------------------
// kept->x is given, attention placed before _start, experts before _experts. Decides the routing
// and adds to stats. bias (E) or 0: selection only.
void layer_forward_start(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                         RouterStats stats, const real *bias);
void layer_forward_experts(Workspace *w, InFlight *s, Saved *kept, int layer,
                           const LayerWeights *p);
void layer_forward_finish(Workspace *w, InFlight *s, Saved *kept, int layer, floatX *out /*(R,C)*/);

// ---- backward -------------------------------------------------------------------------------
// dx (R,C): gradient of the layer's output on entry, of its input after _finish; untouched in
// between. Recomputes what kept does not have, from the saved routing (I7): pieces that are not
// kept must be placed in the slot's scratch again before _start.
void layer_backward_start(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                          const floatX *dx);
void layer_backward_experts(Workspace *w, InFlight *s, Saved *kept, int layer,
                            const LayerWeights *p, const LayerGrads *d, const floatX *dx,
                            int accumulate);
// accumulate_qkvo: of the gradients of q, k, v, o, which with split heads lie in the local block.
void layer_backward_finish(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                           const LayerGrads *d, const RouterLoss *loss, floatX *dx, int accumulate,
                           int accumulate_qkvo);
MOE_END_C
#endif
