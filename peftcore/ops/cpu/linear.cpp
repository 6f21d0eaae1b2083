#include "linear.h"

#include "matmul.h"
#include "parallel.h"

namespace polypeft {
namespace {

constexpr int64_t kBlockRows = 192;  // of one task
constexpr int64_t kRoundRows = 8;

// What the base multiplies: rows as they are or transposed, or rounded.
struct Prepared {
  const float* rows;
  Rounded rounded;
};

// Every module's W x + b into its y.
void multiply(const std::vector<const float*>& inputs, int64_t rows,
              const std::vector<Module>& modules) {
  thread_local std::vector<float> float_memory;
  thread_local std::vector<char> byte_memory;
  int64_t num_transposed = 0, num_rounded = 0, num_tiles = 0, work = 0;
  for (const Module& m : modules) {
    if (!m.weight) continue;
    if (m.weight->activation_bits)
      num_rounded += (rounded_bytes(*m.weight, rows) + 63) / 64 * 64;
    else if (is_tall(rows))
      num_transposed += rows * m.in;
    num_tiles += m.weight->num_tiles();
    work += rows * m.in * m.out;
  }
  if (float_memory.size() < static_cast<size_t>(num_transposed)) float_memory.resize(num_transposed);
  if (byte_memory.size() < static_cast<size_t>(num_rounded)) byte_memory.resize(num_rounded);
  float* floats = float_memory.data();
  char* bytes = byte_memory.data();

  std::vector<Prepared> prepared(modules.size());
  for (size_t m = 0; m < modules.size(); ++m) {  // once for all modules with the same inputs
    const Weight* w = modules[m].weight;
    if (!w) continue;
    prepared[m] = {inputs[m], {}};
    const Weight* last = m > 0 && inputs[m] == inputs[m - 1] ? modules[m - 1].weight : nullptr;
    const bool as_last = last && last->activation_bits == w->activation_bits;
    if (w->activation_bits) {
      const Rounded rounded = lay_out(*w, rows, bytes);
      if (as_last && prepared[m - 1].rounded.group == rounded.group) {
        prepared[m] = prepared[m - 1];
        continue;
      }
      prepared[m].rounded = rounded;
      bytes += (rounded_bytes(*w, rows) + 63) / 64 * 64;
      for_each_task((rows + kRoundRows - 1) / kRoundRows, rows * w->in > 1 << 15, [&](int64_t i) {
        const int64_t from = i * kRoundRows;
        round_rows(inputs[m], w->in, from, std::min(from + kRoundRows, rows), rounded);
      });
    } else if (is_tall(rows)) {
      if (as_last) {
        prepared[m] = prepared[m - 1];
        continue;
      }
      for (int64_t k = 0; k < w->in; ++k)
        for (int64_t r = 0; r < rows; ++r) floats[k * rows + r] = inputs[m][r * w->in + k];
      prepared[m].rows = floats;
      floats += rows * w->in;
    }
  }

  // A task is a few tiles of one module and a block of rows.
  const int64_t step = num_tiles >= 512 ? 8 : num_tiles >= 96 || rows > kBlockRows ? 4 : 2;
  const int64_t ahead = rows <= kBlockRows ? step : 0;  // else tiles come more than once
  struct Task { size_t module; int64_t tile, end, row; };
  std::vector<Task> tasks;
  for (size_t m = 0; m < modules.size(); ++m) {
    const int64_t tiles = modules[m].weight ? modules[m].weight->num_tiles() : 0;
    for (int64_t row = 0; row < rows; row += kBlockRows)
      for (int64_t t = 0; t < tiles; t += step)
        tasks.push_back({m, t, std::min(t + step, tiles), row});
  }
  for_each_task(tasks.size(), work > 1 << 15, [&](int64_t i) {
    const auto [m, tile, end, row] = tasks[i];
    const Weight& w = *modules[m].weight;
    const int64_t count = std::min(kBlockRows, rows - row);
    float* y = modules[m].y + row * w.out;
    if (w.activation_bits)
      multiply_integer(prepared[m].rounded, row, count, w, tile, end, ahead, y);
    else
      multiply_float(prepared[m].rows + row * w.in, count, is_tall(rows), w, tile, end, ahead, y);
  });
}

}  // namespace

void linear(const float* x, int64_t rows, const std::vector<Module>& modules, const Batch* batch) {
  if (rows == 0) return;
  std::vector<const float*> inputs(modules.size(), x);
  if (!batch || batch->empty()) return multiply(inputs, rows, modules);

  std::vector<Active> active;
  std::vector<std::vector<float>> scaled(modules.size());
  for (size_t m = 0; m < modules.size(); ++m) {
    const size_t first = active.size();
    for (const Segment& s : *batch) {
      const auto found = s.adapter->find(modules[m].id);
      if (found == s.adapter->end() || s.start == s.end) continue;
      const ModuleAdapter& at = found->second;
      active.push_back({&modules[m], x, s.start, s.end, &at, s.weight});
      if (at.in_scale && modules[m].weight && scaled[m].empty()) {
        scaled[m].resize(rows * modules[m].in);
        scale_input(x, rows, modules[m].in, modules[m].id, *batch, scaled[m].data());
        inputs[m] = scaled[m].data();
      }
    }
    for (size_t i = first; i < active.size(); ++i) active[i].x = inputs[m];
  }
  multiply(inputs, rows, modules);
  adapt(active);
}

}  // namespace polypeft
