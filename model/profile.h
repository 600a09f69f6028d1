// --profile STEP: where the time of one update goes. A mark ends the phase before it and begins the
// next; phases of the same name add up.
#ifndef MOE_PROFILE_H
#define MOE_PROFILE_H
#include "../kernels/types.h"
#include <stdio.h>
MOE_BEGIN_C
void profile_start(void); // from now on marks are taken (each waits for the device, so the update
                          // is slower on GPUs)
// name: a string literal. flops: of the phase that begins here, for its rate; 0 where it has none
// to speak of. Costs one branch while nothing is profiled.
void profile_mark(const char *name, double flops);
void profile_print(FILE *file); // ends profiling and prints phases by time; 0 = silent
MOE_END_C
#endif
