// tensor_core.h - emulated warp matrix instructions and Hopper asynchronous instructions. Kernels
// do not call these but the functions of ptx.h, whose nvcc side is the instruction itself.
#pragma once
#include "core.h"
#include <cuda.h>

namespace cuemu {

// ---- mma.sync, ldmatrix, stmatrix (src/warp_mma.cpp)
void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2], const float c[4]);
void mma_m16n8k16_f32(float d[4], const unsigned a[8], const unsigned b[4],
                      const float c[4]); // fp32 operands, see ptx.h
void ldmatrix(unsigned *r, int count, const void *row, bool trans);
void stmatrix(void *row, int count, const unsigned *r, bool trans);
bool elect_one(unsigned mask);

// ---- mbarrier and proxies (src/mbarrier.cpp)
void mbar_init(uint64_t *bar, unsigned count);
void mbar_inval(uint64_t *bar);
void mbar_arrive(uint64_t *bar, unsigned count);
void mbar_expect_tx(uint64_t *bar, unsigned bytes);
bool mbar_test_wait(uint64_t *bar, unsigned parity); // never blocks
bool mbar_try_wait(uint64_t *bar,
                   unsigned parity); // sleeps until the phase is complete; always true
void fence_proxy_async();
void fence_mbarrier_init();

// ---- TMA and cp.async (src/tma.cpp)
void tma_load(void *smem, const CUtensorMap *map, uint64_t *bar, int rank, const int *coord);
void tma_store(const CUtensorMap *map, const void *smem, int rank, const int *coord, bool add);
void bulk_load(void *smem, const void *global, unsigned bytes, uint64_t *bar);
void bulk_store(void *global, const void *smem, unsigned bytes);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
void cp_async(void *smem, const void *global, int bytes, int valid_bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_mbar_arrive_noinc(uint64_t *bar);

// ---- wgmma (src/wgmma.cpp); n = columns, d = n/2 accumulators of this thread, a = 4 registers or
// nullptr
void wgmma(int n, float *d, const unsigned *a, uint64_t desc_a, uint64_t desc_b, int scale_d,
           bool trans_a, bool trans_b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

unsigned smem_address(const void *p); // 32-bit shared address of dynamic shared memory
void setmaxnreg(int n, bool increase);
} // namespace cuemu
