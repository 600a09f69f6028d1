// The safetensors format: a reader that trusts nothing and a writer of headers.
//
//   file = u64 little-endian header length | header: JSON { name: { dtype, shape, data_offsets:
//   [begin, end] }, "__metadata__": { text: text } } | data
// Offsets count from the end of the header; data is row-major little-endian. Files are read with
// pread, the ranges that are asked for and nothing else: a rank that owns one part of a 61 GB model
// reads that part. All sizes are 64-bit (I9, 64-bit offsets).
#ifndef MOE_SAFETENSORS_H
#define MOE_SAFETENSORS_H
#include "file.h"
MOE_BEGIN_C
enum { SAFETENSORS_DIMS = 8 };
#define SAFETENSORS_OTHER ((Dtype)64)
typedef struct {
    char *name;
    Dtype type; // SAFETENSORS_OTHER: one that this program does not compute with (F8_E4M3, BOOL)
    int n_dims; // 0 = a scalar
    int64_t shape[SAFETENSORS_DIMS];
    int64_t at, bytes; // where the data lies in the file, from its first byte
    int file;          // index into SafeTensors.path
} SafeTensor;
typedef struct {
    int n_files, n;
    char **path;        // (n_files)
    int *fd;            // (n_files)
    int64_t *bytes;     // (n_files) sizes
    SafeTensor *tensor; // (n) sorted by name
} SafeTensors;

// Opens one file. Dies (naming the file, and the tensor where there is one) on: a header that is
// cut off, longer than the file or than 100 MB; invalid JSON; unknown dtype; negative or
// overflowing shapes; size not shape x dtype; offsets out of range; overlaps; duplicate names.
SafeTensors safetensors_open(const char *path);
// Opens a model folder: model.safetensors, or the files of model.safetensors.index.json (every
// tensor of its weight_map must be in the file it names).
SafeTensors safetensors_open_folder(const char *dir);
void safetensors_close(SafeTensors *s);
// The tensor of that name, 0 where there is none.
const SafeTensor *safetensors_find(const SafeTensors *s, const char *name);
// Elements of a tensor; "[2, 3]" of its shape into text (at least 192 chars), which it returns.
int64_t safetensors_elements(const SafeTensor *t);
char *safetensors_shape(const SafeTensor *t, char *text);
// Bytes [first, first + bytes) of a tensor's data into host memory. Dies where the file ends too
// early.
void safetensors_read(const SafeTensors *s, const SafeTensor *t, int64_t first, void *dst,
                      int64_t bytes);

// Returns the dtype of a tensor of an opened file as the file names it.
const char *safetensors_dtype(const SafeTensor *t);
// Returns 1 where two tensors have the same type, shape and bytes.
int safetensors_equal(const SafeTensors *s, const SafeTensor *a, const SafeTensor *b);

// Lays out one file: fills `at` and `bytes` of n tensors (name, type, n_dims, shape given; names
// unique, without characters that JSON escapes) and returns everything before the data (malloc'd,
// *header_bytes long: padded to 64, so that a mapped file has aligned tensors). Data order: larger
// element types first, then as given, so that every tensor is aligned to its own element size
// whatever the mixture (readers view the bytes in place). *file_bytes: size of the whole file.
char *safetensors_layout(SafeTensor *tensor, int n, size_t *header_bytes, int64_t *file_bytes);

const char *dtype_name(Dtype type); // "F32", "BF16", ... as in the header
MOE_END_C
#endif
