// The folder of a run: lock and identity; see file.h.
#define _GNU_SOURCE // F_OFD_SETLK
#include "file.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *const LOCK = ".lock";

RunFolder run_folder_look(const char *path) {
    RunFolder f = { path, -1, -1, 0 };
    if (!*path) return f;
    f.fd = folder_open(AT_FDCWD, path, 0);
    if (f.fd < 0)
        die("--out %s: cannot open the folder: %s|"
            "ranks of several machines need a folder that all of them see",
            path, strerror(errno));
    return f;
}

static int try_lock(int fd) {
    struct flock whole;
    memset(&whole, 0, sizeof whole);
    whole.l_type = F_WRLCK;
    whole.l_whence = SEEK_SET;
    int failed;
    do failed = fcntl(fd, F_OFD_SETLK, &whole);
    while (failed && errno == EINTR);
    return failed ? errno : 0;
}

// Ends the run in the name of the owner. It may have locked the file and not signed it yet.
static void die_owned(const RunFolder *f, int fd) MOE_NORETURN;
static void die_owned(const RunFolder *f, int fd) {
    char owner[256] = "";
    for (int i = 0; i < 20 && !strchr(owner, '\n'); i++) {
        struct timespec wait = { 0, 50 * 1000 * 1000 };
        nanosleep(&wait, 0);
        ssize_t n = pread(fd, owner, sizeof owner - 1, 0);
        owner[n > 0 ? n : 0] = 0;
    }
    owner[strcspn(owner, "\n")] = 0;
    die("--out %s is in use by another run (%s)|"
        "wait for it or end it, or choose another --out; --steps 0 --resume only looks",
        f->path, *owner ? owner : "which has not said its name");
}

RunFolder run_folder_own(const char *path) {
    folder_make(path);
    RunFolder f = run_folder_look(path);
    f.lock = file_edit(f.fd, LOCK);
    if (f.lock < 0)
        die("--out %s: cannot open its file %s: %s|choose a folder that this user may write to",
            path, LOCK, file_why(errno));
    int error = try_lock(f.lock);
    if (error == EAGAIN || error == EACCES) die_owned(&f, f.lock);
    if (error)
        warn("--out %s: this file system has no locks (%s): nothing keeps a second run out", path,
             strerror(error));
    char host[200] = "unknown";
    char text[256];
    gethostname(host, sizeof host - 1);
    int n = snprintf(text, sizeof text, "host %s, process %ld\n", host, (long)getpid());
    if (ftruncate(f.lock, 0)) error = errno;
    if (file_write_at(f.lock, 0, text, n))
        warn("--out %s: cannot write %s: another run will not learn who owns it", path, LOCK);
    return f;
}

void run_folder_close(RunFolder *f) {
    if (f->lock >= 0) close(f->lock);
    if (f->fd >= 0) close(f->fd);
    f->fd = f->lock = -1;
}

static void not_empty(void *context, const char *name) {
    if (strcmp(name, LOCK)) *(int *)context = 0;
}

int run_folder_is_empty(const char *path) {
    int fd = folder_open(AT_FDCWD, path, 0);
    int empty = 1;
    if (fd < 0 && errno == ENOENT) return 1;
    int error = fd < 0 ? errno : folder_visit(fd, not_empty, &empty);
    if (error)
        die("--out %s: cannot read the folder: %s|choose one that this user may read and write",
            path, strerror(error));
    close(fd);
    return empty;
}

int run_folder_in_place(RunFolder *f) {
    struct stat now, then;
    if (f->fd < 0 || fstat(f->fd, &then)) return 1;
    if (!stat(f->path, &now) && now.st_dev == then.st_dev && now.st_ino == then.st_ino) return 1;
    f->moved = 1;
    return 0;
}
