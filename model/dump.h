// --dump FILE: the first update's logits [B, T, V] in data order, loss, aux, and every gradient
// before clipping as `grad.<HF name>`, fp32 safetensors. Every rank writes its own byte ranges;
// nothing is gathered.
#ifndef MOE_DUMP_H
#define MOE_DUMP_H
#include "step.h"
MOE_BEGIN_C
// Rank 0 writes the header and the file's size; dies where the file cannot be made. All ranks call
// it.
Dump *dump_open(const char *path, const Trainer *t);
// `rows` rows of t->logits that begin at row `row` of this rank's tokens of the update.
void dump_logits(Dump *d, const Trainer *t, int64_t row, int rows);
// This rank's shard of a block's final gradient.
void dump_gradient(Dump *d, const Trainer *t, int block, const gradX *grad);
// Adds loss and aux, closes; t->dump is the caller's to clear.
void dump_finish(Dump *d, Trainer *t, double loss, double aux);
MOE_END_C
#endif
