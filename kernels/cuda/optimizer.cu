// SGD, AdamW and AdamW with 8-bit moments on segments of flat shards, the gradient norm, and
// initial weights: the optimizer's functions of kernels.h.
//
// Formulas are torch.optim's, in its order of operations:
//   SGD    g += wd p;  buf = t == 1 ? g : mu buf + g;  p -= lr buf
//   AdamW  p *= 1 - lr wd;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;
//          p -= (lr / bc1) m / (sqrt(v) / sqrt(bc2) + eps),  bc = 1 - b^t
// 8-bit moments, their order of operations and the noise are quant8.h's and random.h's, shared with
// the CPU backend: the same bits.
//
// Everything goes in blocks of 256 elements of the Hugging Face tensor, the unit of quantisation
// and of noise (I4, layout-free numbers): one warp a block, 8 elements a lane. Lane l holds
// elements 4 l to 4 l + 3 and 128 + 4 l to 128 + 4 l + 3: 16 bytes of fp32 each. Segments travel in
// the kernel's arguments, BATCH at a launch: nothing is uploaded, nothing waits (I11, the host does
// not wait), and a layer of 384 expert matrices takes 7 launches. Bytes a parameter (bf16, no
// master): AdamW8 4 + 2 + 2 + 2 + 2 + scales = 12.06; AdamW with master 28 + 2; SGD without
// momentum 8.
#include "../quant8.h"
#include "common.cuh"

enum { BLOCK = QUANT8_BLOCK, PER_LANE = BLOCK / 32, BATCH = 64, WARPS = 8 };

