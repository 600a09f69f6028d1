// Checkpoints: Hugging Face models in, Hugging Face models out, and what resuming needs beside
// them.
//
//   out/checkpoints/step_N/
//       model.safetensors             (or model-00001-of-000NN.safetensors) the weights under their
//                                     Hugging Face names
//       model.safetensors.index.json  always: tools that take every *.safetensors of a folder would
//                                     else take the optimizer's too
//       config.json                   in 4.x spellings
//       tokenizer*, vocab.json, ...   copied from the model that training started from
//       optimizer.safetensors         per tensor: .master (where the model file has fewer bits than
//                                     training), .m, .v or .m8 .v8 .m_scale .v_scale
//       trainer.json                  step, the caller's values, sizes and checksums of all files:
//                                     written last, so a folder with a matching one is complete
//   out/checkpoints/latest -> step_N  moves after the folder is synced and has its name
//
// Nothing in it depends on ranks (I4, layout-free numbers): files, order and offsets follow from
// the config and the options. Every rank computes the same layout and then reads and writes its own
// byte ranges, found through Segment {tensor, first, count}; no tensor is ever whole anywhere but
// in the file. A save happens under the name incomplete_step_N: a kill at any moment leaves either
// that (removed by the next checkpoint_find) or the finished folder.
#ifndef MOE_CHECKPOINT_H
#define MOE_CHECKPOINT_H
#include "model.h"
#include "file.h"
#include "../parallel/comm.h"
#include <stdio.h>
struct cJSON;
struct Trainer;
MOE_BEGIN_C
typedef struct Checkpoint Checkpoint;
typedef enum {
    SAVE_PRECISION, // floatX of this build
    SAVE_F32,
    SAVE_BF16,
    SAVE_SOURCE // each tensor as it was loaded
} SaveDtype;
typedef struct {
    SaveDtype dtype;
    int fused;          // the experts of a layer as two 3-D tensors (transformers 5), else one each
    int keep;           // complete checkpoints that stay, 0 = all
    int64_t file_bytes; // model files are cut at this size, 0 = 5 GB; a single tensor may exceed it
} SaveOptions;
// Reads "", "f32", "bf16" or "source". Ends the run on any other text.
SaveDtype save_dtype_parse(const char *text);

// A shard is an OptimizerState per block of the model (its gradient is not used here). Returns
// which parts of state it keeps, from the pointers of block 0: they are the same in all blocks and
// ranks.
enum { STATE_MASTER = 1, STATE_M = 2, STATE_V = 4, STATE_8BIT = 8 };
unsigned checkpoint_state(const OptimizerState *shard);

// Makes what loading and saving need. all: every rank (0 = one process); writer: 1 where this
// rank's copy of its shards is the one that is written (data-parallel index 0). Takes
// CHECKPOINT_STAGING bytes from the arena, which may still be counting: load and save only after it
// is committed. Keeps `m` by reference.
enum { CHECKPOINT_STAGING = 16 << 20 };
Checkpoint *checkpoint_create(const Model *m, Comm *all, int writer, Arena *arena);
void checkpoint_free(Checkpoint *checkpoint);

// Returns 1 where the model in `dir` has a head that differs from its embedding. A config that ties
// the two is then not the truth about it: transformers 5 keeps such a head, and so does this
// program. Returns 0 where there are no weights, but a config for a plan.
int checkpoint_has_own_head(const char *dir);
// Reads this rank's shards of the model in `dir` into shard[b].param and, where it is not 0,
// .master, for every block b. Takes one file or several, per-expert or fused 3-D tensors, F32,
// BF16, F16 and F64, and holds at most CHECKPOINT_STAGING bytes beyond the shards. Ends the run
// naming the tensor where one is missing, has another shape or is not finite. Lists tensors that
// the model has no place for in one warning, a tied lm_head only where it differs from the
// embedding. Remembers each tensor's dtype and the tokenizer files for saving.
void checkpoint_load_model(Checkpoint *checkpoint, const char *dir, const OptimizerState *shard);
// Reads one of our own checkpoints likewise, with the optimizer's state: masters, m and v bit-equal
// on any grid. Ends the run where a part that is asked for (by a pointer that is not 0) is missing.
void checkpoint_resume(Checkpoint *checkpoint, const char *dir, const OptimizerState *shard);

