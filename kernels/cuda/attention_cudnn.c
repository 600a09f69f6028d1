// Causal attention by cuDNN's graph API, in plain C: cuDNN recognises the operations below as one
// flash attention and runs its own kernel for the GPU. The functions of attention.h are here.
//
// cuDNN knows no operation "causal attention with log-sum-exp"; it knows graphs. Forward, 14
// operations on S (B,H,T,T), which is never stored:
//   S = scale q k^T;  S = row >= column ? S : -inf;  m = max_j S;  E = e^(S - m);  l = sum_j E;
//   lse = m + ln l;  o = (E / l) v
// Backward, 23 operations (attention_flash.cu has the derivation):
//   delta = sum_d do o;  P = e^(mask(scale q k^T - lse));
//   dv = the sum over the group's query heads of P^T do;  dS = scale P (do v^T - delta);
//   dk = the sum over the group's query heads of dS^T q;  dq = dS k
// Tensors have four dimensions (batch, head, row, column) and strides, so the interleaved layouts
// of kernels.h go in as they are: nothing is copied, and K and V with fewer heads than Q are
// broadcast (grouped heads). The graph's shape is that of NVIDIA's cudnn-frontend
// (scaled_dot_product_flash_attention.h): the order of operations matters, because cuDNN matches it
// against what its kernels can do.
//
// A plan takes a second or two to make and is kept for each shape. dq is written by the last
// product, not added up in an fp32 tensor by atomics: cudnn-frontend's deterministic form (I8,
// deterministic). Its price is memory: dS of a call's heads, 2 T^2 bytes each. So backward runs in
// calls of some sequences, or of some KV heads of one sequence with their query heads, that keep to
// cudnn_attention_chunk: 16 heads of 4,096 tokens, 512 tiles of 128 keys for the GPU's 132
// multiprocessors.
#include "attention.h"
#include "../fail.h"
#include <cudnn.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#if CUDNN_VERSION < 90800
#error "cuDNN 9.8 or newer is needed (device descriptors)"
#endif

typedef cudnnBackendDescriptor_t Desc;
typedef struct {
    int64_t dim[4], stride[4];
} Layout;
// One call: B sequences of T tokens, h query heads on kv of the H and KV heads that lie side by
// side in memory.
typedef struct {
    int backward, B, T, h, kv, H, KV, D;
} Shape;
enum { MADE = 128, OPS = 32, CONFIGS = 16, PLANS = 64 };
int64_t cudnn_attention_chunk = 576 << 20; // bytes of dS that a call of backward aims at
static const int64_t GROUP_BYTES =
    (int64_t)2 << 30; // where the query heads of one KV head need more, cuDNN is not asked
// Names of the tensors that live in memory; 0 is for those that do not. Scalars are passed by
// value.
enum { VIRTUAL, Q, K, V, O, LSE, DO, DQ, DK, DV, DELTA, SCALE, MINUS_INFINITY, ONE, NAMES };
typedef struct {
    Shape shape;
    Desc made[MADE], op[OPS];
    int n_made, n_ops;
    int64_t next;       // names of virtual tensors count from NAMES
    Desc device;        // the described device, 0: the handle's
    int major;          // its compute capability, the number before the point
    const char *failed; // the first step that cuDNN refused; later ones do nothing
} Graph;
typedef struct {
    Graph g;
    Desc plan;
    int64_t workspace;
} AttentionPlan; // plan 0: cuDNN has none
static AttentionPlan plans[PLANS];
static int n_plans;
static cudnnHandle_t handle;

// ---- descriptors: created, filled, finalized; owned by the graph ----------------------------
static int good(Graph *g, cudnnStatus_t status, const char *what) {
    if (status != CUDNN_STATUS_SUCCESS && !g->failed) g->failed = what;
    return !g->failed;
}
static Desc make(Graph *g, cudnnBackendDescriptorType_t type) {
    Desc d = 0;
    if (g->failed) return 0;
    if (g->n_made == MADE)
        die("cuDNN attention: more than %d descriptors|a defect of attention_cudnn.c", MADE);
    if (good(g, cudnnBackendCreateDescriptor(type, &d), "a descriptor")) g->made[g->n_made++] = d;
    return d;
}
static void set(Graph *g, Desc d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t count, const void *values) {
    if (!g->failed) good(g, cudnnBackendSetAttribute(d, name, type, count, values), "an attribute");
}
static void set_desc(Graph *g, Desc d, cudnnBackendAttributeName_t name, Desc value) {
    if (value) set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}
