// A decoder layer of the usual kind, as the engine's step has it: one call in place of a dozen.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace polypeft {

struct Norm {
  const float* weight;  // [dim], or null for none
  float offset, eps;
};

struct Projection {
  const Weight* weight;
  int64_t id;  // by which a batch knows the module
};

// Semantics: h = x + norm_a(W_o attend(q, k, v)) with q, k, v of norm(x), queries and keys under their
// heads' norms and rotated; out = h + norm_m(W_down(activation(W_gate z) ⊙ W_up z)) with z = norm(h).
// Norms may be missing but for those before. Each projection with what the batch's adapters do to it.
struct Layer {
  Projection q, k, v, o, gate, up, down;
  Norm before_attention, of_queries, of_keys, after_attention, before_mlp, after_mlp;
  int64_t head_dim, v_dim;
  Scores scores;
  Activation activation;
};

// Seconds that calls took, by part.
struct LayerSeconds {
  std::atomic<double> linear{0}, attention{0}, norms{0}, gates{0};
};

// Floats that `run` needs beside what it is given.
int64_t scratch_floats(const Layer& layer, int64_t rows);

// x, out: [rows][hidden]; the chunks' rows are `rows` together. memory: of `scratch_floats`.
void run(const Layer& layer, const float* x, int64_t rows, const Cache& cache, const int64_t* slots,
         const std::vector<Chunk>& chunks, const Rotary& rotary, const Batch* batch, float* memory,
         float* out, LayerSeconds& seconds);

}  // namespace polypeft
