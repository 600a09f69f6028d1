// Folders of checkpoints on disk: see checkpoint_folder.h.
//
// A save is durable when its files, its folder and the folder's name are synced, in this order;
// only then is anything older touched. Every name tells its state:
//   incomplete_step_N   being written          -> removed on sight
//   step_N              finished               complete if trainer.json is there and the sizes that
//   it lists are the sizes on disk replaced_step_N     an older step_N that the same save writes
//   again -> back to step_N if that is not complete, else removed removing_step_N     --keep is
//   removing it  -> removed on sight
// so a kill between any two system calls costs at most the checkpoint being written.
#define _POSIX_C_SOURCE 200809L
#include "checkpoint_folder.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

// ---- files and folders ----------------------------------------------------------------------
void folder_make(const char *path) {
    char *p = xasprintf("%s", path);
    for (char *slash = p + 1;; slash++) {
        if (*slash && *slash != '/') continue;
        char was = *slash;
        *slash = 0;
        struct stat st;
        if (mkdir(p, 0777) && (errno != EEXIST || stat(p, &st) || !S_ISDIR(st.st_mode)))
            die("%s: cannot create the folder: %s|choose a place you may write to with --out", p,
                errno == EEXIST ? "a file of this name is in the way" : strerror(errno));
        *slash = was;
        if (!was) break;
    }
    free(p);
}

void folder_sync(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) die("%s: cannot open the folder: %s|check the disk", path, strerror(errno));
    // Some network file systems refuse fsync on folders (EINVAL): their renames are durable on
    // return or not at all.
    if (fsync(fd) && errno != EINVAL && errno != EBADF && errno != ENOTSUP)
        die("%s: cannot sync the folder: %s|check the disk", path, strerror(errno));
    close(fd);
}

void folder_remove(const char *path) {
    DIR *d = opendir(path);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    if (rmdir(path)) fprintf(stderr, "warning: %s: cannot remove: %s\n", path, strerror(errno));
}

int64_t folder_free_bytes(const char *path) {
    struct statvfs v;
    if (statvfs(path, &v)) return -1;
    return (int64_t)((double)v.f_bavail * (double)v.f_frsize);
}

int folder_write(const char *dir, const char *name, const void *data, size_t bytes) {
    char *path = xasprintf("%s/%s", dir, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), error = fd < 0 ? errno : 0;
    for (const char *p = (const char *)data; !error && bytes;) {
        ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            error = n < 0 ? errno : ENOSPC;
        else {
            p += n;
            bytes -= (size_t)n;
        }
    }
    if (fd >= 0 && !error && fsync(fd)) error = errno;
    if (fd >= 0 && close(fd) && !error) error = errno;
    free(path);
    return error;
}

// ---- which are complete ---------------------------------------------------------------------
// trainer.json is written last; it names every large file with its size, so that a folder copied in
// part does not count either. Why not: into `why` (at least 200 chars).
static int is_complete(const char *folder, int64_t step, char *why) {
    char *path = xasprintf("%s/trainer.json", folder), *text = 0;
    int ok = 0;
    struct stat st;
    FILE *f = fopen(path, "rb");
    cJSON *root = 0;
    snprintf(why, 200, "trainer.json is missing");
    if (f && !fstat(fileno(f), &st) && S_ISREG(st.st_mode)) {
        text = (char *)xcalloc((size_t)st.st_size + 1, 1, "trainer.json");
        size_t n = fread(text, 1, (size_t)st.st_size, f);
        text[n] = 0;
        root = cJSON_Parse(text);
        const cJSON *files = cJSON_GetObjectItemCaseSensitive(root, "files"),
                    *at = cJSON_GetObjectItemCaseSensitive(root, "step"), *file = 0;
        ok = cJSON_IsObject(files) && cJSON_IsNumber(at) && at->valuedouble == (double)step;
        snprintf(why, 200, "trainer.json is damaged");
        cJSON_ArrayForEach(file, files) {
            char *name = xasprintf("%s/%s", folder, file->string);
            if (ok && (stat(name, &st) || (double)st.st_size != file->valuedouble)) {
                snprintf(why, 200, "%.150s is missing or has another size", file->string);
                ok = 0;
            }
            free(name);
        }
        cJSON_Delete(root);
    }
    if (f) fclose(f);
    free(text);
    free(path);
    return ok;
}

// N of prefix_step_N, -1 for any other name.
static int64_t step_of(const char *name, const char *prefix) {
    size_t n = strlen(prefix);
    char *end;
    if (strncmp(name, prefix, n) || name[n] < '0' || name[n] > '9') return -1;
    int64_t step = strtoll(name + n, &end, 10);
    return *end ? -1 : step;
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

// Steps of folders prefix_step_N under dir, newest first (caller frees); *n of them.
static int64_t *list_steps(const char *dir, const char *prefix, int *n) {
    int64_t *steps = 0;
    *n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        int64_t step = step_of(e->d_name, prefix);
        if (step < 0) continue;
        steps = (int64_t *)realloc(steps, (size_t)(*n + 1) * sizeof *steps);
        if (!steps) die("out of host memory for the list of checkpoints|free memory");
        steps[(*n)++] = step;
    }
    if (d) closedir(d);
    if (*n) qsort(steps, (size_t)*n, sizeof *steps, descending);
    return steps;
}

