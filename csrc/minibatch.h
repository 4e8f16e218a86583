// Scratch memory of a minibatch and what a chain keeps in it.
#pragma once
#include "gemm.h"
#include "lockstep.h"
#include "pool.h"

// Hands out pieces of one block of scratch memory.
struct Arena {
  char* at;
  float* floats(i64 num) {
    char* here = at;
    at += round_up(num * (i64)sizeof(float), 64);
    return (float*)here;
  }
};
static inline i64 room(i64 num) { return round_up(num * (i64)sizeof(float), 64); }

// Blocks [rows, width] that a chain's forward pass keeps of layer l; see ls_mlp_forward.
static inline i64 saved_blocks_of(const LsMlp* mlp, i64 l) {
  const bool last = l == mlp->num_layers - 1;
  const int32_t activation = last ? mlp->output_activation : mlp->activation;
  return (last ? 0 : 1) + (activation == LS_SILU || activation == LS_GELU ? 1 : 0);
}
// Floats per row that the backward pass needs of a chain, or of one member of an ensemble.
static inline i64 saved_per_row(const LsMlp* mlp) {
  i64 total = 0;
  for (i64 l = 0; l < mlp->num_layers; l++) total += mlp->sizes[l + 1] * saved_blocks_of(mlp, l);
  return total;
}
