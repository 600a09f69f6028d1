// The folders of checkpoints under out/checkpoints: which are complete, publishing, removing. Knows
// no tensors; the contracts are in checkpoint_parts.h.
//
// A save is durable when its files, its folder and the folder's name are synced, in this order;
// only then is anything older touched. Every name tells its state:
//   incomplete_step_N   being written           removed on sight
//   step_N              finished                complete if trainer.json is there and the sizes
//   that
//                                               it lists are the sizes on disk
//   replaced_step_N     an older step_N that    back to step_N if that is not complete, else
//   removed
//                       a save writes again
//   removing_step_N     --keep is removing it   removed on sight
// so a kill between any two system calls costs at most the checkpoint being written. An error is
// not an absence: what cannot be read is neither incomplete nor removed.
#define _GNU_SOURCE
#include "checkpoint_parts.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void die_folder(const RunFolder *f, const char *name, int error) MOE_NORETURN;
static void die_folder(const RunFolder *f, const char *name, int error) {
    die("%s/checkpoints%s%s: %s|check the disk and the folder's owner; nothing was removed",
        f->path, *name ? "/" : "", name, file_why(error));
}

int checkpoints_open(const RunFolder *f, int make) {
    int at =
        make ? folder_enter(f->fd, "checkpoints") : folder_open(f->fd, "checkpoints", O_NOFOLLOW);
    if (at >= 0 || (errno == ENOENT && !make)) return at;
    struct stat st;
    int error = errno;
    if (!fstatat(f->fd, "checkpoints", &st, AT_SYMLINK_NOFOLLOW) && S_ISLNK(st.st_mode))
        die("%s/checkpoints is a symbolic link, through which nothing is written or removed|"
            "give the folder that it leads to as --out",
            f->path);
    die_folder(f, "", error);
}

// ---- which are complete ---------------------------------------------------------------------
enum { WHY = 200, NAME = 64 };

// 1 where the folder `name` in `at` is a complete checkpoint; 0 where it is not: why says what it
// lacks; -1 with errno where that cannot be seen,
// EBADMSG where trainer.json is not what was written. *step: of trainer.json.
static int is_complete(int at, const char *name, int flags, int64_t *step, char why[WHY]) {
    char *text = 0;
    int64_t bytes = 0;
    int fd = folder_open(at, name, flags);
    int complete = 0;
    int error = fd < 0 ? errno : file_load(fd, "trainer.json", flags, MAX_TRAINER, &text, &bytes);
    snprintf(why, WHY, "trainer.json is missing");
    if (error == ENOENT || error == ESPIPE || error == EFBIG) {
        if (error != ENOENT) snprintf(why, WHY, "trainer.json is %s", file_why(error));
        error = 0;
    }
    if (text && !sums_signed(text, bytes)) error = EBADMSG;
    char parsed[JSON_WHY];
    cJSON *root = text && !error ? json_parse(text, bytes, parsed) : 0;
    const cJSON *files = cJSON_GetObjectItemCaseSensitive(root, "files");
    const cJSON *sums = cJSON_GetObjectItemCaseSensitive(root, "checksums"); // of small files, too
    const cJSON *number = cJSON_GetObjectItemCaseSensitive(root, "step");
    const cJSON *file = 0;
    if (cJSON_IsObject(files) && cJSON_IsNumber(number)) {
        double x = number->valuedouble;
        *step = x >= 0 && x < 1e15 ? (int64_t)x : -1;
        complete = 1;
    } else if (text && !error)
        error = EBADMSG;
    for (int small = 0; small < 2; small++) {
        const cJSON *list = small ? sums : files;
        cJSON_ArrayForEach(file, list) {
            struct stat st;
            if (!complete || error) break;
            int missing = strchr(file->string, '/') != 0 || fstatat(fd, file->string, &st, 0);
            if (missing && errno != ENOENT && !strchr(file->string, '/')) error = errno;
            if (!missing && (small || (double)st.st_size == file->valuedouble)) continue;
            snprintf(why, WHY, "%.150s is missing%s", file->string,
                     small ? "" : " or has another size");
            complete = 0;
        }
    }
    cJSON_Delete(root);
    free(text);
    if (fd >= 0) close(fd);
    errno = error;
    return error ? -1 : complete;
}