// Returns the step of the newest complete checkpoint of a run, -1 where there is none, and the same
// on all ranks. Where rank 0 holds the run's lock it removes what interrupted saves left and
// repairs `latest`; else it only reads. A missing file or a wrong size makes a checkpoint
// incomplete; an error of the disk ends the run.
int64_t checkpoint_find(Comm *all, RunFolder *run);
// Returns the path out/checkpoints/step_N, which the caller frees.
char *checkpoint_folder(const char *out, int64_t step);
// Reads every file of a checkpoint and compares it with its checksum; says so on `out`. Ends the
// run naming the first file that differs.
void checkpoint_verify(const char *dir, FILE *out);
// Returns trainer.json of a checkpoint, which the caller deletes. Its numbers are doubles: 64-bit
// values above 15 digits would need text.
struct cJSON *checkpoint_trainer(const char *dir);
// Return the number or text of a key. End the run, naming file and key, where it is missing.
double trainer_number(const struct cJSON *trainer, const char *key);
const char *trainer_text(const struct cJSON *trainer, const char *key);

// Ends the run where the disk has no room for one checkpoint: called before the first update. Every
// rank calls it.
void checkpoint_check_room(Checkpoint *checkpoint, RunFolder *run, SaveOptions o,
                           const OptimizerState *shard);
// Writes out/checkpoints/step_N and returns its bytes; every rank calls it. Rank 0 adds step,
// precision and the file sizes to the values of `trainer` (which may be 0). Checks free space
// before anything is written. A disk that is full in spite of that ends the run after the
// incomplete folder is removed; earlier checkpoints stay as they are.
int64_t checkpoint_save(Checkpoint *checkpoint, RunFolder *run, int64_t step, SaveOptions o,
                        const OptimizerState *shard, const struct cJSON *trainer);
// The phases of a save, for tests that play several ranks in one process: plan (every rank), begin
// (one rank: folder, headers), shards (every rank: own ranges, synced), sums (every rank; played,
// the one that finishes), finish (one rank).
void checkpoint_save_plan(Checkpoint *checkpoint, RunFolder *run, int64_t step, SaveOptions o,
                          unsigned state);
void checkpoint_save_begin(Checkpoint *checkpoint);
void checkpoint_save_shards(Checkpoint *checkpoint, const OptimizerState *shard);
void checkpoint_save_sums(Checkpoint *checkpoint);
void checkpoint_save_finish(Checkpoint *checkpoint, const struct cJSON *trainer);

// ---- --dump FILE: one update for other programs to check ----
// fp32 safetensors: logits [B, T, V] in data order, loss, aux, and every gradient before clipping
// as grad.<HF name>; and the routing as topk [MoE layers, B, T, K], int32, with the router's logits
// as router [MoE layers, B, T, E]. Every rank writes its own byte ranges; nothing is gathered.
typedef struct Dump Dump;
// Creates the file on rank 0 and opens it on all ranks. Ends the run where it cannot be made.
Dump *dump_open(const char *path, const struct Trainer *t);
// Writes `rows` rows of t->head.logits, which begin at row `row` of this rank's tokens of the
// update.
void dump_logits(Dump *d, const struct Trainer *t, int64_t row, int rows);
// Writes the choices of a round and the router's logits.
void dump_routing(Dump *d, const struct Trainer *t);
// Writes this rank's shard of a block's final gradient.
void dump_gradient(Dump *d, const struct Trainer *t, int block, const gradX *grad);
// Writes loss and aux, syncs and closes the file, and sets t->dump to 0.
void dump_finish(Dump *d, struct Trainer *t, double loss, double aux);
MOE_END_C
#endif
