// Files and folders on disk: opened without ever waiting, checked to be what they should be, read
// and written completely, and durable when a function says so. Names may be relative to an open
// folder (`at`, or AT_FDCWD), so that a folder that is renamed meanwhile stays the one that is
// meant. A call that a signal interrupts is repeated.
//
// Functions that return an int without another word return 0 or an errno. After them: checksums of
// what was read or written (checksum.c), and the folder of a run (run_folder.c).
#ifndef MOE_FILE_H
#define MOE_FILE_H
#include "../kernels/types.h"
#include <fcntl.h>
struct cJSON;
MOE_BEGIN_C

// Opens a regular file for reading and returns its descriptor; *bytes: its size. flags: 0, or
// O_NOFOLLOW to refuse a symbolic link. Returns -1 with errno where that is impossible; a pipe, a
// device or a folder has the errno ESPIPE.
int file_open(int at, const char *name, int flags, int64_t *bytes);
// Returns what errno `error` of these functions means, for a message.
const char *file_why(int error);
// Ends the run where `path` is a symbolic link to a file that is not there: in the cache of the hub
// that is a file whose download did not end. Does nothing for any other path.
void file_check_link(const char *path);
// Reads a whole file of at most `limit` bytes into fresh memory, ended by a zero byte; *bytes: its
// size (0: not wanted). EFBIG: it is larger.
int file_load(int at, const char *name, int flags, int64_t limit, char **text, int64_t *bytes);
// Reads `bytes` bytes from byte `first` on. Ends the run, naming `path`, where that is impossible.
void file_read_at(int fd, const char *path, int64_t first, void *dst, int64_t bytes);
int file_write_at(int fd, int64_t first, const void *src, int64_t bytes);
// Open a file for reading and writing, making it where it is missing, and return its descriptor, or
// -1 with errno; file_create empties it. Refuse symbolic links, pipes and devices.
int file_edit(int at, const char *name);
int file_create(int at, const char *name);
// Makes what was written durable.
int file_sync(int fd);
// Writes a new file with this content, synced.
int file_write(int at, const char *name, const void *data, size_t bytes);
// Writes a file under another name, synced, and gives it its name: a reader and a power cut see the
// old content or the new.
int file_replace(int at, const char *name, const void *data, size_t bytes);

// Parses a JSON document strictly: nothing follows it, no object has a key twice (programs disagree
// on which of the two counts), and it has at most JSON_VALUES values (the files of the 30B model
// have 0.9 million, and a value takes 64 bytes of memory). Returns 0 and says why not; the caller
// deletes the result.
enum { JSON_VALUES = 2000000, JSON_WHY = 160 };
struct cJSON *json_parse(const char *text, int64_t bytes, char why[JSON_WHY]);

// Opens a folder and returns its descriptor, or -1 with errno. flags: 0, or O_NOFOLLOW.
int folder_open(int at, const char *name, int flags);
// Makes the folder where it is missing and opens it, never through a link. Returns its descriptor,
// or -1 with errno.
int folder_enter(int at, const char *name);
// Makes a folder and all above it, each synced into the one above. Ends the run where it cannot.
void folder_make(const char *path);
// Makes the names in an open folder durable.
int folder_sync(int fd);
// Removes a folder and all in it, or a file; of a symbolic link only the link.
int folder_remove(int at, const char *name);
// Calls visit for every name in an open folder but "." and "..".
int folder_visit(int fd, void (*visit)(void *context, const char *name), void *context);
// Returns the bytes that a user may still write there; -1 where the system cannot say.
int64_t folder_free_bytes(int fd);

// ---- checksum.c: CRC32C, the checksum of iSCSI, ext4 and Btrfs: a 32-bit number that any flipped
// byte, and any burst of up to 32 bits, changes. It is a remainder of polynomials over two
// elements, so the sums of two pieces give the sum of both together: ranks sum what they read or
// write, in any cut, and the file's sum follows (I4, layout-free numbers) ---- Returns the sum of
// what gave `sum` so far (0: nothing) followed by n bytes. Uses the processor's instruction where
// it has one (SSE 4.2, ARMv8), else a table.
uint32_t checksum(uint32_t sum, const void *data, size_t n);
// Returns the sum of two pieces, of which the second has `bytes` bytes.
uint32_t checksum_join(uint32_t first, uint32_t second, int64_t bytes);

// The sum of a byte range [begin, end) of a file, which is known by its number.
typedef struct {
    int32_t file;
    uint32_t sum;
    int64_t begin, end;
} SumRange;
typedef struct {
    SumRange *range;
    int n, room;
} SumList;
// Add a range, or the sum of `bytes` bytes of a file, from byte `begin` on, which joins the range
// before it where they touch.
void sums_add(SumList *s, int file, int64_t begin, const void *data, int64_t bytes);
void sums_append(SumList *s, SumRange r);
void sums_free(SumList *s);
// Sorts by file and place, drops what is there twice (data-parallel copies read the same ranges)
// and joins what touches.
void sums_sort(SumList *s);

// ---- run_folder.c: the folder of a run (--out): who owns it, that it stays the same folder, and
// that nothing outside it is touched. Everything under it is opened relative to its descriptor and
// never through a symbolic link ----
//
// The owner holds a write lock of the whole file `.lock` in it: an open-file-description lock
// (F_OFD_SETLK), the kind that the kernel drops when its last holder ends, however it ends; that
// other descriptors of the process cannot drop by closing; and that NFS carries to its server,
// where it excludes other machines and the server itself. A machine that dies loses it there when
// its lease runs out (NFSv4, by default 90 s) or when it starts again (NFSv3). The file's text says
// who holds it; the text alone means nothing, so nothing needs to be cleaned up after a crash.
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
