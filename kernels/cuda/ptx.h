// Every PTX instruction that the kernels use, one small function each: inline assembly under nvcc
// (sm_80 and newer, sm_90a for what Hopper has alone), the emulated twin of dev/cuemu elsewhere.
// Kernels contain no assembly. Addresses are ordinary pointers to shared or global memory.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__
// The first argument is the statement of the emulator, the rest that of nvcc.
#ifdef CUEMU
#define PTX(emulated, ...) emulated
#else
#define PTX(emulated, ...) __VA_ARGS__
// An operand of an instruction: the 32-bit address of `p` in shared memory.
#define PTX_S(p) "r"((uint32_t)__cvta_generic_to_shared(p))
#endif

// ---- barriers and registers -----------------------------------------------------------------
// Waits until `threads` threads of the block have come to barrier `id` (1 to 15).
PTX_FN void ptx_bar_sync(int id, int threads) {
    PTX(cuemu::named_barrier(id, threads, 0, true),
        asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads)
                     : "memory"));
}
// Raises or lowers the registers of each thread of a warpgroup to N, for the rest of the kernel.
template <int N> PTX_FN void ptx_setmaxnreg_inc() {
    PTX(cuemu::setmaxnreg(N, true), asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N> PTX_FN void ptx_setmaxnreg_dec() {
    PTX(cuemu::setmaxnreg(N, false), asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}

// ---- mbarrier -------------------------------------------------------------------------------
// A phase of `bar` is complete after `count` arrivals and after the bytes that were announced.
PTX_FN void ptx_mbar_init(uint64_t *bar, uint32_t count) {
    PTX(cuemu::mbar_init(bar, count),
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::PTX_S(bar), "r"(count)
                     : "memory"));
}
// Shows initialised mbarriers to TMA.
PTX_FN void ptx_fence_mbar_init() {
    PTX(cuemu::fence_mbarrier_init(), asm volatile("fence.mbarrier_init.release.cluster;" ::
                                                       : "memory"));
}
PTX_FN void ptx_mbar_arrive(uint64_t *bar) {
    PTX(cuemu::mbar_arrive(bar, 1),
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::PTX_S(bar)
                     : "memory"));
}
// Arrives, and announces `bytes` of TMA to the phase.
PTX_FN void ptx_mbar_arrive_expect_tx(uint64_t *bar, uint32_t bytes) {
#ifdef CUEMU
    cuemu::mbar_expect_tx(bar, bytes);
    cuemu::mbar_arrive(bar, 1);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::PTX_S(bar), "r"(bytes)
                 : "memory");
#endif
}
// Waits until the phase with this parity is complete.
PTX_FN void ptx_mbar_wait(uint64_t *bar, uint32_t parity) {
#ifdef CUEMU
    cuemu::mbar_try_wait(bar, parity);
#else
    asm volatile("{\n.reg .pred p;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:\n}" ::PTX_S(bar),
                 "r"(parity)
                 : "memory");
#endif
}

// ---- proxies --------------------------------------------------------------------------------
// Shows this thread's ordinary stores to shared memory to TMA and wgmma, which see them only after
// this fence.
PTX_FN void ptx_fence_proxy_async() {
    PTX(cuemu::fence_proxy_async(), asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// ---- TMA ------------------------------------------------------------------------------------
// Brings a tensor map into the cache, ahead of its first use.
PTX_FN void ptx_tma_prefetch_map(const CUtensorMap *map) {
    PTX((void)map, asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}
// x is the innermost coordinate. Coordinates outside the tensor give zeros (loads) or nothing
// (stores). A load completes its bytes on `bar`; a store joins the thread's current bulk group.
PTX_FN void ptx_tma_load_2d(void *smem, const CUtensorMap *map, uint64_t *bar, int x, int y) {
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_load(smem, map, bar, 2, c);
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::PTX_S(smem),
                 "l"(map), PTX_S(bar), "r"(x), "r"(y)
                 : "memory");
#endif
}
PTX_FN void ptx_tma_load_3d(void *smem, const CUtensorMap *map, uint64_t *bar, int x, int y,
                            int z) {
#ifdef CUEMU
    int c[] = { x, y, z };
    cuemu::tma_load(smem, map, bar, 3, c);
#else
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::PTX_S(smem),
                 "l"(map), PTX_S(bar), "r"(x), "r"(y), "r"(z)
                 : "memory");
#endif
}
PTX_FN void ptx_tma_store_2d(const CUtensorMap *map, const void *smem, int x, int y) {
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_store(map, smem, 2, c, false);
#else
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group "
                 "[%0, {%2, %3}], [%1];" ::"l"(map),
                 PTX_S(smem), "r"(x), "r"(y)
                 : "memory");
#endif
}
PTX_FN void ptx_tma_store_3d(const CUtensorMap *map, const void *smem, int x, int y, int z) {
#ifdef CUEMU
    int c[] = { x, y, z };
    cuemu::tma_store(map, smem, 3, c, false);
#else
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group "
                 "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 PTX_S(smem), "r"(x), "r"(y), "r"(z)
                 : "memory");
