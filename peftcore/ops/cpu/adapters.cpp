#include "adapters.h"

#include "parallel.h"
#include "simd.h"

namespace polypeft {
namespace {

constexpr int64_t kRows = 32;  // of one task that shrinks, at most
#if defined(__AVX512F__)
constexpr int kSums = 8;  // of sixteen, at a time: enough to hide what one addition takes
#else
constexpr int kSums = 4;
#endif

// Memory that is read next, asked for bit by bit while something else is multiplied: an adapter's
// factors are read once a step, in pieces too short for the processor to foresee.
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  void some(int64_t num_bytes) {
    num_bytes = std::min(num_bytes, end - at);
    fetch(at, num_bytes);
    at += num_bytes;
  }
};

// shrunk[r][j] = scale · weight · A[j] · x[r] for R rows and J of the ranks: sixteen partial sums
// each, added up in one order.
template <int R, int J, class T>
void dots(const float* x, int64_t in, const T* a, float factor, float* shrunk, int64_t rank,
          Ahead& ahead) {
  F16 acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = F16::zero();
  int64_t k = 0;
  for (; k + kLanes <= in; k += kLanes) {
    F16 row[R];
    for (int r = 0; r < R; ++r) row[r] = F16::load(x + r * in + k);
    for (int j = 0; j < J; ++j) {
      const F16 factors = F16::load(a + j * in + k);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(row[r], factors, acc[r][j]);
    }
    ahead.some(J * kLanes * sizeof(T));
  }
  if (const int left = static_cast<int>(in - k))
    for (int j = 0; j < J; ++j) {
      const F16 factors = load_n(a + j * in + k, left);
      for (int r = 0; r < R; ++r)
        acc[r][j] = fma(F16::load_n(x + r * in + k, left), factors, acc[r][j]);
    }
  if constexpr (R * J == kLanes) {
    alignas(64) float sums[R][J];
    (F16::set1(factor) * sum_each(&acc[0][0])).store(&sums[0][0]);
    for (int r = 0; r < R; ++r) std::memcpy(shrunk + r * rank, sums[r], sizeof(sums[r]));
  } else {
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) shrunk[r * rank + j] = factor * sum(acc[r][j]);
  }
}

// y[r] += B shrunk[r] for R rows and C tiles, of which the last has n outputs.
template <int R, int C, class T>
void expand(const float* shrunk, int64_t rank, const T* b, float* y, int64_t out, int n,
            int64_t further) {
  F16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const float* at = y + r * out + c * kLanes;
      acc[r][c] = c + 1 < C || n == kLanes ? F16::load(at) : F16::load_n(at, n);
    }
  for (int64_t j = 0; j < rank; ++j) {
    F16 factors[C];
    for (int c = 0; c < C; ++c) factors[c] = F16::load(b + (c * rank + j) * kLanes);
    for (int r = 0; r < R; ++r) {
      const F16 value = F16::set1(shrunk[r * rank + j]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(value, factors[c], acc[r][c]);
    }
    if (further) fetch(b + further + j * C * kLanes, C * kLanes * sizeof(T));
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float* at = y + r * out + c * kLanes;
      c + 1 < C || n == kLanes ? acc[r][c].store(at) : acc[r][c].store_n(at, n);
    }
}

// The segment's rows [from, to), which count from its start.
template <class T>
void shrink(const Active& s, int64_t from, int64_t to, Ahead& ahead) {
  const auto* a = static_cast<const T*>(s.factors.a);
  const int64_t rank = s.factors.rank, in = s.in;
  const float factor = s.weight * s.factors.scale;
  int64_t r = from;
  const auto rows = [&](auto num_rows, auto num_ranks) {
    constexpr int R = decltype(num_rows)::value, J = decltype(num_ranks)::value;
    for (; r + R <= to; r += R) {
      const float* row = s.x + (s.start + r) * in;
      float* out = s.shrunk + r * rank;
      int64_t j = 0;
      for (; j + J <= rank; j += J) dots<R, J>(row, in, a + j * in, factor, out + j, rank, ahead);
      for (; j < rank; ++j) dots<R, 1>(row, in, a + j * in, factor, out + j, rank, ahead);
    }
  };
#if defined(__AVX512F__)
  rows(Int<4>(), Int<4>());
  if (rank % kLanes == 0) rows(Int<1>(), Int<kLanes>());
#endif
  rows(Int<1>(), Int<4>());
}

