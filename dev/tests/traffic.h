// Bytes that every rank sends in an update, by group, against plan_traffic() with the measured
// routing: equal to the last byte, in every layout, dispatcher, attention, recompute and update
// mode, with several micro-batches and rounds.
#ifndef MOE_TRAFFIC_H
#define MOE_TRAFFIC_H
#include "layouts.h"
#include "../../model/plan.h"

static int64_t group_bytes(Comm *g) {
    int64_t bytes = 0;
    for (int k = 0; k < COMM_KINDS; k++) bytes += comm_traffic(g, k, 1).bytes;
    return bytes;
}

// One update's bytes of each group, and what the plan says. Returns whether they are equal on this
// rank; text: the first that is not.
static int traffic_equal(const Run *r, char *text, size_t size) {
    const Trainer *t = r->t;
    const Grid *g = &r->g;
    double micro = (double)t->n_micro * t->o.rounds;
    double dispatches = micro * r->m.c.n_moe;
    Routing routing = {
        (double)t->counts.sent / dispatches, (double)t->counts.received / dispatches,
        t->counts.sent ? (double)t->counts.redispatched / (double)t->counts.sent : 0,
        (double)t->counts.rerouted / dispatches, (double)t->counts.reattended / (micro * r->m.c.L)
    };
    Traffic plan = plan_traffic(&r->m, g, &t->o, routing);
    const double *b = plan.bytes;
    // The norm travels in the dense group, all other statistics in the group of all.
    double statistics_dense = (double)comm_traffic(g->dense_group, COMM_ALL_REDUCE, 0).bytes;
    struct {
        const char *name;
        Comm *group;
        double expected;
    } row[] = {
        { "ep", g->ep_group, b[SEND_ROUTING] + b[SEND_TOKENS] + b[SEND_HEADS] },
        { "fsdp", g->fsdp_group, b[SEND_LOCAL_WEIGHTS] + b[SEND_LOCAL_GRADS] },
        { "dense", g->dense_group, b[SEND_DENSE_WEIGHTS] + b[SEND_DENSE_GRADS] + statistics_dense },
        { "dp", g->dp_group, b[SEND_DP] },
        { "all", g->all, b[SEND_STATISTICS] - statistics_dense },
    };
    int equal = 1;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        int64_t bytes = group_bytes(row[i].group);
        if (fabs((double)bytes - row[i].expected) > 1e-3 &&
            equal) { // the plan's numbers are doubles: shares of rows are not whole
            snprintf(text, size, ": rank %d sent %lld bytes in group %s, the plan says %.3f",
                     g->rank, (long long)bytes, row[i].name, row[i].expected);
            equal = 0;
        }
    }
    return equal;
}

static void test_traffic(const Fixture *f, int quick) {
    char *path = xasprintf("%s/config.json", f->dir);
    Config c = config_read(path);
    free(path);
    Shape shape[MAX_VALUES];
    int world = comm_world_size();
    int n = shapes_of(shape, world, &c);
    int batch = 4 * world;
    int cases = 0;
    int wrong = 0;
    char first[256] = "";
    for (int i = 0; i < n; i++)
        for (int which = 0; which < 3 * 2 * 4 * 2 * 2; which++) {
            int dispatch = which % 3;
            int heads = which / 3 % 2;
            int recompute = which / 6 % 4;
            int update = which / 24 % 2;
            int rounds = 1 + which / 48;
            if ((quick && which % 7 != i % 7) || (update && rounds > 1) ||
                (shape[i].ep == 1 && (dispatch || heads)) || (heads && c.KV % shape[i].ep))
                continue;
            Layout l = { shape[i].dp, shape[i].fsdp, shape[i].ep, (Dispatch)dispatch, heads };
            Setup s = fixture_setup(f, OPT_SGD);
            s.step.batch = batch;
            s.step.micro_batch = 1;
            s.step.rounds = rounds;
            s.step.recompute = (Recompute)recompute;
            s.step.update_layer = update;
            Run *r = run_open(f, &l, &s);
            Comm *group[] = { r->g.ep_group, r->g.fsdp_group, r->g.dense_group, r->g.dp_group,
                              r->g.all };
            for (int k = 0; k < 5; k++) group_bytes(group[k]);
            // auto with half the store: some pairs are kept, others recomputed
            if (recompute == RECOMPUTE_AUTO) r->t->act.store_size /= 2;
            run_step(r, 1, r->lr, 0);
            char text[256] = "";
            int equal = traffic_equal(r, text, sizeof text);
            int all_equal = comm_max(r->g.all, !equal) == 0;
            if (!all_equal && !wrong) {
                int speaker = (int)comm_max(r->g.all, equal ? -1 : r->g.rank);
                comm_broadcast(r->g.all, text, sizeof text, speaker);
                snprintf(
                    first, sizeof first,
                    "; dp %d fsdp %d ep %d, %s, heads %d, recompute %s, update %d, rounds %d%.150s",
                    l.dp, l.fsdp, l.ep, dispatch_names[dispatch], heads, recompute_names[recompute],
                    update, rounds, text);
            }
            wrong += !all_equal;
            cases++;
            run_close(r);
        }
    check(!wrong,
          "bytes sent in an update by every rank and group are those of the plan, in %d cases (%d "
          "differ%s)",
          cases, wrong, first);
    config_free(&c);
}
#endif
