#include "linear.h"

#include <memory>

#include "matmul.h"
#include "parallel.h"

namespace polypeft {
namespace {

constexpr int64_t kBlockRows = 192;  // of one task
constexpr int64_t kRoundRows = 4;
// So few rows are multiplied faster than memory gives their weight. A thread then asks for this much
// before it needs it: for more, and what lies behind its last tile is read for nothing.
constexpr int64_t kFewRows = 4;
constexpr int64_t kAheadBytes = 4096;

// Every module's W x + b into its y, and what adapters do to it: first a phase that rounds inputs, then
// one that multiplies.
class TileTasks {
 public:
  TileTasks(const std::vector<const float*>& inputs, int64_t rows,
            const std::vector<Module>& modules, const AdapterTasks& adapters)
      : inputs_(inputs), rows_(rows), modules_(modules), adapters_(adapters),
        laid_(modules.size()), rounded_(modules.size()) {
    prepare();
    int64_t num_tiles = 0;
    for (const Module& m : modules_) num_tiles += tiles_of(m);
    const int64_t step = num_tiles >= 512 ? 8 : num_tiles >= 96 || rows > kBlockRows ? 4 : 2;
    ahead_ = rows <= kBlockRows ? step : 0;  // tiles; else they come more than once
    for (int64_t m = 0; m < static_cast<int64_t>(modules_.size()); ++m) {
      const int64_t tiles = tiles_of(modules_[m]);
      for (int64_t row = 0; row < rows; row += kBlockRows)
        for (int64_t t = 0; t < tiles; t += step)
          tasks_.push_back({m, t, std::min(t + step, tiles), row});
    }
  }

  int64_t num_rounds() const { return static_cast<int64_t>(rounds_.size()); }
  void round(int64_t i) const {
    const auto [m, row] = rounds_[i];
    round_rows(inputs_[m], modules_[m].in, row, std::min(row + kRoundRows, rows_),
               rounded_[m]);
  }

  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
  int64_t work() const {  // multiplications
    int64_t work = 0;
    for (const Module& m : modules_)
      if (m.weight) work += rows_ * m.in * m.out;
    return work;
  }
  // What inputs were rounded to, of each module.
  const std::vector<Rounded>& rounded() const { return rounded_; }
  void run(int64_t i) const {
    const auto [m, tile, end, row] = tasks_[i];
    const int64_t count = std::min(kBlockRows, rows_ - row);
    if (modules_[m].weight) multiply(m, tile, end, row, count);
    adapters_.finish(m, row, row + count, tile, end);
  }

 private:
  // A few tiles of one module and a block of rows.
  struct Task {
    int64_t module, tile, end, row;
  };

  static int64_t tiles_of(const Module& m) { return (m.out + kLanes - 1) / kLanes; }
  static int64_t bytes_of(const Weight& w, int64_t rows) {
    return (rounded_bytes(w, rows) + 63) / 64 * 64;
  }

  void multiply(int64_t m, int64_t tile, int64_t end, int64_t row, int64_t count) const {
    const Weight& w = *modules_[m].weight;
    const int64_t bytes = w.tile_bytes();
    const int64_t ahead = rows_ <= kFewRows ? std::min(kAheadBytes, bytes - 1) : ahead_ * bytes;
    float* y = modules_[m].y + row * w.out;
    if (w.activation_bits)
      multiply_integer(rounded_[m], row, count, w, tile, end, ahead, y);
    else
      multiply_float(laid_[m] + row * w.in, count, is_tall(rows_), w, tile, end, ahead, y);
  }

  // Once for all modules with the same inputs.
  void prepare() {
    thread_local std::vector<float> float_memory;
    thread_local std::vector<char> byte_memory;
    int64_t num_transposed = 0, num_rounded = 0;
    for (const Module& m : modules_) {
      if (!m.weight) continue;
      if (m.weight->activation_bits)
        num_rounded += bytes_of(*m.weight, rows_);
      else if (is_tall(rows_))
        num_transposed += rows_ * m.in;
    }
    if (float_memory.size() < static_cast<size_t>(num_transposed))
      float_memory.resize(num_transposed);
    if (byte_memory.size() < static_cast<size_t>(num_rounded) + kQuadBytes)
      byte_memory.resize(num_rounded + kQuadBytes);
    float* floats = float_memory.data();
    char* bytes = aligned(byte_memory.data());
    for (size_t m = 0; m < modules_.size(); ++m) {
      const Weight* w = modules_[m].weight;
      if (!w) continue;
      const float* x = inputs_[m];
      laid_[m] = x;
      const Weight* last = m > 0 && x == inputs_[m - 1] ? modules_[m - 1].weight : nullptr;
      const bool as_last = last && last->activation_bits == w->activation_bits;
      if (w->activation_bits) {
        const Rounded rounded = lay_out(*w, rows_, bytes);
        if (as_last && rounded_[m - 1].group == rounded.group) {
          rounded_[m] = rounded_[m - 1];
          continue;
        }
        rounded_[m] = rounded;
        bytes += bytes_of(*w, rows_);
        for (int64_t row = 0; row < rows_; row += kRoundRows) rounds_.emplace_back(m, row);
      } else if (is_tall(rows_)) {
        if (as_last) {
          laid_[m] = laid_[m - 1];
          continue;
        }
        for (int64_t k = 0; k < w->in; ++k)
          for (int64_t r = 0; r < rows_; ++r) floats[k * rows_ + r] = x[r * w->in + k];
        laid_[m] = floats;
        floats += rows_ * w->in;
      }
    }
  }

  const std::vector<const float*>& inputs_;
  const int64_t rows_;
  const std::vector<Module>& modules_;
  const AdapterTasks& adapters_;
  // What is multiplied: rows as they are or transposed, or rounded.
  std::vector<const float*> laid_;
  std::vector<Rounded> rounded_;
  std::vector<std::pair<size_t, int64_t>> rounds_;  // a module, and a first row
  std::vector<Task> tasks_;
  int64_t ahead_;
};

}  // namespace

void linear(const float* x, int64_t rows, const std::vector<Module>& modules, const Batch* batch) {
  if (rows == 0) return;
  std::vector<const float*> inputs(modules.size(), x);
  std::vector<std::unique_ptr<float[]>> scaled;
  for (size_t m = 0; m < modules.size() && batch; ++m) {
    const Module& module = modules[m];
    const auto parts = batch->at(module.id);
    if (!module.weight || std::none_of(parts.begin(), parts.end(),
                                       [](const Part& part) { return part.scales_inputs; }))
      continue;
    scaled.emplace_back(new float[rows * module.in]);  // not filled with zeros first
    scale_input(x, rows, module.in, module.id, *batch, scaled.back().get());
    inputs[m] = scaled.back().get();
  }
  const AdapterTasks adapters(inputs, modules, batch);
  const TileTasks tiles(inputs, rows, modules, adapters);
  run_phases({{tiles.num_rounds(), [&](int64_t i) { tiles.round(i); }},
              {adapters.num_shrinks(), [&](int64_t i) { adapters.shrink(i, tiles.rounded()); }},
              {tiles.size(), [&](int64_t i) { tiles.run(i); }}},
             tiles.work() + adapters.work() > 1 << 15);
}

}  // namespace polypeft
