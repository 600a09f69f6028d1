// SGD, AdamW and AdamW with 8-bit moments on segments of flat shards, the gradient norm, and
// initial weights: kernels.h's section "optimizer". Reads the codes of quant8.h and the noise of
// random.h.
//
// Everything goes in blocks of 256 elements of the Hugging Face tensor. One block is one call of a
// loop with a constant trip count (a shorter last block is padded), so that an element meets the
// same instructions wherever a shard was cut (I4, layout-free numbers), and compilers vectorise it
// without a tail. Formulas are torch.optim's, in its order of operations, in real:
//   SGD    g += wd p;  buf = t == 1 ? g : mu buf + g;  p -= lr buf
//   AdamW  p *= 1 - lr wd;  m += (1-b1) (g - m);  v = b2 v + (1-b2) g^2;
//          p -= (lr / bc1) m / (sqrt(v) / sqrt(bc2) + eps),   bc = 1 - b^t
#include "../fail.h"
#include "../quant8.h"
#include "math.h"

// Elements of a block; blocks of a piece.
enum { BLOCK = QUANT8_BLOCK, PIECE = 256 };

// ---- segments to pieces ---------------------------------------------------------------------
// Elements [first, first + count) of a segment. Cuts lie at multiples of 256 * PIECE elements of
// the tensor, so that sums and noise do not depend on where a segment begins.
typedef struct {
    int segment;
    int64_t first, count;
} Piece;

// Elements from `at` to the tensor's next multiple of `step`, at most to `end`.
static int64_t until(const Segment *segment, int64_t at, int64_t end, int64_t step) {
    return lesser(end - at, step - (segment->first + at) % step);
}
static Piece *cut_pieces(const Segment *segments, int n_segments, int64_t *count) {
    int64_t n = 0;
    int64_t size = (int64_t)PIECE * BLOCK;
    for (int s = 0; s < n_segments; s++) n += segments[s].count / size + 2;
    Piece *piece = SCRATCH(SCRATCH_SHARED, Piece, n + 1);
    n = 0;
    for (int s = 0; s < n_segments; s++)
        for (int64_t i = 0, length; i < segments[s].count; i += length) {
            length = until(&segments[s], i, segments[s].count, size);
            piece[n++] = (Piece){ s, i, length };
        }
    *count = n;
    return piece;
}

// ---- the update of one block ----------------------------------------------------------------
typedef struct {
    real scale, lr, momentum, keep, lerp, beta2, square, root, eps, step;
    float beta1, root_scale, bound; // 8-bit AdamW's
    int first;
} Coefficients;