#endif
}
// Adds a box of fp32 numbers to global memory. The additions happen in the memory system, each
// rounded to fp32 as an ordinary addition is; where two blocks added to one element, the order of
// the two would be free. It is deterministic here because a tile of a gradient has one adder in a
// pass (I8, deterministic).
PTX_FN void ptx_tma_add_3d(const CUtensorMap *map, const void *smem, int x, int y, int z) {
#ifdef CUEMU
    int c[] = { x, y, z };
    cuemu::tma_store(map, smem, 3, c, true);
#else
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group "
                 "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 PTX_S(smem), "r"(x), "r"(y), "r"(z)
                 : "memory");
#endif
}
PTX_FN void ptx_bulk_commit() {
    PTX(cuemu::bulk_commit(), asm volatile("cp.async.bulk.commit_group;" ::: "memory"));
}
// Waits until all but the latest N bulk groups of this thread have read their shared memory.
template <int N> PTX_FN void ptx_bulk_wait_read() {
    PTX(cuemu::bulk_wait(N, true), asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N)
                                                : "memory"));
}
// Waits until all but the latest N bulk groups of this thread have written global memory too.
template <int N> PTX_FN void ptx_bulk_wait() {
    PTX(cuemu::bulk_wait(N, false), asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N)
                                                 : "memory"));
}

// ---- cp.async -------------------------------------------------------------------------------
// Copies the first `valid` of 16 bytes and fills the rest with zeros.
PTX_FN void ptx_cp_async_16(void *smem, const void *global, int valid = 16) {
    PTX(cuemu::cp_async(smem, global, 16, valid),
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::PTX_S(smem), "l"(global),
                     "r"(valid)
                     : "memory"));
}
PTX_FN void ptx_cp_async_commit() {
    PTX(cuemu::cp_async_commit(), asm volatile("cp.async.commit_group;" ::: "memory"));
}
template <int N> PTX_FN void ptx_cp_async_wait() {
    PTX(cuemu::cp_async_wait(N), asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"));
}
// Arrives once at `bar` when all cp.async that this thread has issued are complete, without waiting
// for them. The barrier's count includes this arrival. The copies are ordinary writes: a thread
// that has waited for the barrier fences before it gives them to wgmma or TMA.
PTX_FN void ptx_cp_async_mbar_arrive_noinc(uint64_t *bar) {
    PTX(cuemu::cp_async_mbar_arrive_noinc(bar),
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::PTX_S(bar)
                     : "memory"));
}

// ---- matrices of a warp ---------------------------------------------------------------------
// Four 8 x 8 matrices of bf16; `row` is this lane's row of one of them.
PTX_FN void ptx_ldmatrix_x4(uint32_t r[4], const void *row) {
    PTX(cuemu::ldmatrix(r, 4, row, false),
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : PTX_S(row)
                     : "memory"));
}
PTX_FN void ptx_ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    PTX(cuemu::ldmatrix(r, 4, row, true),
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : PTX_S(row)
                     : "memory"));
}
PTX_FN void ptx_stmatrix_x4(void *row, const uint32_t r[4]) {
    PTX(cuemu::stmatrix(row, 4, r, false),
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::PTX_S(row),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory"));
}
// d (16,8) = a (16,16) b (16,8) + c, bf16 operands, fp32 sums; who holds what: mma.cuh.
PTX_FN void ptx_mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                  const float c[4]) {
    PTX(cuemu::mma_m16n8k16_bf16(d, a, b, c),
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
                       "f"(c[1]), "f"(c[2]), "f"(c[3])));
}
// The same product of fp32 numbers, whose bits are in uint32_t: a[4 h + 2 r + c] is row g + 8 r,
// column 2 t + c + 8 h; b[2 h + c] is row 2 t + c + 8 h of column g. No instruction does this: each
// lane fetches what it needs by shuffles and multiplies by FFMA.
PTX_FN void ptx_mma_m16n8k16_f32_shuffles(float d[4], const uint32_t a[8], const uint32_t b[4],
                                          const float c[4]) {
    int lane = threadIdx.x % 32;
    int g = lane / 4;
    int t = lane % 4;
    float s[4] = { c[0], c[1], c[2], c[3] };
#pragma unroll 1 // a quarter of the code: only lane numbers depend on the owner
    for (int owner = 0; owner < 4; owner++)
#pragma unroll
        for (int i = 0; i < 4; i++) { // k = 2 owner + i % 2 + 8 (i / 2)
            int half = i / 2;
            int odd = i % 2;
            float top = __uint_as_float(__shfl_sync(0xffffffffu, a[4 * half + odd], 4 * g + owner));
            float bottom =
                __uint_as_float(__shfl_sync(0xffffffffu, a[4 * half + 2 + odd], 4 * g + owner));
            float left =
                __uint_as_float(__shfl_sync(0xffffffffu, b[2 * half + odd], 8 * t + owner));
            float right =
                __uint_as_float(__shfl_sync(0xffffffffu, b[2 * half + odd], 8 * t + 4 + owner));
            s[0] += top * left;
            s[1] += top * right;
            s[2] += bottom * left;
            s[3] += bottom * right;
        }
    for (int i = 0; i < 4; i++) d[i] = s[i];
}
PTX_FN void ptx_mma_m16n8k16_f32(float d[4], const uint32_t a[8], const uint32_t b[4],
                                 const float c[4]) {
    PTX(cuemu::mma_m16n8k16_f32(d, a, b, c), ptx_mma_m16n8k16_f32_shuffles(d, a, b, c));
}

