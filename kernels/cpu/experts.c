// The experts' products, forward and backward. Offers kernels.h's experts_* functions.
//
// A row m of expert e belongs to pool token p = row_token[m]:
//   H = pool[p] W1^T = [gate | up],   A = silu(gate) up,   Y = A W2^T,
//   out[p] = sum over the rows of p of score Y.
// Backward, with g = dpool[p] W2 (F wide). dY = score dpool[p] gives dA = dY W2 = score g, and
// Y = A W2^T gives
//   dscore = <dpool[p], Y> = <dpool[p], A W2^T> = <g, A>.
// So neither Y nor dY is needed, and the score joins A: dW2 = dpool[p]^T (score A).
//
// Work is cut into tasks whose size depends on the routing alone (I8, deterministic): (expert, row
// chunk) for products over rows, (expert, column block) for gradients of weights. They are handed
// out longest first. Each runs on one thread: it gathers rows into a panel that stays in the
// thread's cache, multiplies, and does the elementwise part on the chunk while it is hot.
#include "../fail.h"
#include "gemm.h"
#include <stdlib.h>

// Rows of a task: enough for an efficient product, and about CHUNKS tasks where one expert has all.
enum { CHUNK_MIN = 256, CHUNK_MAX = 1024, CHUNKS = 32 };
// Rows of a step along a reduction; columns of one product.
enum { REDUCE = 1024, MAX_COLUMNS = 1024 };

typedef struct {
    int64_t expert, row, rows, column, columns;
} Task;

static int compare_numbers(int64_t a, int64_t b) { return (a > b) - (a < b); }
static int longer_first(const void *a, const void *b) {
    const Task *x = (const Task *)a;
    const Task *y = (const Task *)b;
    int by_size = compare_numbers(y->rows * y->columns, x->rows * x->columns);
    if (by_size) return by_size;
    if (x->expert != y->expert) return compare_numbers(x->expert, y->expert);
    if (x->row != y->row) return compare_numbers(x->row, y->row);
    return compare_numbers(x->column, y->column);
}
// Cuts every expert's rows into equal pieces of at most a chunk. Returns *count tasks in scratch
// memory, which last until the calling thread asks for it again.
static Task *row_tasks(const RowIndex *index, int64_t *count) {
    const int *start = index->expert_row;
    int64_t n = 0;
    int64_t chunk = start[index->E] / CHUNKS;
    if (chunk < CHUNK_MIN) chunk = CHUNK_MIN;
    if (chunk > CHUNK_MAX) chunk = CHUNK_MAX;
    for (int64_t e = 0; e < index->E; e++) n += div_up(start[e + 1] - start[e], chunk);
    Task *task = SCRATCH(SCRATCH_SHARED, Task, n + 1);
    *count = n;
    n = 0;
    for (int64_t e = 0; e < index->E; e++) {
        int64_t rows = start[e + 1] - start[e];
        int64_t pieces = div_up(rows, chunk);
        for (int64_t i = 0; i < pieces; i++) {
            int64_t first = rows * i / pieces;
            int64_t last = rows * (i + 1) / pieces;
            task[n++] = (Task){ e, start[e] + first, last - first, 0, 1 };
        }
    }
    qsort(task, n, sizeof *task, longer_first);
    return task;
}
// Cuts the hidden width into column blocks for every expert, empty ones too. They are 512 wide, or
// 64 where one expert holds more than an eighth of all rows, so that collapsed routing (or a dense
// MLP, which is one expert) still feeds all threads.
static Task *column_tasks(const RowIndex *index, int64_t C, int64_t *count) {
    const int *start = index->expert_row;
    Task *task = SCRATCH(SCRATCH_SHARED, Task, index->E * div_up(C, 64) + 1);
    int64_t n = 0;
    for (int64_t e = 0; e < index->E; e++) {
        int64_t rows = start[e + 1] - start[e];
        int64_t width = rows > start[index->E] / 8 ? 64 : 512;
        for (int64_t c = 0; c < C; c += width)
            task[n++] = (Task){ e, start[e], rows, c, lesser(width, C - c) };
    }
    qsort(task, n, sizeof *task, longer_first);
    *count = n;
    return task;
}
// Copies columns [column, column + width) of the pool rows row_token[0..rows) into panel
// (rows,width), zeros for padding.
static void gather(floatX *panel, const floatX *pool, const int *row_token, int64_t rows, int64_t C,
                   int64_t column, int64_t width) {
    size_t bytes = width * sizeof(floatX);
    for (int64_t r = 0; r < rows; r++, panel += width) {
        if (row_token[r] < 0)
            memset(panel, 0, bytes);
        else
            memcpy(panel, pool + row_token[r] * C + column, bytes);
    }
}

