// Files and folders on disk: opened without ever waiting, checked to be what they should be, read
// and written completely, and durable when a function says so. Names may be relative to an open
// folder (`at`, or AT_FDCWD), so that a folder that is renamed meanwhile stays the one that is
// meant. A call that a signal interrupts is repeated.
//
// Functions that return an int without another word return 0 or an errno.
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
MOE_END_C
#endif