// ---- publishing -----------------------------------------------------------------------------
// `latest` becomes a link to step_N in one rename: a reader sees the old target or the new one.
// Where links are not allowed it is a text file with the name.
static void point_latest(const char *dir, int64_t step) {
    char *latest = xasprintf("%s/latest", dir), *fresh = xasprintf("%s/latest.new", dir),
         *target = xasprintf("step_%" PRId64, step);
    char now[64];
    ssize_t n = readlink(latest, now, sizeof now - 1);
    if (n >= 0) now[n] = 0;
    if (n < 0 || strcmp(now, target)) {
        unlink(fresh);
        if (symlink(target, fresh) && folder_write(dir, "latest.new", target, strlen(target)))
            fprintf(stderr, "warning: %s: cannot write: %s\n", fresh, strerror(errno));
        else if (rename(fresh, latest))
            fprintf(stderr, "warning: %s: cannot replace: %s\n", latest, strerror(errno));
        folder_sync(dir);
    }
    free(latest);
    free(fresh);
    free(target);
}

static void move(const char *from, const char *to) {
    if (rename(from, to))
        die("%s: cannot rename to %s: %s|check the disk and the folder's owner", from, to,
            strerror(errno));
}

char *folder_begin(const char *out, int64_t step) {
    char *path = xasprintf("%s/checkpoints/incomplete_step_%" PRId64, out, step);
    struct stat st;
    if (!lstat(path, &st)) folder_remove(path);
    folder_make(path);
    return path;
}

void folder_publish(const char *out, int64_t step, int keep) {
    char *dir = xasprintf("%s/checkpoints", out),
         *fresh = xasprintf("%s/incomplete_step_%" PRId64, dir, step);
    char *name = xasprintf("%s/step_%" PRId64, dir, step),
         *replaced = xasprintf("%s/replaced_step_%" PRId64, dir, step), why[200];
    struct stat st;
    folder_sync(fresh);
    if (!lstat(replaced, &st)) folder_remove(replaced);
    if (!lstat(name, &st)) move(name, replaced);
    move(fresh, name);
    folder_sync(dir);
    folder_sync(out);
    point_latest(dir, step);
    if (!lstat(replaced, &st)) folder_remove(replaced);
    int n, kept = 1; // the one just written counts and stays
    int64_t *steps = list_steps(dir, "step_", &n);
    for (int i = 0; keep > 0 && i < n; i++) {
        if (steps[i] == step) continue;
        char *old = xasprintf("%s/step_%" PRId64, dir, steps[i]),
             *removing = xasprintf("%s/removing_step_%" PRId64, dir, steps[i]);
        if (is_complete(old, steps[i], why) && ++kept > keep && !rename(old, removing))
            folder_remove(removing);
        free(old);
        free(removing);
    }
    free(steps);
    free(dir);
    free(fresh);
    free(name);
    free(replaced);
}

int64_t folder_newest(const char *out) {
    char *dir = xasprintf("%s/checkpoints", out), why[200];
    int n;
    static const char *leftover[] = { "incomplete_step_", "removing_step_" };
    for (int j = 0; j < 2; j++) {
        int64_t *steps = list_steps(dir, leftover[j], &n);
        for (int i = 0; i < n; i++) {
            char *path = xasprintf("%s/%s%" PRId64, dir, leftover[j], steps[i]);
            folder_remove(path);
            free(path);
        }
        free(steps);
    }
    int64_t *steps = list_steps(dir, "replaced_step_", &n);
    for (int i = 0; i < n; i++) {
        char *old = xasprintf("%s/replaced_step_%" PRId64, dir, steps[i]),
             *name = xasprintf("%s/step_%" PRId64, dir, steps[i]);
        if (is_complete(name, steps[i], why))
            folder_remove(old);
        else if (is_complete(old, steps[i], why)) {
            folder_remove(name);
            move(old, name);
        }
        free(old);
        free(name);
    }
    free(steps);
    int64_t newest = -1;
    steps = list_steps(dir, "step_", &n);
    for (int i = 0; i < n && newest < 0; i++) {
        char *path = xasprintf("%s/step_%" PRId64, dir, steps[i]);
        if (is_complete(path, steps[i], why))
            newest = steps[i];
        else
            fprintf(stderr, "warning: %s is not a complete checkpoint (%s): ignored\n", path, why);
        free(path);
    }
    free(steps);
    if (newest >= 0) point_latest(dir, newest);
    free(dir);
    return newest;
}
