// Checksums of a checkpoint: every rank sums what it reads or writes, and together they have the
// sum of every byte of every tensor file, whatever the layout (I4, layout-free numbers).
// trainer.json holds them as "crc32c:<8 hex digits>" under "checksums", with those of the small
// files and, last, its own. The contracts are in checkpoint_parts.h and checkpoint.h.
#define _GNU_SOURCE // realpath
#include "checkpoint_parts.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { READ = 4 << 20, GATHERED = 1 << 12 }; // bytes at a time; ranges of a rank at a time

// ---- whole files ----------------------------------------------------------------------------
// Every rank's list becomes the list of all ranks.
static void gather(Comm *all, SumList *s) {
    int ranks = all ? comm_size(all) : 1;
    if (ranks == 1) {
        sums_sort(s);
        return;
    }
    SumList whole = { 0, 0, 0 };
    int64_t most = comm_max(all, s->n);
    SumRange none = { -1, 0, 0, 0 };
    SumRange *mine = (SumRange *)xmalloc(GATHERED * sizeof none, "checksums");
    SumRange *theirs = (SumRange *)xmalloc((size_t)ranks * GATHERED * sizeof none, "checksums");
    for (int64_t first = 0; first < most; first += GATHERED) {
        for (int64_t i = 0; i < GATHERED; i++)
            mine[i] = first + i < s->n ? s->range[first + i] : none;
        comm_all_gather_host(all, theirs, mine, GATHERED * sizeof none);
        for (int64_t i = 0; i < (int64_t)ranks * GATHERED; i++)
            if (theirs[i].file >= 0) sums_append(&whole, theirs[i]);
    }
    free(mine);
    free(theirs);
    sums_free(s);
    *s = whole;
    sums_sort(s);
}

// Calls `visit` for each range of a file that no range of the list covers.
typedef struct {
    Checkpoint *checkpoint;
    const Source *file;
    SumList *found;
    char *buffer;
    int64_t piece; // numbers the pieces over all files: piece i is read by rank i mod ranks
} Gaps;

static void read_gap(Gaps *g, int file, int64_t begin, int64_t end) {
    Comm *all = g->checkpoint->all;
    int ranks = all ? comm_size(all) : 1;
    for (int64_t at = begin, n; at < end; at += n) {
        n = end - at < 16 * READ ? end - at : 16 * READ;
        if (g->piece++ % ranks != g->checkpoint->rank) continue;
        for (int64_t i = at, k; i < at + n; i += k) {
            k = at + n - i < READ ? at + n - i : READ;
            file_read_at(g->file[file].fd, g->file[file].path, i, g->buffer, k);
            sums_add(g->found, file, i, g->buffer, k);
        }
    }
}

void checkpoint_whole_sums(Checkpoint *checkpoint, const Source *file, int n, uint32_t *sum) {
    SumList *s = &checkpoint->sums;
    SumList found = { 0, 0, 0 };
    Gaps g = { checkpoint, file, &found, (char *)xmalloc(READ, "checksums"), 0 };
    gather(checkpoint->all, s);
    int next = 0;
    for (int i = 0; i < n; i++) {
        int64_t at = 0;
        for (; next < s->n && s->range[next].file == i; next++) {
            const SumRange *r = &s->range[next];
            if (r->begin > at) read_gap(&g, i, at, r->begin);
            if (r->end > at) at = r->end;
        }
        read_gap(&g, i, at, file[i].bytes);
    }
    free(g.buffer);
    gather(checkpoint->all, &found);
    for (int i = 0; i < found.n; i++) sums_append(s, found.range[i]);
    sums_free(&found);
    sums_sort(s);
    for (int i = 0; i < n; i++) sum[i] = 0;
    // Copies that differ (a disk or a network gave wrong data) leave a range out: no sum fits then.
    SumRange last = { -1, 0, 0, 0 };
    for (int i = 0; i < s->n; i++) {
        const SumRange *r = &s->range[i];
        if (r->file != last.file) last.end = 0;
        if (r->begin != last.end) continue;
        sum[r->file] = checksum_join(sum[r->file], r->sum, r->end - r->begin);
        last = *r;
    }
    sums_free(s);
}

// ---- trainer.json ---------------------------------------------------------------------------
static const char OWN[] = "\"trainer.json\":\t\"crc32c:";
enum { DIGITS = 8 };

void sums_json_add(struct cJSON *sums, const char *name, uint32_t sum) {
    char text[32];
    snprintf(text, sizeof text, "crc32c:%08" PRIx32, sum);
    cJSON_AddStringToObject(sums, name, text);
}

int sums_json_has(const struct cJSON *trainer, const char *name, uint32_t *sum) {
    const cJSON *sums = cJSON_GetObjectItemCaseSensitive(trainer, "checksums");
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(sums, name);
    if (!cJSON_IsString(v) || strncmp(v->valuestring, "crc32c:", 7)) return 0;
    *sum = (uint32_t)strtoul(v->valuestring + 7, 0, 16);
    return 1;
}

