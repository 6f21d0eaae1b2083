// A batch's adapters: what each does at the linear modules of a launch.
#pragma once

#include <cstdint>
#include <vector>

#include "matmul.h"
#include "weight.h"

namespace polypeft {

// What one adapter does at one linear module.
//
// a: [rank][in]; b: [tiles][rank][16], the outputs in tiles as a weight's. Of kByte, they are int8 weights
// of `rank` outputs and inputs, the scales of the first making up for the second's.
struct ModuleAdapter {
  int64_t in = 0, out = 0;  // 0: nothing at this module
  const void* a = nullptr;
  const void* b = nullptr;
  Weight a_codes{}, b_codes{};  // of kByte
  Type type = Type::kFloat;
  int64_t rank = 0;
  float scale = 0.f;
  const float* in_scale = nullptr;   // [in]
  const float* out_scale = nullptr;  // [out]
  const float* bias = nullptr;       // [out]
};

// A resident adapter: what it does at each module, by the module's id.
struct Adapter {
  std::vector<ModuleAdapter> modules;
  // Null where it does nothing.
  const ModuleAdapter* find(int64_t id) const {
    if (id < 0 || id >= static_cast<int64_t>(modules.size()) || !modules[id].in) return nullptr;
    return &modules[id];
  }
};

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
  float* shrunk = nullptr;  // scale · weight · A x: [end − start][rank]
  Rounded rounded{};        // the same rounded, where the module's inputs are, and factors are codes
};

// What a launch's segments do to its modules' y: for each row first the additive parts, then output
// scales, then biases. First A x of all of them, whose tasks may run at a time; then the rest, tile by
// tile, where the base's result has just been written.
class AdapterTasks {
 public:
  AdapterTasks(const std::vector<Module>& modules, std::vector<Active> active);
  AdapterTasks(const AdapterTasks&) = delete;
  int64_t work() const { return work_; }  // multiplications
  int64_t num_shrinks() const { return static_cast<int64_t>(shrinks_.size()); }
  // rounded: of each module's inputs, where they are, or null.
  void shrink(int64_t i, const std::vector<Rounded>& rounded) const;
  // To rows [row, stop) of a module's tiles [tile, end).
  void finish(int64_t module, int64_t row, int64_t stop, int64_t tile, int64_t end) const;

 private:
  // A block of a segment's rows at one module.
  struct Shrink {
    int64_t module;
    const Active* active;
    int64_t row, stop;
  };
  std::vector<Active> active_;
  std::vector<const Active*> first_;  // of each module, and the end
  std::vector<Shrink> shrinks_;
  int64_t work_ = 0;
};

// x' of `linear` into out: [rows][in].
void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out);

}  // namespace polypeft
