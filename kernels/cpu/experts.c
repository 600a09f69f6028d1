// The experts' products, forward and backward. A row m of expert e belongs to pool token p =
// row_token[m]:
//   H = pool[p] W1^T = [gate | up],  A = silu(gate) up,  Y = A W2^T,  out[p] = sum over its rows of
//   score Y
// Backward, with g = dpool[p] W2 (F wide): dY = score dpool[p], so dA = dY W2 = score g, and
// because Y = A W2^T,
//   dscore = <dpool[p], Y> = <dpool[p], A W2^T> = <g, A>:  neither Y nor dY is ever needed, and the
//   score joins A: dW2 = dpool[p]^T (score A).
//
// Work is cut into tasks of (expert, row chunk) for products over rows and (expert, column block)
// for weight gradients, whose size depends on the routing alone (I8). They are handed out longest
// first; each runs on one thread with one BLAS thread: gather into a panel that stays in the
// thread's cache, product, and the elementwise part on the chunk while it is hot.
#include "../fail.h"
#include "gemm.h"
#include <stdlib.h>

enum {
    CHUNK_MIN = 256,
    CHUNK_MAX = 1024,
    CHUNKS = 32
}; // rows of a task: enough for an efficient product, and about CHUNKS tasks where one expert has
   // all
enum {
    REDUCE = 1024,
    MAX_COLUMNS = 1024
}; // rows of a step along a reduction; columns of one product

typedef struct {
    int expert, row, rows, column, columns;
} Task;

static int longer_first(const void *a, const void *b) {
    const Task *x = (const Task *)a, *y = (const Task *)b;
    int64_t u = (int64_t)x->rows * x->columns, v = (int64_t)y->rows * y->columns;
    if (u != v) return u < v ? 1 : -1;
    if (x->expert != y->expert) return x->expert < y->expert ? -1 : 1;
    return x->row != y->row ? (x->row < y->row ? -1 : 1)
                            : (x->column > y->column) - (x->column < y->column);
}
// Row chunks: every expert's rows in equal pieces of at most `chunk`. *count tasks, in scratch
// until the caller's thread asks for it again.
static Task *row_tasks(const RowIndex *plan, int *count) {
    const int *start = plan->expert_row;
    int n = 0, chunk = start[plan->E] / CHUNKS;
    chunk = chunk < CHUNK_MIN ? CHUNK_MIN : chunk > CHUNK_MAX ? CHUNK_MAX : chunk;
    for (int e = 0; e < plan->E; e++) n += (int)div_up(start[e + 1] - start[e], chunk);
    Task *task = SCRATCH(SCRATCH_SHARED, Task, n + 1);
    *count = n, n = 0;
    for (int e = 0; e < plan->E; e++) {
        int64_t rows = start[e + 1] - start[e], pieces = div_up(rows, chunk);
        for (int64_t i = 0; i < pieces; i++) {
            int first = (int)(start[e] + rows * i / pieces),
                last = (int)(start[e] + rows * (i + 1) / pieces);
            task[n++] = (Task){ e, first, last - first, 0, 1 };
        }
    }
    qsort(task, (size_t)n, sizeof *task, longer_first);
    return task;
}
// Column blocks of the hidden width for every expert, empty ones too: 512 wide; 64 where one expert
// holds more than an eighth of all rows, so that routing collapse (or a dense MLP, which is one
// expert) still feeds all threads.
static Task *column_tasks(const RowIndex *plan, int64_t C, int *count) {
    const int *start = plan->expert_row;
    Task *task = SCRATCH(SCRATCH_SHARED, Task, plan->E * div_up(C, 64) + 1);
    int n = 0;
    for (int e = 0; e < plan->E; e++) {
        int rows = start[e + 1] - start[e], width = rows > start[plan->E] / 8 ? 64 : 512;
        for (int c = 0; c < C; c += width)
            task[n++] = (Task){ e, start[e], rows, c, (int)lesser(width, C - c) };
    }
    qsort(task, (size_t)n, sizeof *task, longer_first);
    *count = n;
    return task;
}
// panel (rows,width) = columns [column, column + width) of the pool rows of row_token[0..rows),
// zeros for padding.
static void gather(floatX *panel, const floatX *pool, const int *row_token, int rows, int64_t C,
                   int column, int width) {
    size_t bytes = (size_t)width * sizeof(floatX);
    for (int r = 0; r < rows; r++, panel += width) {
        if (row_token[r] < 0)
            memset(panel, 0, bytes);
        else
            memcpy(panel, pool + (int64_t)row_token[r] * C + column, bytes);
    }
}