static int finalize(Graph *g, Desc d, const char *what) {
    return !g->failed && good(g, cudnnBackendFinalize(d), what);
}
static void graph_free(Graph *g) {
    while (g->n_made) cudnnBackendDestroyDescriptor(g->made[--g->n_made]);
}

// ---- tensors --------------------------------------------------------------------------------
static Layout layout(int64_t b, int64_t h, int64_t r, int64_t c, int64_t sb, int64_t sh, int64_t sr,
                     int64_t sc) {
    Layout l = { { b, h, r, c }, { sb, sh, sr, sc } };
    return l;
}
static Layout heads(const Shape *s, int n, int N) {
    return layout(s->B, n, s->T, s->D, (int64_t)s->T * N * s->D, s->D, (int64_t)N * s->D, 1);
} // n heads of (B,T,N,D)
static Layout of_q(const Shape *s) { return heads(s, s->h, s->H); }
static Layout of_k(const Shape *s) { return heads(s, s->kv, s->KV); }
static Layout scores(const Shape *s) {
    return layout(s->B, s->h, s->T, s->T, (int64_t)s->h * s->T * s->T, (int64_t)s->T * s->T, s->T,
                  1);
}
static Layout per_row(const Shape *s) {
    return layout(s->B, s->h, s->T, 1, (int64_t)s->h * s->T, s->T, 1, 1);
} // (B,H,T); B = 1 where h < H
static Layout per_head(const Shape *s) {
    return layout(s->B, s->h, s->T, s->D, (int64_t)s->h * s->T * s->D, (int64_t)s->T * s->D, s->D,
                  1);
}
static Layout transposed(Layout l) {
    return layout(l.dim[0], l.dim[1], l.dim[3], l.dim[2], l.stride[0], l.stride[1], l.stride[3],
                  l.stride[2]);
}

static Desc tensor(Graph *g, int64_t name, cudnnDataType_t type, Layout l) {
    Desc d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    int64_t alignment = type == CUDNN_DATA_BFLOAT16 ? 16 : 4;
    int64_t id =
        name ? name : g->next++; // heads start at multiples of D, rows of statistics anywhere
    bool is_virtual = name == VIRTUAL;
    bool by_value = name >= SCALE;
    set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
    set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, l.dim);
    set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, l.stride);
    set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
    finalize(g, d, "a tensor");
    return d;
}
static Desc scalar(Graph *g, int64_t name) {
    return tensor(g, name, CUDNN_DATA_FLOAT, layout(1, 1, 1, 1, 1, 1, 1, 1));
}

// ---- operations: each appends itself and returns its output, the virtual tensor (type, l) or `to`
// ----
static Desc operation(Graph *g, Desc op, Desc output, const char *what) {
    if (finalize(g, op, what)) g->op[g->n_ops++] = op;
    return output;
}
static Desc pointwise_to(Graph *g, Desc to, cudnnPointwiseMode_t mode, int axis,
                         cudnnDataType_t compute, Desc x, Desc b, Desc t) {
    Desc how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    Desc op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    int64_t a = axis;
    set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    if (axis >= 0) set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &a);
    finalize(g, how, "a pointwise mode");
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, to);
    return operation(g, op, to, "a pointwise operation");
}
static Desc pointwise(Graph *g, Layout l, cudnnPointwiseMode_t mode, Desc x, Desc b) {
    return pointwise_to(g, tensor(g, VIRTUAL, CUDNN_DATA_FLOAT, l), mode, -1, CUDNN_DATA_FLOAT, x,
                        b, 0);
}
static Desc product(Graph *g, Desc to, Desc a, Desc b) {
    Desc how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    Desc op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    finalize(g, how, "a product's mode");
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, to);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    return operation(g, op, to, "a product");
}
static Desc reduce(Graph *g, Desc to, cudnnReduceTensorOp_t mode, Desc x) {
    Desc how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    Desc op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode);
    set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    finalize(g, how, "a reduction's mode");
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, to);
    return operation(g, op, to, "a reduction");
}
// The same elements under another layout: how a graph says "transposed".
static Desc reshape(Graph *g, Layout l, Desc x) {
    Desc op = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    Desc to = tensor(g, VIRTUAL, CUDNN_DATA_BFLOAT16, l);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, to);
    return operation(g, op, to, "a reshape");
}
// row >= column ? s : -inf
static Desc causal(Graph *g, Desc s) {
    Layout l = scores(&g->shape);
    Desc row = pointwise_to(g, tensor(g, VIRTUAL, CUDNN_DATA_INT32, l), CUDNN_POINTWISE_GEN_INDEX,
                            2, CUDNN_DATA_FLOAT, s, 0, 0);
    Desc column = pointwise_to(g, tensor(g, VIRTUAL, CUDNN_DATA_INT32, l),
                               CUDNN_POINTWISE_GEN_INDEX, 3, CUDNN_DATA_FLOAT, s, 0, 0);
    Desc visible = pointwise_to(g, tensor(g, VIRTUAL, CUDNN_DATA_BOOLEAN, l),
                                CUDNN_POINTWISE_CMP_GE, -1, CUDNN_DATA_BOOLEAN, row, column, 0);
    return pointwise_to(g, tensor(g, VIRTUAL, CUDNN_DATA_FLOAT, l), CUDNN_POINTWISE_BINARY_SELECT,
                        -1, CUDNN_DATA_FLOAT, s, scalar(g, MINUS_INFINITY), visible);
}

