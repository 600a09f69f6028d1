// What the graphs of kernels/cuda/attention_cudnn.c mean: this file is cuDNN's backend interface
// over a slow interpreter, which runs each operation as cuDNN's documentation defines it, in
// doubles, on the memory and through the strides that the graph names. The results must be
// attention and its gradient.
//   make test-cudnn-graphs        (needs cuDNN's headers; the library itself is asked by
//   test_cudnn.c)
// Tolerance: outputs are rounded once to bf16, 2^-9 of the number; 2^-8 and 1e-5 of the size of the
// inputs leave room for lse in fp32.
#define _GNU_SOURCE
#include "cuda/attention.h"
#include "test.h"
#include <cudnn.h>

// ---- descriptors: attributes as they were set -----------------------------------------------
enum { SLOTS = 24 };
typedef struct Node Node;
struct Node {
    cudnnBackendDescriptorType_t type;
    int n, finalized;
    struct {
        cudnnBackendAttributeName_t name;
        int64_t count;
        char *bytes;
    } slot[SLOTS];
    double *value; // of a tensor while a plan runs
};
static int alive, graphs; // descriptors that exist; graphs that were made
static const size_t width[] = { [CUDNN_TYPE_HANDLE] = 8,
                                [CUDNN_TYPE_DATA_TYPE] = 4,
                                [CUDNN_TYPE_BOOLEAN] = 1,
                                [CUDNN_TYPE_INT64] = 8,
                                [CUDNN_TYPE_VOID_PTR] = 8,
                                [CUDNN_TYPE_HEUR_MODE] = 4,
                                [CUDNN_TYPE_POINTWISE_MODE] = 4,
                                [CUDNN_TYPE_BACKEND_DESCRIPTOR] = 8,
                                [CUDNN_TYPE_REDUCTION_OPERATOR_TYPE] = 4 };
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t *d) {
    Node *n = xcalloc(1, sizeof *n, "a descriptor");
    n->type = type;
    *d = n;
    alive++;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
    Node *n = d;
    for (int i = 0; i < n->n; i++) free(n->slot[i].bytes);
    free(n);
    alive--;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count,
                                       const void *values) {
    Node *n = d;
    size_t bytes = (size_t)count * width[type];
    if (n->finalized || n->n == SLOTS || !bytes)
        die("test_cudnn_graph: attribute %d cannot be set|finalized, too many, or of an unknown "
            "type",
            (int)name);
    n->slot[n->n].name = name;
    n->slot[n->n].count = count;
    memcpy(n->slot[n->n++].bytes = xmalloc(bytes, "an attribute"), values, bytes);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d) {
    Node *n = d;
    n->finalized = 1;
    graphs += n->type == CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR;
    return CUDNN_STATUS_SUCCESS;
}
static const void *find(const Node *n, cudnnBackendAttributeName_t name, int64_t *count) {
    for (int i = 0; i < n->n; i++)
        if (n->slot[i].name == name) {
            if (count) *count = n->slot[i].count;
            return n->slot[i].bytes;
        }
    return 0;
}
static const void *get(const Node *n, cudnnBackendAttributeName_t name) {
    const void *p = find(n, name, 0);
    if (!p)
        die("test_cudnn_graph: a descriptor of type %d lacks attribute %d|a defect of "
            "attention_cudnn.c",
            (int)n->type, (int)name);
    return p;
}
static Node *node(const Node *n, cudnnBackendAttributeName_t name) {
    Node *const *p = find(n, name, 0);
    return p ? *p : 0;
}
// One configuration, which remembers the graph; no workspace.
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const d,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t wanted,
                                       int64_t *count, void *out) {
    (void)type;
    (void)wanted;
    *count = 1;
    if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS) {
        Node *graph = node(d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
        cudnnBackendSetAttribute(*(cudnnBackendDescriptor_t *)out,
                                 CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                 1, &graph);
    } else
        *(int64_t *)out = 0;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnCreate(cudnnHandle_t *h) {
    *h = (cudnnHandle_t)&graphs;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t h) {
    (void)h;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t s) {
    (void)h;
    (void)s;
    return CUDNN_STATUS_SUCCESS;
}
size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
void cudnnGetLastErrorString(char *text, size_t size) { snprintf(text, size, "none"); }
cudaError_t cudaGetDevice(int *d) {
    *d = 0;
    return cudaSuccess;
}
static int capability = 9; // Hopper
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
    (void)name;
    (void)device;
    *value = capability;
    return cudaSuccess;
}

