// What checkpoint.c (reading), checkpoint_save.c (writing) and dump.c share: the list of the
// model's Hugging Face tensors, the parts that are kept of each, and how a segment finds its bytes.
#ifndef MOE_CHECKPOINT_PARTS_H
#define MOE_CHECKPOINT_PARTS_H
#include "checkpoint.h"
#include "file.h"
#include "../kernels/fail.h"
#include "safetensors.h"
#include <stdio.h>
struct cJSON;
MOE_BEGIN_C

// What a checkpoint keeps of one Hugging Face tensor. One row of PART says everything about a part;
// reading, planning and writing have no other list.
typedef enum {
    PART_WEIGHT,
    PART_MASTER,
    PART_M,
    PART_V,
    PART_M8,
    PART_V8,
    PART_M_SCALE,
    PART_V_SCALE,
    PARTS
} Part;
typedef struct {
    const char *suffix; // optimizer.safetensors has the part as <HF name><suffix>
    unsigned state;     // STATE_ bit of checkpoint_state() with which the part is kept
    Dtype type;         // of its numbers in memory
    int per_number;     // elements of the tensor that share one of its numbers
    size_t field;       // offset of its pointer in OptimizerState
} PartRow;
extern const PartRow PART[PARTS];

typedef struct {
    char *name;
    int64_t rows, cols;
    int vector;
} Weight; // an HF tensor of the per-expert layout
typedef struct {
    int file;
    Dtype type;
    int64_t at;
} Place; // its element 0 in a set of files; file -1: not there
typedef struct {
    char *name, *data;
    size_t bytes;
} Attachment; // a tokenizer file, carried along
typedef struct {
    char *name, *header;
    size_t header_bytes;
    int64_t bytes;
} OutFile;
typedef struct {
    SaveOptions options;
    int64_t step, bytes; // bytes of all tensor files
    RunFolder *run;
    char *folder, name[64]; // incomplete_step_N: its path for messages, its name in checkpoints
    const char *dtype;      // what config.json says
    int n_files, n_tensors, n_model_files;
    OutFile *file;       // (n_files) the model's, then optimizer.safetensors
    SafeTensor *tensor;  // (n_tensors) of the model's files, for the index
    Place *place[PARTS]; // (weights) each
    uint32_t *sum;       // (n_files) checksums
} SavePlan;

struct Checkpoint {
    const Model *m;
    Comm *all;
    int writer, rank;
    void *device; // (CHECKPOINT_STAGING bytes) where numbers change their type
    char *host;   // (CHECKPOINT_STAGING bytes) what pread and pwrite see
    int n;
    Weight *weight; // (n) in table order
    struct {
        uint64_t id;
        int weight;
    } * by_id;     // (n) sorted: a segment's tensor -> weight
    Dtype *source; // (n) types of the loaded model
    int has_source, warned;
    int n_attachments;
    Attachment *attachment;
    int64_t bad;  // element that checkpoint_write_piece() found not finite
    SumList sums; // of what this rank read or wrote, by file
    SavePlan plan;
    int64_t moved, to_move; // progress of a long load or save
    double began, shown;
};

// One part of one segment: its numbers in this rank's buffer, and where they begin in the part of
// the whole Hugging Face tensor.
typedef struct {
    char *data; // 0: this rank's state has no such part
    Dtype type;
    int64_t first, count;
} Piece;
Piece checkpoint_piece(Part part, const OptimizerState *s, const Segment *g);
// Returns the index of the segment's Hugging Face tensor in checkpoint->weight.
int checkpoint_weight(const Checkpoint *checkpoint, const Segment *g);
// Writes the fused name of an expert's tensor to `fused`, where the expert begins in it to `base`,
// and the fused shape. Returns 0 for tensors that are no expert's.
enum { FUSED_NAME = 160 };
int checkpoint_fused(const Config *c, const char *name, char fused[FUSED_NAME], int64_t *base,
                     int64_t shape[3]);
