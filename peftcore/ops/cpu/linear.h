// y = W x + b over packed quantized weights, with a batch's adapters in the same launch.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace polypeft {

// How a matrix's numbers are kept.
enum class Type { kFloat, kHalf, kBFloat16 };

// A quantized weight in tiles of sixteen outputs; the last tile is filled up with zeros.
//
// int8: codes [tiles][in][16]; scales [tiles][16], W = code · scale.
// nf4:  codes [tiles][in/2][16], a byte holds inputs k (low) and k+1 (high) of one output;
//       scales [tiles][in/group][16], W = table[code] · scale; in and group are even.
struct Weight {
  bool nf4;
  int64_t out, in, group;
  const void* codes;
  const float* scales;
  const float* bias;  // [out] or null
  int64_t num_tiles() const { return (out + 15) / 16; }
};

// What one adapter does at one linear module.
//
// a: [rank][in]; b: [tiles][rank][16], the outputs in tiles as a weight's.
struct ModuleAdapter {
  const void* a = nullptr;
  const void* b = nullptr;
  Type type = Type::kFloat;
  int64_t rank = 0;
  float scale = 0.f;
  const float* in_scale = nullptr;   // [in]
  const float* out_scale = nullptr;  // [out]
  const float* bias = nullptr;       // [out]
};

// A resident adapter: module id → what it does there.
using Adapter = std::unordered_map<int64_t, ModuleAdapter>;

// Rows [start, end) use the adapter, its additive parts times `weight`. Segments of a mixture
// cover the same rows; a scale stands in no mixture.
struct Segment {
  int64_t start, end;
  const Adapter* adapter;
  float weight;
};

using Batch = std::vector<Segment>;

// One module of a launch. weight: null where y holds the base's result already.
struct Module {
  const Weight* weight;
  int64_t id, in, out;
  float* y;  // [rows][out]
};

// Semantics, for each module and row i: x' = x[i] ⊙ v_in; y[i] = W x' + b, then
// y[i] += Σ weight · scale · B (A x'), y[i] *= v_out, y[i] += Σ weight · Δb, over the segments that
// hold row i. A row's result does not depend on the other rows. Segmented matmul: Punica
// (arXiv:2310.18547), at each adapter's own rank.
//
// x: [rows][in], the same for all modules. batch: null or empty for none.
void linear(const float* x, int64_t rows, const std::vector<Module>& modules, const Batch* batch);

// x' of `linear` into out: [rows][in].
void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out);

// The outputs [start, stop) of Wᵀ into out: [in][stop − start], kFloat or kBFloat16; without an int8
// weight's scales where `scaled` is false.
void unpack(const Weight& weight, int64_t start, int64_t stop, bool scaled, void* out, Type type);

}  // namespace polypeft