// Factors of kByte as weights; without bias, and of B only its inputs' sizes matter where there are no
// codes yet.
Weight a_of(const Active& s) {
  return {.nf4 = false, .out = s.factors.rank, .in = s.in, .group = s.in, .activation_bits = 16,
          .codes = s.factors.a, .scales = s.factors.a_scales, .bias = nullptr};
}
Weight b_of(const Active& s) {
  return {.nf4 = false, .out = s.out, .in = s.factors.rank, .group = s.factors.rank,
          .activation_bits = 16, .codes = s.factors.b, .scales = nullptr, .bias = nullptr,
          .adds = true};
}

// The same by codes; x: what the module's inputs were rounded to.
void shrink_codes(const Active& s, int64_t from, int64_t to, const Rounded& x, int64_t ahead) {
  const Weight a = a_of(s);
  float* shrunk = s.shrunk + from * a.out;
  const int64_t row = s.start + from, rows = to - from;
  if (s.rounds)
    multiply_integer(x, row, rows, a, 0, a.num_tiles(), ahead, shrunk);
  else
    multiply_float(s.x + row * a.in, rows, false, a, 0, a.num_tiles(), ahead, shrunk);
  const float factor = s.weight * s.factors.scale;
  for (int64_t i = 0; i < rows * a.out; ++i) shrunk[i] *= factor;
  if (s.rounds) round_rows(s.shrunk, a.out, from, to, s.rounded);
}

void expand_codes(const Active& s, int64_t from, int64_t to, int64_t tile, int64_t end) {
  const Weight b = b_of(s);
  float* y = s.module->y + (s.start + from) * b.out;
  const int64_t rows = to - from, ahead = (end - tile) * b.tile_bytes();
  if (s.rounds)
    multiply_integer(s.rounded, from, rows, b, tile, end, ahead, y);
  else
    multiply_float(s.shrunk + from * b.in, rows, false, b, tile, end, ahead, y);
}

// y[r] += B shrunk[r] for the segment's rows [from, to) and the module's tiles [tile, end): many rows
// of one tile at a time, or one or two of several; those ask for as many tiles that come next.
template <class T>
void expand(const Active& s, int64_t from, int64_t to, int64_t tile, int64_t end) {
  const int64_t rank = s.factors.rank, out = s.out;
  int64_t r = from;
  const auto rows = [&](auto num_rows) {
    constexpr int R = decltype(num_rows)::value;
    for (; r + R <= to; r += R) {
      int64_t t = tile;
      const auto tiles = [&](auto num_tiles) {
        constexpr int C = decltype(num_tiles)::value;
        if constexpr (R * C <= kSums)
          for (; t + C <= end; t += C) {
            const T* b = static_cast<const T*>(s.factors.b) + t * rank * kLanes;
            const int64_t column = t * kLanes;
            const int n = static_cast<int>(std::min<int64_t>(kLanes, out - column - (C - 1) * kLanes));
            expand<R, C>(s.shrunk + r * rank, rank, b, s.module->y + (s.start + r) * out + column, out,
                         n, R <= 2 ? (end - tile) * rank * kLanes : 0);
          }
      };
      tiles(Int<4>());
      tiles(Int<2>());
      tiles(Int<1>());
    }
  };
  rows(Int<kSums>());
  rows(Int<2>());
  rows(Int<1>());
}

// y = op(y, columns c to c + n) on the segment's rows [from, to) and the module's tiles [tile, end).
template <class Op>
void each_row(const Active& s, int64_t from, int64_t to, int64_t tile, int64_t end, const Op& op) {
  const int64_t out = s.out, stop = std::min(end * kLanes, out);
  for (int64_t r = s.start + from; r < s.start + to; ++r)
    for (int64_t c = tile * kLanes; c < stop; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, stop - c));
      float* at = s.module->y + r * out + c;
      if (n == kLanes)
        op(F16::load(at), c, n).store(at);
      else
        op(F16::load_n(at, n), c, n).store_n(at, n);
    }
}

int64_t bytes_for(const Active& s) {
  return (rounded_bytes(b_of(s), s.end - s.start) + 63) / 64 * 64;
}

}  // namespace

