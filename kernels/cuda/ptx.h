// ptx.h - every PTX instruction the kernels use, one small function each: inline assembly under
// nvcc (sm_90a), the emulated twin otherwise. Kernels contain no asm. Addresses are ordinary
// pointers to shared or global memory.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__
#ifdef CUEMU
#define PTX(emulated, ...) emulated
#else
#define PTX(emulated, ...) __VA_ARGS__
#endif

// 32-bit shared-memory address
PTX_FN uint32_t ptx_smem(const void *p) {
    PTX(return cuemu::smem_address(p), return (uint32_t)__cvta_generic_to_shared(p));
}

#ifndef CUEMU
#define PTX_S(p) "r"((uint32_t)__cvta_generic_to_shared(p))
#endif

// ---- roles and barriers
PTX_FN bool ptx_elect_one() { // true in one lane of a converged warp
#ifdef CUEMU
    return cuemu::elect_one(0xffffffffu);
#else
    uint32_t pred;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(pred));
    return pred;
#endif
}
PTX_FN void ptx_bar_sync(int id, int threads) {
    PTX(cuemu::named_barrier(id, threads, 0, true),
        asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads)
                     : "memory"));
}
PTX_FN void ptx_bar_arrive(int id, int threads) {
    PTX(cuemu::named_barrier(id, threads, 0, false),
        asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads)
                     : "memory"));
}
template <int N> PTX_FN void ptx_setmaxnreg_inc() {
    PTX(cuemu::setmaxnreg(N, true), asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N> PTX_FN void ptx_setmaxnreg_dec() {
    PTX(cuemu::setmaxnreg(N, false), asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}

// ---- mbarrier
PTX_FN void ptx_mbar_init(uint64_t *bar, uint32_t count) {
    PTX(cuemu::mbar_init(bar, count),
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::PTX_S(bar), "r"(count)
                     : "memory"));
}
PTX_FN void ptx_mbar_inval(uint64_t *bar) {
    PTX(cuemu::mbar_inval(bar), asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::PTX_S(bar)
                                             : "memory"));
}
PTX_FN void ptx_fence_mbar_init() {
    PTX(cuemu::fence_mbarrier_init(), asm volatile("fence.mbarrier_init.release.cluster;" ::
                                                       : "memory"));
}
PTX_FN void ptx_mbar_arrive(uint64_t *bar) {
    PTX(cuemu::mbar_arrive(bar, 1),
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::PTX_S(bar)
                     : "memory"));
}
PTX_FN void ptx_mbar_expect_tx(uint64_t *bar, uint32_t bytes) {
    PTX(cuemu::mbar_expect_tx(bar, bytes),
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::PTX_S(bar),
                     "r"(bytes)
                     : "memory"));
}
PTX_FN void ptx_mbar_arrive_expect_tx(uint64_t *bar, uint32_t bytes) {
#ifdef CUEMU
    cuemu::mbar_expect_tx(bar, bytes);
    cuemu::mbar_arrive(bar, 1);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::PTX_S(bar), "r"(bytes)
                 : "memory");
#endif
}
PTX_FN bool ptx_mbar_test_wait(uint64_t *bar, uint32_t parity) { // one look, never blocks
#ifdef CUEMU
    return cuemu::mbar_test_wait(bar, parity);
#else
    uint32_t ok;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(ok)
        : PTX_S(bar), "r"(parity)
        : "memory");
    return ok;
#endif
}
PTX_FN void ptx_mbar_wait(uint64_t *bar,
                          uint32_t parity) { // until the phase with this parity is complete
#ifdef CUEMU
    cuemu::mbar_try_wait(bar, parity);
#else
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::
            PTX_S(bar),
        "r"(parity)
        : "memory");
#endif
}