// ---- the two graphs -------------------------------------------------------------------------
static void build_forward(Graph *g) {
    const Shape *s = &g->shape;
    const cudnnDataType_t X = CUDNN_DATA_BFLOAT16, F = CUDNN_DATA_FLOAT;
    Layout square = scores(s);
    Layout row = per_row(s);
    Desc q = tensor(g, Q, X, of_q(s));
    Desc kt = tensor(g, K, X, transposed(of_k(s)));
    Desc v = tensor(g, V, X, of_k(s));
    Desc raw = product(g, tensor(g, VIRTUAL, F, square), q, kt);
    Desc masked = causal(g, pointwise(g, square, CUDNN_POINTWISE_MUL, raw, scalar(g, SCALE)));
    Desc most = reduce(g, tensor(g, VIRTUAL, F, row), CUDNN_REDUCE_TENSOR_MAX, masked);
    Desc e = pointwise(g, square, CUDNN_POINTWISE_EXP,
                       pointwise(g, square, CUDNN_POINTWISE_SUB, masked, most), 0);
    Desc sum = reduce(g, tensor(g, VIRTUAL, F, row), CUDNN_REDUCE_TENSOR_ADD, e);
    Desc log = pointwise(g, row, CUDNN_POINTWISE_LOG, sum, 0);
    pointwise_to(g, tensor(g, LSE, F, row), CUDNN_POINTWISE_ADD, -1, F, most, log, 0);
    Desc p = pointwise_to(g, tensor(g, VIRTUAL, X, square), CUDNN_POINTWISE_DIV, -1, F, e, sum, 0);
    product(g, tensor(g, O, X, of_q(s)), p, v);
}
static void build_backward(Graph *g) {
    const Shape *s = &g->shape;
    const cudnnDataType_t X = CUDNN_DATA_BFLOAT16, F = CUDNN_DATA_FLOAT;
    Layout square = scores(s);
    Layout row = per_row(s);
    Layout wide = per_head(s);
    Layout flipped = layout(s->B, s->h, s->T, s->T, square.stride[0], square.stride[1], 1, s->T);
    Desc q = tensor(g, Q, X, of_q(s));
    Desc kt = tensor(g, K, X, transposed(of_k(s)));
    Desc vt = tensor(g, V, X, transposed(of_k(s)));
    Desc o = tensor(g, O, X, of_q(s));
    Desc d_o = tensor(g, DO, X, of_q(s));
    Desc lse = tensor(g, LSE, F, row);
    Desc scale = scalar(g, SCALE);
    Desc dk = tensor(g, DK, X, of_k(s));
    Desc dv = tensor(g, DV, X, of_k(s));
    // delta; the factor is where dropout would stand, and the kernels' pattern has it
    Desc sum = reduce(g, tensor(g, VIRTUAL, F, row), CUDNN_REDUCE_TENSOR_ADD,
                      pointwise(g, wide, CUDNN_POINTWISE_MUL, d_o, o));
    Desc delta = pointwise_to(g, tensor(g, DELTA, F, row), CUDNN_POINTWISE_MUL, -1, F, sum,
                              scalar(g, ONE), 0);
    // P and dv
    Desc raw = product(g, tensor(g, VIRTUAL, F, square), q, kt);
    Desc shifted = pointwise(g, square, CUDNN_POINTWISE_SUB,
                             pointwise(g, square, CUDNN_POINTWISE_MUL, raw, scale), lse);
    Desc p = pointwise(g, square, CUDNN_POINTWISE_EXP, causal(g, shifted), 0);
    Desc pt = reshape(g, flipped, p);
    if (s->h == s->kv)
        product(g, dv, pt, d_o);
    else
        reduce(g, dv, CUDNN_REDUCE_TENSOR_ADD, product(g, tensor(g, VIRTUAL, X, wide), pt, d_o));
    // dS and dk
    Desc dp = product(g, tensor(g, VIRTUAL, F, square), d_o, vt);
    Desc product_rule = pointwise(g, square, CUDNN_POINTWISE_MUL,
                                  pointwise(g, square, CUDNN_POINTWISE_SUB, dp, delta), p);
    Desc ds = pointwise(g, square, CUDNN_POINTWISE_MUL, product_rule, scale);
    Desc dst = reshape(g, flipped, ds);
    if (s->h == s->kv)
        product(g, dk, dst, q);
    else
        reduce(g, dk, CUDNN_REDUCE_TENSOR_ADD, product(g, tensor(g, VIRTUAL, X, wide), dst, q));
    product(g, tensor(g, DQ, X, of_q(s)), ds, reshape(g, of_k(s), kt));
}

