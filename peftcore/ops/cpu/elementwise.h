// What stands between the matmuls, each row by itself.
#pragma once

#include <cstdint>

namespace polypeft {

enum class Activation { kSilu, kGeluTanh };

// Semantics: out = x · (mean(x²) + eps)^(−1/2) ⊙ (offset + weight) (arXiv:1910.07467).
// x, out: [rows][dim], or the same memory; weight: [dim].
void rms_norm(const float* x, const float* weight, float offset, float eps, int64_t rows,
              int64_t dim, float* out);

// out = x + y: [count].
void add(const float* x, const float* y, int64_t count, float* out);

// Semantics: gate = activation(gate) ⊙ up. gate, up: [count]; SwiGLU and its kin
// (arXiv:2002.05202).
void gate(float* gate, const float* up, int64_t count, Activation activation);

}  // namespace polypeft
