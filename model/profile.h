// --profile STEP: where the time of one update goes. Every kernel, every collective and every wait
// for one reports itself when it begins (kernels/device.h), and lasts until the next one does.
#ifndef MOE_PROFILE_H
#define MOE_PROFILE_H
#include "../parallel/comm.h"
#include <stdio.h>
MOE_BEGIN_C
typedef struct Profile Profile;
// Starts to listen; the ranks of `all` together, so that their clocks begin at one moment. Each
// report then waits for the device: times are exact, but nothing overlaps and the update is slower.
Profile *profile_start(Comm *all);
// Stops to listen and prints the reports by time, those of one name and about one size together;
// nothing if `file` is 0.
void profile_print(Profile *profile, FILE *file);
// Writes one report an event in the format of Chrome's tracing and of Perfetto, with a process for
// each rank and a row for each stream. All ranks call it, rank 0 writes. Dies where it cannot.
void profile_trace(const Profile *profile, const char *path);
void profile_free(Profile *profile);
MOE_END_C
#endif