static int is_step(const RunFolder *f, int at, const char *name, int64_t step, char why[WHY]) {
    int64_t has = -1;
    int complete = is_complete(at, name, 0, &has, why);
    if (complete < 0 && errno == EBADMSG) {
        char *dir = xasprintf("%s/checkpoints/%s", f->path, name);
        checkpoint_damaged(dir, "trainer.json");
    }
    if (complete < 0) die_folder(f, name, errno);
    if (!complete || has == step) return complete;
    snprintf(why, WHY, "trainer.json is of step %lld", (long long)has);
    return 0;
}

typedef struct {
    const char *prefix;
    int64_t *step;
    int n;
} Steps;

static void add_step(void *context, const char *name) {
    Steps *s = (Steps *)context;
    size_t n = strlen(s->prefix);
    char *end;
    if (strncmp(name, s->prefix, n) || name[n] < '0' || name[n] > '9') return;
    errno = 0;
    int64_t step = strtoll(name + n, &end, 10);
    if (*end || errno) return;
    s->step = (int64_t *)xrealloc(s->step, s->n + 1, sizeof *s->step, "list of steps");
    s->step[s->n++] = step;
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a;
    int64_t y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

// Lists N of all names prefixN in `at`, the largest first; the caller frees s->step. Returns 0 or
// an errno.
static int list_steps(int at, const char *prefix, Steps *s) {
    s->prefix = prefix;
    s->step = 0;
    s->n = 0;
    int error = folder_visit(at, add_step, s);
    if (s->n) qsort(s->step, s->n, sizeof *s->step, descending);
    return error;
}

// ---- latest ---------------------------------------------------------------------------------
// `latest` as a folder is what `cp -rL` makes of the link: a second copy of a checkpoint. It goes
// where that checkpoint is there, and becomes it where it is not. Returns 1 where the name is free.
static int make_room_for_latest(int at) {
    char why[WHY], name[NAME];
    int64_t step = -1;
    int64_t same = -1;
    struct stat st;
    if (fstatat(at, "latest", &st, AT_SYMLINK_NOFOLLOW) || !S_ISDIR(st.st_mode)) return 1;
    if (is_complete(at, "latest", O_NOFOLLOW, &step, why) == 1) {
        snprintf(name, sizeof name, "step_%" PRId64, step);
        int there = is_complete(at, name, 0, &same, why);
        if (there == 1 && same == step) return !folder_remove(at, "latest");
        if (there < 0 && errno == ENOENT) return !renameat(at, "latest", at, name);
    }
    return 0;
}

// `latest` becomes a link to step_N in one rename: a reader sees the old target or the new one.
// Where links are not allowed it is a text file with the name.
static void point_latest(const RunFolder *f, int at, int64_t step) {
    char target[NAME];
    char now[NAME] = "";
    snprintf(target, sizeof target, "step_%" PRId64, step);
    ssize_t n = readlinkat(at, "latest", now, sizeof now - 1);
    if (n >= 0 && !strcmp(now, target)) return;
    int error = make_room_for_latest(at) ? 0 : EISDIR;
    unlinkat(at, "latest.new", 0);
    if (!error && symlinkat(target, at, "latest.new"))
        error = file_write(at, "latest.new", target, strlen(target));
    if (!error && renameat(at, "latest.new", at, "latest")) error = errno;
    if (!error) error = folder_sync(at);
    if (error)
        warn("%s/checkpoints/latest does not lead to %s: %s", f->path, target, strerror(error));
}

// ---- publishing and finding -----------------------------------------------------------------
static void move(const RunFolder *f, int at, const char *from, const char *to) {
    if (renameat(at, from, at, to)) die_folder(f, from, errno);
}

static void try_remove(const RunFolder *f, int at, const char *name) {
    int error = folder_remove(at, name);
    if (error) warn("%s/checkpoints/%s: cannot remove: %s", f->path, name, strerror(error));
}

// All but the newest `keep` complete checkpoints up to `step` go. A step above it is of a run that
// this one does not know, and a link leads out of the folder: both stay. Where looking fails,
// nothing is removed this time.
static void keep_newest(const RunFolder *f, int at, int64_t step, int keep) {
    Steps old;
    char why[WHY];
    int error = list_steps(at, "step_", &old);
    int kept = 1; // the one just written counts and stays
    for (int i = 0; i < old.n && !error; i++) {
        char name[NAME], removing[NAME];
        int64_t has = -1;
        struct stat st;
        snprintf(name, sizeof name, "step_%" PRId64, old.step[i]);
        snprintf(removing, sizeof removing, "removing_step_%" PRId64, old.step[i]);
        if (old.step[i] >= step || fstatat(at, name, &st, AT_SYMLINK_NOFOLLOW) ||
            S_ISLNK(st.st_mode))
            continue;
        int complete = is_complete(at, name, O_NOFOLLOW, &has, why);
        if (complete < 0)
            error = errno;
        else if (complete && ++kept > keep && !renameat(at, name, at, removing))
            try_remove(f, at, removing);
    }
    if (error)
        warn("%s/checkpoints: cannot look at older checkpoints, none is removed: %s", f->path,
             strerror(error));
    free(old.step);
}

void checkpoints_publish(const RunFolder *f, int at, int64_t step, int keep) {
    char fresh[NAME], name[NAME], replaced[NAME];
    snprintf(fresh, sizeof fresh, "incomplete_step_%" PRId64, step);
    snprintf(name, sizeof name, "step_%" PRId64, step);
    snprintf(replaced, sizeof replaced, "replaced_step_%" PRId64, step);
    int error = folder_remove(at, replaced);
    if (error) die_folder(f, replaced, error);
    if (renameat(at, name, at, replaced) && errno != ENOENT) die_folder(f, name, errno);
    move(f, at, fresh, name);
    error = folder_sync(at);
    if (!error) error = folder_sync(f->fd);
    if (error) die_folder(f, name, error);
    point_latest(f, at, step);
    try_remove(f, at, replaced);
    if (keep > 0) keep_newest(f, at, step, keep);
}

// What interrupted saves left: removed, or put back.
static void clean_up(const RunFolder *f, int at) {
    static const char *const leftover[] = { "incomplete_step_", "removing_step_" };
    Steps s;
    char name[NAME], old[NAME], why[WHY];
    for (int j = 0; j < 2; j++) {
        int error = list_steps(at, leftover[j], &s);
        if (error) die_folder(f, "", error);
        for (int i = 0; i < s.n; i++) {
            snprintf(name, sizeof name, "%s%" PRId64, leftover[j], s.step[i]);
            try_remove(f, at, name);
        }
        free(s.step);
    }
    int error = list_steps(at, "replaced_step_", &s);
    if (error) die_folder(f, "", error);
    for (int i = 0; i < s.n; i++) {
        struct stat st;
        snprintf(old, sizeof old, "replaced_step_%" PRId64, s.step[i]);
        snprintf(name, sizeof name, "step_%" PRId64, s.step[i]);
        int there = !fstatat(at, name, &st, AT_SYMLINK_NOFOLLOW);
        if (there && is_step(f, at, name, s.step[i], why))
            try_remove(f, at, old);
        else if (is_step(f, at, old, s.step[i], why)) {
            if (there) try_remove(f, at, name);
            move(f, at, old, name);
        }
    }
    free(s.step);
}

int64_t checkpoints_newest(const RunFolder *f, int64_t below) {
    int at = checkpoints_open(f, 0);
    if (at < 0) return -1;
    if (f->lock >= 0) clean_up(f, at);
    Steps s;
    int error = list_steps(at, "step_", &s);
    if (error) die_folder(f, "", error);
    int64_t newest = -1;
    char *ignored = xasprintf("%s", "");
    char why[WHY];
    for (int i = 0; i < s.n && newest < 0; i++) {
        char name[NAME];
        if (s.step[i] >= below) continue;
        snprintf(name, sizeof name, "step_%" PRId64, s.step[i]);
        if (is_step(f, at, name, s.step[i], why)) {
            newest = s.step[i];
            break;
        }
        char *longer = xasprintf("%s%s%s (%s)", ignored, *ignored ? ", " : "", name, why);
        free(ignored);
        ignored = longer;
    }
    if (newest < 0 && s.n && below == INT64_MAX)
        die("%s/checkpoints: none of its %d step_N is a complete checkpoint: %s|"
            "bring the missing file back, or start a new --out",
            f->path, s.n, ignored);
    if (*ignored && below == INT64_MAX)
        warn("%s/checkpoints: ignored, because not complete: %s", f->path, ignored);
    free(ignored);
    free(s.step);
    if (newest >= 0 && f->lock >= 0) point_latest(f, at, newest);
    close(at);
    return newest;
}
