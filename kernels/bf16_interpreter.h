// The instructions of cpu/gemm_bf16.c in plain C, by Intel's manual (volume 2: VDPBF16PS,
// TDPBF16PS, LDTILECFG, TILELOADD), so that the packing and both kernels run on any processor:
// included before that file by test_gemm_bf16.c, or by the compiler in a whole build whose bf16
// products it then computes, slowly:
//   make PRECISION=bf16 ROOT_BUILD=build/interpreted EXTRA_gemm_bf16="-include
//        kernels/bf16_interpreter.h -DGEMM_BF16_FORCED=GEMM_AMX" ...
#ifndef MOE_BF16_INTERPRETER_H
#define MOE_BF16_INTERPRETER_H
#include <stdint.h>
#include <string.h>
typedef struct {
    float lane[16];
} Lanes;
typedef struct {
    uint16_t half[32];
} Halves;
static float half_float(uint16_t bits) { // denormal numbers count as zero
    uint32_t u = bits & 0x7f80u ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x8000u) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static Lanes zero_lanes(void) { return (Lanes){ { 0 } }; }
static Halves load_halves(const void *p) {
    Halves x;
    memcpy(&x, p, sizeof x);
    return x;
}
static Halves broadcast(int pair) {
    Halves x;
    for (int i = 0; i < 16; i++) memcpy(x.half + 2 * i, &pair, 4);
    return x;
}
// Pair or half i of the result is number index[i] of a, or of b where it is larger.
static Halves permute_pairs(Halves a, Halves index, Halves b) {
    Halves x;
    for (int i = 0; i < 16; i++) {
        int32_t from;
        memcpy(&from, index.half + 2 * i, 4);
        memcpy(x.half + 2 * i, (from < 16 ? a.half : b.half) + 2 * (from % 16), 4);
    }
    return x;
}
static Halves permute_halves(Halves a, Halves index, Halves b) {
    Halves x;
    for (int i = 0; i < 32; i++)
        x.half[i] = (index.half[i] < 32 ? a.half : b.half)[index.half[i] % 32];
    return x;
}
static void store_halves(void *p, Halves x) { memcpy(p, x.half, sizeof x.half); }
static void add_pair(float *sum, const uint16_t *a, const uint16_t *b) {
    *sum += half_float(a[1]) * half_float(b[1]);
    *sum += half_float(a[0]) * half_float(b[0]);
}
static Lanes dot_pairs(Lanes c, Halves a, Halves b) {
    for (int i = 0; i < 16; i++) add_pair(c.lane + i, a.half + 2 * i, b.half + 2 * i);
    return c;
}
static void store_lanes(float *p, Lanes x) { memcpy(p, x.lane, sizeof x.lane); }
// Eight tiles of 16 rows of 64 bytes; `tiles_configured` is what LDTILECFG sets and clears.
static _Thread_local uint8_t tile[8][16][64];
static _Thread_local int tiles_configured, tiles_misused;
static void load_config(const void *p) {
    const uint8_t *c = p;
    tiles_configured = c[0] == 1;
    for (int i = 0; i < 8; i++)
        tiles_configured &= c[16 + 2 * i] == 64 && c[17 + 2 * i] == 0 && c[48 + i] == 16;
}
static void release_tiles(void) { tiles_configured = 0; }
static void zero_tile(int t) { memset(tile[t], 0, sizeof tile[t]); }
static void load_tile(int t, const void *p, int64_t stride) {
    tiles_misused += !tiles_configured;
    for (int r = 0; r < 16; r++) memcpy(tile[t][r], (const char *)p + r * stride, 64);
}
static void store_tile(int t, void *p, int64_t stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)p + r * stride, tile[t][r], 64);
}
static void multiply_tiles(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                float sum;
                memcpy(&sum, tile[c][m] + 4 * n, 4);
                uint16_t x[2], y[2];
                memcpy(x, tile[a][m] + 4 * k, 4);
                memcpy(y, tile[b][k] + 4 * n, 4);
                add_pair(&sum, x, y);
                memcpy(tile[c][m] + 4 * n, &sum, 4);
            }
}
#define GEMM_BF16_INTERPRETED 1
#define TARGET_AVX512
#define TARGET_AMX
#define AS_PAIRS(x) (x)
#define __m512 Lanes
#define __m512i Halves
#define _mm512_setzero_ps zero_lanes
#define _mm512_loadu_si512 load_halves
#define _mm512_storeu_si512 store_halves
#define _mm512_set1_epi32 broadcast
#define _mm512_permutex2var_epi32 permute_pairs
#define _mm512_permutex2var_epi16 permute_halves
#define _mm512_dpbf16_ps dot_pairs
#define _mm512_storeu_ps store_lanes
#define _tile_loadconfig load_config
#define _tile_release release_tiles
#define _tile_zero zero_tile
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps multiply_tiles
#ifndef GEMM_BF16_FORCED
#define GEMM_BF16_FORCED GEMM_WIDENED
#endif
#define detect() GEMM_BF16_FORCED
#endif
