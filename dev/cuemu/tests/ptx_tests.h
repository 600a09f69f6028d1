// PTX instructions that no kernel uses, for the emulator's own tests.
#pragma once
#include "ptx.h"

// True in one lane of a converged warp.
PTX_FN bool ptx_elect_one() {
#ifdef CUEMU
    return cuemu::elect_one(0xffffffffu);
#else
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(elected));
    return elected;
#endif
}
PTX_FN void ptx_bar_arrive(int id, int threads) {
    PTX(cuemu::named_barrier(id, threads, 0, false),
        asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads)
                     : "memory"));
}
PTX_FN void ptx_mbar_inval(uint64_t *bar) {
    PTX(cuemu::mbar_inval(bar), asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::PTX_S(bar)
                                             : "memory"));
}
// One look, never blocks.
PTX_FN bool ptx_mbar_test_wait(uint64_t *bar, uint32_t parity) {
#ifdef CUEMU
    return cuemu::mbar_test_wait(bar, parity);
#else
    uint32_t complete;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.b32 %0, 1, 0, p;\n}"
                 : "=r"(complete)
                 : PTX_S(bar), "r"(parity)
                 : "memory");
    return complete;
#endif
}
// Adds a box to global memory.
PTX_FN void ptx_tma_add_2d(const CUtensorMap *map, const void *smem, int x, int y) {
#ifdef CUEMU
    int c[] = { x, y };
    cuemu::tma_store(map, smem, 2, c, true);
#else
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group "
                 "[%0, {%2, %3}], [%1];" ::"l"(map),
                 PTX_S(smem), "r"(x), "r"(y)
                 : "memory");
#endif
}
// Copies without a tensor map; bytes and addresses are multiples of 16.
PTX_FN void ptx_bulk_load(void *smem, const void *global, uint32_t bytes, uint64_t *bar) {
    PTX(cuemu::bulk_load(smem, global, bytes, bar),
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];" ::PTX_S(smem),
                     "l"(global), "r"(bytes), PTX_S(bar)
                     : "memory"));
}
PTX_FN void ptx_bulk_store(void *global, const void *smem, uint32_t bytes) {
    PTX(cuemu::bulk_store(global, smem, bytes),
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                     PTX_S(smem), "r"(bytes)
                     : "memory"));
}
PTX_FN void ptx_ldmatrix_x2(uint32_t r[2], const void *row) {
    PTX(cuemu::ldmatrix(r, 2, row, false),
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : PTX_S(row)
                     : "memory"));
}
PTX_FN void ptx_stmatrix_x4_trans(void *row, const uint32_t r[4]) {
    PTX(cuemu::stmatrix(row, 4, r, true),
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::PTX_S(row),
            "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
            : "memory"));
}

// ptx_wgmma_ra: A from registers. Further widths of both forms.
template <int N> struct PtxWgmmaRa;
#ifdef CUEMU
template <int N> struct PtxWgmmaRa {
    template <int TRANS_B>
    static void product(float *d, const uint32_t *a, uint64_t b, int scale_d) {
        cuemu::wgmma(N, d, a, 0, b, scale_d, false, TRANS_B);
    }
};
#else
#define PTX_WGMMA_RA(N, names, a0, a1, a2, a3, b_, scale, tb, ...)                            \
    template <> struct PtxWgmmaRa<N> {                                                        \
        template <int TRANS_B>                                                                \
        PTX_FN void product(float *d, const uint32_t *a, uint64_t b, int scale_d) {           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" scale ", 0;\n"                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "          \
                         "{" names "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b_ ", p, 1, 1, " \
                         "%" tb ";\n}"                                                        \
                         : __VA_ARGS__                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d),  \
                           "n"(TRANS_B));                                                     \
        }                                                                                     \
    }
#define PTX_TESTED(N, names, i0, i1, i2, i3, i4, i5, i6, ...) \
    PTX_WGMMA(N, names, i0, i1, i2, i3, i4, __VA_ARGS__);     \
    PTX_WGMMA_RA(N, names, i0, i1, i2, i3, i4, i5, i6, __VA_ARGS__)
PTX_TESTED(64, PTX_N0 PTX_N16, "32", "33", "34", "35", "36", "37", "38", PTX_D32(0));
PTX_TESTED(96, PTX_N0 PTX_N16 PTX_N32, "48", "49", "50", "51", "52", "53", "54", PTX_D32(0),
           PTX_D8(32), PTX_D8(40));
PTX_TESTED(192, PTX_N0 PTX_N16 PTX_N32 PTX_N48 PTX_N64 PTX_N80, "96", "97", "98", "99", "100",
           "101", "102", PTX_D32(0), PTX_D32(32), PTX_D32(64));
PTX_WGMMA_RA(128, PTX_N0 PTX_N16 PTX_N32 PTX_N48, "64", "65", "66", "67", "68", "69", "70",
             PTX_D32(0), PTX_D32(32));
PTX_WGMMA_RA(256, PTX_N0 PTX_N16 PTX_N32 PTX_N48 PTX_N64 PTX_N80 PTX_N96 PTX_N112, "128", "129",
             "130", "131", "132", "133", "134", PTX_D32(0), PTX_D32(32), PTX_D32(64), PTX_D32(96));
#endif
template <int N, int TRANS_B = 0>
PTX_FN void ptx_wgmma_ra(float *d, const uint32_t a[4], uint64_t desc_b, int scale_d) {
    PtxWgmmaRa<N>::template product<TRANS_B>(d, a, desc_b, scale_d);
}
