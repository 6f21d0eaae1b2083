// Causal attention of short sequences, each to itself, with gradients.
#pragma once

#include <cstdint>
#include <vector>

#include "weight.h"

namespace polypeft {

// Rows of heads: the value of row r, head h and feature k lies at r · row + h · head + k.
struct HeadRows {
  void* values;  // T
  int64_t row, head;
};

// Rows [start, end) are one sequence.
struct Sequence {
  int64_t start, end;
};

// The operands of one layer; T is kFloat or kBFloat16, sums are floats. dim is a multiple of 16.
struct SelfAttention {
  Type type;
  int64_t heads, kv_heads, dim, rows;
  float scale;
  HeadRows q, k, v, out;
  float* log_sums;  // [heads][rows]: of each row's exponentials
};

// Semantics: out[i] = softmax(scale · q[i] · k[j] over the j ≤ i of i's sequence) · v. A sequence's
// rows depend on nothing outside it, nor on the number of threads.
void attend_short(const SelfAttention& a, const std::vector<Sequence>& sequences);

// The gradients of q, k and v, from what `attend_short` left in out and log_sums.
void attend_short_back(const SelfAttention& a, const std::vector<Sequence>& sequences,
                       const HeadRows& grad, const HeadRows& grad_q, const HeadRows& grad_k,
                       const HeadRows& grad_v);

}  // namespace polypeft
