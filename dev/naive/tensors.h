// What naive.h computes with: the model's shape, its tensors under their Hugging Face names, arrays
// of numbers, and rounding.
#ifndef MOE_NAIVE_TENSORS_H
#define MOE_NAIVE_TENSORS_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef NUMBER
#define NUMBER double
#endif
typedef NUMBER number;

// ---- the model's shape and its tensors ------------------------------------------------------
typedef struct {
    int64_t V, C, L;             // vocabulary, hidden width, layers
    int64_t H, KV, D;            // query heads, key/value heads, size of a head
    int64_t E, K, F, I;          // experts, experts of a token, their width; width of a dense MLP
    const unsigned char *is_moe; // (L) 1: the layer has experts; 0: one dense MLP
    int norm_topk, tied;         // a token's scores sum to 1; the head is the embedding
    int pad;                     // this token's embedding has no gradient from look-ups; -1: none
    double eps, theta;           // inside the norms; base of the rotation
} NaiveConfig;

typedef struct {
    char name[128]; // as Hugging Face names it
    int64_t n;
    number *w, *g; // (n) values and their gradient
} Weight;
typedef struct {
    int n;
    Weight *weight;
} Weights;
// Tensors of a layer, from its first on. A dense layer has its MLP where others have the router.
enum { ATTN_NORM, Q_PROJ, K_PROJ, V_PROJ, Q_NORM, K_NORM, O_PROJ, MLP_NORM, ROUTER, EXPERTS };

static void *naive_allocate(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (p) return p;
    fprintf(stderr, "error: no memory for %zu elements of the naive model\n", n);
    exit(1);
}
static void weights_append(Weights *all, int64_t n, int layer, const char *name) {
    Weight *w = &all->weight[all->n++];
    if (layer < 0)
        snprintf(w->name, sizeof w->name, "%s", name);
    else
        snprintf(w->name, sizeof w->name, "model.layers.%d.%s", layer, name);
    w->n = n;
    w->w = (number *)naive_allocate((size_t)n, sizeof(number));
    w->g = (number *)naive_allocate((size_t)n, sizeof(number));
}
// Every tensor of the model, zero, in the order of computation.
static Weights naive_weights(const NaiveConfig *c) {
    size_t most = (size_t)(3 + c->L * (12 + 3 * c->E));
    Weights all = { 0, (Weight *)naive_allocate(most, sizeof(Weight)) };
    weights_append(&all, c->V * c->C, -1, "model.embed_tokens.weight");
    for (int l = 0; l < c->L; l++) {
        weights_append(&all, c->C, l, "input_layernorm.weight");
        weights_append(&all, c->H * c->D * c->C, l, "self_attn.q_proj.weight");
        weights_append(&all, c->KV * c->D * c->C, l, "self_attn.k_proj.weight");
        weights_append(&all, c->KV * c->D * c->C, l, "self_attn.v_proj.weight");
        weights_append(&all, c->D, l, "self_attn.q_norm.weight");
        weights_append(&all, c->D, l, "self_attn.k_norm.weight");
        weights_append(&all, c->C * c->H * c->D, l, "self_attn.o_proj.weight");
        weights_append(&all, c->C, l, "post_attention_layernorm.weight");
        if (c->is_moe[l]) weights_append(&all, c->E * c->C, l, "mlp.gate.weight");
        for (int e = 0; e < (c->is_moe[l] ? c->E : 1); e++)
            for (int part = 0; part < 3; part++) { // (F,C), (F,C), (C,F)
                static const char *const proj[] = { "gate_proj", "up_proj", "down_proj" };
                char name[80];
                if (c->is_moe[l])
                    snprintf(name, sizeof name, "mlp.experts.%d.%s.weight", e, proj[part]);
                else
                    snprintf(name, sizeof name, "mlp.%s.weight", proj[part]);
                weights_append(&all, (c->is_moe[l] ? c->F : c->I) * c->C, l, name);
            }
    }
    weights_append(&all, c->C, -1, "model.norm.weight");
    if (!c->tied) weights_append(&all, c->V * c->C, -1, "lm_head.weight");
    return all;
}

// ---- arrays and rounding --------------------------------------------------------------------
enum { NAIVE_ARRAYS = 4096 };
static void *naive_array[NAIVE_ARRAYS]; // what naive_release frees
static int naive_arrays, naive_rounding;

// An array of n zeros, until naive_release.
static number *zeros(int64_t n) {
    if (naive_arrays == NAIVE_ARRAYS) {
        fprintf(stderr, "error: the naive model needs more than %d arrays\n", NAIVE_ARRAYS);
        exit(1);
    }
    naive_array[naive_arrays] = naive_allocate((size_t)n, sizeof(number));
    return (number *)naive_array[naive_arrays++];
}
static void naive_release(void) {
    while (naive_arrays) free(naive_array[--naive_arrays]);
}
// Rounds to bf16 (nearest, ties to even) where naive_rounding is set; else returns v.
static inline number Q(number v) {
    if (!naive_rounding) return v;
    union {
        float f;
        uint32_t u;
    } x = { (float)v };
    x.u = (x.u + 0x7fff + (x.u >> 16 & 1)) & 0xffff0000u;
    return x.f;
}
static void add_into(number *a, const number *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) a[i] = Q(a[i] + b[i]);
}
#endif
