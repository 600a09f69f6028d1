// Products of bf16 panels with fp32 sums by the processor's own instructions: vdpbf16ps
// (AVX512-BF16) or tiles (AMX-BF16), chosen when the program runs. gemm.c packs with the functions
// here and falls back to fp32 products where the processor has neither. Offers gemm.h's
// gemm_bf16_*.
//
// Both instructions multiply pairs of neighbours along k, so a pair is the unit of both packings,
// which serve both instructions. k is padded with zeros to KP, a multiple of 32.
//
//   A, row-major, m rows and room for 32 more:       B, strips of 32 columns, pairs side by side:
//
//     row 0    k0 k1 | k2 k3 | ...     KP              pair 0   c0: k0 k1 | c1: k0 k1 | ... c31
//     row 1    k0 k1 | k2 k3 | ...     KP              pair 1   c0: k2 k3 | c1: k2 k3 | ... c31
//     ...                                              ...      KP/2 pairs, then the next strip
//
//   vdpbf16ps   one pair of A, broadcast, times 16 columns of a pair row of B adds to 16 sums:
//               12 rows x 32 columns of sums fill 24 of the 32 registers.
//   tdpbf16ps   16 rows x 32 k of A (64 bytes a row, stride 2 KP bytes) times 16 pairs x 16 columns
//               of B (64 bytes a pair, stride 128 bytes) adds to 16 x 16 sums: 2 x 2 tiles of sums,
//               2 of A and 2 of B are all eight tiles.
// The sums of a block do not depend on the number of threads (I8, deterministic). Both
// instructions take denormal numbers as zero.
#define _GNU_SOURCE // syscall
#include "gemm.h"

enum { BLOCK = 32, TILE_M = BLOCK, STRIP = BLOCK, ROWS = 12 };

// ---- instructions ---------------------------------------------------------------------------
// The test replaces their names by an interpreter in plain C (GEMM_BF16_INTERPRETED).
#if defined(GEMM_BF16_INTERPRETED)
#define HAVE_INSTRUCTIONS 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define HAVE_INSTRUCTIONS 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define TARGET_AMX __attribute__((target("amx-tile,amx-bf16")))
#define AS_PAIRS(x) ((__m512bh)(x))

