// A batch's adapters: what each does at the linear modules of a launch.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "weight.h"

namespace polypeft {

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

// What one segment does at one module of a launch.
struct Active {
  const Module* module;
  const float* x;  // [rows][in], scaled already
  int64_t start, end;
  const ModuleAdapter* at;
  float weight;
};

// The additive parts, output scales and biases, onto y: first those, then these, for each row.
// active: those of one module one after another.
void adapt(const std::vector<Active>& active);

// x' of `linear` into out: [rows][in].
void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out);

}  // namespace polypeft
