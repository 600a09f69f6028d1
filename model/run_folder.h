// The folder of a run (--out): who owns it, that it stays the same folder, and that nothing outside
// it is touched. Everything under it is opened relative to its descriptor and never through a
// symbolic link.
//
// The owner holds a write lock of the whole file `.lock` in it: an open-file-description lock
// (F_OFD_SETLK), the kind that the kernel drops when its last holder ends, however it ends; that
// other descriptors of the process cannot drop by closing; and that NFS carries to its server,
// where it excludes other machines and the server itself. A machine that dies loses it there when
// its lease runs out (NFSv4, by default 90 s) or when it starts again (NFSv3). The file's text says
// who holds it; the text alone means nothing, so nothing needs to be cleaned up after a crash.
#ifndef MOE_RUN_FOLDER_H
#define MOE_RUN_FOLDER_H
#include "../kernels/types.h"
MOE_BEGIN_C
typedef struct {
    const char *path; // as given with --out
    int fd;           // the folder; -1: there is no --out
    int lock;         // descriptor that holds the lock; -1: this process only reads, or is no owner
    int moved;        // run_folder_in_place() was 0 once
} RunFolder;

// Opens a folder that must be there, without a lock: for looking at a run, and for the ranks beside
// the one that owns it. "": no folder.
RunFolder run_folder_look(const char *path);
// Makes the folder where it is missing, opens and locks it. Ends the run where another process owns
// it, naming host and process.
RunFolder run_folder_own(const char *path);
void run_folder_close(RunFolder *f);
// Returns 1 where the folder is not there or holds nothing that a run left.
int run_folder_is_empty(const char *path);
// Returns 0, and remembers it in f->moved, where the path leads to another folder than the one that
// was opened: it was renamed, removed or unmounted since.
int run_folder_in_place(RunFolder *f);
MOE_END_C
#endif