// ---- proxies. Ordinary stores to shared memory become visible to TMA and wgmma only through this
// fence.
PTX_FN void ptx_fence_proxy_async() {
    PTX(cuemu::fence_proxy_async(), asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// ---- TMA. x is the innermost coordinate; coordinates outside the tensor give zeros (loads) or
// nothing (stores).
PTX_FN void ptx_tma_prefetch_map(const CUtensorMap *map) {
    PTX((void)map, asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}
PTX_FN void ptx_tma_load_2d(void *smem, const CUtensorMap *map, uint64_t *bar, int x, int y) {
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_load(smem, map, bar, 2, c);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            PTX_S(smem),
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
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            PTX_S(smem),
        "l"(map), PTX_S(bar), "r"(x), "r"(y), "r"(z)
        : "memory");
#endif
}
PTX_FN void ptx_tma_store_2d(const CUtensorMap *map, const void *smem, int x, int y) {
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_store(map, smem, 2, c, false);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        PTX_S(smem), "r"(x), "r"(y)
        : "memory");
#endif
}
PTX_FN void ptx_tma_store_3d(const CUtensorMap *map, const void *smem, int x, int y, int z) {
#ifdef CUEMU
    int c[] = { x, y, z };
    cuemu::tma_store(map, smem, 3, c, false);
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        PTX_S(smem), "r"(x), "r"(y), "r"(z)
        : "memory");
#endif
}
PTX_FN void ptx_tma_add_2d(const CUtensorMap *map, const void *smem, int x,
                           int y) { // global += shared
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_store(map, smem, 2, c, true);
#else
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::
            "l"(map),
        PTX_S(smem), "r"(x), "r"(y)
        : "memory");
#endif
}
PTX_FN void ptx_tma_add_3d(const CUtensorMap *map, const void *smem, int x, int y, int z) {
#ifdef CUEMU
    int c[] = { x, y, z };
    cuemu::tma_store(map, smem, 3, c, true);
#else
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::
            "l"(map),
        PTX_S(smem), "r"(x), "r"(y), "r"(z)
        : "memory");
#endif
}
// Plain copies without a tensor map; bytes and addresses are multiples of 16.
PTX_FN void ptx_bulk_load(void *smem, const void *global, uint32_t bytes, uint64_t *bar) {
    PTX(cuemu::bulk_load(smem, global, bytes, bar),
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                PTX_S(smem),
            "l"(global), "r"(bytes), PTX_S(bar)
            : "memory"));
}
PTX_FN void ptx_bulk_store(void *global, const void *smem, uint32_t bytes) {
    PTX(cuemu::bulk_store(global, smem, bytes),
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                     PTX_S(smem), "r"(bytes)
                     : "memory"));
}
PTX_FN void ptx_bulk_commit() {
    PTX(cuemu::bulk_commit(), asm volatile("cp.async.bulk.commit_group;" ::: "memory"));
}
template <int N> PTX_FN void ptx_bulk_wait_read() {
    PTX(cuemu::bulk_wait(N, true), asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N)
                                                : "memory"));
} // shared memory may be reused
template <int N> PTX_FN void ptx_bulk_wait() {
    PTX(cuemu::bulk_wait(N, false), asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N)
                                                 : "memory"));
} // and global memory is written

// ---- cp.async (16 bytes); valid < 16 fills the rest with zeros
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

// ---- warp matrix instructions
#ifdef CUEMU
PTX_FN void ptx_ldmatrix_x4(uint32_t r[4], const void *row) { cuemu::ldmatrix(r, 4, row, false); }
PTX_FN void ptx_ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    cuemu::ldmatrix(r, 4, row, true);
}
PTX_FN void ptx_ldmatrix_x2(uint32_t r[2], const void *row) { cuemu::ldmatrix(r, 2, row, false); }
PTX_FN void ptx_ldmatrix_x2_trans(uint32_t r[2], const void *row) {
    cuemu::ldmatrix(r, 2, row, true);
}
PTX_FN void ptx_stmatrix_x4(void *row, const uint32_t r[4]) { cuemu::stmatrix(row, 4, r, false); }
PTX_FN void ptx_stmatrix_x4_trans(void *row, const uint32_t r[4]) {
    cuemu::stmatrix(row, 4, r, true);
}
PTX_FN void ptx_stmatrix_x2(void *row, const uint32_t r[2]) { cuemu::stmatrix(row, 2, r, false); }
PTX_FN void ptx_mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                  const float c[4]) {
    cuemu::mma_m16n8k16_bf16(d, a, b, c);
}
#else
#define PTX_LDMATRIX4(name, trans)                                                            \
    PTX_FN void name(uint32_t r[4], const void *row) {                                        \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                         \
                     : PTX_S(row)                                                             \
                     : "memory");                                                             \
    }