// The processor says what it can do, the operating system what it saves and, for tiles, grants.
static int detect(void) {
    enum { TILE_DATA = 18, REQUEST_PERMISSION = 0x1023 };
    unsigned a, b, c, d, tiles, sub;
    if (!__builtin_cpu_supports("avx512bw") || !__get_cpuid_count(7, 0, &a, &b, &c, &tiles))
        return GEMM_WIDENED;
    int amx = tiles >> 22 & tiles >> 24 & 1; // AMX-BF16 and AMX-TILE
    if (amx && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return GEMM_AMX;
    if (!__get_cpuid_count(7, 1, &sub, &b, &c, &d)) return GEMM_WIDENED;
    return sub >> 5 & 1 ? GEMM_AVX512 : GEMM_WIDENED; // AVX512-BF16
}
#else
static int detect(void) { return GEMM_WIDENED; }
#endif

GemmBf16 gemm_bf16_kind(void) {
    static int kind = -1; // gemm_init asks first, on one thread
    if (kind < 0) kind = detect();
    return (GemmBf16)kind;
}

// ---- packing --------------------------------------------------------------------------------
int64_t gemm_bf16_padded(int64_t k) { return div_up(k, BLOCK) * BLOCK; }
size_t gemm_bf16_a_size(int64_t m, int64_t k) { return (m + BLOCK) * gemm_bf16_padded(k); }
size_t gemm_bf16_b_size(int64_t n, int64_t k) {
    return div_up(n, BLOCK) * BLOCK * gemm_bf16_padded(k);
}
#ifdef HAVE_INSTRUCTIONS
// 16 x 16 pairs change places with those across the diagonal: squares of 8 x 8 first, then of 4, 2
// and 1. Index j of a permutation names pair j of the first operand, 16 + j of the second.
TARGET_AVX512 static inline void transpose(__m512i x[16]) {
#pragma GCC unroll 4
    for (int s = 8; s > 0; s /= 2) {
        int upper[16], lower[16];
        for (int j = 0; j < 16; j++) {
            upper[j] = j & s ? 16 + j - s : j;
            lower[j] = j & s ? 16 + j : j + s;
        }
        __m512i u = _mm512_loadu_si512(upper);
        __m512i l = _mm512_loadu_si512(lower);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i & s) continue;
            __m512i above = x[i];
            x[i] = _mm512_permutex2var_epi32(above, u, x[i + s]);
            x[i + s] = _mm512_permutex2var_epi32(above, l, x[i + s]);
        }
    }
}
// A line is a row of A or a column of B. They are packed in blocks of 32 lines x 32 k, each through
// registers that hold 16 pairs: of one line, or of 16 lines at the same k. A block at an edge is
// copied into zeros first.
TARGET_AVX512 void gemm_bf16_pack(uint16_t *out, const uint16_t *X, int64_t ld, int lines_first,
                                  int64_t lines, int64_t k, int is_a) {
    int64_t padded = gemm_bf16_padded(k);
    int64_t step = is_a ? padded : 2 * BLOCK;
    uint16_t edge[BLOCK * BLOCK], pairs[2][BLOCK];
    for (int j = 0; j < BLOCK; j++) {
        pairs[0][j] = (uint16_t)(j / 2 + j % 2 * BLOCK);
        pairs[1][j] = (uint16_t)(pairs[0][j] + BLOCK / 2);
    }
    for (int64_t line = 0; line < lines; line += BLOCK)
        for (int64_t p = 0; p < k; p += BLOCK) {
            const uint16_t *from = X + (lines_first ? line * ld + p : p * ld + line);
            int64_t rows = lesser(BLOCK, lines_first ? lines - line : k - p);
            int64_t from_ld = ld;
            int64_t width = lesser(BLOCK, lines_first ? k - p : lines - line);
            if (rows < BLOCK || width < BLOCK) {
                memset(edge, 0, sizeof edge);
                for (int64_t r = 0; r < rows; r++)
                    memcpy(edge + r * BLOCK, from + r * ld, width * sizeof *edge);
                from = edge;
                from_ld = BLOCK;
            }
            uint16_t *to = out + line * padded + (is_a ? p : p * BLOCK);
            for (int half = 0; half < 2; half++) {
                __m512i x[16];
                __m512i order = _mm512_loadu_si512(pairs[half]);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    x[i] = lines_first ? _mm512_loadu_si512(from + (half * 16 + i) * from_ld)
                                       : _mm512_permutex2var_epi16(
                                             _mm512_loadu_si512(from + 2 * i * from_ld), order,
                                             _mm512_loadu_si512(from + (2 * i + 1) * from_ld));
                if (lines_first != is_a) transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    _mm512_storeu_si512(to + (is_a ? half * 16 * step : half * BLOCK) + i * step,
                                        x[i]);
            }
        }
}

