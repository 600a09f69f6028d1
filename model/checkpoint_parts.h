// What checkpoint.c (reading) and checkpoint_save.c (writing) share: the list of the model's HF
// tensors and how a segment finds its bytes.
#ifndef MOE_CHECKPOINT_PARTS_H
#define MOE_CHECKPOINT_PARTS_H
#include "checkpoint.h"
#include "safetensors.h"
MOE_BEGIN_C

// What a checkpoint keeps of one HF tensor; the optimizer's file names it <HF name><suffix>.
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
extern const char *const PART_SUFFIX[PARTS];

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
    char *out, *folder;  // folder: while it is incomplete
    const char *dtype;   // what config.json says
    int n_files, n_tensors, n_model_files;
    OutFile *file;       // (n_files) the model's, then optimizer.safetensors
    SafeTensor *tensor;  // (n_tensors) of the model's files, for the index
    Place *place[PARTS]; // (weights) each
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
    SavePlan plan;
    int64_t moved, to_move; // progress of a long load or save
    double began, shown;
};

// A piece of one part of one segment: where it lies in the rank's buffer and in the HF tensor, both
// in elements of the part.
typedef struct {
    char *data;
    Dtype type;
    int64_t first, count;
} Piece;
// data 0 where this rank's state has no such part.
Piece checkpoint_piece(Part part, const OptimizerState *s, const Segment *g);
int checkpoint_weight(const Checkpoint *k, const Segment *g); // index of the segment's HF tensor
// Fused name of an expert's tensor (into fused, 160 chars), where the expert begins in it, and its
// shape; 0 for tensors that are no expert's.
int checkpoint_fused(const Config *c, const char *name, char *fused, int64_t *base,
                     int64_t shape[3]);
// Elements of a part of a weight.
int64_t checkpoint_part_elements(const Weight *w, Part part);
// 8-bit state is addressed by whole 256-element blocks; dies where a cut goes through one.
void checkpoint_check_blocks(const Checkpoint *k);
void checkpoint_plan_free(SavePlan *p);
// Progress of a load or save on rank 0's terminal. total: bytes that will move, 0 where they are
// not known beforehand.
void checkpoint_progress_start(Checkpoint *k, int64_t total);
void checkpoint_progress(Checkpoint *k, const char *verb, int64_t bytes);
void checkpoint_progress_end(const Checkpoint *k);
MOE_END_C
#endif
