// A batch's adapters: what each does at the linear modules of a launch.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "matmul.h"
#include "weight.h"

namespace polypeft {

// A low-rank update: a: [rank][in]; b: [tiles][rank][16], the outputs in tiles as a weight's. Of kByte,
// they are int8 weights of `rank` outputs and inputs, the scales of the first making up for the second's.
struct Factors {
  const void* a = nullptr;
  const void* b = nullptr;
  const float* a_scales = nullptr;  // of kByte
  float scale = 0.f;
  int32_t rank = 0;
  Type type = Type::kFloat;
};

// What one adapter does at one linear module.
struct ModuleAdapter {
  int64_t in = 0, out = 0;
  Factors factors;
  const float* in_scale = nullptr;   // [in]
  const float* out_scale = nullptr;  // [out]
  const float* bias = nullptr;       // [out]
};

// A resident adapter: what it does at each module, by the module's id.
class Adapter {
 public:
  void set(int64_t id, const ModuleAdapter& entry);
  int64_t num_modules() const { return static_cast<int64_t>(entries_.size()); }
  int64_t num_ids() const { return static_cast<int64_t>(by_id_.size()); }
  // Null where it does nothing.
  const ModuleAdapter* find(int64_t id) const { return by_id_[id]; }

 private:
  std::deque<ModuleAdapter> entries_;  // which stay where they are
  std::vector<ModuleAdapter*> by_id_;
};

// Rows [start, end) use the adapter, its additive parts times `weight`. Segments of a mixture
// cover the same rows; a scale stands in no mixture.
struct Segment {
  int64_t start, end;
  const Adapter* adapter;
  float weight;
};

// What a segment does at a module. `at` itself is in no cache when a launch begins, nor are its
// neighbours: what most launches read of it stands here.
struct Part {
  int64_t start, end;
  const ModuleAdapter* at;
  int64_t in, out;
  Factors factors;
  float weight;
  bool scales_inputs, scales_outputs, has_bias;
};

// A step's segments by module, of adapters as they are when it is made: a step's launches ask for every
// module once, and would find each adapter's entry for it elsewhere.
class Batch {
 public:
  explicit Batch(const std::vector<Segment>& segments);
  // In the order of the segments.
  std::span<const Part> at(int64_t id) const {
    if (id < 0 || id + 1 >= static_cast<int64_t>(first_.size())) return {};
    return {parts_.data() + first_[id], parts_.data() + first_[id + 1]};
  }

 private:
  std::vector<Part> parts_;
  std::vector<size_t> first_;  // of each id, and the end
};

// One module of a launch. weight: null where y holds the base's result already.
struct Module {
  const Weight* weight;
  int64_t id, in, out;
  float* y;  // [rows][out]
};

// A part at one module of a launch.
struct Active : Part {
  const Module* module;
  int64_t index;            // the module's
  const float* x;           // [rows][in], scaled already
  bool rounds;              // are factors multiplied as codes with rounded inputs?
  float* shrunk = nullptr;  // scale · weight · A x: [end − start][rank]
  Rounded rounded{};        // the same rounded, where that is so
};

// What a launch's segments do to its modules' y: for each row first the additive parts, then output
// scales, then biases. First A x of all of them, whose tasks may run at a time; then the rest, tile by
// tile, where the base's result has just been written.
class AdapterTasks {
 public:
  // inputs: of each module, scaled already. batch: or null.
  AdapterTasks(const std::vector<const float*>& inputs, const std::vector<Module>& modules,
               const Batch* batch);
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
    const Active* active;
    int64_t row, stop;
  };
  // Where a module's are, and whether any has these.
  struct OfModule {
    size_t first = 0, last = 0;
    bool scales_outputs = false, has_bias = false;
  };
  void lay_out_shrunk();
  void share_out();

  std::vector<Active> active_;
  std::vector<OfModule> of_module_;
  std::vector<Shrink> shrinks_;
  int64_t work_ = 0;
};

// x' of `linear` into out: [rows][in].
void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out);

}  // namespace polypeft