// ---- tensors: (b, h, r, c) in logical order while a plan runs -------------------------------
static const int64_t *dims(const Node *t) { return get(t, CUDNN_ATTR_TENSOR_DIMENSIONS); }
static const int64_t *strides(const Node *t) { return get(t, CUDNN_ATTR_TENSOR_STRIDES); }
static int64_t elements(const Node *t) {
    const int64_t *d = dims(t);
    return d[0] * d[1] * d[2] * d[3];
}
static void place(const Node *t, int64_t i, int64_t at[4]) {
    for (int a = 3; a >= 0; i /= dims(t)[a--]) at[a] = i % dims(t)[a];
}
static int64_t offset(const Node *t, int64_t i) {
    int64_t at[4];
    int64_t sum = 0;
    place(t, i, at);
    for (int a = 0; a < 4; a++) sum += at[a] * strides(t)[a];
    return sum;
}
static int64_t span(const Node *t) { return offset(t, elements(t) - 1) + 1; }
// The element of t at `at`; where t has one along an axis, or one for a group of heads, that one.
static double at(const Node *t, const int64_t *where, const int64_t *of) {
    int64_t i = 0;
    for (int a = 0; a < 4; a++)
        i = i * dims(t)[a] + (dims(t)[a] == of[a] ? where[a] : where[a] / (of[a] / dims(t)[a]));
    return t->value[i];
}
static const int64_t *pack_ids;
static void *const *pack_pointers;
static int64_t pack_count;
static void *pointer_of(const Node *t) {
    int64_t id = *(const int64_t *)get(t, CUDNN_ATTR_TENSOR_UNIQUE_ID);
    for (int64_t i = 0; i < pack_count; i++)
        if (pack_ids[i] == id) return pack_pointers[i];
    die("test_cudnn_graph: tensor %lld has no memory|a defect of attention_cudnn.c", (long long)id);
}
static int is_virtual(const Node *t) { return *(const char *)get(t, CUDNN_ATTR_TENSOR_IS_VIRTUAL); }
static Node *input(Node *t) {
    if (t->value) return t;
    if (is_virtual(t))
        die("test_cudnn_graph: a virtual tensor is read before it is written|a defect of "
            "attention_cudnn.c");
    int bf16 = *(const cudnnDataType_t *)get(t, CUDNN_ATTR_TENSOR_DATA_TYPE) == CUDNN_DATA_BFLOAT16;
    const void *p = pointer_of(t);
    t->value = xmalloc((size_t)elements(t) * sizeof(double), "a tensor");
    for (int64_t i = 0; i < elements(t); i++)
        t->value[i] = bf16 ? (double)bf16_to_float(((const uint16_t *)p)[offset(t, i)])
                           : (double)((const float *)p)[offset(t, i)];
    return t;
}
static void output(Node *t) {
    if (is_virtual(t)) return;
    int bf16 = *(const cudnnDataType_t *)get(t, CUDNN_ATTR_TENSOR_DATA_TYPE) == CUDNN_DATA_BFLOAT16;
    void *p = pointer_of(t);
    for (int64_t i = 0; i < elements(t); i++) {
        if (bf16)
            ((uint16_t *)p)[offset(t, i)] = float_to_bf16((float)t->value[i]);
        else
            ((float *)p)[offset(t, i)] = (float)t->value[i];
    }
}

