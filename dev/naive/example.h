// One layer of experts with six tokens, every number printed: ./naive --example. README.md shows
// this output piece by piece and explains it. Uses route, experts and their backwards of naive.h.
#ifndef MOE_NAIVE_EXAMPLE_H
#define MOE_NAIVE_EXAMPLE_H
#include "naive.h"

// Prints `rows` rows of `cols` numbers, each row after its number.
static void example_rows(const char *title, const char *row, const number *x, int64_t rows,
                         int64_t cols) {
    printf("%s\n", title);
    for (int64_t r = 0; r < rows; r++) {
        printf("  %s %d ", row, (int)r);
        for (int64_t i = 0; i < cols; i++) {
            double v = (double)x[r * cols + i];
            printf(" %8.4f", fabs(v) < 5e-5 ? 0 : v); // never "-0.0000"
        }
        printf("\n");
    }
}

static void naive_example(void) {
    enum { R = 6, C = 2, E = 4, K = 2, F = 2 };
    NaiveConfig c = { .C = C, .E = E, .K = K, .F = F, .norm_topk = 1 };
    number u[R * C] = { 1, .5, -.5, 1, 2, -.5, .5, 1.5, 1.5, 1, -1, .5 };
    number dy[R * C] = { .1, -.1, .2, 0, 0, .1, -.2, .1, .1, .1, 0, -.2 };
    number router[E * C] = { 1, 0, 0, 1, -1, 1, -1, -1 };
    static number w[E][3][F * C] = { { { 1, 0, 0, 1 }, { 1, 1, 1, -1 }, { 1, 0, 0, 1 } },
                                     { { 1, 1, -1, 1 }, { 1, 0, 0, 1 }, { .5, 0, 0, .5 } },
                                     { { 0, 1, 1, 0 }, { 1, 0, 0, 1 }, { 0, 1, 1, 0 } },
                                     { { 1, 1, 1, 1 }, { 1, 1, 1, 1 }, { 1, 1, 1, 1 } } };
    Weight tensor[3 * E];
    for (int i = 0; i < 3 * E; i++) {
        tensor[i].w = w[i / 3][i % 3];
        tensor[i].g = zeros(F * C);
    }

    example_rows("tokens u", "token", u, R, C);
    example_rows("router Wr, a row an expert", "expert", router, E, C);
    NaiveRouting y = route(u, router, 0, R, &c);
    example_rows("logits z = u Wr^T, a column an expert", "token", y.z, R, E);
    example_rows("probabilities p = softmax(z)", "token", y.p, R, E);
    printf("chosen experts and their scores\n");
    for (int r = 0; r < R; r++)
        printf("  token %d  experts %d %d  scores %6.4f %6.4f\n", r, y.topk[r * K],
               y.topk[r * K + 1], (double)y.score[r * K], (double)y.score[r * K + 1]);

    printf("rows sorted by expert\n");
    for (int e = 0, row = 0; e < E; e++) {
        int first = row;
        printf("  expert %d: tokens", e);
        for (int i = 0; i < R * K; i++) {
            if (y.topk[i] != e) continue;
            printf(" %d", i / K);
            row++;
        }
        if (row > first)
            printf("  rows %d to %d\n", first, row - 1);
        else
            printf(" none, no row\n");
    }
    number *out = experts(u, tensor, y.topk, y.score, R, K, C, F);
    number each[R * K * C];
    for (int i = 0; i < R * K; i++) { // the experts' outputs before their scores
        number one = 1;
        number *v = experts(u + i / K * C, tensor, y.topk + i, &one, 1, 1, C, F);
        memcpy(each + i * C, v, C * sizeof(number));
    }
    example_rows("outputs of a token's two experts, one after the other", "token", each, R, K * C);
    example_rows("y, their sum weighted by the scores", "token", out, R, C);
    number aux = 0;
    for (int e = 0; e < E; e++) aux += E * y.load[e] * y.mean[e];
    example_rows("load f, share of the tokens that chose an expert", "layer", y.load, 1, E);
    example_rows("mean of the probabilities P", "layer", y.mean, 1, E);
    printf("aux = E * sum of f P = %.4f\n", (double)aux);

    number *du = zeros(R * C);
    number *dscore = zeros(R * K);
    number *dWr = zeros(E * C);
    example_rows("dy, the gradient that arrives", "token", dy, R, C);
    experts_back(du, dscore, dy, u, tensor, y.topk, y.score, R, K, C, F);
    example_rows("dscore = dy . output of the expert", "token", dscore, R, K);
    number *unused = zeros(E * C);
    number *plain = zeros(R * C);
    number *dz = route_back(plain, unused, dscore, &y, y.load, 0, 0, u, router, R, &c);
    example_rows("dz from the scores alone", "token", dz, R, E);
    dz = route_back(du, dWr, dscore, &y, y.load, 0.1 / R, 0, u, router, R, &c);
    example_rows("dz with 0.1 aux added to the loss", "token", dz, R, E);
    example_rows("du, from the experts and the router", "token", du, R, C);
    example_rows("dWr = dz^T u", "expert", dWr, E, C);
    example_rows("gradient of expert 0's gate", "row", tensor[0].g, F, C);
    example_rows("gradient of expert 3's gate, which no token chose", "row", tensor[9].g, F, C);
    naive_release();
}
#endif