#define PTX_LDMATRIX2(name, trans)                                                      \
    PTX_FN void name(uint32_t r[2], const void *row) {                                  \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0,%1}, [%2];" \
                     : "=r"(r[0]), "=r"(r[1])                                           \
                     : PTX_S(row)                                                       \
                     : "memory");                                                       \
    }
#define PTX_STMATRIX4(name, trans)                                    \
    PTX_FN void name(void *row, const uint32_t r[4]) {                \
        asm volatile("stmatrix.sync.aligned.m8n8.x4" trans            \
                     ".shared.b16 [%0], {%1,%2,%3,%4};" ::PTX_S(row), \
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])       \
                     : "memory");                                     \
    }
PTX_LDMATRIX4(ptx_ldmatrix_x4, "")
PTX_LDMATRIX4(ptx_ldmatrix_x4_trans, ".trans")
PTX_LDMATRIX2(ptx_ldmatrix_x2, "")
PTX_LDMATRIX2(ptx_ldmatrix_x2_trans, ".trans")
PTX_STMATRIX4(ptx_stmatrix_x4, "")
PTX_STMATRIX4(ptx_stmatrix_x4_trans, ".trans")
PTX_FN void ptx_stmatrix_x2(void *row, const uint32_t r[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::PTX_S(row), "r"(r[0]),
                 "r"(r[1])
                 : "memory");
}
PTX_FN void ptx_mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                  const float c[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
}
#endif

// No instruction: the same product of fp32 numbers (bits in uint32_t, a[4 h + 2 r + c] is row g + 8
// r, column 2t + c + 8 h; b[2 h + c] is row 2t + c + 8 h of column g) by shuffles and FFMA.
PTX_FN void ptx_mma_m16n8k16_f32_shuffles(float d[4], const uint32_t a[8], const uint32_t b[4],
                                          const float c[4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float s[4] = { c[0], c[1], c[2], c[3] };
#pragma unroll 1 // a quarter of the code: only lane numbers depend on owner
    for (int owner = 0; owner < 4; owner++)
#pragma unroll
        for (int i = 0; i < 4; i++) { // k = 2 owner + i % 2 + 8 (i / 2)
            int half = i / 2, odd = i % 2;
            float top = __uint_as_float(__shfl_sync(0xffffffffu, a[4 * half + odd], 4 * g + owner));
            float bottom =
                __uint_as_float(__shfl_sync(0xffffffffu, a[4 * half + 2 + odd], 4 * g + owner));
            float left =
                __uint_as_float(__shfl_sync(0xffffffffu, b[2 * half + odd], 8 * t + owner));
            float right =
                __uint_as_float(__shfl_sync(0xffffffffu, b[2 * half + odd], 8 * t + 4 + owner));
            s[0] += top * left, s[1] += top * right, s[2] += bottom * left, s[3] += bottom * right;
        }
    for (int i = 0; i < 4; i++) d[i] = s[i];
}
PTX_FN void ptx_mma_m16n8k16_f32(float d[4], const uint32_t a[8], const uint32_t b[4],
                                 const float c[4]) {
    PTX(cuemu::mma_m16n8k16_f32(d, a, b, c), ptx_mma_m16n8k16_f32_shuffles(d, a, b, c));
}

// ---- wgmma. Order: fence, mma..., commit, wait; the accumulators belong to the hardware until the
// wait.
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

// Keeps the compiler from moving accesses of the accumulators over a fence or a wait, which do not
// name them.
template <int N> PTX_FN void ptx_wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) PTX((void)d[i], asm volatile("" : "+f"(d[i])::"memory"));
}

// Makes the shared-memory matrix descriptor of an operand; swizzle in bytes: 128, 64, 32 or 0. Both
// distances are in bytes. With S = swizzle:
//
//   K-major (rows of S bytes along K)      sbo: from one group of 8 rows to the next (8 S when
//   dense),
//                                          lbo: 16 (LBO_K_MAJOR; the instruction takes it for 1
//                                          unit)
//   MN-major (rows of S bytes along M/N)   sbo: from one group of 8 k to the next,
//                                          lbo: from one group of S/2 elements along M/N to the
//                                          next
//   no swizzle (8 x 16-byte matrices)      sbo: along M/N, lbo: along K
enum { LBO_K_MAJOR = 16 };
PTX_FN uint64_t ptx_wgmma_desc(const void *p, uint32_t lbo, uint32_t sbo, int swizzle) {
    uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
    return (uint64_t)((ptx_smem(p) & 0x3FFFF) >> 4) | (uint64_t)(lbo >> 4 & 0x3FFF) << 16 |
           (uint64_t)(sbo >> 4 & 0x3FFF) << 32 | mode << 62;
}

