// Router, row index, experts and routes, on the device beside the CPU; a part of test_cuda.cu,
// whose buffers and checks it uses.

// ---- router ---------------------------------------------------------------------------------
// The sums of logits are those of tensor cores here and of loops there: the ids of the chosen agree
// only where the choice hangs on more than rounding. The smallest distance between a token's last
// chosen and its best refused value, relative to them, equal ones aside (the lower id wins).
static double closest_choice(const Numbers &logits, const Numbers &bias, int R, int E, int K) {
    double closest = 1;
    for (int r = 0; r < R && K < E; r++) {
        Numbers value(logits.begin() + (ptrdiff_t)r * E, logits.begin() + (ptrdiff_t)(r + 1) * E);
        double top = *std::max_element(value.begin(), value.end());
        double sum = 0;
        for (double &v : value) sum += v = exp(v - top);
        for (int e = 0; e < E; e++) value[e] = value[e] / sum + bias[e];
        std::sort(value.rbegin(), value.rend());
        double gap = (value[K - 1] - value[K]) / fabs(value[K - 1]);
        if (gap > 0 && gap < closest) closest = gap;
    }
    return closest;
}
static void test_router(int R, int C, int E, int K, int normalize, int ties) {
    char name[80];
    snprintf(name, sizeof name, "router R %d E %d K %d%s%s", R, E, K,
             normalize ? " normalised" : "", ties ? " ties" : "");
    begin(name);
    Buffer u = random_input(X, (size_t)R * C);
    Buffer W = ties ? zeros(X, (size_t)E * C) : random_input(X, (size_t)E * C, 0.5);
    Buffer bias = random_input(REAL, E, 0.1);
    Buffer logits = output(REAL, (size_t)R * E);
    Buffer topk = output(INT, (size_t)R * K);
    Buffer score = output(REAL, (size_t)R * K);
    Buffer count = input(INT64, Numbers(E, 3));
    Buffer prob = zeros(DOUBLE, E);
    Buffer z = zeros(DOUBLE, 2);
    Buffer f = output(DOUBLE, E);
    Buffer du = random_input(X, (size_t)R * C);
    Buffer dW = output(REAL, (size_t)E * C);
    Buffer dW2 = random_input(REAL, (size_t)E * C);
    Buffer dz = output(REAL, (size_t)R * E);
    Buffer dscore = random_input(REAL, (size_t)R * K);
    Buffer biased = output(INT, (size_t)R * K);
    Buffer score2 = output(REAL, (size_t)R * K);
    Buffer given = output(REAL, (size_t)R * K);
    RouterStats none = {};
    for (int w = CUDA; w < WORLDS; w++) {
        RouterStats stats = { count.l(w), prob.d(w), z.d(w) };
        CALL(w, router_forward, logits.r(w), biased.i(w), score2.r(w), none, u.x(w), W.x(w),
             bias.r(w), 0, normalize, R, C, E, K);
        CALL(w, router_forward, logits.r(w), topk.i(w), score.r(w), stats, u.x(w), W.x(w), 0, 0,
             normalize, R, C, E, K);
        // The biased choice is given: its ids stay, and without the bias they have the same scores.
        CALL(w, router_forward, logits.r(w), biased.i(w), given.r(w), none, u.x(w), W.x(w), 0, 1,
             normalize, R, C, E, K);
        CALL(w, router_share, f.d(w), count.l(w), 100.0, 1, E);
        CALL(w, router_backward_add, du.x(w), dW.g(w), dz.r(w), dscore.r(w), logits.r(w), topk.i(w),
             score.r(w), u.x(w), W.x(w), f.d(w), 0.02, 0.001, normalize, 0, R, C, E, K);
        CALL(w, router_backward_add, du.x(w), dW2.g(w), dz.r(w), dscore.r(w), logits.r(w),
             topk.i(w), score.r(w), u.x(w), W.x(w), f.d(w), 0.0, 0.0, normalize, 1, R, C, E, K);
    }
    for (const Numbers &b : { Numbers(E, 0.0), read(bias, TRUTH) })
        if (closest_choice(read(logits, TRUTH), b, R, E, K) < 4e-6)
            complain("this test's numbers", "a choice hangs on rounding");
    exact("topk", topk);
    exact("topk with bias", biased);
    exact("count", count);
    compare("logits", logits);
    compare("score", score);
    compare("prob", prob);
    compare("z", z);
    compare("f", f);
    compare("dz", dz);
    compare("du", du);
    compare("dW", dW);
    compare("dW accumulated", dW2);
    compare("score with bias", score2);
    compare("score of a given choice", given);
    end();
}

