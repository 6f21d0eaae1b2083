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
  const auto* a = static_cast<const T*>(s.at->a);
  const int64_t rank = s.at->rank, in = s.module->in;
  const float factor = s.weight * s.at->scale;
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

// Are factors multiplied as codes with rounded inputs? Of eight bits these would be too coarse.
bool rounds(const Active& s) {
  const Weight* base = s.module->weight;
  return s.at->type == Type::kByte && base && base->activation_bits == 16;
}

// The same by codes; x: what the module's inputs were rounded to.
void shrink_codes(const Active& s, int64_t from, int64_t to, const Rounded& x) {
  const Weight& a = s.at->a_codes;
  float* shrunk = s.shrunk + from * a.out;
  const int64_t row = s.start + from, rows = to - from;
  if (rounds(s))
    multiply_integer(x, row, rows, a, 0, a.num_tiles(), 0, shrunk);
  else
    multiply_float(s.x + row * a.in, rows, false, a, 0, a.num_tiles(), 0, shrunk);
  const float factor = s.weight * s.at->scale;
  for (int64_t i = 0; i < rows * a.out; ++i) shrunk[i] *= factor;
  if (rounds(s)) round_rows(s.shrunk, a.out, from, to, s.rounded);
}

void expand_codes(const Active& s, int64_t from, int64_t to, int64_t tile, int64_t end) {
  const Weight& b = s.at->b_codes;
  float* y = s.module->y + (s.start + from) * b.out;
  const int64_t rows = to - from, ahead = end - tile;
  if (rounds(s))
    multiply_integer(s.rounded, from, rows, b, tile, end, ahead, y);
  else
    multiply_float(s.shrunk + from * b.in, rows, false, b, tile, end, ahead, y);
}

// y[r] += B shrunk[r] for the segment's rows [from, to) and the module's tiles [tile, end): many rows
// of one tile at a time, or one or two of several; those ask for as many tiles that come next.
template <class T>
void expand(const Active& s, int64_t from, int64_t to, int64_t tile, int64_t end) {
  const int64_t rank = s.at->rank, out = s.module->out;
  int64_t r = from;
  const auto rows = [&](auto num_rows) {
    constexpr int R = decltype(num_rows)::value;
    for (; r + R <= to; r += R) {
      int64_t t = tile;
      const auto tiles = [&](auto num_tiles) {
        constexpr int C = decltype(num_tiles)::value;
        if constexpr (R * C <= kSums)
          for (; t + C <= end; t += C) {
            const T* b = static_cast<const T*>(s.at->b) + t * rank * kLanes;
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
  const int64_t out = s.module->out, stop = std::min(end * kLanes, out);
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

}  // namespace

AdapterTasks::AdapterTasks(const std::vector<Module>& modules, std::vector<Active> active)
    : active_(std::move(active)) {
  int64_t num_rows = 0, num_shrunk = 0, num_rounded = 0;
  const auto rounded_size = [](const Active& s) {
    return rounds(s) ? (rounded_bytes(s.at->b_codes, s.end - s.start) + 63) / 64 * 64 : 0;
  };
  for (const Active& s : active_) {
    const int64_t rows = s.end - s.start;
    num_rows += rows;
    num_shrunk += rows * s.at->rank;
    num_rounded += rounded_size(s);
    work_ += rows * (s.at->rank * (s.module->in + s.module->out) + s.module->out);
  }
  thread_local std::vector<float> memory;
  thread_local std::vector<char> byte_memory;
  if (memory.size() < static_cast<size_t>(num_shrunk)) memory.resize(num_shrunk);
  if (byte_memory.size() < static_cast<size_t>(num_rounded) + kQuadBytes)
    byte_memory.resize(num_rounded + kQuadBytes);
  const int64_t share = num_rows / (2 * at::get_num_threads());
  const int64_t step = std::clamp<int64_t>(share, 4, kRows);
  shrinks_.reserve(active_.size());
  float* shrunk = memory.data();
  char* bytes = aligned(byte_memory.data());
  auto s = active_.data();
  const auto end = s + active_.size();
  for (size_t m = 0; m < modules.size(); ++m) {
    first_.push_back(s);
    for (; s != end && s->module == &modules[m]; ++s) {
      if (!s->at->rank) continue;
      s->shrunk = shrunk;
      if (rounds(*s)) s->rounded = lay_out(s->at->b_codes, s->end - s->start, bytes);
      bytes += rounded_size(*s);
      const int64_t rows = s->end - s->start;
      shrunk += rows * s->at->rank;
      for (int64_t row = 0; row < rows; row += step)
        shrinks_.push_back({static_cast<int64_t>(m), s, row, std::min(row + step, rows)});
    }
  }
  first_.push_back(s);
  // By rows, so that a thread reads one adapter's modules, which lie together.
  std::sort(shrinks_.begin(), shrinks_.end(), [](const Shrink& a, const Shrink& b) {
    return std::pair(a.active->start + a.row, a.active) < std::pair(b.active->start + b.row, b.active);
  });
}

void AdapterTasks::shrink(int64_t i, const std::vector<Rounded>& rounded) const {
  const auto& [module, active, row, stop] = shrinks_[i];
  Ahead ahead;
  if (i + 1 < num_shrinks() && shrinks_[i + 1].active != active) {
    const ModuleAdapter& next = *shrinks_[i + 1].active->at;
    const auto* a = static_cast<const char*>(next.a);
    ahead = {a, a + next.rank * next.in * (next.type == Type::kFloat ? 4 : 2)};
  }
  switch (active->at->type) {
    case Type::kFloat: return polypeft::shrink<float>(*active, row, stop, ahead);
    case Type::kHalf: return polypeft::shrink<Half>(*active, row, stop, ahead);
    case Type::kBFloat16: return polypeft::shrink<BFloat16>(*active, row, stop, ahead);
    case Type::kByte: return shrink_codes(*active, row, stop, rounded[module]);
  }
}

void AdapterTasks::finish(int64_t module, int64_t row, int64_t stop, int64_t tile,
                          int64_t end) const {
  const auto each = [&](const auto& apply) {
    for (auto s = first_[module]; s != first_[module + 1]; ++s) {
      const int64_t from = std::max(row, s->start) - s->start;
      const int64_t to = std::min(stop, s->end) - s->start;
      if (from < to) apply(*s, from, to);
    }
  };
  each([&](const Active& s, int64_t from, int64_t to) {
    if (!s.at->rank) return;
    switch (s.at->type) {
      case Type::kFloat: return expand<float>(s, from, to, tile, end);
      case Type::kHalf: return expand<Half>(s, from, to, tile, end);
      case Type::kBFloat16: return expand<BFloat16>(s, from, to, tile, end);
      case Type::kByte: return expand_codes(s, from, to, tile, end);
    }
  });
  each([&](const Active& s, int64_t from, int64_t to) {
    if (const float* v = s.at->out_scale)
      each_row(s, from, to, tile, end,
               [v](F16 a, int64_t c, int n) { return a * F16::load_n(v + c, n); });
  });
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
  for (const Segment& s : batch) {
    const ModuleAdapter* at = s.adapter->find(id);
    if (!at || !at->in_scale) continue;
    for (int64_t r = s.start; r < s.end; ++r)
      if (scales[r])
        further.emplace_back(r, at->in_scale);
      else
        scales[r] = at->in_scale;
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