// ---- plans ----------------------------------------------------------------------------------
// Bytes that the chosen engine may use. Backward: dS of the call's heads in bf16, whose rows and
// columns are padded to tiles of up to 128, and, where query heads share KV heads, dk and dv before
// their sum over the group.
static int64_t workspace_bound(const Shape *s) {
    int64_t padded = ((int64_t)s->T + 127) / 128 * 128;
    return 4096 + (s->backward
                       ? (int64_t)s->B * s->h * (2 * padded * padded + 4 * (int64_t)s->T * s->D)
                       : 0);
}
// The calls that backward is made of: all heads of as many sequences as cudnn_attention_chunk holds
// (the last call may have fewer), or else as many KV heads of one sequence, a divisor. More
// sequences never need less memory: what is reserved for a micro-batch serves smaller ones.
static Shape backward_call(int B, int T, int H, int KV, int D) {
    Shape s = { 1, B, T, H, KV, H, KV, D };
    while (s.B > 1 && workspace_bound(&s) > cudnn_attention_chunk) s.B--;
    while (s.kv > 1 && (KV % s.kv || workspace_bound(&s) > cudnn_attention_chunk)) {
        s.kv--;
        s.h = H / KV * s.kv;
    }
    return s;
}
static Shape forward_call(int B, int T, int H, int KV, int D) {
    Shape s = { 0, B, T, H, KV, H, KV, D };
    return s;
}
// What cuDNN's own front end knows of its versions and does not leave to the support check. On
// Blackwell (10 and above) deterministic sums are a setting of the engine, from cuDNN 9.18.1 on
// (TransformerEngine, pull request 2584). It is not made here, and the form of the graph alone is
// not known to give them (I8, deterministic).
static const char *refused(const Shape *s, int major) {
    size_t version = cudnnGetVersion();
    if (version == 91000 || version == 91001) return "cuDNN 9.10.0 and 9.10.1 compute it wrongly";
    if (s->backward && s->T == 1) return "a sequence of one token has no backward kernel";
    if (s->backward && s->T % 128 && version <= 91500)
        return "before cuDNN 9.16 its backward pass wants sequences of whole tiles of 128";
    if (s->backward && workspace_bound(s) > GROUP_BYTES)
        return "its deterministic backward pass would take more than 2 GiB beside the tensors";
    if (s->backward && major >= 10)
        return "its backward pass is not known to be deterministic on Blackwell";
    return 0;
}
// The graph of a call, and cuDNN's engine configurations for it, best first; returns their number.
static int configurations(Graph *g, Desc config[CONFIGS]) {
    cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t n = 0;
    g->next = NAMES;
    if ((g->failed = refused(&g->shape, g->major))) return 0;
    if (g->shape.backward)
        build_backward(g);
    else
        build_forward(g);
    Desc graph = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    Desc rank = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->n_ops, g->op);
    if (handle) set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finalize(g, graph, "the graph");
    set_desc(g, rank, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    set(g, rank, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    set_desc(g, rank, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, g->device);
    finalize(g, rank, "no engine");
    for (int i = 0; i < CONFIGS; i++) config[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (!g->failed)
        good(g,
             cudnnBackendGetAttribute(rank, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                      CUDNN_TYPE_BACKEND_DESCRIPTOR, CONFIGS, &n, config),
             "no engine");
    if (!g->failed && !n) g->failed = "no engine";
    if (g->failed) return 0;
    return n < CONFIGS ? (int)n : CONFIGS;
}
// A number of a descriptor, -1 where cuDNN does not say.
static int64_t number_of(Desc d, cudnnBackendAttributeName_t name) {
    int64_t value = -1;
    int64_t n = 0;
    return cudnnBackendGetAttribute(d, name, CUDNN_TYPE_INT64, 1, &n, &value) ==
                       CUDNN_STATUS_SUCCESS &&
                   n == 1
               ? value
               : -1;
}
// The first configuration that compiles and keeps to the bound; plan 0 where there is none, which
// is said once on a machine.
static void plan_create(AttentionPlan *p, const Shape *s) {
    static int said;
    Desc config[CONFIGS];
    int device = 0;
    memset(p, 0, sizeof *p);
    p->g.shape = *s;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&p->g.major, cudaDevAttrComputeCapabilityMajor, device);
    int n = configurations(&p->g, config);
    for (int i = 0; i < n && !p->plan; i++) {
        Graph *g = &p->g;
        Desc plan = make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        set(g, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
        set_desc(g, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config[i]);
        if (g->failed || cudnnBackendFinalize(plan) != CUDNN_STATUS_SUCCESS) continue;
        p->workspace = number_of(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE);
        if (p->workspace >= 0 && p->workspace <= workspace_bound(s)) p->plan = plan;
    }
    if (p->plan || said++ || device) return;
    fprintf(stderr,
            "attention: cuDNN has no %s plan for sequences of %d, %d heads on %d of %d (%s); the "
            "kernel \"flash\" computes it\n",
            s->backward ? "backward" : "forward", s->T, s->H, s->KV, s->D,
            p->g.failed ? p->g.failed : "no engine keeps to the workspace");
}
static AttentionPlan *plan_for(const Shape *s) {
    for (int i = 0; i < n_plans; i++)
        if (!memcmp(&plans[i].g.shape, s, sizeof *s)) return &plans[i];
    if (n_plans == PLANS) cudnn_attention_finish(); // only a test has so many shapes
    if (!cudnn_attention_start())
        die("cuDNN %zu does not start on this GPU|--attention-kernel flash, or a newer driver",
            cudnnGetVersion());
    plan_create(&plans[n_plans], s);
    return &plans[n_plans++];
}
int cudnn_attention_start(void) {
    if (!handle && cudnnCreate(&handle) != CUDNN_STATUS_SUCCESS) handle = 0;
    return handle != 0;
}
void cudnn_attention_finish(void) {
    while (n_plans) graph_free(&plans[--n_plans].g);
    if (handle) cudnnDestroy(handle);
    handle = 0;
}

// ---- execution ------------------------------------------------------------------------------
// memory: by name of the tensor, 0 where the graph has none.
static void execute(AttentionPlan *p, void *memory[NAMES], void *workspace, cudaStream_t stream) {
    float scale = 1 / sqrtf((float)p->g.shape.D);
    float hidden = cudnnGetVersion() < 91000 ? -FLT_MAX : -INFINITY;
    float one = 1;
    int64_t name[NAMES];
    int64_t n = 0;
    void *pointer[NAMES];
    Graph pack = { 0 };
    memory[SCALE] = &scale;
    memory[MINUS_INFINITY] = &hidden;
    memory[ONE] = p->g.shape.backward ? &one : 0;
    for (int i = 1; i < NAMES; i++)
        if (memory[i]) {
            name[n] = i;
            pointer[n++] = memory[i];
        }
    Desc d = make(&pack, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, name);
    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, pointer);
    set(&pack, d, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    finalize(&pack, d, "the pointers");
    good(&pack, cudnnSetStream(handle, stream), "the stream");
    if (!pack.failed) good(&pack, cudnnBackendExecute(handle, p->plan, d), "the plan");
    if (pack.failed) {
        char why[512] = "";
        cudnnGetLastErrorString(why, sizeof why);
        die("cuDNN attention: %s failed: %s|--attention-kernel flash goes without; an error of an "
            "earlier kernel can show here",
            pack.failed, why);
    }
    graph_free(&pack);
}
// Where backward's delta ends and the engine's own memory begins.
static size_t delta_bytes(int B, int T, int H) {
    return (B * (size_t)T * H * sizeof(float) + 255) / 256 * 256;
}

size_t cudnn_attention_workspace(int B, int T, int H, int KV, int D) {
    Shape forward = forward_call(B, T, H, KV, D);
    Shape backward = backward_call(B, T, H, KV, D);
    if (B == 0 || T == 0 || workspace_bound(&backward) > GROUP_BYTES)
        return workspace_bound(&forward);
    return delta_bytes(B, T, H) + workspace_bound(&backward);
}
int cudnn_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                            void *workspace, int B, int T, int H, int KV, int D,
                            cudaStream_t stream) {
    Shape s = forward_call(B, T, H, KV, D);
    AttentionPlan *p = plan_for(&s);
    if (!p->plan) return 0;
    void *memory[NAMES] = {
        [Q] = (void *)q, [K] = (void *)k, [V] = (void *)v, [O] = o, [LSE] = lse
    };
    execute(p, memory, workspace, stream);
    return 1;
}
int cudnn_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                             const real *lse, const floatX *q, const floatX *k, const floatX *v,
                             void *workspace, int B, int T, int H, int KV, int D,
                             cudaStream_t stream) {
    Shape s = backward_call(B, T, H, KV, D);
    float *delta = (float *)workspace;
    for (int b = 0, most = s.B; b < B; b += most) {
        s.B = B - b < most ? B - b : most;
        AttentionPlan *p = plan_for(&s);
        if (!p->plan) return 0;
        for (int n = 0; n < KV; n += s.kv) {
            size_t h = n * (size_t)(H / KV);
            size_t at_q = (b * (size_t)T * H + h) * D;
            size_t at_k = (b * (size_t)T * KV + n) * D;
            size_t at_row = (b * (size_t)H + h) * T;
            void *memory[NAMES] = { [Q] = (void *)(q + at_q),
                                    [K] = (void *)(k + at_k),
                                    [V] = (void *)(v + at_k),
                                    [O] = (void *)(o + at_q),
                                    [LSE] = (void *)(lse + at_row),
                                    [DO] = (void *)(d_o + at_q),
                                    [DQ] = dq + at_q,
                                    [DK] = dk + at_k,
                                    [DV] = dv + at_k,
                                    [DELTA] = delta + at_row };
            execute(p, memory, (char *)workspace + delta_bytes(B, T, H), stream);
        }
    }
    return 1;
}

// ---- without a GPU --------------------------------------------------------------------------
int cudnn_attention_check(const char *device, int major, int backward, int B, int T, int H, int KV,
                          int D, int64_t *workspace, const char **why) {
    Graph g = { 0 };
    Desc config[CONFIGS];
    g.major = major;
    g.shape = backward ? backward_call(B, T, H, KV, D) : forward_call(B, T, H, KV, D);
    g.device = make(&g, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
    set(&g, g.device, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR,
        (int64_t)strlen(device), device);
    finalize(&g, g.device, "the device's description");
    int n = g.failed ? 0 : configurations(&g, config);
    int kept = 0;
    *workspace = -1;
    *why = g.failed;
    for (int i = 0; i < n && !kept; i++) {
        *workspace = number_of(config[i], CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE);
        kept = *workspace >= 0 && *workspace <= workspace_bound(&g.shape);
    }
    if (n && !kept) *why = "no engine keeps to the workspace";
    graph_free(&g);
    return kept ? n : 0;
}
