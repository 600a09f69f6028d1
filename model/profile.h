// --profile STEP: where the time of one update goes. Every kernel and collective reports itself
// when it begins (kernel_begin in kernels/device.h), and runs until the next one does.
#ifndef MOE_PROFILE_H
#define MOE_PROFILE_H
#include "../kernels/types.h"
#include <stdio.h>
MOE_BEGIN_C
typedef struct Profile Profile;
// Starts to listen. Each report then waits for the device, so that the update is slower on GPUs.
Profile *profile_start(void);
// Stops to listen, prints the kernels by time (nothing if `file` is 0) and frees the profile.
void profile_print(Profile *profile, FILE *file);
MOE_END_C
#endif