// Returns how many numbers a part of a weight has.
int64_t checkpoint_part_elements(const Weight *w, Part part);
// Ends the run where this layout cuts blocks of 8-bit state, which are read and written whole.
void checkpoint_check_blocks(const Checkpoint *checkpoint);
void checkpoint_plan_free(SavePlan *p);
// Creates file `name` in the open folder `at` at its full size with its header, synced. Returns 0
// or an errno.
int checkpoint_create_file(int at, const char *name, const OutFile *f);
// Returns the index of the first of n numbers that is NaN or infinite, -1 where all are finite.
int64_t checkpoint_not_finite(const void *data, Dtype type, int64_t n);
// Writes the numbers of `piece`, converted to the type of `place`, to their place in `fd` and notes
// their checksum. Returns 0 or an errno; EDOM: number checkpoint->bad is not finite.
int checkpoint_write_piece(Checkpoint *checkpoint, int fd, Place place, Piece piece);
// Show the progress of a load or save on rank 0's terminal. total: bytes that will move, 0 where
// they are not known beforehand.
void checkpoint_progress_start(Checkpoint *checkpoint, int64_t total);
void checkpoint_progress(Checkpoint *checkpoint, const char *verb, int64_t bytes);
void checkpoint_progress_end(const Checkpoint *checkpoint);

// ---- checksums (checkpoint_sums.c) ----
typedef struct {
    int fd;
    const char *path;
    int64_t bytes;
} Source; // an open file
// Sums n whole files from checkpoint->sums of all ranks, which it empties; what no rank has read or
// written (headers, tensors that are not used) is read for it. Every rank calls it and gets sum
// (n).
void checkpoint_whole_sums(Checkpoint *checkpoint, const Source *file, int n, uint32_t *sum);
// Adds a file's checksum to the object "checksums" of trainer.json.
void sums_json_add(struct cJSON *sums, const char *name, uint32_t sum);
// Returns 0 where trainer.json has no checksum of that file.
int sums_json_has(const struct cJSON *trainer, const char *name, uint32_t *sum);
// Writes trainer.json's own checksum into its text, where its place is; returns the text.
char *sums_sign(char *text);
// Returns 1 where the text of trainer.json is the one that was written.
int sums_signed(const char *text, int64_t bytes);
// Ends the run because of a file of a checkpoint that is not the one that was written, naming the
// newest older checkpoint that is complete.
void checkpoint_damaged(const char *dir, const char *file) MOE_NORETURN;
// Does so where trainer.json has another checksum of `file`.
void checkpoint_check_sum(const char *dir, const struct cJSON *trainer, const char *file,
                          uint32_t sum);
// Checks the files of a checkpoint that hold no tensors, likewise.
void checkpoint_check_small(const char *dir, const struct cJSON *trainer);

// ---- folders under out/checkpoints (checkpoint_folder.c) ----
enum { MAX_TRAINER = 64 << 20 }; // bytes of trainer.json; that of the 30B model has 200 kB
// Opens out/checkpoints, making it where `make` says so, and returns its descriptor; -1 where it is
// not there. Ends the run where it is a link or cannot be opened.
int checkpoints_open(const RunFolder *f, int make);
// Gives incomplete_step_N, synced, its name in `at` (out/checkpoints), moves `latest` and removes
// all but the newest `keep` complete checkpoints up to this step (0: all stay). Ends the run where
// the disk refuses.
void checkpoints_publish(const RunFolder *f, int at, int64_t step, int keep);
// Returns the newest complete step below `below` (INT64_MAX: of all), -1 where there is none. With
// the lock held it first removes what interrupted saves left, and repairs `latest`. Warns of
// folders that are not complete; ends the run where all are such, or where one cannot be looked at.
int64_t checkpoints_newest(const RunFolder *f, int64_t below);
MOE_END_C
#endif
