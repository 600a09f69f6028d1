// Checkpoints: Hugging Face models in, Hugging Face models out, and what resuming needs beside
// them.
//
//   out/checkpoints/step_N/model.safetensors            (or model-00001-of-000NN.safetensors) the
//   weights under their Hugging Face names
//                          model.safetensors.index.json always: tools that take every *.safetensors
//                          of a folder would else take the optimizer's too config.json 4.x
//                          spellings tokenizer*, vocab.json, ...  copied from the model that
//                          training started from optimizer.safetensors        per HF tensor:
//                          .master (where the model file has fewer bits than training), .m, .v or
//                          .m8 .v8 .m_scale .v_scale trainer.json                 step, the
//                          caller's values, sizes of all files: written last, so a folder with a
//                          matching one is complete
//   out/checkpoints/latest -> step_N                    moves after the folder is synced and has
//   its name
//
// Nothing in it depends on ranks (I4): files, order and offsets follow from the config and the
// options. Every rank computes the same layout and then reads and writes its own byte ranges, found
// through Segment {HF tensor, first, count}; no tensor is ever whole anywhere but in the file. A
// save happens under the name incomplete_step_N; a kill at any moment leaves either that (removed
// by the next checkpoint_find) or the finished folder.
#ifndef MOE_CHECKPOINT_H
#define MOE_CHECKPOINT_H
#include "params.h"
#include "../parallel/comm.h"
struct cJSON;
MOE_BEGIN_C
typedef struct Checkpoint Checkpoint;
typedef enum {
    SAVE_PRECISION,
    SAVE_F32,
    SAVE_BF16,
    SAVE_SOURCE
} SaveDtype; // SAVE_PRECISION: floatX of this build; SAVE_SOURCE: each tensor as it was loaded
typedef struct {
    SaveDtype dtype;
    int fused; // --save-layout fused: the experts of a layer as two 3-D tensors (transformers 5),
               // else one tensor each
    int keep;  // complete checkpoints that stay, 0 = all
    int64_t file_bytes; // model files are cut at this size, 0 = 5 GB; a single tensor may exceed it
} SaveOptions;
SaveDtype save_dtype_parse(const char *text); // "", "f32", "bf16", "source"; dies naming them

// What a shard's buffers are called here: an OptimizerState per block of the model (grad is not
// used). Which of master, m, v, m8.. are kept is read from element 0 and is the same for every
// block and rank.
enum { STATE_MASTER = 1, STATE_M = 2, STATE_V = 4, STATE_8BIT = 8 };
unsigned checkpoint_state(const OptimizerState *shard);

// all: every rank (0 = one process); writer: 1 where this rank's copy of its shards is the one that
// is written (data-parallel index 0). Staging comes from the arena (CHECKPOINT_STAGING bytes; it
// may still be counting: load and save only after it is committed).  m is kept by reference.
enum { CHECKPOINT_STAGING = 16 << 20 };
Checkpoint *checkpoint_create(const Model *m, Comm *all, int writer, Arena *arena);
void checkpoint_free(Checkpoint *k);

// Reads this rank's shards of the model in `dir` into shard[b].param and, where it is not 0,
// .master, for every block b (shard: n_blocks). One file or several; per-expert or fused 3-D
// tensors; F32, BF16, F16, F64. At most CHECKPOINT_STAGING bytes beyond the shards are held. Dies
// naming the tensor where one is missing, has another shape or is not finite. Tensors the model has
// no place for are listed in one warning, as is a tied lm_head that differs from the embedding.
// Remembers each tensor's dtype and the tokenizer files for saving.
void checkpoint_load_model(Checkpoint *k, const char *dir, const OptimizerState *shard);
// The same from one of our own checkpoints, with the optimizer's state: masters, m, v bit-equal on
// any grid. Dies where the state asked for (by non-0 pointers) is not there.
void checkpoint_resume(Checkpoint *k, const char *dir, const OptimizerState *shard);

// The step of the newest complete checkpoint under `out`, -1 where there is none; the same on all
// ranks. Rank 0 removes what interrupted saves left and repairs `latest`.
int64_t checkpoint_find(Comm *all, const char *out);
char *checkpoint_folder(const char *out, int64_t step); // out/checkpoints/step_N (caller frees)
// trainer.json of a checkpoint (caller: cJSON_Delete). JSON numbers are doubles: keep 64-bit values
// (seeds) as text. The number or text of a key; dies where it is missing, naming file and key.
struct cJSON *checkpoint_trainer(const char *dir);
double trainer_number(const struct cJSON *trainer, const char *key);
const char *trainer_text(const struct cJSON *trainer, const char *key);

// Writes out/checkpoints/step_N: collective. trainer: values of the caller (rank 0's is used; may
// be 0), to which step, precision and the file sizes are added. Free space is checked before
// anything is written; a disk that is full in spite of that ends the run after removing the
// incomplete folder; earlier checkpoints stay as they are. Returns the bytes written.
int64_t checkpoint_save(Checkpoint *k, const char *out, int64_t step, SaveOptions o,
                        const OptimizerState *shard, const struct cJSON *trainer);
// Its phases, for tests that play several ranks in one process: plan (every rank), begin (one rank:
// folder, headers), shards (every rank: own ranges, synced), finish (one rank).
void checkpoint_save_plan(Checkpoint *k, const char *out, int64_t step, SaveOptions o,
                          unsigned state);
void checkpoint_save_begin(Checkpoint *k);
void checkpoint_save_shards(Checkpoint *k, const OptimizerState *shard);
void checkpoint_save_finish(Checkpoint *k, const struct cJSON *trainer);
MOE_END_C
#endif