// ---- operations -----------------------------------------------------------------------------
static double pointwise(cudnnPointwiseMode_t mode, double x, double b, double t) {
    switch (mode) {
    case CUDNN_POINTWISE_MUL: return x * b;
    case CUDNN_POINTWISE_ADD: return x + b;
    case CUDNN_POINTWISE_SUB: return x - b;
    case CUDNN_POINTWISE_DIV: return x / b;
    case CUDNN_POINTWISE_EXP: return exp(x);
    case CUDNN_POINTWISE_LOG: return log(x);
    case CUDNN_POINTWISE_CMP_GE: return x >= b;
    case CUDNN_POINTWISE_BINARY_SELECT: return t != 0 ? x : b;
    default: die("test_cudnn_graph: pointwise mode %d|teach it to this test", (int)mode);
    }
}
static Node *run_operation(const Node *op) {
    int64_t where[4], inner[4];
    Node *y = 0;
    if (op->type == CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR) {
        const Node *how = node(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
        cudnnPointwiseMode_t mode =
            *(const cudnnPointwiseMode_t *)get(how, CUDNN_ATTR_POINTWISE_MODE);
        Node *x = input(node(op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC));
        Node *b = node(op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC);
        Node *t = node(op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC);
        if (b) input(b);
        if (t) input(t);
        y = node(op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC);
        y->value = xmalloc((size_t)elements(y) * sizeof(double), "a tensor");
        for (int64_t i = 0; i < elements(y); i++) {
            place(y, i, where);
            if (mode == CUDNN_POINTWISE_GEN_INDEX)
                y->value[i] = (double)where[*(const int64_t *)get(how, CUDNN_ATTR_POINTWISE_AXIS)];
            else
                y->value[i] = pointwise(mode, at(x, where, dims(y)), b ? at(b, where, dims(y)) : 0,
                                        t ? at(t, where, dims(y)) : 0);
        }
    } else if (op->type == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR) {
        Node *a = input(node(op, CUDNN_ATTR_OPERATION_MATMUL_ADESC));
        Node *b = input(node(op, CUDNN_ATTR_OPERATION_MATMUL_BDESC));
        y = node(op, CUDNN_ATTR_OPERATION_MATMUL_CDESC);
        int64_t K = dims(a)[3];
        int64_t of[4] = { dims(y)[0], dims(y)[1], 0, 0 };
        if (dims(b)[2] != K || dims(a)[2] != dims(y)[2] || dims(b)[3] != dims(y)[3])
            die("test_cudnn_graph: sizes of a product disagree|a defect of attention_cudnn.c");
        y->value = xcalloc((size_t)elements(y), sizeof(double), "a tensor");
        for (int64_t i = 0; i < elements(y); i++) {
            place(y, i, where);
            for (int64_t k = 0; k < K; k++) {
                int64_t left[4] = { where[0], where[1], where[2], k };
                int64_t right[4] = { where[0], where[1], k, where[3] };
                of[2] = dims(a)[2];
                of[3] = K;
                double x = at(a, left, of);
                of[2] = K;
                of[3] = dims(b)[3];
                y->value[i] += x * at(b, right, of);
            }
        }
    } else if (op->type == CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR) {
        int most = *(const cudnnReduceTensorOp_t *)get(
                       node(op, CUDNN_ATTR_OPERATION_REDUCTION_DESC),
                       CUDNN_ATTR_REDUCTION_OPERATOR) == CUDNN_REDUCE_TENSOR_MAX;
        Node *x = input(node(op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC));
        y = node(op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC);
        y->value = xmalloc((size_t)elements(y) * sizeof(double), "a tensor");
        for (int64_t i = 0; i < elements(y); i++) y->value[i] = most ? -INFINITY : 0;
        for (int64_t i = 0; i < elements(x); i++) {
            int64_t to = 0;
            place(x, i, inner);
            for (int a = 0; a < 4; a++) to = to * dims(y)[a] + inner[a] / (dims(x)[a] / dims(y)[a]);
            double before = y->value[to];
            double one = x->value[i];
            y->value[to] = most ? fmax(before, one) : before + one;
        }
    } else if (op->type ==
               CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR) { // the same memory under other strides
        Node *x = input(node(op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC));
        y = node(op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC);
        if (span(x) != span(y))
            die("test_cudnn_graph: a reshape of %lld elements to %lld|a defect of "
                "attention_cudnn.c",
                (long long)span(x), (long long)span(y));
        double *memory = xcalloc((size_t)span(x), sizeof(double), "a tensor");
        y->value = xmalloc((size_t)elements(y) * sizeof(double), "a tensor");
        for (int64_t i = 0; i < elements(x); i++) memory[offset(x, i)] = x->value[i];
        for (int64_t i = 0; i < elements(y); i++) y->value[i] = memory[offset(y, i)];
        free(memory);
    } else
        die("test_cudnn_graph: an operation of type %d|teach it to this test", (int)op->type);
    output(y);
    return y;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t pack) {
    (void)handle;
    int64_t n = 0;
    Node *graph = node(node(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG),
                       CUDNN_ATTR_ENGINE_OPERATION_GRAPH);
    Node *const *op = find(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, &n);
    pack_ids = find(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &pack_count);
    pack_pointers = get(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
    for (int64_t i = 0; i < n; i++) run_operation(op[i]);
    for (int64_t i = 0; i < n; i++) // every tensor hangs on an operation
        for (int s = 0; s < op[i]->n; s++) {
            Node *t = *(Node *const *)(void *)op[i]->slot[s].bytes;
            if (t->type == CUDNN_BACKEND_TENSOR_DESCRIPTOR) {
                free(t->value);
                t->value = 0;
            }
        }
    return CUDNN_STATUS_SUCCESS;
}

// ---- attention, from its definition ---------------------------------------------------------
static void near(const char *what, const double *got, const double *want, size_t n,
                 double relative) {
    for (size_t i = 0; i < n; i++)
        if (!compare(fabs(got[i] - want[i]) <= relative * fabs(want[i]) + 1e-5,
                     "%s[%zu] is %.9g, not %.9g", what, i, got[i], want[i]))
            return;
}
static void test_shape(int B, int T, int H, int KV, int D, const char *calls, int plans) {
    size_t nq = (size_t)B * T * H * D;
    size_t nk = (size_t)B * T * KV * D;
    size_t nl = (size_t)B * H * T;
    double *q = test_random(nq, 1, 0);
    double *k = test_random(nk, 1, 0);
    double *v = test_random(nk, 1, 0);
    double *d_o = test_random(nq, 1, 0);
    double scale = 1 / sqrt(D);
    double *o = TEST_TAKE(double, nq);
    double *lse = TEST_TAKE(double, nl);
    double *dq = TEST_TAKE(double, nq);
    double *dk = TEST_TAKE(double, nk);
    double *dv = TEST_TAKE(double, nk);
    double *p = TEST_TAKE(double, T);
    floatX *xo = TEST_TAKE(floatX, nq);
    floatX *xdq = TEST_TAKE(floatX, nq);
    floatX *xdk = TEST_TAKE(floatX, nk);
    floatX *xdv = TEST_TAKE(floatX, nk);
    floatX *xq = test_x(q, nq);
    floatX *xk = test_x(k, nk);
    floatX *xv = test_x(v, nk);
    floatX *xd = test_x(d_o, nq);
    real *xl = TEST_TAKE(real, nl);
    void *workspace = test_take(cudnn_attention_workspace(B, T, H, KV, D));
    memset(o, 0, nq * sizeof *o);
    memset(dq, 0, nq * sizeof *dq);
    memset(dk, 0, nk * sizeof *dk);
    memset(dv, 0, nk * sizeof *dv);
    compare(cudnn_attention_forward(xo, xl, xq, xk, xv, workspace, B, T, H, KV, D, 0),
            "forward is refused");
    const double *rounded = from_x(xo, nq);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) {
                size_t row = (((size_t)b * T + t) * H + h) * D;
                size_t kv = ((size_t)b * T * KV + h / (H / KV)) * D;
                size_t step = (size_t)KV * D;
                double sum = 0;
                double delta = 0;
                for (int j = 0; j <= t; j++)
                    sum += p[j] = exp(scale * test_dot(q + row, k + kv + j * step, D));
                lse[((size_t)b * H + h) * T + t] = log(sum);
                for (int d = 0; d < D; d++) delta += d_o[row + d] * rounded[row + d];
                for (int j = 0; j <= t; j++) {
                    size_t at_j = kv + j * step;
                    double P = p[j] / sum;
                    double dS = scale * P * (test_dot(d_o + row, v + at_j, D) - delta);
                    for (int d = 0; d < D; d++) {
                        o[row + d] += P * v[at_j + d];
                        dv[at_j + d] += P * d_o[row + d];
                        dq[row + d] += dS * k[at_j + d];
                        dk[at_j + d] += dS * q[row + d];
                    }
                }
            }
    near("o", rounded, o, nq, 0x1p-8);
    near("lse", from_real(xl, nl), lse, nl, 1e-6);
    int before = graphs;
    for (int again = 0; again < 2; again++)
        compare(cudnn_attention_backward(xdq, xdk, xdv, xd, xo, xl, xq, xk, xv, workspace, B, T, H,
                                         KV, D, 0),
                "backward is refused");
    compare(graphs == before + plans, "%d graphs, not %d", graphs - before, plans);
    near("dq", from_x(xdq, nq), dq, nq, 0x1p-8);
    near("dk", from_x(xdk, nk), dk, nk, 0x1p-8);
    near("dv", from_x(xdv, nk), dv, nk, 0x1p-8);
    char name[120];
    snprintf(name, sizeof name, "the graphs are attention: B %d T %d, %d heads on %d of %d, %s", B,
             T, H, KV, D, calls);
    test_group(name);
}

int main(void) {
    for (int mode = 0; mode < 2; mode++) {
        const char *calls = mode ? "calls of one KV head" : "one call";
        cudnn_attention_finish(); // plans are kept for a shape
        cudnn_attention_chunk = mode ? 1 : (int64_t)1 << 30;
        test_shape(1, 9, 1, 1, 16, calls, 1);
        test_shape(2, 7, 4, 2, 32, calls, 1);
        test_shape(3, 12, 6, 1, 16, calls, 1);
        test_shape(2, 130, 4, 4, 8, calls, 1);
        test_shape(1, 2, 8, 2, 128, calls, 1);
    }
    cudnn_attention_chunk = 2 * 6 * 2 * 128 * 128 + 16384; // dS of two sequences of one tile
    test_shape(5, 12, 6, 2, 16, "calls of two, two and one sequence", 2);
    cudnn_attention_finish();
    capability = 10;
    check(!cudnn_attention_backward(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 128, 2, 1, 128, 0),
          "Blackwell: backward is left to the kernel \"flash\"");
    cudnn_attention_finish();
    check(alive == 0, "every descriptor is destroyed (%d left)", alive);
    return test_summary();
}