// ---- products -------------------------------------------------------------------------------
// c (ROWS,STRIP) = ROWS rows of A times a strip of B.
TARGET_AVX512 static void product_avx512(float *c, const uint16_t *a, const uint16_t *b,
                                         int64_t padded) {
    __m512 c0[ROWS], c1[ROWS];
    for (int i = 0; i < ROWS; i++) c0[i] = c1[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < padded; p += 2, b += 2 * STRIP) {
        __m512i b0 = _mm512_loadu_si512(b);
        __m512i b1 = _mm512_loadu_si512(b + STRIP);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            int pair;
            memcpy(&pair, a + i * padded + p, sizeof pair);
            __m512i both = _mm512_set1_epi32(pair);
            c0[i] = _mm512_dpbf16_ps(c0[i], AS_PAIRS(both), AS_PAIRS(b0));
            c1[i] = _mm512_dpbf16_ps(c1[i], AS_PAIRS(both), AS_PAIRS(b1));
        }
    }
    for (int i = 0; i < ROWS; i++) {
        _mm512_storeu_ps(c + i * STRIP, c0[i]);
        _mm512_storeu_ps(c + i * STRIP + STRIP / 2, c1[i]);
    }
}
// Palette 1: eight tiles of 16 rows of 64 bytes.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;
TARGET_AMX static void tiles_begin(void) {
    TileConfig config = { .palette = 1 };
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}
TARGET_AMX static void tiles_end(void) { _tile_release(); }
// c (TILE_M,STRIP) = TILE_M rows of A times a strip of B. Tiles 0 to 3 are sums, 4 and 5 A, 6 and
// 7 B.
TARGET_AMX static void product_amx(float *c, const uint16_t *a, const uint16_t *b, int64_t padded) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t p = 0; p < padded; p += 32, b += 32 * STRIP) {
        _tile_loadd(4, a + p, 2 * padded);
        _tile_loadd(5, a + 16 * padded + p, 2 * padded);
        _tile_loadd(6, b, 4 * STRIP);
        _tile_loadd(7, b + STRIP, 4 * STRIP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * STRIP);
    _tile_stored(1, c + 16, 4 * STRIP);
    _tile_stored(2, c + 16 * STRIP, 4 * STRIP);
    _tile_stored(3, c + 16 * STRIP + 16, 4 * STRIP);
}
// c + beta C (rows,columns), to X where it is given, else to C.
TARGET_AVX512 static inline void put(float *C, int64_t ldc, uint16_t *X, int64_t ldx,
                                     const float *c, int64_t rows, int64_t columns, int beta) {
    for (int64_t r = 0; r < rows; r++, c += STRIP, C += ldc) {
        float sum[STRIP];
        for (int64_t s = 0; s < columns; s++) sum[s] = beta ? C[s] + c[s] : c[s];
        for (int64_t s = 0; s < columns && !X; s++) C[s] = sum[s];
        for (int64_t s = 0; s < columns && X; s++) X[r * ldx + s] = float_to_bf16(sum[s]);
    }
}
// The same for a whole strip: the compiler knows its width and what it adds.
TARGET_AVX512 static void put_strip(float *C, int64_t ldc, uint16_t *X, int64_t ldx, const float *c,
                                    int64_t rows, int beta) {
    if (X)
        put(C, ldc, X, ldx, c, rows, STRIP, beta);
    else if (beta)
        put(C, ldc, 0, 0, c, rows, STRIP, 1);
    else
        put(C, ldc, 0, 0, c, rows, STRIP, 0);
}
void gemm_bf16(GemmBf16 kind, float *C, int64_t ldc, uint16_t *X, int64_t ldx, const uint16_t *a,
               const uint16_t *b, int64_t m, int64_t n, int64_t k, int beta) {
    int64_t padded = gemm_bf16_padded(k);
    int64_t step = kind == GEMM_AMX ? TILE_M : ROWS;
    float c[TILE_M * STRIP];
    if (kind == GEMM_AMX) tiles_begin();
    for (int64_t j = 0; j < n; j += STRIP)
        for (int64_t i = 0; i < m; i += step) {
            if (kind == GEMM_AMX)
                product_amx(c, a + i * padded, b + j * padded, padded);
            else
                product_avx512(c, a + i * padded, b + j * padded, padded);
            int64_t rows = lesser(step, m - i);
            float *to = C + i * ldc + j;
            uint16_t *rounded = X ? X + i * ldx + j : 0;
            if (n - j >= STRIP)
                put_strip(to, ldc, rounded, ldx, c, rows, beta);
            else
                put(to, ldc, rounded, ldx, c, rows, n - j, beta);
        }
    if (kind == GEMM_AMX) tiles_end();
}
#else
void gemm_bf16_pack(uint16_t *out, const uint16_t *X, int64_t ld, int lines_first, int64_t lines,
                    int64_t k, int is_a) {
    (void)out;
    (void)X;
    (void)ld;
    (void)lines_first;
    (void)lines;
    (void)k;
    (void)is_a;
}
void gemm_bf16(GemmBf16 kind, float *C, int64_t ldc, uint16_t *X, int64_t ldx, const uint16_t *a,
               const uint16_t *b, int64_t m, int64_t n, int64_t k, int beta) {
    (void)kind;
    (void)C;
    (void)ldc;
    (void)X;
    (void)ldx;
    (void)a;
    (void)b;
    (void)m;
    (void)n;
    (void)k;
    (void)beta;
}
#endif
