// Statistics of the router over all tokens of a round and of an update: how often each expert was
// chosen, its probabilities, and what follows from them: the auxiliary losses, which are exact over
// the whole round because they are summed over the ranks before backward starts, the report, and
// the selection bias of --balance bias. Contracts in step.h.
#include "step.h"
#include "../kernels/fail.h"
#include <stdlib.h>

static int64_t pairs(const Trainer *t) { return (int64_t)t->m->c.n_moe * t->m->c.E; }
static double round_positions(const Trainer *t) { return (double)t->R * t->n_micro * t->g->world; }

// ---- memory ---------------------------------------------------------------------------------
void router_totals_create(RouterTotals *r, const Model *m, int with_bias, Arena *arena) {
    int64_t n = (int64_t)m->c.n_moe * m->c.E;
    const char *what = "router statistics";
    r->count = ARENA_TAKE(arena, int64_t, n, what);
    r->prob = ARENA_TAKE(arena, double, n, what);
    r->z = ARENA_TAKE(arena, double, 2 * m->c.n_moe, what);
    r->share = ARENA_TAKE(arena, double, n, what);
    r->bias = with_bias ? ARENA_TAKE(arena, real, n, what) : 0;
    if (r->bias) device_zero(r->bias, n * sizeof(real));
}

void router_totals_create_host(RouterTotals *r, const Model *m) {
    size_t layers = m->c.n_moe;
    size_t n = layers * m->c.E;
    const char *what = "router statistics";
    r->host_count = (int64_t *)xcalloc(2 * n, sizeof(int64_t), what);
    r->host_prob = (double *)xcalloc(2 * n, sizeof(double), what);
    r->host_z = (double *)xcalloc(4 * layers, sizeof(double), what);
    r->host_bias = (float *)xcalloc(n, sizeof(float), what);
    r->round_count = r->host_count + n;
    r->round_prob = r->host_prob + n;
    r->round_z = r->host_z + 2 * layers;
}

void router_totals_free(RouterTotals *r) {
    free(r->host_count);
    free(r->host_prob);
    free(r->host_z);
    free(r->host_bias);
}

void router_totals_clear(Trainer *t, int update) {
    RouterTotals *r = &t->router;
    size_t n = pairs(t);
    size_t layers = t->m->c.n_moe;
    device_zero(r->count, n * sizeof(int64_t));
    device_zero(r->prob, n * sizeof(double));
    device_zero(r->z, 2 * layers * sizeof(double));
    if (!update) return;
    memset(r->host_count, 0, n * sizeof(int64_t));
    memset(r->host_prob, 0, n * sizeof(double));
    memset(r->host_z, 0, 2 * layers * sizeof(double));
}

// ---- one layer's part -----------------------------------------------------------------------
RouterStats router_totals_of(const Trainer *t, int layer) {
    int64_t i = t->m->moe_index[layer];
    int64_t E = t->m->c.E;
    const RouterTotals *r = &t->router;
    RouterStats stats = { 0, 0, 0 };
    if (i < 0) return stats;
    stats.count = r->count + i * E;
    stats.prob = r->prob + i * E;
    stats.z = r->z + 2 * i;
    return stats;
}

const real *router_bias_of(const Trainer *t, int layer) {
    int64_t i = t->m->moe_index[layer];
    return t->router.bias && i >= 0 ? t->router.bias + i * t->m->c.E : 0;
}

// ---- the auxiliary losses -------------------------------------------------------------------
void router_totals_sum(Trainer *t) {
    const Config *c = &t->m->c;
    const RouterTotals *r = &t->router;
    if (!c->n_moe) return;
    size_t n = pairs(t);
    size_t n_z = 2 * (size_t)c->n_moe;
    comm_where(-1, -1, "router statistics");
    comm_wait(all_reduce_start(t->g->all, r->count, n, DTYPE_I64, STREAM_EXCHANGE));
    comm_wait(all_reduce_start(t->g->all, r->prob, n, DTYPE_F64, STREAM_EXCHANGE));
    comm_wait(all_reduce_start(t->g->all, r->z, n_z, DTYPE_F64, STREAM_EXCHANGE));
    double positions = round_positions(t);
    if (!t->o.aux_per_layer) {
        router_share(r->share, r->count, positions * c->n_moe, c->n_moe, c->E);
        return;
    }
    for (int64_t i = 0; i < c->n_moe; i++)
        router_share(r->share + i * c->E, r->count + i * c->E, positions, 1, c->E);
}