// ---- wgmma ----------------------------------------------------------------------------------
// The order is fence, products, commit, wait. The accumulators belong to the hardware from the
// first product to the wait.
PTX_FN void ptx_wgmma_fence() {
    PTX(cuemu::wgmma_fence(), asm volatile("wgmma.fence.sync.aligned;" ::: "memory"));
}
PTX_FN void ptx_wgmma_commit() {
    PTX(cuemu::wgmma_commit(), asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}
template <int N> PTX_FN void ptx_wgmma_wait() {
    PTX(cuemu::wgmma_wait(N), asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N)
                                           : "memory"));
}
// Keeps the compiler from moving accesses of the accumulators over a fence or a wait, neither of
// which names them.
template <int N> PTX_FN void ptx_wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) PTX((void)d[i], asm volatile("" : "+f"(d[i])::"memory"));
}
// The descriptor of a matrix in shared memory (PTX ISA, "Matrix Descriptor Format"). `swizzle` in
// bytes: 128, 64, 32 or 0; distances in bytes. With S = swizzle:
//   K-major  (rows of S bytes along K)    sbo: from 8 rows to the next 8 (8 S where dense),
//                                         lbo: 16 (LBO_K_MAJOR: the ISA assumes one unit)
//   MN-major (rows of S bytes along M, N) sbo: from 8 k to the next 8 k,
//                                         lbo: from S/2 elements of M or N to the next
//   no swizzle (8 x 16-byte matrices)     sbo: along M or N,  lbo: along K
enum { LBO_K_MAJOR = 16 };
PTX_FN uint64_t ptx_wgmma_desc(const void *p, uint32_t lbo, uint32_t sbo, int swizzle) {
    uint64_t mode = 0;
    if (swizzle) mode = swizzle == 128 ? 1 : 4 - swizzle / 32;
#ifdef CUEMU
    uint32_t address = cuemu::smem_address(p);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(p);
#endif
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(lbo >> 4 & 0x3FFF) << 16 |
           (uint64_t)(sbo >> 4 & 0x3FFF) << 32 | mode << 62;
}
// D (64,N) = A (64,16) B (16,N), plus D where scale_d is not 0; each of the warpgroup's threads
// holds N / 2 numbers of D. TRANS 1: the operand is M- or N-major in memory.
template <int N> struct PtxWgmma;
#ifdef CUEMU
template <int N> struct PtxWgmma {
    template <int TRANS_A, int TRANS_B>
    static void product(float *d, uint64_t a, uint64_t b, int scale_d) {
        cuemu::wgmma(N, d, nullptr, a, b, scale_d, TRANS_A, TRANS_B);
    }
};
#else
#define PTX_D8(i)                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_D32(i) PTX_D8(i), PTX_D8(i + 8), PTX_D8(i + 16), PTX_D8(i + 24)
#define PTX_N0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PTX_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PTX_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PTX_N48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PTX_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define PTX_N80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PTX_N96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define PTX_N112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// names: the accumulators in the instruction's text; a, b, scale, ta, tb: the numbers of the
// operands after them; then the constraints of the accumulators.
#define PTX_WGMMA(N, names, a_, b_, scale, ta, tb, ...)                                 \
    template <> struct PtxWgmma<N> {                                                    \
        template <int TRANS_A, int TRANS_B>                                             \
        PTX_FN void product(float *d, uint64_t a, uint64_t b, int scale_d) {            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" scale ", 0;\n"            \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "    \
                         "{" names "}, %" a_ ", %" b_ ", p, 1, 1, %" ta ", %" tb ";\n}" \
                         : __VA_ARGS__                                                  \
                         : "l"(a), "l"(b), "r"(scale_d), "n"(TRANS_A), "n"(TRANS_B));   \
        }                                                                               \
    }
PTX_WGMMA(128, PTX_N0 PTX_N16 PTX_N32 PTX_N48, "64", "65", "66", "67", "68", PTX_D32(0),
          PTX_D32(32));
PTX_WGMMA(256, PTX_N0 PTX_N16 PTX_N32 PTX_N48 PTX_N64 PTX_N80 PTX_N96 PTX_N112, "128", "129", "130",
          "131", "132", PTX_D32(0), PTX_D32(32), PTX_D32(64), PTX_D32(96));
#endif
template <int N, int TRANS_A = 0, int TRANS_B = 0>
PTX_FN void ptx_wgmma(float *d, uint64_t desc_a, uint64_t desc_b, int scale_d) {
    PtxWgmma<N>::template product<TRANS_A, TRANS_B>(d, desc_a, desc_b, scale_d);
}
