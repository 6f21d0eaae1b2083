// Adapters in training at one linear module: what they do to its outputs, and the gradients of that.
#pragma once

#include <cstdint>
#include <vector>

#include "weight.h"

namespace polypeft {

// Rows [start, end) of a launch, which are one adapter's; parts are disjoint. Memory of type T is
// kFloat or kBFloat16, as the module's own; all sums are floats. Null: not there, or not wanted.
struct TrainedPart {
  int64_t start, end;
  const void* x;  // T [end − start][in], the part's inputs
  // The update, of rank 0 for none.
  int64_t rank = 0;
  float scale = 0.f;
  const float* a = nullptr;  // [rank][in]
  const float* b = nullptr;  // [out][rank]
  float* low = nullptr;      // [end − start][rank]: A x
  // The output scale.
  const float* v = nullptr;  // [out]
  void* before = nullptr;    // T [end − start][out]: y before the scale
  // Gradients.
  float* grad_a = nullptr;   // as a
  float* grad_b = nullptr;   // as b
  float* grad_v = nullptr;   // as v
  void* grad_x = nullptr;    // as x
};

// Semantics, for row i of a part: low = A x[i], y[i] += scale · B low, before = y[i], y[i] *= v. A
// row's result does not depend on the others, nor on the number of threads.
//
// y: T [rows][out].
void adapt(void* y, Type type, int64_t in, int64_t out, const std::vector<TrainedPart>& parts);

// The gradients of `adapt`, which left `low` and `before`. A part's are summed over its own rows in
// order, and touch no other's.
//
// grad: T [rows][out], of y; becomes that of what `adapt` found in y. To grad_x is added.
void adapt_back(void* grad, Type type, int64_t in, int64_t out,
                const std::vector<TrainedPart>& parts);

// norms[o] = ‖W[o] + scale · (B A)[o]‖ from ‖W[o]‖² + 2 scale B[o] · (A Wᵀ)[o] + scale² B[o] A Aᵀ B[o]ᵀ
// (DoRA, arXiv:2402.09353, section 4.3).
//
// a: [rank][in]; b: [out][rank]; across: [rank][out], A Wᵀ; squares: [out], ‖W[o]‖².
void row_norms(const float* a, const float* b, const float* across, const float* squares,
               float scale, int64_t rank, int64_t in, int64_t out, float* norms);

}  // namespace polypeft
