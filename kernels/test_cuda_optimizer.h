// Part of test_cuda.cu, which includes it: the optimizers and norms of the CUDA backend beside
// those of the CPU.

static std::vector<Segment> make_segments(int n, int64_t *total, bool anywhere) {
    std::vector<Segment> s(n);
    int64_t offset = 0;
    int64_t block = 0;
    for (int i = 0; i < n; i++) {
        int count = i == 1 ? 1000 : 1 + below(700);
        if (i == 2) count = 0;
        Segment g = { 0x1234567u + (uint64_t)i * 77,
                      anywhere && i % 2 ? 3 + 100 * i : 256 * i,
                      count,
                      offset,
                      block,
                      (float)(i % 2) };
        s[i] = g;
        offset += g.count + (anywhere ? 1 : 0);
        block += g.count / 256 + 2;
    }
    *total = offset;
    return s;
}
static void test_optimizer(OptimizerKind kind, bool master, bool anywhere, int n_segments) {
    static const char *names[] = { "sgd", "adamw", "adamw8" };
    char name[80];
    snprintf(name, sizeof name, "optimizer %s%s%s, %d segments", names[kind],
             master ? " master" : "", anywhere ? " cut anywhere" : "", n_segments);
    begin(name);
    int64_t n;
    std::vector<Segment> segments = make_segments(n_segments, &n, anywhere);
    int blocks = (int)(segments.back().qblock + segments.back().count / 256 + 2);
    Buffer param = random_input(X, n);
    Buffer copy = random_input(REAL, n);
    Buffer grad = random_input(REAL, n);
    Buffer m = zeros(REAL, n);
    Buffer v = zeros(REAL, n);
    Buffer m8 = zeros(BYTE, n);
    Buffer v8 = zeros(BYTE, n);
    Buffer m_scale = zeros(REAL, blocks);
    Buffer v_scale = zeros(REAL, blocks);
    Buffer scale = input(REAL, Numbers(1, 0.5));
    Buffer infinite = input(REAL, Numbers(1, INFINITY));
    // without a master, bf16 builds round stochastically: only the other backend in the same
    // precision has the same noise
    bool stochastic = !master && sizeof(floatX) == 2;
    for (int w = CUDA; w < WORLDS; w++) {
        OptimizerState s = {
            param.x(w), master ? copy.r(w) : 0, grad.g(w),   m.r(w), v.r(w), m8.b(w),
            v8.b(w),    m_scale.r(w),           v_scale.r(w)
        };
        for (int t = 1; t <= 3; t++) {
            OptimizerStep o = { kind, 1e-2, 0.9, 0.9, 0.99, 1e-8, 0.1, t, 7, t, 0.75 };
            CALL(w, optimizer_update, &s, segments.data(), n_segments, &o, scale.r(w));
            CALL(w, optimizer_update, &s, segments.data(), n_segments, &o, infinite.r(w));
        }
    }
    Numbers mine = read(param, CUDA);
    Numbers same = read(param, SAME);
    if (kind == OPT_ADAMW8) {
        if (mine != same || read(copy, CUDA) != read(copy, SAME)) complain("param", "other bits");
        if (read(v8, CUDA) != read(v8, SAME)) complain("codes of v", "differ from the CPU's");
        if (read(m8, CUDA) != read(m8, SAME)) complain("codes of m", "differ from the CPU's");
        if (read(v_scale, CUDA) != read(v_scale, SAME) ||
            read(m_scale, CUDA) != read(m_scale, SAME))
            complain("scales", "differ from the CPU's");
    } else if (stochastic) {
        // an fp32 number in the last bit elsewhere may round the other way, rarely
        size_t other = 0;
        for (size_t i = 0; i < mine.size(); i++) {
            if (!(fabs(mine[i] - same[i]) <= 0.02 * (fabs(same[i]) + 0.02)))
                complain("param", "far from the CPU's");
            other += fabs(mine[i] - same[i]) > 1e-5;
        }
        if (other > mine.size() / 100) complain("param", "more than 1 % differ from the CPU's");
    } else {
        compare("param", param);
        compare("master", copy);
    }
    if (kind == OPT_ADAMW) {
        compare("m", m);
        compare("v", v);
    } else
        compare("momentum", m);
    end();
}
static void test_norms(int n_segments) {
    begin("gradient squares, scales, clip, initial weights");
    int64_t n;
    std::vector<Segment> segments = make_segments(n_segments, &n, true);
    // more than one piece
    segments.back().count = 70000;
    n += 70000;
    Buffer grad = random_input(REAL, n);
    Buffer sums = output(DOUBLE, n_segments);
    Buffer total = output(DOUBLE, 1);
    Buffer factor = random_input(REAL, n_segments);
    Buffer norm = output(REAL, 1);
    Buffer clip = output(REAL, 1);
    Buffer param = zeros(X, n);
    Buffer master = zeros(REAL, n);
    Buffer ones = zeros(X, n);
    Buffer norm2 = output(REAL, 1);
    Buffer clip2 = output(REAL, 1);
    Buffer bad = input(DOUBLE, { 1.0, INFINITY });
    Buffer many = random_input(DOUBLE, 2500);
    Buffer total_many = output(DOUBLE, 1);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, gradient_squares, sums.d(w), grad.g(w), segments.data(), n_segments);
        CALL(w, sum_in_order, total.d(w), sums.d(w), n_segments);
        CALL(w, sum_in_order, total_many.d(w), many.d(w), 2500); // fetched in pieces of 1024
        CALL(w, clip_scale, norm.r(w), clip.r(w), sums.d(w), n_segments, 1.0);
        CALL(w, clip_scale, norm2.r(w), clip2.r(w), bad.d(w), 2, 1.0);
        CALL(w, gradient_scale, grad.g(w), segments.data(), n_segments, factor.r(w));
        CALL(w, init_segments, param.x(w), master.r(w), segments.data(), n_segments, 42, 0.02);
        CALL(w, init_segments, ones.x(w), 0, segments.data(), n_segments, 42, -1.0);
    }
    compare("squares", sums);
    compare("sum", total);
    exact("sum in order", total_many);
    compare("norm", norm);
    compare("scale", clip);
    exact("scaled gradients", grad);
    exact("weights", param);
    exact("masters", master);
    exact("ones", ones);
    exact("norm of infinity", norm2);
    exact("scale of infinity", clip2);
    end();
}
