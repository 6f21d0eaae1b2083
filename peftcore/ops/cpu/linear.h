// y = W x + b over packed quantized weights, with a batch's adapters in the same launch.
#pragma once

#include <cstdint>
#include <vector>

#include "adapters.h"

namespace polypeft {

// Semantics, for each module and row i: x' = x[i] ⊙ v_in; y[i] = W x' + b, then
// y[i] += Σ weight · scale · B (A x'), y[i] *= v_out, y[i] += Σ weight · Δb, over the segments that
// hold row i. A row's result does not depend on the other rows. Segmented matmul: Punica
// (arXiv:2310.18547), at each adapter's own rank.
//
// x: [rows][in], the same for all modules. batch: null or empty for none.
void linear(const float* x, int64_t rows, const std::vector<Module>& modules, const Batch* batch);

}  // namespace polypeft