// ---- segments to blocks ---------------------------------------------------------------------
struct Batch {
    Segment segment[BATCH];
    int64_t start[BATCH + 1]; // blocks before each segment; its first and last may be cut
    int count;
};
// Calls launch(batch, first segment) for all segments, BATCH at a time. Blocks lie at multiples of
// `size` elements of the TENSOR, so that sums and noise do not depend on where a segment begins.
template <class Launch>
static void for_batches(const Segment *segments, int n, int64_t size, Launch launch) {
    for (int first = 0; first < n; first += BATCH) {
        Batch batch;
        batch.count = n - first < BATCH ? n - first : BATCH;
        batch.start[0] = 0;
        for (int i = 0; i < batch.count; i++) {
            const Segment *s = &segments[first + i];
            batch.segment[i] = *s;
            batch.start[i + 1] =
                batch.start[i] + (s->count ? div_up(s->first % size + s->count, size) : 0);
        }
        if (batch.start[batch.count]) launch(batch, first);
    }
}
// The segment of block b: the last one with start <= b that is not empty.
static __device__ __forceinline__ int segment_of(const Batch &batch, int64_t b) {
    int low = 0;
    int high = batch.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (batch.start[middle] <= b)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// What a warp works on: elements [low, high) of a block; element 0 of the block stands at `at` of
// the shard (before its segment where low > 0).
struct Block {
    int segment, low, high;
    int64_t at, index;
};
static __device__ __forceinline__ Block block_of(const Batch &batch, int64_t b, int64_t size) {
    Block k;
    k.segment = segment_of(batch, b);
    const Segment &s = batch.segment[k.segment];
    k.index = b - batch.start[k.segment];
    // Of the block, in elements of the segment.
    int64_t begin = k.index * size - s.first % size;
    int64_t left = s.count - begin;
    k.at = s.offset + begin;
    k.low = begin < 0 ? (int)-begin : 0;
    k.high = left < size ? (int)left : (int)size;
    return k;
}

// ---- eight elements of a lane ---------------------------------------------------------------
// Element i of a lane stands at place(i) of the block. A whole, aligned block moves in 16-byte
// (fp32), 8-byte (bf16) and 4-byte (codes) words.
static __device__ __forceinline__ int place(int i) {
    return i / 4 * 128 + (int)threadIdx.x % 32 * 4 + i % 4;
}
static __device__ __forceinline__ bool inside(const Block &k, int i) {
    return place(i) >= k.low && place(i) < k.high;
}
template <class T> struct alignas(4 * sizeof(T)) Four { T x[4]; };
template <class T> static __device__ __forceinline__ bool whole(const T *x, const Block &k) {
    return k.low == 0 && k.high == BLOCK && (size_t)(x + k.at) % sizeof(Four<T>) == 0;
}
template <class T>
static __device__ __forceinline__ void read_block(T (&v)[PER_LANE], const T *x, const Block &k) {
    if (whole(x, k))
        for (int i = 0; i < PER_LANE; i += 4) {
            Four<T> four = *(const Four<T> *)(x + k.at + place(i));
            for (int l = 0; l < 4; l++) v[i + l] = four.x[l];
        }
    else
        for (int i = 0; i < PER_LANE; i++) {
            T zero = {};
            v[i] = inside(k, i) ? x[k.at + place(i)] : zero;
        }
}
template <class T>
static __device__ __forceinline__ void write_block(T *x, const T (&v)[PER_LANE], const Block &k) {
    if (whole(x, k))
        for (int i = 0; i < PER_LANE; i += 4) {
            Four<T> four;
            for (int l = 0; l < 4; l++) four.x[l] = v[i + l];
            *(Four<T> *)(x + k.at + place(i)) = four;
        }
    else
        for (int i = 0; i < PER_LANE; i++)
            if (inside(k, i)) x[k.at + place(i)] = v[i];
}

// ---- the update -----------------------------------------------------------------------------
// keep: what is left of a parameter (AdamW), or joins its gradient (SGD), where weight decay
// applies and where it does not.
struct Coefficients {
    float lr, momentum, keep_decayed, keep, lerp, beta1, beta2, square, root, root_scale, eps, step;
    float bound;
    double grad_scale;
    int first;
    uint64_t seed, counter;
    Quant8Roots roots;
};

static Coefficients coefficients(const OptimizerStep *o) {
    double correction1 = 1 - pow(o->beta1, (double)o->t);
    double correction2 = 1 - pow(o->beta2, (double)o->t);
    Coefficients c;
    memset(&c, 0, sizeof c);
    c.lr = (float)o->lr;
    c.momentum = (float)o->momentum;
    c.first = o->t == 1;
    c.grad_scale = o->grad_scale;
    c.keep_decayed = (float)(o->kind == OPT_SGD ? o->weight_decay : 1 - o->lr * o->weight_decay);
    c.keep = o->kind == OPT_SGD ? 0 : 1;
    c.lerp = (float)(1 - o->beta1);
    c.beta1 = (float)o->beta1;
    c.beta2 = (float)o->beta2;
    c.square = (float)(1 - o->beta2);
    c.eps = (float)o->eps;
    c.root = (float)sqrt(correction2);
    c.root_scale = (float)sqrt(2 / correction2);
    c.step = (float)(o->lr / correction1);
    c.bound = (float)adam_bound(o->beta1, o->beta2);
    c.seed = o->seed;
    c.counter = (uint64_t)o->step;
    c.roots = quant8_roots();
    return c;
}
// Entry i % 16 of a table of which every lane holds one entry.
static __device__ __forceinline__ uint32_t entry_of(uint32_t held, int i) {
    return __shfl_sync(0xffffffffu, held, i, 16);
}
// Outside the block, where a shard was cut, v is 0.
static __device__ __forceinline__ void encode(uint8_t *m8, uint8_t *v8, float *m_scale,
                                              float *v_scale, const float (&m)[PER_LANE],
                                              const float (&v)[PER_LANE], uint32_t inverse_held,
                                              float bound, Noise noise, const Block &k) {
    float u[PER_LANE];
    float top = 0;
    float size = 0;
    uint8_t code[PER_LANE];
    uint32_t bits[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) top = fmaxf(v[i], top);
    top = warp_max(top);
    float inverse_top = 1 / top;
    float root = sqrtf(top);
    float limit = bound * root;
    for (int i = 0; i < PER_LANE; i++) {
        bits[i] = noise_bits(noise, 0, (uint32_t)place(i));
        code[i] = v8_encode(v[i] * inverse_top, v[i] > 0, bits[i] >> 12);
        float x = m[i] * v8_inverse_root(entry_of(inverse_held, v8_entry(code[i])), code[i]);
        u[i] = code[i] ? fmaxf(quant8_min(x, limit), -limit) : 0;
        size = fmaxf(fabsf(u[i]), size);
    }
    write_block(v8, code, k);
    size = warp_max(size);
    float inverse = m8_inverse(size);
    for (int i = 0; i < PER_LANE; i++) code[i] = m8_encode(u[i], inverse, bits[i]);
    write_block(m8, code, k);
    __syncwarp(); // every lane has read the old scales
    if (threadIdx.x % 32 == 0) {
        *v_scale = top;
        *m_scale = size > 0 ? size / root : 0;
    }
}
// p as floatX, in bf16 builds without a master copy rounded stochastically. Below the last of the
// finite numbers a carry needs no case of its own, which one test for all eight decides.
static __device__ __forceinline__ void round_params(floatX (&x)[PER_LANE],
                                                    const float (&p)[PER_LANE], bool stochastic,
                                                    Noise noise) {
#if defined(MOE_BF16)
    if (stochastic) {
        bool small = true;
        uint32_t bits[PER_LANE];
        for (int i = 0; i < PER_LANE; i++) {
            small = small && fabsf(p[i]) < 3.38e38f;
            bits[i] = noise_bits(noise, 2, (uint32_t)place(i)) >> 16;
        }
        for (int i = 0; i < PER_LANE; i++)
            x[i].bits = (uint16_t)((__float_as_uint(p[i]) + bits[i]) >> 16);
        for (int i = 0; i < PER_LANE && !small; i++) x[i].bits = bf16_stochastic(p[i], bits[i]);
        return;
    }
#endif
    for (int i = 0; i < PER_LANE; i++) x[i] = to_x(p[i]);
}
template <int KIND>
static __global__ void __launch_bounds__(WARPS * 32)
    update_kernel(OptimizerState s, __grid_constant__ const Batch batch, Coefficients c,
                  const real *scale) {
    int64_t block = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    float factor = (float)(scale[0] * c.grad_scale);
    if (block >= batch.start[batch.count] || !isfinite(factor)) return;
    Block k = block_of(batch, block, BLOCK);
    const Segment &segment = batch.segment[k.segment];
    int64_t qblock = segment.qblock + k.index;
    float p[PER_LANE], g[PER_LANE];
    float m[PER_LANE] = {};
    float v[PER_LANE] = {};
    float keep = segment.decay != 0 ? c.keep_decayed : c.keep;
    floatX stored[PER_LANE];
    bool moment = KIND == OPT_ADAMW || (KIND == OPT_SGD && s.m && c.momentum != 0);
    Noise noise = {};
    if (KIND == OPT_ADAMW8 || (sizeof(floatX) == 2 && !s.master))
        noise = noise_block(c.seed, segment.tensor, (uint64_t)(segment.first / BLOCK + k.index),
                            c.counter);
    read_block(g, &s.grad->v, k);
    if (s.master)
        read_block(p, s.master, k);
    else {
        read_block(stored, s.param, k);
        for (int i = 0; i < PER_LANE; i++) p[i] = load(&stored[i]);
    }
    if (moment) read_block(m, s.m, k);
    if (KIND == OPT_ADAMW) read_block(v, s.v, k);
    if (KIND == OPT_ADAMW8) {
        uint8_t code_m[PER_LANE], code_v[PER_LANE];
        read_block(code_m, s.m8, k);
        read_block(code_v, s.v8, k);
        float v_scale = s.v_scale[qblock];
        float unit = m8_unit(s.m_scale[qblock], v_scale);
        v_scale *= c.beta2;
        unit *= c.beta1;
        uint32_t root_held = c.roots.root[threadIdx.x % 16];
        for (int i = 0; i < PER_LANE; i++) {
            uint32_t entry = entry_of(root_held, v8_entry(code_v[i]));
            v[i] = v8_decode(code_v[i], v_scale);
            m[i] = code_v[i] ? (float)(int8_t)code_m[i] * (unit * v8_root(entry, code_v[i])) : 0;
        }
    }
    for (int i = 0; i < PER_LANE; i++) {
        float d = g[i] * factor;
        if (KIND == OPT_SGD) {
            d += keep * p[i];
            m[i] = c.first ? d : c.momentum * m[i] + d;
            p[i] -= c.lr * m[i];
        } else if (KIND == OPT_ADAMW8) {
            float change =
                c.step * quant8_step(&m[i], &v[i], d, c.lerp, c.square, c.root_scale, c.eps);
            p[i] = fmaf(keep, p[i], -change);
        } else {
            m[i] += c.lerp * (d - m[i]);
            v[i] = c.beta2 * v[i] + c.square * d * d;
            p[i] = keep * p[i] - c.step * m[i] / (sqrtf(v[i]) / c.root + c.eps);
        }
    }
    if (moment) write_block(s.m, m, k);
    if (KIND == OPT_ADAMW) write_block(s.v, v, k);
    if (s.master) write_block(s.master, p, k);
    round_params(stored, p, !s.master, noise);
    write_block(s.param, stored, k);
    if (KIND == OPT_ADAMW8)
        encode(s.m8, s.v8, s.m_scale + qblock, s.v_scale + qblock, m, v,
               c.roots.inverse[threadIdx.x % 16], c.bound, noise, k);
}
void optimizer_update(const OptimizerState *s, const Segment *segments, int n_segments,
                      const OptimizerStep *o, const real *scale) {
    kernel_begin("optimizer_update", 0);
    for (int i = 0; o->kind == OPT_ADAMW8 && i < n_segments; i++)
        if (segments[i].first % BLOCK)
            die("a shard starts at element %lld of a tensor, inside a block of 8-bit state|8-bit "
                "AdamW needs cuts at multiples of %d elements: choose "
                "another --fsdp, or --optimizer adamw",
                (long long)segments[i].first, BLOCK);
    Coefficients c = coefficients(o);
    for_batches(segments, n_segments, BLOCK, [&](const Batch &batch, int) {
        unsigned blocks = grid_for(batch.start[batch.count], WARPS);
        switch (o->kind) {
        case OPT_SGD:
            update_kernel<OPT_SGD>
                <<<blocks, WARPS * 32, 0, compute_stream()>>>(*s, batch, c, scale);
            break;
        case OPT_ADAMW:
            update_kernel<OPT_ADAMW>
                <<<blocks, WARPS * 32, 0, compute_stream()>>>(*s, batch, c, scale);
            break;
        case OPT_ADAMW8:
            update_kernel<OPT_ADAMW8>
                <<<blocks, WARPS * 32, 0, compute_stream()>>>(*s, batch, c, scale);
            break;
        }
        LAUNCHED();
    });
}

// ---- norms and scales -----------------------------------------------------------------------
enum { PIECE = 1 << 15 }; // elements whose squares one block adds up
static __global__ void squares_kernel(double *partial, const gradX *grad,
                                      __grid_constant__ const Batch batch) {
    __shared__ double shared[32];
    Block k = block_of(batch, blockIdx.x, PIECE);
    const gradX *g = grad + k.at;
    bool aligned = (size_t)g % 16 == 0; // the order of the sum does not depend on this
    double sum = 0;
    for (int i = threadIdx.x * 4; i < k.high; i += blockDim.x * 4) {
        float x[4] = {};
        if (aligned && i >= k.low && i + 4 <= k.high) {
            float4 four = *(const float4 *)(g + i);
            x[0] = four.x;
            x[1] = four.y;
            x[2] = four.z;
            x[3] = four.w;
        } else
            for (int l = 0; l < 4; l++)
                if (i + l >= k.low && i + l < k.high) x[l] = g[i + l].v;
        for (int l = 0; l < 4; l++) sum += (double)x[l] * (double)x[l];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
// One block a segment; its pieces in a fixed order.
static __global__ void squares_total_kernel(double *sums, const double *partial,
                                            __grid_constant__ const Batch batch) {
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = batch.start[blockIdx.x] + threadIdx.x; i < batch.start[blockIdx.x + 1];
         i += blockDim.x)
        sum += partial[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
void gradient_squares(double *sums, const gradX *grad, const Segment *segments, int n_segments) {
    kernel_begin("gradient_squares", 0);
    if (n_segments) device_zero(sums, (size_t)n_segments * sizeof *sums);
    for_batches(segments, n_segments, PIECE, [&](const Batch &batch, int first) {
        double *partial = (double *)device_scratch(
            SCRATCH_PARTIAL, (size_t)batch.start[batch.count] * sizeof(double));
        squares_kernel<<<(unsigned)batch.start[batch.count], 256, 0, compute_stream()>>>(
            partial, grad, batch);
        LAUNCHED();
        squares_total_kernel<<<(unsigned)batch.count, 128, 0, compute_stream()>>>(sums + first,
                                                                                  partial, batch);
        LAUNCHED();
    });
}
// The sum of in[0..n) in index order, in thread 0: the block fetches, one thread adds (18,867
// tensors: 0.2 ms, once a step).
static __device__ double ordered_sum(const double *in, int n) {
    __shared__ double chunk[1024];
    double sum = 0;
    for (int first = 0; first < n; first += 1024) {
        int count = n - first < 1024 ? n - first : 1024;
        if ((int)threadIdx.x < count) chunk[threadIdx.x] = in[first + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < count; i++) sum += chunk[i];
        __syncthreads();
    }
    return sum;
}
static __global__ void sum_kernel(double *total, const double *in, int n) {
    double sum = ordered_sum(in, n);
    if (threadIdx.x == 0) total[0] = sum;
}
void sum_in_order(double *total, const double *in, int n) {
    sum_kernel<<<1, 1024, 0, compute_stream()>>>(total, in, n);
    LAUNCHED();
}
static __global__ void clip_kernel(real *norm, real *scale, const double *sums, int n,
                                   double clip) {
    double sum = ordered_sum(sums, n);
    if (threadIdx.x > 0) return;
    norm[0] = (real)sqrt(sum);
    double s = clip > 0 ? fmin(1.0, clip / ((double)norm[0] + 1e-6)) : 1;
    scale[0] = isfinite(norm[0]) ? (real)s : (real)NAN;
}
void clip_scale(real *norm, real *scale, const double *sums, int n, double clip) {
    kernel_begin("clip_scale", 0);
    clip_kernel<<<1, 1024, 0, compute_stream()>>>(norm, scale, sums, n, clip);
    LAUNCHED();
}
static __global__ void scale_kernel(gradX *grad, __grid_constant__ const Batch batch,
                                    const float *factor) {
    int64_t block = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (block >= batch.start[batch.count]) return;
    Block k = block_of(batch, block, BLOCK);
    float g[PER_LANE];
    read_block(g, &grad->v, k);
    for (int i = 0; i < PER_LANE; i++) g[i] *= factor[k.segment];
    write_block(&grad->v, g, k);
}
void gradient_scale(gradX *grad, const Segment *segments, int n_segments, const float *factor) {
    kernel_begin("gradient_scale", 0);
    for_batches(segments, n_segments, BLOCK, [&](const Batch &batch, int first) {
        scale_kernel<<<grid_for(batch.start[batch.count], WARPS), WARPS * 32, 0,
                       compute_stream()>>>(grad, batch, factor + first);
        LAUNCHED();
    });
}

// ---- initial weights ------------------------------------------------------------------------
// A thread makes two neighbours of the tensor from one Philox block.
static __global__ void init_kernel(floatX *param, real *master, __grid_constant__ const Batch batch,
                                   uint64_t seed, double std) {
    Block k = block_of(batch, blockIdx.x, BLOCK);
    const Segment &segment = batch.segment[k.segment];
    int i = 2 * threadIdx.x;
    Random128 bits = random_normal_block(seed, segment.tensor,
                                         (uint64_t)((segment.first / BLOCK + k.index) * BLOCK + i));
    for (int half = 0; half < 2; half++) {
        if (i + half < k.low || i + half >= k.high) continue;
        real value =
            (real)(std < 0 ? 1 : std * inverse_normal(random_uniform(random_half(bits, half))));
        store(param + k.at + i + half, value);
        if (master) master[k.at + i + half] = value;
    }
}
void init_segments(floatX *param, real *master, const Segment *segments, int n_segments,
                   uint64_t seed, double std) {
    for_batches(segments, n_segments, BLOCK, [&](const Batch &batch, int) {
        init_kernel<<<(unsigned)batch.start[batch.count], BLOCK / 2, 0, compute_stream()>>>(
            param, master, batch, seed, std);
        LAUNCHED();
    });
}