static Coefficients coefficients(const OptimizerStep *o, real scale, double decay) {
    double correction1 = 1 - pow(o->beta1, (double)o->t);
    double correction2 = 1 - pow(o->beta2, (double)o->t);
    Coefficients c = { .scale = scale,
                       .lr = (real)o->lr,
                       .momentum = (real)o->momentum,
                       .lerp = (real)(1 - o->beta1),
                       .beta2 = (real)o->beta2,
                       .square = (real)(1 - o->beta2),
                       .root = (real)sqrt(correction2),
                       .beta1 = (float)o->beta1,
                       .root_scale = (float)sqrt(2 / correction2),
                       .bound = (float)adam_bound(o->beta1, o->beta2),
                       .eps = (real)o->eps,
                       .step = (real)(o->lr / correction1),
                       .first = o->t == 1 };
    switch (o->kind) {
    case OPT_SGD: c.keep = (real)(o->weight_decay * decay); break;
    case OPT_ADAMW:
    case OPT_ADAMW8: c.keep = (real)(1 - o->lr * o->weight_decay * decay); break;
    }
    return c;
}
// a b + c, rounded once.
static real fused(real a, real b, real c) {
    if (sizeof(real) == 8) return (real)fma((double)a, (double)b, (double)c);
    return (real)fmaf((float)a, (float)b, (float)c);
}
static void adamw_block(real *restrict p, const real *restrict g, real *restrict m,
                        real *restrict v, const Coefficients *c) {
    Coefficients k = *c;
    for (int i = 0; i < BLOCK; i++) {
        real d = g[i] * k.scale;
        real m1 = m[i] + k.lerp * (d - m[i]);
        real v1 = k.beta2 * v[i] + k.square * d * d;
        real root = square_root(v1);
        m[i] = m1;
        v[i] = v1;
        p[i] = k.keep * p[i] - k.step * m1 / (root / k.root + k.eps);
    }
}
static void sgd_block(real *restrict p, const real *restrict g, real *restrict buf,
                      const Coefficients *c) {
    Coefficients k = *c;
    for (int i = 0; i < BLOCK; i++) {
        real d = g[i] * k.scale + k.keep * p[i];
        // Not 0 * buf: the first step does not read it.
        buf[i] = k.first ? d : k.momentum * buf[i] + d;
        p[i] -= k.lr * buf[i];
    }
}
// The largest of BLOCK floats >= 0: their bits are ordered as integers are, and an integer maximum
// is one vector instruction.
static float largest(const float *x) {
    int32_t top = 0;
    int32_t bits;
    for (int i = 0; i < BLOCK; i++) {
        memcpy(&bits, x + i, 4);
        top = bits > top ? bits : top;
    }
    float value;
    memcpy(&value, &top, 4);
    return value;
}
// The order of steps is quant8.h's. Codes are computed as ints, one simple loop each: that is what
// compilers turn into vectors.
static void encode_block(uint8_t *m8, uint8_t *v8, float *m_scale, float *v_scale, const float *m,
                         const float *v, float bound, Noise noise, int n) {
    float u[BLOCK], size[BLOCK];
    float top = largest(v);
    float inverse_top = 1 / top;
    float root = sqrtf(top);
    float limit = bound * root;
    uint32_t bits[BLOCK];
    uint8_t code[BLOCK];
    for (int i = 0; i < BLOCK; i++) bits[i] = noise_bits(noise, 0, (uint32_t)i);
    for (int i = 0; i < BLOCK; i++)
        code[i] = v8_encode(v[i] * inverse_top, v[i] > 0, bits[i] >> 12);
    for (int i = 0; i < BLOCK; i++) {
        float x = quant8_min(m[i] * (1 / sqrtf(v8_decode(code[i], 1))), limit);
        x = x > -limit ? x : -limit;
        u[i] = code[i] ? x : 0; // v8 = 0: u = 0
        size[i] = fabsf(u[i]);
    }
    memcpy(v8, code, n);
    float most = largest(size);
    float inverse = m8_inverse(most);
    *v_scale = top;
    *m_scale = most > 0 ? most / root : 0;
    for (int i = 0; i < BLOCK; i++) code[i] = m8_encode(u[i], inverse, bits[i]);
    memcpy(m8, code, n);
}
static void adamw8_block(real *restrict p, const real *restrict g, uint8_t *m8, uint8_t *v8,
                         float *m_scale, float *v_scale, const Coefficients *c, Noise noise,
                         int n) {
    Coefficients k = *c;
    float m[BLOCK] = { 0 };
    float v[BLOCK] = { 0 };
    float unit = k.beta1 * m8_unit(*m_scale, *v_scale);
    float kept = (float)k.beta2 * *v_scale;
    for (int i = 0; i < n; i++) {
        v[i] = v8_decode(v8[i], kept);
        m[i] = (float)(int8_t)m8[i] * (unit * sqrtf(v8_decode(v8[i], 1)));
    }
    for (int i = 0; i < BLOCK; i++) {
        float change =
            (float)k.step * quant8_step(&m[i], &v[i], (float)(g[i] * k.scale), (float)k.lerp,
                                        (float)k.square, k.root_scale, (float)k.eps);
        p[i] = fused(k.keep, p[i], -change);
    }
    encode_block(m8, v8, m_scale, v_scale, m, v, k.bound, noise, n);
}
// p as floatX: exact where floatX is real; bf16 to nearest where a master keeps what is lost, else
// stochastically.
static void store_param(floatX *param, const real *p, int nearest, Noise noise, int lane, int n) {
#if defined(MOE_BF16)
    if (nearest)
        store_row(param, p, n);
    else
        for (int i = 0; i < n; i++)
            param[i].bits = bf16_stochastic(p[i], noise_bits(noise, 2, (uint32_t)(lane + i)) >> 16);
#else
    (void)nearest;
    (void)noise;
    (void)lane;
    if (&param->v != p) store_row(param, p, n);
#endif
}
// A whole block of x: x itself, or a copy padded with zeros where only n elements are left.
static real *whole(real *x, real *copy, int n) {
    if (n == BLOCK) return x;
    memset(copy, 0, BLOCK * sizeof(real));
    memcpy(copy, x, n * sizeof(real));
    return copy;
}
static void give_back(real *x, const real *block, int n) {
    if (x != block) memcpy(x, block, n * sizeof(real));
}
static void update_block(const OptimizerState *s, const OptimizerStep *o, const Coefficients *c,
                         const Segment *segment, int64_t at, int n) {
    int64_t i = segment->offset + at;
    int64_t q = segment->qblock + at / BLOCK;
    int64_t element = segment->first + at;
    real p_copy[BLOCK], g_copy[BLOCK];
    real m_copy[BLOCK] = { 0 };
    real v_copy[BLOCK] = { 0 };
    Noise noise = { { 0, 0, 0, 0 } };
    if (o->kind == OPT_ADAMW8 || (sizeof(floatX) < sizeof(real) && !s->master))
        noise =
            noise_block(o->seed, segment->tensor, (uint64_t)(element / BLOCK), (uint64_t)o->step);
    // The gradient is const: `whole` returns it or its copy, and nothing below writes to it.
    const real *g = whole((real *)&s->grad[i].v, g_copy, n);
    real *p = p_copy;
    if (s->master)
        p = whole(s->master + i, p_copy, n);
    else {
#if defined(MOE_BF16)
        memset(p_copy, 0, sizeof p_copy);
        load_row(p_copy, s->param + i, n);
#else
        p = whole(&s->param[i].v, p_copy, n);
#endif
    }
    real *m = m_copy;
    real *v = v_copy;
    switch (o->kind) {
    case OPT_SGD:
        // Without momentum the buffer is the gradient and need not be kept.
        if (s->m && o->momentum != 0) m = whole(s->m + i, m_copy, n);
        sgd_block(p, g, m, c);
        if (s->m && o->momentum != 0) give_back(s->m + i, m, n);
        break;
    case OPT_ADAMW:
        m = whole(s->m + i, m_copy, n);
        v = whole(s->v + i, v_copy, n);
        adamw_block(p, g, m, v, c);
        give_back(s->m + i, m, n);
        give_back(s->v + i, v, n);
        break;
    case OPT_ADAMW8:
        adamw8_block(p, g, s->m8 + i, s->v8 + i, s->m_scale + q, s->v_scale + q, c, noise, n);
        break;
    }
    if (s->master) give_back(s->master + i, p, n);
    store_param(s->param + i, p, s->master != 0, noise, (int)(element % BLOCK), n);
}
void optimizer_update(const OptimizerState *s, const Segment *segments, int n_segments,
                      const OptimizerStep *o, const real *scale) {
    kernel_begin("optimizer_update", 0);
    real factor = (real)(scale[0] * o->grad_scale);
    if (!isfinite(factor)) return;
    Coefficients with_decay = coefficients(o, factor, 1);
    Coefficients without = coefficients(o, factor, 0);
    for (int i = 0; o->kind == OPT_ADAMW8 && i < n_segments; i++)
        if (segments[i].first % BLOCK)
            die("a shard starts at element %lld of a tensor, inside a block of 8-bit "
                "state|8-bit AdamW needs cuts at multiples of %d elements: choose another "
                "--fsdp, or --optimizer adamw",
                (long long)segments[i].first, BLOCK);
    int64_t pieces;
    Piece *piece = cut_pieces(segments, n_segments, &pieces);
    PARALLEL_TILES
    for (int64_t j = 0; j < pieces; j++) {
        const Segment *segment = segments + piece[j].segment;
        const Coefficients *c = segment->decay != 0 ? &with_decay : &without;
        for (int64_t at = piece[j].first, end = at + piece[j].count, n; at < end; at += n) {
            n = until(segment, at, end, BLOCK);
            update_block(s, o, c, segment, at, (int)n);
        }
    }
}