// ---- plan and experts -----------------------------------------------------------------------
struct Plans {
    RowIndex plan[WORLDS];
    Buffer row_token[WORLDS], token_row[WORLDS], expert_row[WORLDS];
};
static Plans make_plans(int P, int K, int E) {
    Plans p;
    for (int w = CUDA; w < WORLDS; w++) {
        int M = CALL(w, row_index_bound, P, K, E);
        p.row_token[w] = input(INT, Numbers(M, 1));
        p.token_row[w] = input(INT, Numbers((size_t)P * K, 1));
        p.expert_row[w] = output(INT, E + 1);
        RowIndex plan = {
            p.row_token[w].i(w), p.token_row[w].i(w), p.expert_row[w].i(w), M, P, E, K
        };
        p.plan[w] = plan;
    }
    return p;
}
// The plans of the two backends differ by padding only: the same tokens in the same order.
static void compare_plans(const Plans &p) {
    int tile = device_row_tile();
    Numbers rt = read(p.row_token[CUDA], CUDA);
    Numbers tr = read(p.token_row[CUDA], CUDA);
    Numbers er = read(p.expert_row[CUDA], CUDA);
    Numbers rt2 = read(p.row_token[SAME], SAME);
    Numbers tr2 = read(p.token_row[SAME], SAME);
    Numbers er2 = read(p.expert_row[SAME], SAME);
    size_t used = 0;
    for (size_t e = 0; e + 1 < er.size(); e++) {
        size_t rows = (size_t)(er2[e + 1] - er2[e]);
        if (er[e + 1] - er[e] != (double)((rows + tile - 1) / tile * tile))
            return complain("expert_row", "an expert's rows are not padded to the tile");
        for (size_t i = 0; i < (size_t)(er[e + 1] - er[e]); i++)
            if (rt[(size_t)er[e] + i] != (i < rows ? rt2[(size_t)er2[e] + i] : -1))
                return complain("row_token", "another token than on the CPU");
        for (size_t i = 0; i < tr.size(); i++)
            if (tr2[i] >= er2[e] && tr2[i] < er2[e + 1] && tr[i] - er[e] != tr2[i] - er2[e])
                return complain("token_row", "another row than on the CPU");
        used = (size_t)er[e + 1];
    }
    for (size_t i = 0; i < tr.size(); i++)
        if ((tr[i] < 0) != (tr2[i] < 0))
            return complain("token_row", "-1 where the CPU has a row, or a row where it has none");
    for (size_t i = used; i < rt.size(); i++)
        if (rt[i] != -1) return complain("row_token", "not -1 behind the last expert");
}
// Rows in the order of token_row, which all worlds share.
static Numbers by_slot(const Plans &p, int w, const Buffer &b, int width) {
    Numbers v = read(b, w);
    Numbers slot = read(p.token_row[w], w);
    Numbers out;
    for (double s : slot)
        for (int c = 0; s >= 0 && c < width; c++) out.push_back(v[(size_t)s * width + c]);
    return out;
}
static void compare_rows(const char *what, const Plans &p, const Buffer (&b)[WORLDS], int width,
                         bool padding_is_zero) {
    compare_numbers(what, by_slot(p, CUDA, b[CUDA], width), by_slot(p, SAME, b[SAME], width),
                    by_slot(p, TRUTH, b[TRUTH], width));
    Numbers rows = read(b[CUDA], CUDA);
    Numbers token = read(p.row_token[CUDA], CUDA);
    Numbers expert = read(p.expert_row[CUDA], CUDA);
    for (size_t m = 0; padding_is_zero && m < (size_t)expert.back(); m++)
        for (int c = 0; token[m] < 0 && c < width; c++)
            if (rows[m * width + c] != 0) return complain(what, "a padding row is not zero");
}
enum Routing { DISPATCH, ONE, FOREIGN, EMPTY };
// NaN in the padding rows: what stands there may not matter.
static void poison_padding(const Buffer &rows, const Buffer &row_token, int width) {
    Numbers v = read(rows, CUDA);
    Numbers token = read(row_token, CUDA);
    for (size_t i = 0; i < v.size(); i++)
        if (token[i / width] < 0) v[i] = NAN;
    write(rows, CUDA, v);
}
static const char *expert_kernel = "auto";
static void test_experts(int P, int K, int E, int C, int F, Routing routing) {
    char name[120];
    static const char *names[] = { "", " all on one", " two ranks", " nobody here" };
    snprintf(name, sizeof name, "experts (%s) P %d K %d E %d C %d F %d%s", expert_kernel, P, K, E,
             C, F, names[routing]);
    begin(name);
    int global = routing == FOREIGN || routing == EMPTY ? 2 * E : E;
    int first = routing == FOREIGN ? E / 2 : 0;
    Numbers ids((size_t)P * K);
    for (int p = 0; p < P; p++) { // K distinct ids, ascending
        std::vector<int> take(global);
        for (int k = 0; k < K; k++) {
            int e = routing == EMPTY ? E + below(E) : below(global);
            if (routing == ONE && k == 0) e = E - 1;
            while (take[e]) e = routing == EMPTY ? E + (e + 1) % E : (e + 1) % global;
            take[e] = 1;
        }
        for (int e = 0, k = 0; e < global; e++)
            if (take[e]) ids[(size_t)p * K + k++] = e;
    }
    Plans p = make_plans(P, K, E);
    Buffer choice = input(INT, ids);
    Buffer pool = random_input(X, (size_t)P * C);
    Buffer W1 = random_input(X, (size_t)E * 2 * F * C, 2 / sqrt(C));
    Buffer W2 = random_input(X, (size_t)E * C * F, 2 / sqrt(F));
    Buffer score = random_input(REAL, (size_t)P * K);
    Buffer dpool = random_input(X, (size_t)P * C);
    Buffer out = output(X, (size_t)P * C);
    Buffer out1 = output(X, (size_t)P * C);
    Buffer dscore = output(REAL, (size_t)P * K);
    Buffer dW1 = output(REAL, (size_t)E * 2 * F * C);
    Buffer dW2 = output(REAL, (size_t)E * C * F);
    Buffer sum1 = random_input(REAL, (size_t)E * 2 * F * C);
    Buffer sum2 = random_input(REAL, (size_t)E * C * F);
    Buffer H[WORLDS], again[WORLDS], A[WORLDS], Y[WORLDS], sA[WORLDS], dX[WORLDS], dH[WORLDS],
        dH1[WORLDS], sA1[WORLDS];
    for (int w = CUDA; w < WORLDS; w++) {
        size_t M = p.plan[w].M;
        H[w] = output(X, M * 2 * F);
        again[w] = output(X, M * 2 * F);
        A[w] = output(X, M * F);
        Y[w] = output(X, M * C);
        sA[w] = output(X, M * F);
        dX[w] = output(X, M * C);
        dH[w] = output(X, M * 2 * F);
        dH1[w] = output(X, M * 2 * F);
        sA1[w] = output(X, M * F);
        const RowIndex *plan = &p.plan[w];
        CALL(w, row_index_build, &p.plan[w], choice.i(w), first);
        CALL(w, experts_up, H[w].x(w), A[w].x(w), pool.x(w), W1.x(w), plan, C, F);
        CALL(w, experts_up, again[w].x(w), 0, pool.x(w), W1.x(w), plan, C, F);
        CALL(w, experts_down, Y[w].x(w), A[w].x(w), W2.x(w), plan, C, F);
        if (w == CUDA) poison_padding(again[w], p.row_token[w], 2 * F);
        CALL(w, rows_weighted_sum, out.x(w), Y[w].x(w), score.r(w), plan, C);
        CALL(w, rows_weighted_sum, out1.x(w), Y[w].x(w), 0, plan, C);
        CALL(w, experts_down_backward, dH[w].x(w), sA[w].x(w), dscore.r(w), dpool.x(w), H[w].x(w),
             W2.x(w), score.r(w), plan, C, F);
        CALL(w, experts_down_backward, again[w].x(w), sA[w].x(w), dscore.r(w), dpool.x(w),
             again[w].x(w), W2.x(w), score.r(w), plan, C, F); // dH is H
        CALL(w, experts_down_backward, dH1[w].x(w), sA1[w].x(w), 0, dpool.x(w), H[w].x(w), W2.x(w),
             0, plan, C, F);
        CALL(w, experts_up_backward, dX[w].x(w), dH[w].x(w), W1.x(w), plan, C, F);
        CALL(w, experts_wgrad, dW1.g(w), dW2.g(w), pool.x(w), dpool.x(w), dH[w].x(w), sA[w].x(w),
             plan, 0, C, F);
        CALL(w, experts_wgrad, sum1.g(w), sum2.g(w), pool.x(w), dpool.x(w), dH[w].x(w), sA[w].x(w),
             plan, 1, C, F);
    }
    compare_plans(p);
    compare_rows("H", p, H, 2 * F, true);
    compare_rows("A", p, A, F, true);
    compare_rows("Y", p, Y, C, true);
    compare("out", out);
    compare("out without scores", out1);
    compare_rows("dH", p, dH, 2 * F, true);
    compare_rows("dH in place", p, again, 2 * F, true);
    compare_rows("sA", p, sA, F, true);
    compare("dscore", dscore);
    compare_rows("dH without scores", p, dH1, 2 * F, true);
    compare_rows("A of backward", p, sA1, F, true);
    compare_rows("dX", p, dX, C, true);
    compare("dW1", dW1);
    compare("dW2", dW2);
    compare("dW1 accumulated", sum1);
    compare("dW2 accumulated", sum2);
    end();
}
static void test_plan(int P, int K, int E) {
    char name[80];
    snprintf(name, sizeof name, "plan P %d K %d E %d", P, K, E);
    begin(name);
    Numbers ids((size_t)P * K);
    for (int p = 0; p < P; p++) {
        int start = below(E - K + 1);
        for (int k = 0; k < K; k++)
            ids[(size_t)p * K + k] = below(7) == 0 && k == 0 ? -1 : start + k;
    }
    Buffer choice = input(INT, ids);
    Plans p = make_plans(P, K, E);
    for (int w = CUDA; w < WORLDS; w++) CALL(w, row_index_build, &p.plan[w], choice.i(w), 0);
    compare_plans(p);
    end();
}
// The same bits on any number of multiprocessors, on all of them and on two: then each block takes
// several tiles, and its ring and its results go on from tile to tile.
static void test_experts_budget(int P, int K, int E, int C, int F) {
    char name[120];
    snprintf(name, sizeof name, "experts (%s) on fewer multiprocessors, P %d K %d E %d C %d F %d",
             expert_kernel, P, K, E, C, F);
    begin(name);
    Numbers ids((size_t)P * K);
    for (int p = 0; p < P; p++)
        for (int k = 0, start = below(E - K + 1); k < K; k++) ids[(size_t)p * K + k] = start + k;
    RowIndex plan = make_plans(P, K, E).plan[CUDA];
    Buffer pool = random_input(X, (size_t)P * C);
    Buffer dpool = random_input(X, (size_t)P * C);
    Buffer W1 = random_input(X, (size_t)E * 2 * F * C), W2 = random_input(X, (size_t)E * C * F);
    Buffer score = random_input(REAL, (size_t)P * K);
    Buffer choice = input(INT, ids);
    int multiprocessors;
    std::vector<Numbers> results[2];
    row_index_build(&plan, choice.i(CUDA), 0);
    CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    for (int run = 0; run < 2; run++) {
        size_t M = plan.M;
        Buffer H = zeros(X, M * 2 * F), A = zeros(X, M * F), Y = zeros(X, M * C);
        Buffer dH = zeros(X, M * 2 * F);
        Buffer sA = zeros(X, M * F);
        Buffer dX = zeros(X, M * C);
        Buffer dscore = output(REAL, (size_t)P * K);
        Buffer dW1 = output(REAL, (size_t)E * 2 * F * C);
        Buffer dW2 = output(REAL, (size_t)E * C * F);
        experts_leave(run ? multiprocessors - 2 : 0);
        experts_up(H.x(CUDA), A.x(CUDA), pool.x(CUDA), W1.x(CUDA), &plan, C, F);
        experts_down(Y.x(CUDA), A.x(CUDA), W2.x(CUDA), &plan, C, F);
        experts_down_backward(dH.x(CUDA), sA.x(CUDA), dscore.r(CUDA), dpool.x(CUDA), H.x(CUDA),
                              W2.x(CUDA), score.r(CUDA), &plan, C, F);
        experts_up_backward(dX.x(CUDA), dH.x(CUDA), W1.x(CUDA), &plan, C, F);
        for (int accumulate = 0; accumulate < 2; accumulate++)
            experts_wgrad(dW1.g(CUDA), dW2.g(CUDA), pool.x(CUDA), dpool.x(CUDA), dH.x(CUDA),
                          sA.x(CUDA), &plan, accumulate, C, F);
        for (const Buffer &b : { H, A, Y, dH, sA, dX, dscore, dW1, dW2 })
            results[run].push_back(read(b, CUDA));
    }
    experts_leave(0);
    static const char *names[] = { "H", "A", "Y", "dH", "sA", "dX", "dscore", "dW1", "dW2" };
    for (int i = 0; i < 9; i++) exact_numbers(names[i], results[1][i], results[0][i]);
    end();
}
#if defined(MOE_BF16)
// The time of a product in tiles, on the multiprocessors that NCCL does not hold: each takes the
// next block when it is free.
static int64_t tiles_of_longest(int64_t tiles, int64_t blocks, int free_ones) {
    std::vector<int64_t> busy(free_ones);
    for (int64_t b = 0; b < blocks; b++)
        *std::min_element(busy.begin(), busy.end()) += (tiles - b + blocks - 1) / blocks;
    return *std::max_element(busy.begin(), busy.end());
}
// 116 of 132 multiprocessors are the products'. With `held` ones beyond the 16, two waves would
// take twice the time; and nothing is lost where none is.
static void test_shares(int64_t tiles) {
    char name[80];
    snprintf(name, sizeof name, "shares of %lld tiles", (long long)tiles);
    begin(name);
    int64_t blocks = hopper_blocks(tiles, 132, 16);
    int64_t alone = (tiles + 115) / 116;
    if (hopper_blocks(tiles, 132, 0) > 132) complain("one GPU", "more blocks than multiprocessors");
    if (tiles_of_longest(tiles, blocks, 116) != alone) complain("nothing held", "takes longer");
    for (int held = 1; held <= 24; held++) {
        int64_t longest = tiles_of_longest(tiles, blocks, 116 - held);
        if (longest > alone * 3 / 2 + 1) complain("held", "a second wave");
        if (tiles_of_longest(tiles, 116, 116 - held) < 2 * (alone - 1))
            complain("held", "a block a multiprocessor is no worse");
    }
    end();
}
#endif
// Random routings over an ep group: the integers of the table, of the lists and of the row index
// are those of the CPU, but for the rows that pad an expert.
static std::vector<int> ints(const int *device, int64_t n) {
    std::vector<int> host((size_t)n + 1);
    if (n) device_download(host.data(), device, (size_t)n * sizeof(int));
    return host;
}
// The experts of a token, ascending: any K of them, those of one rank first, or always the same.
static void choose_experts(int *id, RouteShape s, int kind) {
    std::vector<int> all((size_t)s.E);
    for (int e = 0; e < s.E; e++) all[e] = e;
    int first = kind == 1 ? (int)(s.E / s.ranks * below((int)s.ranks)) : 0;
    if (first + s.K > s.E) first = (int)(s.E - s.K);
    for (int k = 0; k < s.K; k++) {
        if (kind == 0) std::swap(all[k], all[k + below((int)s.E - k)]);
        id[k] = kind == 0 ? all[k] : first + k;
    }
    std::sort(id, id + s.K);
}
static int wrong_table(RouteShape s, const std::vector<int> &ids, const std::vector<int> &cuda,
                       const std::vector<int> &cpu) {
    int local = (int)(s.E / s.ranks);
    int tile = device_row_tile();
    int wrong = 0;
    int64_t pairs = s.sources * s.ranks;
    std::vector<int> count((size_t)s.E), rows((size_t)s.ranks);
    for (int64_t i = 0; i < s.sources * s.R * s.K; i++) count[ids[i]]++;
    for (int e = 0; e < s.E; e++) rows[e / local] += (count[e] + tile - 1) / tile * tile;
    for (int64_t i = 0; i < pairs; i++) wrong += cuda[i] != cpu[i];
    for (int j = 0; j < s.ranks; j++) wrong += cuda[pairs + j] != rows[j];
    return wrong + (cuda[pairs + s.ranks] != 0) + (cpu[pairs + s.ranks] != 0);
}
static int wrong_index(int64_t P, int64_t K, int first, int E, const std::vector<int> &choice,
                       RowIndex a, RowIndex b) {
    std::vector<int> rows = ints(a.token_row, P * K), starts = ints(a.expert_row, E + 1),
                     tokens = ints(a.row_token, a.M);
    int wrong = 0;
    for (int64_t i = 0; i < P * K; i++) {
        int e = choice[i] - first;
        int here = e >= 0 && e < E;
        if (here != (rows[i] >= 0) || here != (b.token_row[i] >= 0))
            wrong++;
        else if (here)
            wrong += rows[i] - starts[e] != b.token_row[i] - b.expert_row[e] ||
                     tokens[rows[i]] != i / K || b.row_token[b.token_row[i]] != i / K;
    }
    return wrong;
}
static void test_routes(int cases) {
    begin("routes");
    enum { TOKENS = 40, RANKS = 8, LOCAL = 7, KEYS = 8 };
    int64_t most = RANKS * TOKENS * KEYS;
    int64_t rows = row_index_bound(RANKS * TOKENS, KEYS, LOCAL);
    Buffer id_buffer = output(INT, most);
    Buffer table = output(INT, RANKS * RANKS + RANKS + 1);
    Buffer send = output(INT, TOKENS * KEYS);
    Buffer sum = output(INT, TOKENS * KEYS);
    Buffer choice = output(INT, most);
    Buffer row_token = output(INT, rows);
    Buffer token_row = output(INT, most);
    Buffer expert_row = output(INT, LOCAL + 1);
    int wrong[4] = { 0, 0, 0, 0 };
    for (int i = 0; i < cases; i++) {
        RouteShape s;
        int64_t local = 1 + below(LOCAL);
        s.ranks = 1 + below(RANKS);
        s.sources = i % 5 == 4 ? 1 : s.ranks;
        s.R = i % 17 == 16 ? 0 : 1 + below(TOKENS);
        s.E = s.ranks * local;
        int64_t keys = KEYS;
        if (s.E < keys) keys = s.E;
        s.K = 1 + below((int)keys);
        if (i % 3 == 0) s.K = 1;
        if (i % 3 == 1) s.K = keys;
        std::vector<int> ids((size_t)(s.sources * s.R * s.K) + 1);
        for (int64_t t = 0; t < s.sources * s.R; t++) choose_experts(&ids[t * s.K], s, i / 5 % 3);
        size_t bytes = (size_t)(s.sources * s.R * s.K) * sizeof(int);
        device_upload(id_buffer.i(CUDA), ids.data(), bytes);
        route_table(table.i(CUDA), id_buffer.i(CUDA), s);
        ref_route_table(table.i(SAME), ids.data(), s);
        std::vector<int> cpu(table.i(SAME), table.i(SAME) + route_table_size(s));
        wrong[0] += wrong_table(s, ids, ints(table.i(CUDA), route_table_size(s)), cpu);
        if (s.sources != s.ranks) continue;
        int me = below((int)s.ranks);
        int sent = 0;
        int pool = 0;
        for (int j = 0; j < s.ranks; j++) {
            sent += cpu[me * s.ranks + j];
            pool += cpu[j * s.ranks + me];
        }
        int64_t J = s.ranks < s.K ? s.ranks : s.K;
        route_lists(send.i(CUDA), sum.i(CUDA), choice.i(CUDA), id_buffer.i(CUDA), me, s);
        ref_route_lists(send.i(SAME), sum.i(SAME), choice.i(SAME), ids.data(), me, s);
        std::vector<int> sends = ints(send.i(CUDA), sent), sums = ints(sum.i(CUDA), s.R * J),
                         pools = ints(choice.i(CUDA), pool * s.K);
        wrong[1] += memcmp(sends.data(), send.i(SAME), (size_t)sent * sizeof(int)) != 0;
        wrong[1] += memcmp(sums.data(), sum.i(SAME), (size_t)(s.R * J) * sizeof(int)) != 0;
        wrong[2] += memcmp(pools.data(), choice.i(SAME), (size_t)(pool * s.K) * sizeof(int)) != 0;
        RowIndex index[2];
        for (int w = CUDA; w <= SAME; w++) {
            index[w].row_token = row_token.i(w);
            index[w].token_row = token_row.i(w);
            index[w].expert_row = expert_row.i(w);
            index[w].P = pool;
            index[w].K = s.K;
            index[w].E = local;
            index[w].M = w == CUDA ? row_index_bound(pool, s.K, local)
                                   : ref_row_index_bound(pool, s.K, local);
        }
        row_index_build(&index[CUDA], choice.i(CUDA), me * (int)local);
        ref_row_index_build(&index[SAME], choice.i(SAME), me * (int)local);
        wrong[3] +=
            wrong_index(pool, s.K, me * (int)local, (int)local, pools, index[CUDA], index[SAME]);
    }
    static const char *const names[] = { "tables", "lists of sent rows", "pools", "row indices" };
    for (int i = 0; i < 4; i++)
        if (wrong[i]) complain(names[i], "differ from the CPU's");
    end();
}
static void test_rows(int n, int R, int J, int C) {
    begin("rows");
    Numbers one(n), many((size_t)R * J);
    for (auto &i : one) i = below(R + 1) - 1;
    for (auto &i : many) i = below(n + 1) - 1;
    Buffer in = random_input(X, (size_t)R * C);
    Buffer index = input(INT, one);
    Buffer out = output(X, (size_t)n * C);
    Buffer words = random_input(REAL, (size_t)R * 3);
    Buffer out_words = output(REAL, (size_t)n * 3);
    Buffer indices = input(INT, many);
    Buffer sum = output(X, (size_t)R * C);
    Buffer sum_words = output(REAL, (size_t)R * 3);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, rows_gather, out.x(w), in.x(w), index.i(w), n, C * element_size(X, w));
        CALL(w, rows_gather, out_words.r(w), words.r(w), index.i(w), n, 12);
        CALL(w, rows_sum, sum.x(w), out.x(w), indices.i(w), R, J, C);
        CALL(w, rows_sum_real, sum_words.r(w), out_words.r(w), indices.i(w), R, J, 3);
    }
    exact("gather", out);
    exact("gather of 12 bytes", out_words);
    compare("sum", sum);
    compare("sum of reals", sum_words);
    end();
}
