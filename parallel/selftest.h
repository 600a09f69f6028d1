// --selftest: every collective of every group of a grid, checked and timed.
#ifndef MOE_SELFTEST_H
#define MOE_SELFTEST_H
#include <stdio.h>
#include "grid.h"
MOE_BEGIN_C
// Checks and times all collectives over each group of more than one rank; rank 0 writes a table to out. Returns the number of failed checks, the same on all ranks.
int comm_selftest(const Grid *g, FILE *out);
MOE_END_C
#endif