// ptx_wgmma<N, TRANS_A, TRANS_B>(d, desc_a, desc_b, scale_d): D[64,N] = A[64,16] B[16,N] (+ D if
// scale_d), d[N/2] a thread. ptx_wgmma_ra<N, TRANS_B>(d, a, desc_b, scale_d): A from registers.
// TRANS = 1: the operand is M- or N-major in memory.
template <int N> struct PtxWgmma;
#ifdef CUEMU
template <int N> struct PtxWgmma {
    template <int TA, int TB> static void ss(float *d, uint64_t a, uint64_t b, int scale_d) {
        cuemu::wgmma(N, d, nullptr, a, b, scale_d, TA, TB);
    }
    template <int TB> static void rs(float *d, const uint32_t *a, uint64_t b, int scale_d) {
        cuemu::wgmma(N, d, a, 0, b, scale_d, false, TB);
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
// names: the accumulator names; D: their constraints; i0..: numbers of the operands after them
#define PTX_WGMMA(N, names, i0, i1, i2, i3, i4, i5, i6, ...)                                      \
    template <> struct PtxWgmma<N> {                                                              \
        template <int TA, int TB> PTX_FN void ss(float *d, uint64_t a, uint64_t b, int scale_d) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                  \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" names \
                         "}, %" i0 ", %" i1 ", p, 1, 1, %" i3 ", %" i4 ";\n}"                     \
                         : __VA_ARGS__                                                            \
                         : "l"(a), "l"(b), "r"(scale_d), "n"(TA), "n"(TB));                       \
        }                                                                                         \
        template <int TB> PTX_FN void rs(float *d, const uint32_t *a, uint64_t b, int scale_d) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5                                  \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" names \
                         "}, {%" i0 ",%" i1 ",%" i2 ",%" i3 "}, %" i4 ", p, 1, 1, %" i6 ";\n}"    \
                         : __VA_ARGS__                                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d),      \
                           "n"(TB));                                                              \
        }                                                                                         \
    };
PTX_WGMMA(64, PTX_N0 PTX_N16, "32", "33", "34", "35", "36", "37", "38", PTX_D32(0))
PTX_WGMMA(96, PTX_N0 PTX_N16 PTX_N32, "48", "49", "50", "51", "52", "53", "54", PTX_D32(0),
          PTX_D8(32), PTX_D8(40))
PTX_WGMMA(128, PTX_N0 PTX_N16 PTX_N32 PTX_N48, "64", "65", "66", "67", "68", "69", "70", PTX_D32(0),
          PTX_D32(32))
PTX_WGMMA(192, PTX_N0 PTX_N16 PTX_N32 PTX_N48 PTX_N64 PTX_N80, "96", "97", "98", "99", "100", "101",
          "102", PTX_D32(0), PTX_D32(32), PTX_D32(64))
PTX_WGMMA(256, PTX_N0 PTX_N16 PTX_N32 PTX_N48 PTX_N64 PTX_N80 PTX_N96 PTX_N112, "128", "129", "130",
          "131", "132", "133", "134", PTX_D32(0), PTX_D32(32), PTX_D32(64), PTX_D32(96))
#endif
template <int N, int TRANS_A = 0, int TRANS_B = 0>
PTX_FN void ptx_wgmma(float *d, uint64_t desc_a, uint64_t desc_b, int scale_d) {
    PtxWgmma<N>::template ss<TRANS_A, TRANS_B>(d, desc_a, desc_b, scale_d);
}
template <int N, int TRANS_B = 0>
PTX_FN void ptx_wgmma_ra(float *d, const uint32_t a[4], uint64_t desc_b, int scale_d) {
    PtxWgmma<N>::template rs<TRANS_B>(d, a, desc_b, scale_d);
}
