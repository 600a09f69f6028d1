// ./train_moe --selftest: every collective over every group of the grid, checked and timed, before
// a long run is trusted to the machines.
#ifndef MOE_SELFTEST_H
#define MOE_SELFTEST_H
#include "grid.h"
#include <stdio.h>
MOE_BEGIN_C
// All ranks call it. Rank 0 writes the table (its own groups; times are the slowest rank's of the
// group) to out. Returns the number of wrong results over all ranks.
int comm_selftest(const Grid *g, FILE *out);
MOE_END_C
#endif
