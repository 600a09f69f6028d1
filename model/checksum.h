// CRC32C, the checksum of iSCSI, ext4 and Btrfs: a 32-bit number that any flipped byte, and any
// burst of up to 32 bits, changes. It is a remainder of polynomials over two elements, so the sums
// of two pieces give the sum of both together: ranks sum what they read or write, in any cut, and
// the file's sum follows (I4, layout-free numbers).
#ifndef MOE_CHECKSUM_H
#define MOE_CHECKSUM_H
#include "../kernels/types.h"
MOE_BEGIN_C
// Returns the sum of what gave `sum` so far (0: nothing) followed by n bytes. Uses the processor's
// instruction where it has one (SSE 4.2, ARMv8), else a table.
uint32_t checksum(uint32_t sum, const void *data, size_t n);
// Returns the sum of two pieces, of which the second has `bytes` bytes.
uint32_t checksum_join(uint32_t first, uint32_t second, int64_t bytes);

// The sum of a byte range [begin, end) of a file, which is known by its number.
typedef struct {
    int32_t file;
    uint32_t sum;
    int64_t begin, end;
} SumRange;
typedef struct {
    SumRange *range;
    int n, room;
} SumList;
// Add a range, or the sum of `bytes` bytes of a file, from byte `begin` on, which joins the range
// before it where they touch.
void sums_add(SumList *s, int file, int64_t begin, const void *data, int64_t bytes);
void sums_append(SumList *s, SumRange r);
void sums_free(SumList *s);
// Sorts by file and place, drops what is there twice (data-parallel copies read the same ranges)
// and joins what touches.
void sums_sort(SumList *s);
MOE_END_C
#endif