void experts_up(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *index,
                int64_t C, int64_t F) {
    kernel_begin("experts_up", 2 * expert_flops(index, C, F));
    int64_t count;
    Task *tasks = row_tasks(index, &count);
    PARALLEL_TILES
    for (int64_t i = 0; i < count; i++) {
        Task t = tasks[i];
        floatX *X = SCRATCH(SCRATCH_LOCAL, floatX, t.rows * C);
        floatX *h = H + t.row * 2 * F;
        const floatX *w = W1 + t.expert * 2 * F * C;
        gather(X, pool, index->row_token + t.row, t.rows, C, 0, C);
        if (2 * F <= MAX_COLUMNS) gemm_xx(0, 1, t.rows, 2 * F, C, X, C, w, C, 0, h, 2 * F);
        for (int64_t f = 0; f < F; f += MAX_COLUMNS / 2) {
            int64_t width = lesser(MAX_COLUMNS / 2, F - f);
            // A wide expert: gate and up columns of one block, so that SwiGLU finds both in cache.
            if (2 * F > MAX_COLUMNS) {
                floatX *gate = h + f;
                floatX *up = h + F + f;
                gemm_xx(0, 1, t.rows, width, C, X, C, w + f * C, C, 0, gate, 2 * F);
                gemm_xx(0, 1, t.rows, width, C, X, C, w + (F + f) * C, C, 0, up, 2 * F);
            }
            for (int64_t r = 0; A && r < t.rows; r++) {
                const floatX *gate = h + r * 2 * F + f;
                const floatX *up = gate + F;
                floatX *a = A + (t.row + r) * F + f;
                for (int64_t j = 0; j < width; j++)
                    store(a + j, silu(load(gate + j)) * load(up + j));
            }
        }
    }
}
void experts_down(floatX *Y, const floatX *A, const floatX *W2, const RowIndex *index, int64_t C,
                  int64_t F) {
    kernel_begin("experts_down", expert_flops(index, C, F));
    int64_t count;
    Task *tasks = row_tasks(index, &count);
    PARALLEL_TILES
    for (int64_t i = 0; i < count; i++) {
        Task t = tasks[i];
        gemm_xx(0, 1, t.rows, C, F, A + t.row * F, F, W2 + t.expert * C * F, F, 0, Y + t.row * C,
                C);
    }
}
// Returns which of its token's K slots a row is.
static int64_t slot_of(const RowIndex *index, int token, int64_t row) {
    const int *slots = index->token_row + token * index->K;
    int64_t k = 0;
    while (slots[k] != row) k++;
    return k;
}
// silu(x) = x s with s = 1 / (1 + e^-x), and s' = s (1 - s), so d silu/dx = s (1 + x (1 - s)). For
// a = silu(gate) up:
//   dgate = dA up s (1 + gate (1 - s)),   dup = dA gate s,   dA = score g.
// Returns the row's share of <g, a>, whose terms g holds afterwards. a is what forward stored:
// rounded once to floatX. dH may be H: stripes go through local arrays, which also tells the
// compiler that nothing overlaps.
static real swiglu_backward(floatX *dH, floatX *sA, real *g, const floatX *H, real score, int64_t F,
                            int64_t width) {
    enum { STRIPE = 64 };
    real gate[STRIPE], up[STRIPE], weighted[STRIPE];
    for (int64_t f = 0; f < width; f += STRIPE) {
        int n = (int)lesser(STRIPE, width - f);
        load_row(gate, H + f, n);
        load_row(up, H + F + f, n);
        for (int j = 0; j < n; j++) {
            real x = gate[j];
            real y = up[j];
            real s = sigmoid(x);
            real a = round_x(x * s * y);
            real dA = score * g[f + j];
            g[f + j] *= a;
            weighted[j] = score * a;
            gate[j] = dA * y * s * (1 + x * (1 - s));
            up[j] = dA * x * s;
        }
        store_row(sA + f, weighted, n);
        store_row(dH + f, gate, n);
        store_row(dH + F + f, up, n);
    }
    return row_sum(g, width);
}
void experts_down_backward(floatX *dH, floatX *sA, real *dscore, const floatX *dpool,
                           const floatX *H, const floatX *W2, const real *score,
                           const RowIndex *index, int64_t C, int64_t F) {
    kernel_begin("experts_down_backward", expert_flops(index, C, F));
    int64_t count;
    int64_t K = index->K;
    int64_t block = lesser(F, MAX_COLUMNS / 2);
    Task *tasks = row_tasks(index, &count);
    if (dscore) {
        PARALLEL_FOR_BYTES(index->P * K * sizeof *dscore)
        for (int64_t i = 0; i < index->P * K; i++) dscore[i] = 0;
    }
    PARALLEL_TILES
    for (int64_t i = 0; i < count; i++) {
        Task t = tasks[i];
        const int *token = index->row_token + t.row;
        floatX *dY = SCRATCH(SCRATCH_LOCAL, floatX, t.rows * C);
        real *g = SCRATCH(SCRATCH_LOCAL2, real, t.rows * block);
        gather(dY, dpool, token, t.rows, C, 0, C);
        for (int64_t f = 0; f < F; f += block) {
            int64_t width = lesser(block, F - f);
            gemm_x(0, 0, t.rows, width, C, dY, C, W2 + t.expert * C * F + f, F, 0, g, width);
            for (int64_t r = 0; r < t.rows; r++) {
                int64_t row = t.row + r;
                floatX *dh = dH + row * 2 * F + f;
                floatX *sa = sA + row * F + f;
                // A padding row gets zeros: what H holds there is not read.
                if (token[r] < 0) {
                    memset(dh, 0, width * sizeof *dh);
                    memset(dh + F, 0, width * sizeof *dh);
                    memset(sa, 0, width * sizeof *sa);
                    continue;
                }
                int64_t slot = token[r] * K + slot_of(index, token[r], row);
                real dot = swiglu_backward(dh, sa, g + r * width, H + row * 2 * F + f,
                                           score ? score[slot] : 1, F, width);
                if (dscore) dscore[slot] += dot;
            }
        }
    }
}
void experts_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *index,
                         int64_t C, int64_t F) {
    kernel_begin("experts_up_backward", 2 * expert_flops(index, C, F));
    int64_t count;
    Task *tasks = row_tasks(index, &count);
    PARALLEL_TILES
    for (int64_t i = 0; i < count; i++) {
        Task t = tasks[i];
        gemm_xx(0, 0, t.rows, C, 2 * F, dH + t.row * 2 * F, 2 * F, W1 + t.expert * 2 * F * C, C, 0,
                dX + t.row * C, C);
    }
}
// y = x W^T gives dW = dy^T x. Rows are the reduction. Both weights are cut along the hidden width,
// so that a task gathers only its own columns of the pool (dW1) and of its gradient (dW2) and owns
// its piece of the result. Equal steps of at most REDUCE rows are added in row order.
void experts_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool,
                   const floatX *dH, const floatX *sA, const RowIndex *index, int accumulate,
                   int64_t C, int64_t F) {
    kernel_begin("experts_wgrad", 3 * expert_flops(index, C, F));
    int64_t count;
    Task *tasks = column_tasks(index, C, &count);
    PARALLEL_TILES
    for (int64_t i = 0; i < 2 * count; i++) {
        Task t = tasks[i / 2];
        int is_dW1 = i % 2 == 0;
        real *dw = is_dW1 ? &dW1[t.expert * 2 * F * C + t.column].v
                          : &dW2[(t.expert * C + t.column) * F].v;
        real beta = accumulate ? 1 : 0;
        floatX *panel = SCRATCH(SCRATCH_LOCAL, floatX, REDUCE * t.columns);
        // One step also for an expert without rows: it writes the zeros (I3, unused is zero).
        int64_t steps = t.rows ? div_up(t.rows, REDUCE) : 1;
        for (int64_t step = 0; step < steps; step++, beta = 1) {
            int64_t row = t.row + t.rows * step / steps;
            int64_t rows = t.row + t.rows * (step + 1) / steps - row;
            gather(panel, is_dW1 ? pool : dpool, index->row_token + row, rows, C, t.column,
                   t.columns);
            if (is_dW1)
                gemm_x(1, 0, 2 * F, t.columns, rows, dH + row * 2 * F, 2 * F, panel, t.columns,
                       beta, dw, C);
            else
                gemm_x(1, 0, t.columns, F, rows, panel, t.columns, sA + row * F, F, beta, dw, F);
        }
    }
}
