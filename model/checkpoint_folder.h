// Folders of checkpoints on disk: durable writes, names, what is complete, publishing and removing.
// Knows no tensors.
#ifndef MOE_CHECKPOINT_FOLDER_H
#define MOE_CHECKPOINT_FOLDER_H
#include "../kernels/types.h"
MOE_BEGIN_C
// mkdir -p; dies where that is impossible.
void folder_make(const char *path);
void folder_sync(const char *path);
// Removes a flat folder and the files in it, as far as possible.
void folder_remove(const char *path);
// Bytes a user may still write where `path` lies; -1 where the system cannot say.
int64_t folder_free_bytes(const char *path);
// A new file with this content, synced. Returns 0 or errno.
int folder_write(const char *dir, const char *name, const void *data, size_t bytes);

// incomplete_step_N under out/checkpoints: fresh and empty (caller frees).
char *folder_begin(const char *out, int64_t step);
// The incomplete folder gets its name, `latest` moves, and all but the newest `keep` complete
// checkpoints go (0: all stay).
void folder_publish(const char *out, int64_t step, int keep);
// The newest complete step or -1; removes leftovers, repairs `latest`, warns about folders that
// look like checkpoints and are not complete.
int64_t folder_newest(const char *out);
MOE_END_C
#endif
