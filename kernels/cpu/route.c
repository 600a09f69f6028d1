// Who sends what to whom in an ep group (kernels.h): the table of rows that the host needs to post
// messages, and the lists that follow a token to the ranks of its experts and back. Ids ascend, so
// the experts of one rank are neighbours in a token's list, and a change of rank is a new
// destination.
#include "../device.h"
#include "../fail.h"
#include "math.h"

// The rank of the k-th choice if it is the token's first there, else -1.
static int new_rank(const int *ids, int64_t k, int64_t local, int64_t E) {
    if (ids[k] < 0 || ids[k] >= E) return -1;
    int rank = (int)(ids[k] / local);
    return k > 0 && ids[k - 1] >= rank * local ? -1 : rank;
}

void route_table(int *table, const int *ids, RouteShape s) {
    kernel_begin("route_table", 0);
    int64_t local = s.E / s.ranks, tile = device_row_tile();
    int *count = SCRATCH(SCRATCH_SHARED, int, s.E), *rows = table + s.sources * s.ranks;
    memset(table, 0, (size_t)route_table_size(s) * sizeof *table);
    memset(count, 0, (size_t)s.E * sizeof *count);
    for (int64_t i = 0; i < s.sources; i++)
        for (int64_t r = 0; r < s.R; r++) {
            const int *id = ids + (i * s.R + r) * s.K;
            for (int64_t k = 0; k < s.K; k++) {
                int rank = new_rank(id, k, local, s.E);
                if (rank >= 0) table[i * s.ranks + rank]++;
                if (id[k] >= 0 && id[k] < s.E)
                    count[id[k]]++;
                else
                    rows[s.ranks]++;
            }
        }
    for (int64_t e = 0; e < s.E; e++) rows[e / local] += (int)(div_up(count[e], tile) * tile);
}

void route_lists(int *send_token, int *sum_row, int *choice, const int *ids, int me, RouteShape s) {
    kernel_begin("route_lists", 0);
    int64_t local = s.E / s.ranks, J = s.ranks < s.K ? s.ranks : s.K;
    const int *mine = ids + me * s.R * s.K;
    int *row = SCRATCH(SCRATCH_SHARED, int, s.ranks + 1); // next row to each rank
    memset(row, 0, (size_t)(s.ranks + 1) * sizeof *row);
    for (int64_t r = 0; r < s.R; r++)
        for (int64_t k = 0; k < s.K; k++) row[1 + new_rank(mine + r * s.K, k, local, s.E)]++;
    row[0] = 0; // took those that are no new destination
    for (int64_t j = 0; j < s.ranks; j++) row[j + 1] += row[j];
    for (int64_t r = 0; r < s.R; r++) {
        int64_t j = 0;
        for (int64_t k = 0; k < s.K; k++) {
            int rank = new_rank(mine + r * s.K, k, local, s.E);
            if (rank < 0) continue;
            sum_row[r * J + j++] = row[rank];
            send_token[row[rank]++] = (int)r;
        }
        for (; j < J; j++) sum_row[r * J + j] = -1;
    }
    for (int64_t t = 0; t < s.ranks * s.R; t++, ids += s.K) {
        int here = 0;
        for (int64_t k = 0; k < s.K; k++) here |= ids[k] >= me * local && ids[k] < (me + 1) * local;
        if (!here) continue;
        memcpy(choice, ids, (size_t)s.K * sizeof *ids);
        choice += s.K;
    }
}
