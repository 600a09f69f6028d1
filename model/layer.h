// One transformer layer, forward and backward, of one micro-batch:
//
//   h = norm(x);  q, k, v = h Wq^T, h Wk^T, h Wv^T
//   qn, kn = rope(norm(q)), rope(norm(k));  o = attention(qn, kn, v);  mid = x + o Wo^T
//   u = norm(mid);  topk, score = router(u);  pool = dispatch(u)
//   H = pool[rows] W1^T;  A = silu(gate) * up;  Y = A W2^T
//   out = mid + combine(weighted sum of each token's rows of Y)
//
// A dense MLP is one expert that every token chose with score 1. Both directions have three stages
// around the two exchanges of tokens, so that the step can keep several micro-batches in flight:
// _start ends when the dispatch has started, _experts lies between dispatch and combine, and
// _finish begins by waiting for the combine.
#ifndef MOE_LAYER_H
#define MOE_LAYER_H
#include "model.h"
#include "../parallel/dispatch.h"
#include "../parallel/heads.h"
MOE_BEGIN_C

// What a micro-batch carries from one stage to the next.
typedef struct {
    floatX *u;              // (R,C) normed mid
    floatX *y;              // (R,C) forward: the combined output; backward: du
    real *rstd;             // (R) of u
    real *dscore;           // (R,K)
    Dispatcher *dispatcher; // 0 in a model without experts
    Route route;            // of the pass at hand
    const int *position;    // (A) of each token in its document; 0: in its sequence
    Saved scratch;          // holds q, k, v, o, lse and mid where they are not saved
} InFlight;

// Dimensions of the run, and scratch memory that the stages use one after another: nothing in it
// survives a stage but H, where it is not saved, and the constants.
typedef struct {
    const Config *c;
    int64_t B, T, R;         // micro-batch: sequences, tokens of each, rows
    int64_t heads, kv_heads; // of this rank
    int64_t attention_rows;  // tokens that its heads see: R, or ep * R where heads are split
    int tokens_move;         // ep > 1, and not --dispatch allreduce
    int ep, destinations;    // ranks of an ep group; those that a token can travel to, or 0
    Heads *split;            // 0 if heads are not split
    RowIndex dense;          // of dense layers
    real *cos, *sin;         // (T,D/2)
    floatX *h;               // (R,C)
    floatX *qn, *kn;         // shapes of Saved's q, k
    floatX *dq, *dk, *dv, *d_o, *dh; // shapes of Saved's q, k, v, o; (R,C)
    floatX *H, *A, *Y;               // (M,2F) unsaved, (M,F), (M,C)
    real *rstd, *dz;                 // (R) (R,E)
    void *attention;                 // attention_workspace() bytes
} Workspace;

// What the gradient of the router's logits needs from all tokens of the update.
typedef struct {
    const double *share;       // (E) f: mean choices of each expert
    double aux_scale, z_scale; // aux coefficient * E / positions, z coefficient / positions
} RouterLoss;

// ---- memory (workspace.c) -------------------------------------------------------------------
// Takes everything from an arena, which may be counting, for micro-batches of B sequences of T
// tokens.
void workspace_create(Workspace *w, const Model *m, const Grid *g, int64_t B, int64_t T,
                      Arena *arena);
void workspace_free(Workspace *w);
void in_flight_create(InFlight *f, const Workspace *w, const Grid *g, Arena *arena);
void in_flight_free(InFlight *f);
// Counts the bytes of Saved's two groups. rows and pool are those that the routing made (the
// largest of the ep group, so that all its ranks decide alike).
size_t saved_attention_bytes(const Workspace *w);
size_t saved_expert_bytes(const Workspace *w, int layer, int64_t rows, int64_t pool);
// Places a group in memory of that size, or in scratch memory if it is 0, and sets its has_ flag.
void saved_attention_place(Saved *s, const Workspace *w, const InFlight *f, char *memory);
void saved_expert_place(Saved *s, const Workspace *w, int layer, int64_t rows, int64_t pool,
                        char *memory);
// Copies the lists of a routing to where they are saved.
void saved_route_copy(Saved *s, const Workspace *w, const Route *route);

// ---- forward --------------------------------------------------------------------------------
// saved->x is given; the attention group must be placed before _start, the expert group before
// _experts. _start decides the routing (by p + bias if bias (E) is not 0; given: topk
// holds it already) and adds it to stats.
void layer_forward_start(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                         RouterStats stats, const real *bias, int given);
void layer_forward_experts(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p);
void layer_forward_finish(Workspace *w, InFlight *f, Saved *s, int layer, floatX *out /*(R,C)*/);

// ---- backward -------------------------------------------------------------------------------
// dx (R,C) holds the gradient of the layer's output until _finish turns it into that of its input.
// Computes again what is not saved, with the saved routing; an unsaved attention group must have
// been placed in this micro-batch's scratch. accumulate_qkvo is for q, k, v, o, which lie in the
// local block where heads are split (I5, who adds is in the contract).
void layer_backward_start(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                          const floatX *dx);
void layer_backward_experts(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                            const LayerGrads *d, const floatX *dx, int accumulate);
void layer_backward_finish(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                           const LayerGrads *d, const RouterLoss *loss, floatX *dx, int accumulate,
                           int accumulate_qkvo);
MOE_END_C
#endif