void experts_up(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
                int64_t C, int64_t F) {
    kernel_begin("experts_up", 2 * expert_flops(plan, C, F));
    int count;
    Task *tasks = row_tasks(plan, &count);
    PARALLEL_TILES
    for (int i = 0; i < count; i++) {
        Task t = tasks[i];
        floatX *X = SCRATCH(SCRATCH_LOCAL, floatX, (int64_t)t.rows * C),
               *h = H + (int64_t)t.row * 2 * F;
        const floatX *w = W1 + (int64_t)t.expert * 2 * F * C;
        gather(X, pool, plan->row_token + t.row, t.rows, C, 0, C);
        if (2 * F <= MAX_COLUMNS) gemm_xx(0, 1, t.rows, 2 * F, C, X, C, w, C, 0, h, 2 * F);
        for (int f = 0; f < F; f += MAX_COLUMNS / 2) {
            int width = (int)lesser(MAX_COLUMNS / 2, F - f);
            if (2 * F > MAX_COLUMNS) { // a wide expert: gate and up columns of one block, so that
                                       // SwiGLU finds both in the cache
                gemm_xx(0, 1, t.rows, width, C, X, C, w + (int64_t)f * C, C, 0, h + f, 2 * F);
                gemm_xx(0, 1, t.rows, width, C, X, C, w + (int64_t)(F + f) * C, C, 0, h + F + f,
                        2 * F);
            }
            for (int r = 0; A && r < t.rows; r++) {
                const floatX *gate = h + (int64_t)r * 2 * F + f, *up = gate + F;
                floatX *a = A + (int64_t)(t.row + r) * F + f;
                for (int j = 0; j < width; j++) store(a + j, silu(load(gate + j)) * load(up + j));
            }
        }
    }
}
void experts_down(floatX *Y, const floatX *A, const floatX *W2, const RowIndex *plan, int64_t C,
                  int64_t F) {
    kernel_begin("experts_down", expert_flops(plan, C, F));
    int count;
    Task *tasks = row_tasks(plan, &count);
    PARALLEL_TILES
    for (int i = 0; i < count; i++) {
        Task t = tasks[i];
        gemm_xx(0, 1, t.rows, C, F, A + (int64_t)t.row * F, F, W2 + (int64_t)t.expert * C * F, F, 0,
                Y + (int64_t)t.row * C, C);
    }
}
// Which of its token's K slots a row is.
static int slot_of(const RowIndex *plan, int token, int row) {
    const int *slots = plan->token_row + (int64_t)token * plan->K;
    int k = 0;
    while (slots[k] != row) k++;
    return k;
}
// silu(x) = x s, s = 1/(1 + e^-x), s' = s (1 - s), so d silu/dx = s + x s (1 - s) = s (1 + x (1 -
// s)). With a = silu(gate) up:
//   dgate = dA up s (1 + gate (1 - s)),  dup = dA gate s,  dA = score g.   Returns the row's share
//   of <g, a>; g holds the products then.
// a is what forward stored: rounded once to floatX. dH may be H: stripes go through local arrays,
// which also tells the compiler that nothing overlaps.
static real swiglu_backward(floatX *dH, floatX *sA, real *g, const floatX *H, real score, int64_t F,
                            int width) {
    enum { STRIPE = 64 };
    real gate[STRIPE], up[STRIPE], weighted[STRIPE];
    for (int f = 0; f < width; f += STRIPE) {
        int n = (int)lesser(STRIPE, width - f);
        load_row(gate, H + f, n), load_row(up, H + F + f, n);
        for (int j = 0; j < n; j++) {
            real x = gate[j], y = up[j], s = sigmoid(x), a = round_x(x * s * y),
                 dA = score * g[f + j];
            g[f + j] *= a;
            weighted[j] = score * a;
            gate[j] = dA * y * s * (1 + x * (1 - s));
            up[j] = dA * x * s;
        }
        store_row(sA + f, weighted, n), store_row(dH + f, gate, n), store_row(dH + F + f, up, n);
    }
    return row_sum(g, width);
}
void experts_down_backward(floatX *dH, floatX *sA, real *dscore, const floatX *dpool,
                           const floatX *H, const floatX *W2, const real *score,
                           const RowIndex *plan, int64_t C, int64_t F) {
    kernel_begin("experts_down_backward", expert_flops(plan, C, F));
    int count, K = plan->K;
    Task *tasks = row_tasks(plan, &count);
    if (dscore) {
        PARALLEL_FOR
        for (int64_t i = 0; i < (int64_t)plan->P * K; i++) dscore[i] = 0;
    }
    PARALLEL_TILES
    for (int i = 0; i < count; i++) {
        Task t = tasks[i];
        const int *token = plan->row_token + t.row;
        int block = (int)lesser(F, MAX_COLUMNS / 2);
        floatX *dY = SCRATCH(SCRATCH_LOCAL, floatX, (int64_t)t.rows * C);
        real *g = SCRATCH(SCRATCH_LOCAL2, real, (int64_t)t.rows * block);
        gather(dY, dpool, token, t.rows, C, 0, C);
        for (int f = 0; f < F; f += block) {
            int width = (int)lesser(block, F - f);
            gemm_x(0, 0, t.rows, width, C, dY, C, W2 + (int64_t)t.expert * C * F + f, F, 0, g,
                   width);
            for (int r = 0; r < t.rows;
                 r++) { // a padding row: g is 0 and so must be score, H may hold anything
                int64_t row = t.row + r;
                floatX *dh = dH + row * 2 * F + f, *sa = sA + row * F + f;
                if (token[r] < 0) {
                    memset(dh, 0, (size_t)width * sizeof *dh),
                        memset(dh + F, 0, (size_t)width * sizeof *dh),
                        memset(sa, 0, (size_t)width * sizeof *sa);
                    continue;
                }
                int64_t slot = (int64_t)token[r] * K + slot_of(plan, token[r], (int)row);
                real dot = swiglu_backward(dh, sa, g + (int64_t)r * width, H + row * 2 * F + f,
                                           score ? score[slot] : 1, F, width);
                if (dscore) dscore[slot] += dot;
            }
        }
    }
}
void experts_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *plan,
                         int64_t C, int64_t F) {
    kernel_begin("experts_up_backward", 2 * expert_flops(plan, C, F));
    int count;
    Task *tasks = row_tasks(plan, &count);
    PARALLEL_TILES
    for (int i = 0; i < count; i++) {
        Task t = tasks[i];
        gemm_xx(0, 0, t.rows, C, 2 * F, dH + (int64_t)t.row * 2 * F, 2 * F,
                W1 + (int64_t)t.expert * 2 * F * C, C, 0, dX + (int64_t)t.row * C, C);
    }
}
// y = x W^T gives dW = dy^T x. Rows are the reduction; both weights are cut along the hidden width,
// so that a task gathers only its own columns of the pool (dW1) and of its gradient (dW2) and owns
// its piece of the result. Equal steps of at most REDUCE rows are added in row order.
void experts_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool,
                   const floatX *dH, const floatX *sA, const RowIndex *plan, int accumulate,
                   int64_t C, int64_t F) {
    kernel_begin("experts_wgrad", 3 * expert_flops(plan, C, F));
    int count;
    Task *tasks = column_tasks(plan, C, &count);
    PARALLEL_TILES
    for (int i = 0; i < 2 * count; i++) {
        Task t = tasks[i / 2];
        int first = i % 2 == 0;
        real *dw = first ? &dW1[(int64_t)t.expert * 2 * F * C + t.column].v
                         : &dW2[((int64_t)t.expert * C + t.column) * F].v,
             beta = accumulate ? 1 : 0;
        floatX *panel = SCRATCH(SCRATCH_LOCAL, floatX, REDUCE * t.columns);
        int steps = t.rows ? (int)div_up(t.rows, REDUCE)
                           : 1; // one also for an expert without rows: it writes the zeros
        for (int64_t step = 0; step < steps; step++, beta = 1) {
            int64_t row = t.row + t.rows * step / steps;
            int rows = (int)(t.row + t.rows * (step + 1) / steps - row);
            gather(panel, first ? pool : dpool, plan->row_token + row, rows, C, t.column,
                   t.columns);
            if (first)
                gemm_x(1, 0, 2 * F, t.columns, rows, dH + row * 2 * F, 2 * F, panel, t.columns,
                       beta, dw, C);
            else
                gemm_x(1, 0, t.columns, F, rows, panel, t.columns, sA + row * F, F, beta, dw, F);
        }
    }
}