RouterLoss router_loss_of(const Trainer *t, int layer) {
    const Config *c = &t->m->c;
    int64_t i = t->o.aux_per_layer && c->is_moe[layer] ? t->m->moe_index[layer] : 0;
    // The update's aux is the mean of its rounds' values; z is one mean over all of its tokens.
    double pooled = round_positions(t) * c->n_moe * t->o.rounds;
    RouterLoss loss = { t->router.share + i * c->E, t->o.aux_coef * c->E / pooled,
                        t->o.z_coef / pooled };
    // An update without targets has no gradient at all.
    if (t->tokens.valid == 0) loss.aux_scale = loss.z_scale = 0;
    return loss;
}

// aux = E * sum over e of f_e P_e, f_e = choices and P_e = mean probability of expert e a position,
// of all layers pooled or the mean of the layers' values.
static double round_aux(const Trainer *t) {
    const Config *c = &t->m->c;
    double positions = round_positions(t);
    double aux = 0;
    for (int e = 0; e < c->E; e++) {
        double f = 0;
        double p = 0;
        for (int64_t l = 0; l < c->n_moe; l++) {
            double f_layer = (double)t->router.round_count[l * c->E + e] / positions;
            double p_layer = t->router.round_prob[l * c->E + e] / positions;
            if (t->o.aux_per_layer) aux += c->E * f_layer * p_layer / c->n_moe;
            f += f_layer / c->n_moe;
            p += p_layer / c->n_moe;
        }
        if (!t->o.aux_per_layer) aux += c->E * f * p;
    }
    return aux;
}

double router_totals_collect(Trainer *t) {
    RouterTotals *r = &t->router;
    int64_t n = pairs(t);
    int64_t n_z = 2 * t->m->c.n_moe;
    if (!n) return 0;
    device_download(r->round_count, r->count, n * sizeof(int64_t));
    device_download(r->round_prob, r->prob, n * sizeof(double));
    device_download(r->round_z, r->z, n_z * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        r->host_count[i] += r->round_count[i];
        r->host_prob[i] += r->round_prob[i];
    }
    for (int64_t i = 0; i < n_z; i++) r->host_z[i] += r->round_z[i];
    return round_aux(t);
}

void router_totals_report(const Trainer *t, StepResult *result) {
    const Config *c = &t->m->c;
    double positions = round_positions(t) * t->o.rounds;
    for (int64_t l = 0; l < c->n_moe; l++) {
        int64_t most = 0;
        int64_t total = 0;
        for (int e = 0; e < c->E; e++) {
            int64_t n = t->router.host_count[l * c->E + e];
            result->expert_dead += n == 0;
            total += n;
            if (n > most) most = n;
        }
        double load = total ? (double)most * c->E / (double)total : 0;
        if (load > result->expert_load_max) result->expert_load_max = load;
        result->z += t->router.host_z[2 * l] / (positions * c->n_moe);
    }
}

// ---- the selection bias ---------------------------------------------------------------------
// An expert with less than its share becomes easier to select, though never heavier in the sum.
// Counts are integers that all ranks have, and so the bias has the same bits everywhere.
void router_bias_update(Trainer *t) {
    const Config *c = &t->m->c;
    for (int64_t l = 0; l < c->n_moe; l++) {
        const int64_t *count = t->router.host_count + l * c->E;
        float *bias = t->router.host_bias + l * c->E;
        int64_t total = 0;
        for (int e = 0; e < c->E; e++) total += count[e];
        for (int e = 0; e < c->E; e++) {
            int64_t below = total - count[e] * c->E;
            bias[e] += (float)(t->o.balance_rate * ((below > 0) - (below < 0)));
        }
    }
    trainer_set_bias(t, t->router.host_bias, pairs(t));
}

void trainer_set_bias(Trainer *t, const float *bias, size_t n) {
    real *value = (real *)xmalloc(n * sizeof(real), "router bias");
    for (size_t i = 0; i < n; i++) {
        t->router.host_bias[i] = bias[i];
        value[i] = (real)bias[i];
    }
    device_upload(t->router.bias, value, n * sizeof(real));
    free(value);
}