// Its own digits count as zeros. Returns them in hex.
static const char *own_sum(const char *text, const char *digits, char hex[DIGITS + 1]) {
    size_t before = digits - text;
    uint32_t sum = checksum(0, text, before);
    sum = checksum(sum, "00000000", DIGITS);
    sum = checksum(sum, digits + DIGITS, strlen(digits + DIGITS));
    snprintf(hex, DIGITS + 1, "%08" PRIx32, sum);
    return hex;
}

char *sums_sign(char *text) {
    char *digits = strstr(text, OWN);
    char hex[DIGITS + 1];
    if (digits)
        memcpy(digits + sizeof OWN - 1, own_sum(text, digits + sizeof OWN - 1, hex), DIGITS);
    return text;
}

int sums_signed(const char *text, int64_t bytes) {
    const char *digits = strstr(text, OWN);
    char hex[DIGITS + 1];
    if ((int64_t)strlen(text) != bytes) return 0;
    if (!digits) return !strstr(text, "\"checksums\""); // of a version that had none
    digits += sizeof OWN - 1;
    if (strlen(digits) < DIGITS) return 0;
    return !memcmp(own_sum(text, digits, hex), digits, DIGITS);
}

// ---- verifying ------------------------------------------------------------------------------
// What to do about a damaged checkpoint: which one would work, if it lies in a run's folder.
void checkpoint_damaged(const char *dir, const char *file) {
    char *real = realpath(dir, 0);
    char *out = xasprintf("%s", real ? real : dir);
    char *name = strstr(out, "/checkpoints/step_");
    int64_t other = -1;
    if (name) {
        *name = 0;
        RunFolder run = run_folder_look(out);
        other = checkpoints_newest(&run, strtoll(name + strlen("/checkpoints/step_"), 0, 10));
        dir = real;
    }
    if (other >= 0)
        die("%s/%s is damaged: its bytes are not those that were written|"
            "remove that folder and --resume: step_%" PRId64 " is complete",
            dir, file, other);
    die("%s/%s is damaged: its bytes are not those that were written|"
        "copy the checkpoint again; no older one is complete beside it",
        dir, file);
}

void checkpoint_check_sum(const char *dir, const struct cJSON *trainer, const char *file,
                          uint32_t sum) {
    uint32_t was;
    if (sums_json_has(trainer, file, &was) && was != sum) checkpoint_damaged(dir, file);
}

// Sums a whole file; *bytes: its size.
static uint32_t sum_file(const char *dir, const char *name, int64_t *bytes) {
    char *path = xasprintf("%s/%s", dir, name);
    char *buffer = (char *)xmalloc(READ, "a file");
    int fd = file_open(AT_FDCWD, path, 0, bytes);
    if (fd < 0) die("%s: cannot open: %s|copy the checkpoint again", path, file_why(errno));
    uint32_t sum = 0;
    for (int64_t at = 0, n; at < *bytes; at += n) {
        n = *bytes - at < READ ? *bytes - at : READ;
        file_read_at(fd, path, at, buffer, n);
        sum = checksum(sum, buffer, n);
    }
    close(fd);
    free(buffer);
    free(path);
    return sum;
}

void checkpoint_check_small(const char *dir, const struct cJSON *trainer) {
    const cJSON *sums = cJSON_GetObjectItemCaseSensitive(trainer, "checksums");
    const cJSON *v = 0;
    const cJSON *files = cJSON_GetObjectItemCaseSensitive(trainer, "files");
    cJSON_ArrayForEach(v, sums) {
        int64_t bytes;
        int small = strcmp(v->string, "trainer.json") && !strchr(v->string, '/') &&
                    !cJSON_GetObjectItemCaseSensitive(files, v->string);
        if (small) checkpoint_check_sum(dir, trainer, v->string, sum_file(dir, v->string, &bytes));
    }
}

void checkpoint_verify(const char *dir, FILE *out) {
    cJSON *trainer = checkpoint_trainer(dir);
    const cJSON *sums = cJSON_GetObjectItemCaseSensitive(trainer, "checksums");
    const cJSON *v = 0;
    const cJSON *files = cJSON_GetObjectItemCaseSensitive(trainer, "files");
    if (!cJSON_IsObject(sums))
        die("%s/trainer.json has no checksums|it was written by an older version: load and save it",
            dir);
    double total = 0;
    int n = 0;
    cJSON_ArrayForEach(v, files) {
        uint32_t was;
        if (!sums_json_has(trainer, v->string, &was)) checkpoint_damaged(dir, "trainer.json");
    }
    cJSON_ArrayForEach(v, sums) {
        int64_t bytes = 0;
        uint32_t was;
        if (strchr(v->string, '/') || !sums_json_has(trainer, v->string, &was))
            checkpoint_damaged(dir, "trainer.json");
        if (strcmp(v->string, "trainer.json"))
            checkpoint_check_sum(dir, trainer, v->string, sum_file(dir, v->string, &bytes));
        total += (double)bytes;
        n++;
    }
    fprintf(out, "verified %s: %d files, %.1f MB, every byte as it was written\n", dir, n,
            total / 1e6);
    cJSON_Delete(trainer);
}
