// warp_mma.cpp - mma.sync.m16n8k16, ldmatrix, stmatrix with the fragment layouts of the PTX manual.
#include "block.h"
#include "cuemu/tensor_core.h"
#include <cstring>

namespace cuemu {

static float bf16_half(unsigned r, int high) {
    unsigned u = high ? r & 0xffff0000u : r << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// C += A B, each element in the order of k; columns are inside, so that they vectorise.
static void multiply(float C[16][8], const float A[16][16], const float B[16][8]) {
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < 8; col++) C[row][col] += A[row][k] * B[k][col];
}
// Where element i of a lane's accumulators lies.
static float &place(float C[16][8], int lane, int i) {
    return C[(lane >> 2) + (i >> 1) * 8][2 * (lane & 3) + (i & 1)];
}

struct MmaOperands {
    unsigned a[4], b[2];
    float c[4];
};

void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2], const float c[4]) {
    Fiber *f = W->cur;
    auto *x = (MmaOperands *)f->warp->in[f->lane];
    memcpy(x->a, a, sizeof x->a);
    memcpy(x->b, b, sizeof x->b);
    memcpy(x->c, c, sizeof x->c);
    warp_wait(
        0xffffffffu, OP_MMA,
        [](Warp *w, unsigned) {
            float A[16][16], B[16][8], C[16][8] = {};
            for (int l = 0; l < 32; l++) {
                auto *x = (MmaOperands *)w->in[l];
                int g = l >> 2;
                int t = l & 3;
                for (int h = 0; h < 2; h++) {
                    A[g][2 * t + h] = bf16_half(x->a[0], h);
                    A[g + 8][2 * t + h] = bf16_half(x->a[1], h);
                    A[g][2 * t + 8 + h] = bf16_half(x->a[2], h);
                    A[g + 8][2 * t + 8 + h] = bf16_half(x->a[3], h);
                    B[2 * t + h][g] = bf16_half(x->b[0], h);
                    B[2 * t + 8 + h][g] = bf16_half(x->b[1], h);
                }
            }
            multiply(C, A, B);
            for (int l = 0; l < 32; l++) {
                auto *x = (MmaOperands *)w->in[l];
                float *o = (float *)w->out[l];
                for (int i = 0; i < 4; i++) o[i] = x->c[i] + place(C, l, i);
            }
        },
        false);
    memcpy(d, f->warp->out[f->lane], 4 * sizeof *d);
}

// The same for fp32 operands: what ptx.h does by 64 shuffles, in one rendezvous.
struct MmaOperandsF32 {
    float a[8], b[4], c[4];
};
void mma_m16n8k16_f32(float d[4], const unsigned a[8], const unsigned b[4], const float c[4]) {
    Fiber *f = W->cur;
    auto *x = (MmaOperandsF32 *)f->warp->in[f->lane];
    static_assert(sizeof *x <= sizeof f->warp->in[0], "operands fit into a lane's slot");
    memcpy(x->a, a, sizeof x->a);
    memcpy(x->b, b, sizeof x->b);
    memcpy(x->c, c, sizeof x->c);
    warp_wait(
        0xffffffffu, OP_MMA,
        [](Warp *w, unsigned) {
            float A[16][16], B[16][8], C[16][8];
            for (int l = 0; l < 32; l++) {
                auto *x = (MmaOperandsF32 *)w->in[l];
                int g = l >> 2;
                int t = l & 3;
                for (int i = 0; i < 8; i++)
                    A[g + 8 * (i >> 1 & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = x->a[i];
                for (int i = 0; i < 4; i++) B[2 * t + (i & 1) + 8 * (i >> 1)][g] = x->b[i];
            }
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < 4; i++) place(C, l, i) = ((MmaOperandsF32 *)w->in[l])->c[i];
            multiply(C, A, B);
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < 4; i++) ((float *)w->out[l])[i] = place(C, l, i);
        },
        false);
    memcpy(d, f->warp->out[f->lane], 4 * sizeof *d);
}

// Lane 8i+j names row j of matrix i. Element [r][c] of matrix i is in lane 4r+c/2, register i, half
// c%2; transposed: with r and c exchanged.
void ldmatrix(unsigned *r, int count, const void *row, bool trans) {
    Fiber *f = W->cur;
    int l = (int)f->lane;
    if (l < 8 * count && (uintptr_t)row & 15)
        fail("ldmatrix: row address of lane %d is not 16-byte aligned", l);
    *(const void **)f->warp->in[l] = row;
    warp_wait(
        0xffffffffu, OP_LDMATRIX,
        [](Warp *w, unsigned) {
            for (int l = 0; l < 32; l++)
                memcpy(w->out[l], w->in[l], 8); // all row addresses, stable after the rendezvous
        },
        false);
    for (int i = 0; i < count; i++)
        for (int h = 0; h < 2; h++) {
            int rr = trans ? 2 * (l & 3) + h : l >> 2;
            int cc = trans ? l >> 2 : 2 * (l & 3) + h;
            const uint16_t *p = *(const uint16_t **)f->warp->out[i * 8 + rr] + cc;
            tsan_read(p, 2);
            memcpy((char *)&r[i] + 2 * h, p, 2);
        }
    warp_wait(0xffffffffu, OP_LDMATRIX, nullptr,
              false); // nobody overwrites the addresses before all have read
}
void stmatrix(void *row, int count, const unsigned *r, bool trans) {
    Fiber *f = W->cur;
    int l = (int)f->lane;
    if (l < 8 * count && (uintptr_t)row & 15)
        fail("stmatrix: row address of lane %d is not 16-byte aligned", l);
    *(void **)f->warp->in[l] = row;
    warp_wait(
        0xffffffffu, OP_STMATRIX,
        [](Warp *w, unsigned) {
            for (int l = 0; l < 32; l++) memcpy(w->out[l], w->in[l], 8);
        },
        false);
    for (int i = 0; i < count; i++)
        for (int h = 0; h < 2; h++) {
            int rr = trans ? 2 * (l & 3) + h : l >> 2;
            int cc = trans ? l >> 2 : 2 * (l & 3) + h;
            uint16_t *p = *(uint16_t **)f->warp->out[i * 8 + rr] + cc;
            tsan_write(p, 2);
            memcpy(p, (const char *)&r[i] + 2 * h, 2);
        }
    warp_wait(0xffffffffu, OP_STMATRIX, nullptr, false);
}
} // namespace cuemu
