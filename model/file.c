// Files and folders on disk: see file.h. Everything that reads a file of somebody else opens it
// here: O_NONBLOCK, because a pipe in the place of a file would else stop the program for ever, and
// then a look at what was opened.
#define _GNU_SOURCE
#include "file.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { IO_CHUNK = 1 << 30 }; // Linux moves at most 2 GiB a call

static int open_at(int at, const char *name, int flags) {
    int fd;
    do fd = openat(at, name, flags | O_CLOEXEC | O_NOCTTY, 0666);
    while (fd < 0 && errno == EINTR);
    return fd;
}

int file_sync(int fd) {
    int failed;
    do failed = fsync(fd);
    while (failed && errno == EINTR);
    return failed ? errno : 0;
}

// Keeps the first error; close reports what the disk refused late (NFS).
static int close_file(int fd, int error) {
    if (close(fd) && !error && errno != EINTR) error = errno;
    return error;
}

// ---- files ----------------------------------------------------------------------------------
// fd, if it is a regular file; else -1 with errno.
static int regular(int fd, struct stat *st) {
    if (fd < 0) return -1;
    int error = 0;
    if (fstat(fd, st))
        error = errno;
    else if (!S_ISREG(st->st_mode))
        error = ESPIPE;
    if (!error) return fd;
    close(fd);
    errno = error;
    return -1;
}

int file_open(int at, const char *name, int flags, int64_t *bytes) {
    struct stat st;
    int fd = regular(open_at(at, name, O_RDONLY | O_NONBLOCK | flags), &st);
    if (fd >= 0) *bytes = st.st_size;
    return fd;
}

const char *file_why(int error) {
    if (error == ESPIPE || error == ENXIO) return "not a file but a folder, a pipe or a device";
    if (error == ELOOP) return "it is a symbolic link, which is not followed here";
    return strerror(error);
}

void file_check_link(const char *path) {
    struct stat st;
    if (!lstat(path, &st) && S_ISLNK(st.st_mode) && stat(path, &st) && errno == ENOENT)
        die("%s: a link to a file that is not there|the download is incomplete: repeat it "
            "(hf download)",
            path);
}

int file_load(int at, const char *name, int flags, int64_t limit, char **text, int64_t *bytes) {
    int64_t size = 0;
    int64_t used = 0;
    int fd = file_open(at, name, flags, &size);
    int error = fd < 0 ? errno : 0;
    if (error) return error;
    if (size > limit) {
        close(fd);
        return EFBIG;
    }
    char *p = (char *)xmalloc(size + 1, "the text of a file");
    while (used < size) {
        ssize_t n = pread(fd, p + used, size - used, (off_t)used);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) error = errno;
        if (n <= 0) break; // a file that became shorter is what it is now
        used += n;
    }
    close(fd);
    p[used] = 0;
    if (error) {
        free(p);
        return error;
    }
    *text = p;
    if (bytes) *bytes = used;
    return 0;
}

void file_read_at(int fd, const char *path, int64_t first, void *dst, int64_t bytes) {
    for (char *p = (char *)dst; bytes > 0;) {
        ssize_t n = pread(fd, p, bytes < IO_CHUNK ? bytes : IO_CHUNK, (off_t)first);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            die("%s: cannot read at byte %lld: %s|check the disk", path, (long long)first,
                strerror(errno));
        if (n == 0)
            die("%s: the file ends at byte %lld, it was cut while in use|copy or download it again",
                path, (long long)first);
        p += n;
        first += n;
        bytes -= n;
    }
}

int file_write_at(int fd, int64_t first, const void *src, int64_t bytes) {
    for (const char *p = (const char *)src; bytes > 0;) {
        ssize_t n = pwrite(fd, p, bytes < IO_CHUNK ? bytes : IO_CHUNK, (off_t)first);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : ENOSPC;
        p += n;
        first += n;
        bytes -= n;
    }
    return 0;
}

int file_edit(int at, const char *name) {
    struct stat st;
    return regular(open_at(at, name, O_RDWR | O_CREAT | O_NONBLOCK | O_NOFOLLOW), &st);
}