// ---- norms and scales -----------------------------------------------------------------------
// Block sums in 16 lanes of doubles, blocks in order, pieces in order.
static double squares(const gradX *g, const Segment *segment, int64_t first, int64_t count) {
    double total = 0;
    for (int64_t b = first, n = first + count, end; b < n; b = end) {
        double lane[16] = { 0 };
        int64_t i = b;
        end = b + until(segment, b, n, BLOCK);
        for (; i + 16 <= end; i += 16)
            for (int j = 0; j < 16; j++) lane[j] += (double)g[i + j].v * (double)g[i + j].v;
        for (int j = 0; i < end; i++, j++) lane[j] += (double)g[i].v * (double)g[i].v;
        for (int w = 8; w > 0; w /= 2)
            for (int j = 0; j < w; j++) lane[j] += lane[j + w];
        total += lane[0];
    }
    return total;
}
void gradient_squares(double *sums, const gradX *grad, const Segment *segments, int n_segments) {
    kernel_begin("gradient_squares", 0);
    int64_t pieces;
    Piece *piece = cut_pieces(segments, n_segments, &pieces);
    double *partial = SCRATCH(SCRATCH_LOCAL, double, pieces + 1);
    PARALLEL_TILES
    for (int64_t j = 0; j < pieces; j++)
        partial[j] = squares(grad + segments[piece[j].segment].offset, &segments[piece[j].segment],
                             piece[j].first, piece[j].count);
    for (int i = 0; i < n_segments; i++) sums[i] = 0;
    for (int64_t j = 0; j < pieces; j++) sums[piece[j].segment] += partial[j];
}
void sum_in_order(double *total, const double *in, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += in[i];
    total[0] = sum;
}
void gradient_scale(gradX *grad, const Segment *segments, int n_segments, const float *factor) {
    kernel_begin("gradient_scale", 0);
    int64_t pieces;
    Piece *piece = cut_pieces(segments, n_segments, &pieces);
    PARALLEL_TILES
    for (int64_t j = 0; j < pieces; j++) {
        gradX *g = grad + segments[piece[j].segment].offset + piece[j].first;
        real f = factor[piece[j].segment];
        for (int64_t i = 0; i < piece[j].count; i++) g[i].v *= f;
    }
}
void clip_scale(real *norm, real *scale, const double *sums, int n, double clip) {
    kernel_begin("clip_scale", 0);
    double sum = 0;
    for (int i = 0; i < n; i++) sum += sums[i];
    norm[0] = (real)sqrt(sum);
    double s = clip > 0 ? fmin(1.0, clip / ((double)norm[0] + 1e-6)) : 1;
    scale[0] = isfinite(norm[0]) ? (real)s : (real)NAN;
}

// ---- initial weights ------------------------------------------------------------------------
void init_segments(floatX *param, real *master, const Segment *segments, int n_segments,
                   uint64_t seed, double std) {
    int64_t pieces;
    Piece *piece = cut_pieces(segments, n_segments, &pieces);
    PARALLEL_TILES
    for (int64_t j = 0; j < pieces; j++) {
        const Segment *segment = segments + piece[j].segment;
        int64_t i = piece[j].first;
        int64_t end = i + piece[j].count;
        while (i < end) { // one Philox gives two neighbours
            int64_t element = segment->first + i;
            Random128 bits = random_normal_block(seed, segment->tensor, (uint64_t)element);
            for (int half = (int)(element % 2); half < 2 && i < end; half++, i++) {
                double z = inverse_normal(random_uniform(random_half(bits, half)));
                real value = (real)(std < 0 ? 1 : std * z);
                store(param + segment->offset + i, value);
                if (master) master[segment->offset + i] = value;
            }
        }
    }
}
