// Who sends what to whom in an ep group (kernels.h): the table of rows that the host needs to post
// messages, and the lists that follow a token to the ranks of its experts and back. Ids ascend, so
// the experts of one rank are neighbours in a token's list, and a change of rank is a new
// destination.
#include "../device.h"
#include "../fail.h"
#include "math.h"

void route_table(int *table, const int *ids, RouteShape s) {
    kernel_begin("route_table", 0);
    const int local = (int)(s.E / s.ranks);
    const int tile = device_row_tile();
    const int E = (int)s.E;
    int *count = SCRATCH(SCRATCH_SHARED, int, s.E);
    int *rows = table + s.sources * s.ranks;
    memset(table, 0, route_table_size(s) * sizeof *table);
    memset(count, 0, s.E * sizeof *count);
    for (int64_t i = 0; i < s.sources; i++, table += s.ranks)
        for (int64_t r = 0; r < s.R; r++, ids += s.K) {
            int end = 0; // the first expert of the ranks after the last destination
            for (int64_t k = 0; k < s.K; k++) {
                int id = ids[k];
                if (id < 0 || id >= E) {
                    rows[s.ranks]++;
                    continue;
                }
                count[id]++;
                if (id < end) continue;
                table[id / local]++;
                end = (id / local + 1) * local;
            }
        }
    for (int e = 0; e < E; e++) rows[e / local] += (count[e] + tile - 1) / tile * tile;
}

void route_lists(int *send_token, int *sum_row, int *choice, const int *ids, int me, RouteShape s) {
    kernel_begin("route_lists", 0);
    const int local = (int)(s.E / s.ranks);
    const int first = me * local;
    const int64_t J = s.ranks < s.K ? s.ranks : s.K;
    const int *mine = ids + me * s.R * s.K;
    int *row = SCRATCH(SCRATCH_SHARED, int, s.ranks + 1); // the next row to each rank
    memset(row, 0, (s.ranks + 1) * sizeof *row);
    for (int counted = 0; counted < 2; counted++) { // how many rows to each rank, then which
        for (int64_t r = 0; r < s.R; r++) {
            int end = 0;
            int j = 0;
            for (int64_t k = 0; k < s.K; k++) {
                int id = mine[r * s.K + k];
                if (id < end || id >= s.E) continue;
                int rank = id / local;
                end = (rank + 1) * local;
                if (!counted) {
                    row[rank + 1]++;
                    continue;
                }
                sum_row[r * J + j++] = row[rank];
                send_token[row[rank]++] = (int)r;
            }
            for (; counted && j < J; j++) sum_row[r * J + j] = -1;
        }
        for (int64_t j = 0; !counted && j < s.ranks; j++) row[j + 1] += row[j];
    }
    for (int64_t t = 0; t < s.ranks * s.R; t++, ids += s.K) {
        int here = 0;
        for (int64_t k = 0; k < s.K; k++) here |= ids[k] >= first && ids[k] < first + local;
        if (!here) continue;
        memcpy(choice, ids, s.K * sizeof *ids);
        choice += s.K;
    }
}