void Adapter::set(int64_t id, const ModuleAdapter& entry) {
  if (id >= num_ids()) by_id_.resize(id + 1);
  if (by_id_[id]) {
    *by_id_[id] = entry;
    return;
  }
  entries_.push_back(entry);
  by_id_[id] = &entries_.back();
}

Batch::Batch(const std::vector<Segment>& segments) {
  int64_t num_ids = 0;
  for (const Segment& s : segments) num_ids = std::max(num_ids, s.adapter->num_ids());
  // First how many there are at each id, a place further on than where they begin.
  first_.resize(num_ids + 2);
  const auto each = [&](const auto& use) {
    for (const Segment& s : segments)
      for (int64_t id = 0; id < s.adapter->num_ids(); ++id)
        if (const ModuleAdapter* at = s.adapter->find(id)) use(s, id, *at);
  };
  each([&](const Segment&, int64_t id, const ModuleAdapter&) { ++first_[id + 2]; });
  for (int64_t id = 2; id < num_ids + 2; ++id) first_[id] += first_[id - 1];
  parts_.resize(first_.back());
  each([&](const Segment& s, int64_t id, const ModuleAdapter& at) {
    parts_[first_[id + 1]++] = {s.start, s.end, &at, at.in, at.out, at.factors, s.weight,
                                at.in_scale != nullptr, at.out_scale != nullptr, at.bias != nullptr};
  });
  first_.pop_back();
}

AdapterTasks::AdapterTasks(const std::vector<const float*>& inputs,
                           const std::vector<Module>& modules, const Batch* batch)
    : of_module_(modules.size()) {
  size_t num_parts = 0;
  for (size_t m = 0; m < modules.size() && batch; ++m) num_parts += batch->at(modules[m].id).size();
  if (num_parts == 0) return;
  active_.reserve(num_parts);
  for (size_t m = 0; m < modules.size(); ++m) {
    const Module& module = modules[m];
    OfModule& of = of_module_[m];
    of.first = active_.size();
    const bool is_rounded = module.weight && module.weight->activation_bits == 16;
    for (const Part& part : batch->at(module.id)) {
      if (part.start == part.end) continue;
      // Of eight bits, rounded inputs would be too coarse for an adapter's factors.
      active_.push_back({part, &module, static_cast<int64_t>(m), inputs[m],
                         is_rounded && part.factors.type == Type::kByte});
      of.scales_outputs |= part.scales_outputs;
      of.has_bias |= part.has_bias;
      work_ += (part.end - part.start) * (part.factors.rank * (module.in + module.out) + module.out);
    }
    of.last = active_.size();
  }
  lay_out_shrunk();
  share_out();
}

void AdapterTasks::lay_out_shrunk() {
  thread_local std::vector<float> memory;
  thread_local std::vector<char> byte_memory;
  size_t num_floats = 0, num_bytes = kQuadBytes;
  for (const Active& s : active_) {
    num_floats += (s.end - s.start) * s.factors.rank;
    if (s.rounds) num_bytes += bytes_for(s);
  }
  if (memory.size() < num_floats) memory.resize(num_floats);
  if (byte_memory.size() < num_bytes) byte_memory.resize(num_bytes);
  float* shrunk = memory.data();
  char* bytes = aligned(byte_memory.data());
  for (Active& s : active_) {
    s.shrunk = shrunk;
    shrunk += (s.end - s.start) * s.factors.rank;
    if (!s.rounds) continue;
    s.rounded = lay_out(b_of(s), s.end - s.start, bytes);
    bytes += bytes_for(s);
  }
}

// By rows, so that a thread reads one adapter's modules, which lie together.
void AdapterTasks::share_out() {
  int64_t num_rows = 0;
  for (const Active& s : active_) num_rows += s.end - s.start;
  const int64_t step = std::clamp<int64_t>(num_rows / (2 * at::get_num_threads()), 4, kRows);
  shrinks_.reserve(active_.size());
  std::vector<size_t> next;  // of each module
  for (const OfModule& of : of_module_) next.push_back(of.first);
  for (;;) {
    int64_t start = -1, rows = 0;  // of the segments that come next
    for (size_t m = 0; m < next.size(); ++m)
      if (next[m] < of_module_[m].last && (start < 0 || active_[next[m]].start < start))
        start = active_[next[m]].start;
    if (start < 0) return;
    const auto each = [&](const auto& use) {
      for (size_t m = 0; m < next.size(); ++m)
        for (size_t k = next[m]; k < of_module_[m].last && active_[k].start == start; ++k)
          use(m, active_[k]);
    };
    each([&](size_t, const Active& s) { rows = std::max(rows, s.end - start); });
    for (int64_t row = 0; row < rows; row += step)
      each([&](size_t, const Active& s) {
        const int64_t stop = std::min(row + step, s.end - start);
        if (s.factors.rank && row < stop) shrinks_.push_back({&s, row, stop});
      });
    each([&](size_t m, const Active&) { ++next[m]; });
  }
}