int file_create(int at, const char *name) {
    int fd = file_edit(at, name);
    if (fd < 0 || !ftruncate(fd, 0)) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int file_write(int at, const char *name, const void *data, size_t bytes) {
    int fd = file_create(at, name);
    int error = fd < 0 ? errno : 0;
    if (error) return error;
    error = file_write_at(fd, 0, data, (int64_t)bytes);
    if (!error) error = file_sync(fd);
    return close_file(fd, error);
}

int file_replace(int at, const char *name, const void *data, size_t bytes) {
    char *fresh = xasprintf("%s.new", name);
    unlinkat(at, fresh, 0);
    int error = file_write(at, fresh, data, bytes);
    if (!error && renameat(at, fresh, at, name)) error = errno;
    if (error) unlinkat(at, fresh, 0);
    free(fresh);
    return error ? error : folder_sync(at);
}

// ---- JSON -----------------------------------------------------------------------------------
// Counts values without building them: each follows an opening bracket, a comma or the begin.
static int64_t count_values(const char *text, int64_t bytes) {
    int64_t n = 1;
    int inside = 0;
    for (int64_t i = 0; i < bytes; i++) {
        if (inside && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            inside = !inside;
        else if (!inside)
            n += text[i] == ',' || text[i] == '[' || text[i] == '{';
    }
    return n;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// A key that some object of the document has twice, 0 where none has.
static const char *twice(const cJSON *v) {
    const cJSON *child = 0;
    size_t n = 0;
    const char *found = 0;
    cJSON_ArrayForEach(child, v) {
        n++;
        if (!found && child->child) found = twice(child);
    }
    if (found || !cJSON_IsObject(v) || n < 2) return found;
    const char **key = (const char **)xmalloc(n * sizeof *key, "keys");
    n = 0;
    cJSON_ArrayForEach(child, v) key[n++] = child->string;
    qsort((void *)key, n, sizeof *key, by_text);
    for (size_t i = 1; i < n && !found; i++)
        if (!strcmp(key[i - 1], key[i])) found = key[i];
    free((void *)key);
    return found;
}

struct cJSON *json_parse(const char *text, int64_t bytes, char why[JSON_WHY]) {
    int64_t values = count_values(text, bytes);
    if (values > JSON_VALUES) {
        snprintf(why, JSON_WHY, "%lld values are more than the %d that such a file has",
                 (long long)values, JSON_VALUES);
        return 0;
    }
    const char *end = text;
    cJSON *root = cJSON_ParseWithOpts(text, &end, 0);
    while (root && end < text + bytes && strchr(" \t\r\n", *end) && *end) end++;
    if (!root || end != text + bytes) {
        snprintf(why, JSON_WHY, "not valid JSON near \"%.40s\" (byte %lld)", end,
                 (long long)(end - text));
        cJSON_Delete(root);
        return 0;
    }
    const char *key = twice(root);
    if (!key) return root;
    snprintf(why, JSON_WHY, "the key \"%.60s\" is there twice", key);
    cJSON_Delete(root);
    return 0;
}

// ---- folders --------------------------------------------------------------------------------
int folder_open(int at, const char *name, int flags) {
    return open_at(at, name, O_RDONLY | O_DIRECTORY | O_NONBLOCK | flags);
}

int folder_enter(int at, const char *name) {
    if (mkdirat(at, name, 0777)) {
        if (errno != EEXIST) return -1;
    } else {
        int error = folder_sync(at);
        errno = error;
        if (error) return -1;
    }
    return folder_open(at, name, O_NOFOLLOW);
}

int folder_sync(int fd) {
    int error = file_sync(fd);
    // Some network file systems refuse fsync on folders: their renames are durable on return.
    return error == EINVAL || error == EBADF || error == ENOTSUP ? 0 : error;
}

// Syncs the folder that holds `path`.
static void sync_above(const char *path) {
    const char *slash = strrchr(path, '/');
    char *above = xasprintf("%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    int fd = folder_open(AT_FDCWD, *above ? above : "/", 0);
    int error = fd < 0 ? errno : 0;
    // A folder that may be passed but not read cannot be opened, and is not this user's to sync.
    if (!error) error = folder_sync(fd);
    if (error && error != EACCES)
        die("%s: cannot sync the folder: %s|check the disk", above, strerror(error));
    if (fd >= 0) close(fd);
    free(above);
}

void folder_make(const char *path) {
    char *p = xasprintf("%s", path);
    for (char *slash = p + 1;; slash++) {
        if (*slash && *slash != '/') continue;
        char was = *slash;
        *slash = 0;
        struct stat st;
        int error = mkdir(p, 0777) ? errno : 0;
        if (!error)
            sync_above(p);
        else if (stat(p, &st) || !S_ISDIR(st.st_mode))
            die("%s: cannot create the folder: %s|choose a place you may write to", p,
                error == EEXIST ? "a file of this name is in the way" : strerror(error));
        *slash = was;
        if (!was) break;
    }
    free(p);
}

int folder_visit(int fd, void (*visit)(void *context, const char *name), void *context) {
    int copy = folder_open(fd, ".", 0);
    int error = copy < 0 ? errno : 0;
    DIR *d = error ? 0 : fdopendir(copy);
    if (!error && !d) {
        error = errno;
        close(copy);
    }
    while (d) {
        errno = 0;
        const struct dirent *e = readdir(d);
        if (!e) {
            if (errno == EINTR) continue;
            error = errno;
            break;
        }
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) visit(context, e->d_name);
    }
    if (d) closedir(d);
    return error;
}

typedef struct {
    int fd, error;
} Removal;

static void remove_entry(void *context, const char *name) {
    Removal *r = (Removal *)context;
    int error = unlinkat(r->fd, name, 0) ? errno : 0;
    if (error == EISDIR || error == EPERM) error = folder_remove(r->fd, name); // a folder
    if (error && error != ENOENT && !r->error) r->error = error;
}

int folder_remove(int at, const char *name) {
    Removal r = { folder_open(at, name, O_NOFOLLOW), 0 };
    if (r.fd < 0) {
        // O_NOFOLLOW says ELOOP or ENOTDIR of a link: the link itself goes, not what it leads to.
        if (errno == ENOENT) return 0;
        if (errno != ELOOP && errno != ENOTDIR) return errno;
        return unlinkat(at, name, 0) && errno != ENOENT ? errno : 0;
    }
    int error = folder_visit(r.fd, remove_entry, &r);
    close(r.fd);
    if (!error) error = r.error;
    if (unlinkat(at, name, AT_REMOVEDIR) && errno != ENOENT && !error) error = errno;
    return error;
}

int64_t folder_free_bytes(int fd) {
    struct statvfs v;
    if (fstatvfs(fd, &v)) return -1;
    return (int64_t)((double)v.f_bavail * (double)v.f_frsize);
}
