// Part of test_dispatch.c, which includes it: numbers in every type, and a problem that every rank
// knows whole.

// ---- numbers --------------------------------------------------------------------------------
static uint64_t random_bits(uint64_t *s) { // splitmix64
    uint64_t z = (*s += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static int below(uint64_t *s, int n) { return (int)(random_bits(s) % (uint64_t)n); }
static double uniform(uint64_t *s) {
    return (double)(random_bits(s) >> 11) * 0x1p-52 - 1;
} // [-1, 1)
static double quarter(uint64_t *s) { return (below(s, 17) - 8) * 0.25; } // -2, -1.75 .. 2

static char *scratch; // device, room for the largest tensor in double
static void put(void *dst, Dtype type, const double *x, size_t n) {
    device_upload(scratch, x, n * 8);
    convert(dst, type, scratch, DTYPE_F64, n);
}
static void get(double *x, const void *src, Dtype type, size_t n) {
    convert(scratch, DTYPE_F64, src, type, n);
    device_download(x, scratch, n * 8);
}
static double dot(const double *a, const double *b, size_t n) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
// |a - b| / |b| in the 2-norm; b = 0 demands a = 0; NaN fails every comparison.
static double distance(const double *a, const double *b, size_t n) {
    double d = 0;
    double norm = dot(b, b, n);
    for (size_t i = 0; i < n; i++) d += (a[i] - b[i]) * (a[i] - b[i]);
    if (norm == 0 && d == 0) return 0;
    return norm > 0 ? sqrt(d / norm) : INFINITY;
}
static double *numbers(size_t n) {
    return (double *)xcalloc(n + 1, sizeof(double), "test numbers");
}
static void poison(Arena *a) { // every byte 0xff: NaN in any float type, -1 as an id
    static char ff[4096];
    memset(ff, 0xff, sizeof ff);
    for (size_t i = 0; i < a->used; i += sizeof ff)
        device_upload(a->base + i, ff, a->used - i < sizeof ff ? a->used - i : sizeof ff);
}

// ---- a problem: all tokens of an ep group, known to every rank ------------------------------
enum { RANDOM, SKEWED, SKIP_LAST_RANK, ONE_EXPERT, ONE_RANK, OWN, NEIGHBOUR, ROUTINGS };
static const char *routing_name[] = {
    "random",        "skewed",          "last rank gets nothing", "all to one expert",
    "all to rank 0", "own tokens only", "neighbour's tokens only"
};
typedef struct {
    int n, me, R, N, C, E, K, F;         // N = n R tokens
    int *topk;                           // (N,K)
    double *x, *dy, *score, *W1, *W2;    // (N,C), (N,C), (N,K), (E,2F,C), (E,C,F)
    double *y, *dx, *dscore, *dW1, *dW2; // one process' answer, same shapes
} Problem;

static int problem_expert(const Problem *p, int routing, int token, uint64_t *s) {
    int local = p->E / p->n;
    int rank = token / p->R;
    switch (routing) {
    case SKEWED: {
        int a = below(s, p->E);
        int b = below(s, p->E);
        int c = below(s, p->E);
        a = a < b ? a : b;
        return a < c ? a : c;
    }
    case SKIP_LAST_RANK: return below(s, p->n > 1 ? p->E - local : p->E);
    case ONE_RANK: return below(s, local);
    case OWN: return rank * local + below(s, local);
    case NEIGHBOUR: return (rank + 1) % p->n * local + below(s, local);
    default: return below(s, p->E);
    }
}
static void problem_fill(Problem *p, int routing, uint64_t seed) {
    uint64_t s = seed * 7919 + 1;
    for (int t = 0; t < p->N; t++) {
        int *id = p->topk + (size_t)t * p->K;
        int k = 0;
        if (routing == ONE_EXPERT) id[k++] = p->E / 2;
        while (k <
               p->K) { // distinct ids, ascending; a routing with too few experts for K takes others
            int e = problem_expert(p, k < p->E / p->n ? routing : RANDOM, t, &s);
            int fresh = 1;
            int j = k;
            for (int i = 0; i < k; i++) fresh &= id[i] != e;
            if (!fresh) continue;
            for (; j > 0 && id[j - 1] > e; j--) id[j] = id[j - 1];
            id[j] = e;
            k++;
        }
    }
    size_t N = p->N, C = p->C;
    size_t w = (size_t)p->E * p->F * C;
    for (size_t i = 0; i < N * C; i++) {
        p->x[i] = uniform(&s);
        p->dy[i] = uniform(&s);
    }
    for (size_t i = 0; i < N * p->K; i++) p->score[i] = 0.5 + 0.4 * uniform(&s);
    for (size_t i = 0; i < 2 * w; i++) p->W1[i] = 0.3 * uniform(&s);
    for (size_t i = 0; i < w; i++) p->W2[i] = 0.3 * uniform(&s);
}
static Problem problem_new(const Grid *g, const Config *c, int R) {
    Problem p = { .n = g->ep,
                  .me = g->ep_rank,
                  .R = R,
                  .N = g->ep * R,
                  .C = c->C,
                  .E = c->E,
                  .K = c->K,
                  .F = c->F };
    size_t x = (size_t)p.N * p.C;
    size_t s = (size_t)p.N * p.K;
    size_t w = (size_t)p.E * p.F * p.C;
    p.topk = (int *)xcalloc(s, sizeof(int), "topk");
    p.x = numbers(x);
    p.dy = numbers(x);
    p.score = numbers(s);
    p.W1 = numbers(2 * w);
    p.W2 = numbers(w);
    p.y = numbers(x);
    p.dx = numbers(x);
    p.dscore = numbers(s);
    p.dW1 = numbers(2 * w);
    p.dW2 = numbers(w);
    return p;
}
static void problem_free(Problem *p) {
    free(p->topk);
    free(p->x);
    free(p->dy);
    free(p->score);
    free(p->W1);
    free(p->W2);
    free(p->y);
    free(p->dx);
    free(p->dscore);
    free(p->dW1);
    free(p->dW2);
}