void AdapterTasks::shrink(int64_t i, const std::vector<Rounded>& rounded) const {
  const auto& [active, row, stop] = shrinks_[i];
  const auto* a = static_cast<const char*>(active->factors.a);
  const char* next = a;
  Ahead ahead;
  if (i + 1 < num_shrinks() && shrinks_[i + 1].active != active) {
    const Active& other = *shrinks_[i + 1].active;
    next = static_cast<const char*>(other.factors.a);
    ahead = {next, next + other.factors.rank * other.in * (other.factors.type == Type::kFloat ? 4 : 2)};
  }
  switch (active->factors.type) {
    case Type::kFloat: return polypeft::shrink<float>(*active, row, stop, ahead);
    case Type::kHalf: return polypeft::shrink<Half>(*active, row, stop, ahead);
    case Type::kBFloat16: return polypeft::shrink<BFloat16>(*active, row, stop, ahead);
    case Type::kByte: return shrink_codes(*active, row, stop, rounded[active->index], next - a);
  }
}

void AdapterTasks::finish(int64_t module, int64_t row, int64_t stop, int64_t tile,
                          int64_t end) const {
  const OfModule& of = of_module_[module];
  const auto each = [&](const auto& apply) {
    for (size_t k = of.first; k < of.last; ++k) {
      const Active& s = active_[k];
      const int64_t from = std::max(row, s.start) - s.start;
      const int64_t to = std::min(stop, s.end) - s.start;
      if (from < to) apply(s, from, to);
    }
  };
  each([&](const Active& s, int64_t from, int64_t to) {
    if (!s.factors.rank) return;
    switch (s.factors.type) {
      case Type::kFloat: return expand<float>(s, from, to, tile, end);
      case Type::kHalf: return expand<Half>(s, from, to, tile, end);
      case Type::kBFloat16: return expand<BFloat16>(s, from, to, tile, end);
      case Type::kByte: return expand_codes(s, from, to, tile, end);
    }
  });
  if (of.scales_outputs)
    each([&](const Active& s, int64_t from, int64_t to) {
      if (const float* v = s.at->out_scale)
        each_row(s, from, to, tile, end,
                 [v](F16 a, int64_t c, int n) { return a * F16::load_n(v + c, n); });
    });
  if (of.has_bias)
    each([&](const Active& s, int64_t from, int64_t to) {
      if (const float* v = s.at->bias)
        each_row(s, from, to, tile, end, [v, w = F16::set1(s.weight)](F16 a, int64_t c, int n) {
          return fma(w, F16::load_n(v + c, n), a);
        });
    });
}

void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out) {
  std::vector<const float*> scales(rows, nullptr);
  std::vector<std::pair<int64_t, const float*>> further;  // of rows that have one already
  for (const Part& part : batch.at(id)) {
    if (!part.scales_inputs) continue;
    for (int64_t r = part.start; r < part.end; ++r)
      if (scales[r])
        further.emplace_back(r, part.at->in_scale);
      else
        scales[r] = part.at->in_scale;
  }
  for_each_task((rows + kRows - 1) / kRows, rows * in > 1 << 15, [&](int64_t task) {
    for (int64_t r = task * kRows; r < std::min(rows, (task + 1) * kRows); ++r) {
      const float *from = x + r * in, *v = scales[r];
      float* to = out + r * in;
      if (v)
        for (int64_t k = 0; k < in; ++k) to[k] = from[k] * v[k];
      else
        std::memcpy(to, from, sizeof(float) * in);
    }
  });
  for (const auto& [r, v] : further)
    for (int64_t k = 0; k < in; ++k) out[r * in + k] *= v[k];
}

}  // namespace polypeft
