#include "adapters.h"

#include "parallel.h"
#include "simd.h"

namespace polypeft {
namespace {

constexpr int64_t kRows = 32;  // of one task, at most

// shrunk[r][j] = scale · weight · A[j] · x[r] for R rows and J of the ranks: sixteen partial sums
// each, added up in one order.
template <int R, int J, class T>
void dots(const float* x, int64_t in, const T* a, float factor, float* shrunk, int64_t rank) {
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

// y[r] += B shrunk[r] for R rows, one tile.
template <int R, class T>
void expand(const float* shrunk, int64_t rank, const T* b, float* y, int64_t out, int n) {
  F16 acc[R];
  for (int r = 0; r < R; ++r)
    acc[r] = n == kLanes ? F16::load(y + r * out) : F16::load_n(y + r * out, n);
  for (int64_t j = 0; j < rank; ++j) {
    const F16 factors = F16::load(b + j * kLanes);
    for (int r = 0; r < R; ++r) acc[r] = fma(F16::set1(shrunk[r * rank + j]), factors, acc[r]);
  }
  for (int r = 0; r < R; ++r)
    n == kLanes ? acc[r].store(y + r * out) : acc[r].store_n(y + r * out, n);
}

// The factors of the task that comes next, asked for bit by bit while this one's are multiplied:
// an adapter's are read once a step, in pieces too short for the processor to foresee.
struct Ahead {
  const char *a = nullptr, *a_end = nullptr, *b = nullptr, *b_end = nullptr;

  explicit Ahead(const Active* next) {
    if (!next) return;
    const ModuleAdapter& at = *next->at;
    const int64_t row_bytes = at.rank * (at.type == Type::kFloat ? 4 : 2);
    a = static_cast<const char*>(at.a);
    a_end = a + row_bytes * next->module->in;
    b = static_cast<const char*>(at.b);
    b_end = b + row_bytes * ((next->module->out + kLanes - 1) / kLanes * kLanes);
  }
  static void some(const char*& at, const char* end, int64_t num_bytes) {
    num_bytes = std::min(num_bytes, end - at);
    fetch(at, num_bytes);
    at += num_bytes;
  }
};

// shrunk [to − from][rank] of the segment's rows [from, to), which count from its start.
template <class T>
void shrink(const Active& s, int64_t from, int64_t to, float* shrunk, Ahead& ahead) {
  const auto* a = static_cast<const T*>(s.at->a);
  const int64_t rank = s.at->rank, in = s.module->in;
  const float factor = s.weight * s.at->scale;
  int64_t r = from;
  const auto rows = [&](auto num_rows, auto num_ranks) {
    constexpr int R = decltype(num_rows)::value, J = decltype(num_ranks)::value;
    for (; r + R <= to; r += R) {
      const float* row = s.x + (s.start + r) * in;
      float* out = shrunk + (r - from) * rank;
      int64_t j = 0;
      for (; j + J <= rank; j += J) {
        dots<R, J>(row, in, a + j * in, factor, out + j, rank);
        Ahead::some(ahead.a, ahead.a_end, J * in * sizeof(T));
      }
      for (; j < rank; ++j) dots<R, 1>(row, in, a + j * in, factor, out + j, rank);
    }
  };
#if defined(__AVX512F__)
  rows(Int<4>(), Int<4>());
  if (rank % kLanes == 0) rows(Int<1>(), Int<kLanes>());
#endif
  rows(Int<1>(), Int<4>());
}

// y[r] += B shrunk[r] for the segment's rows [from, to): a few at a time, whose outputs lie one after
// another.
template <class T>
void expand(const Active& s, int64_t from, int64_t to, const float* shrunk, Ahead& ahead) {
  const int64_t rank = s.at->rank, out = s.module->out;
  int64_t r = from;
  const auto rows = [&](auto num_rows) {
    constexpr int R = decltype(num_rows)::value;
    for (; r + R <= to; r += R) {
      const T* b = static_cast<const T*>(s.at->b);
      float* y = s.module->y + (s.start + r) * out;
      for (int64_t column = 0; column < out; column += kLanes, b += rank * kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, out - column));
        expand<R>(shrunk + (r - from) * rank, rank, b, y + column, out, n);
        Ahead::some(ahead.b, ahead.b_end, rank * kLanes * sizeof(T));
      }
    }
  };
  rows(Int<8>());
  rows(Int<2>());
  rows(Int<1>());
}

template <class T>
void add_low_rank(const Active& s, int64_t from, int64_t to, Ahead& ahead) {
  float* shrunk = scratch((to - from) * s.at->rank);
  shrink<T>(s, from, to, shrunk, ahead);
  expand<T>(s, from, to, shrunk, ahead);
}

// y = op(y, columns c to c + n) on the segment's rows [from, to).
template <class Op>
void each_row(const Active& s, int64_t from, int64_t to, const Op& op) {
  const int64_t out = s.module->out;
  for (int64_t r = s.start + from; r < s.start + to; ++r)
    for (int64_t c = 0; c < out; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, out - c));
      float* at = s.module->y + r * out + c;
      if (n == kLanes)
        op(F16::load(at), c, n).store(at);
      else
        op(F16::load_n(at, n), c, n).store_n(at, n);
    }
}

// What the segments [first, last) do to their rows among [row, stop).
void adapt(const Active* first, const Active* last, int64_t row, int64_t stop, Ahead ahead) {
  const auto each = [&](const auto& apply) {
    for (auto s = first; s != last; ++s) {
      const int64_t from = std::max(row, s->start) - s->start;
      const int64_t to = std::min(stop, s->end) - s->start;
      if (from < to) apply(*s, from, to);
    }
  };
  each([&](const Active& s, int64_t from, int64_t to) {
    if (!s.at->rank) return;
    switch (s.at->type) {
      case Type::kFloat: return add_low_rank<float>(s, from, to, ahead);
      case Type::kHalf: return add_low_rank<Half>(s, from, to, ahead);
      case Type::kBFloat16: return add_low_rank<BFloat16>(s, from, to, ahead);
    }
  });
  each([&](const Active& s, int64_t from, int64_t to) {
    if (const float* v = s.at->out_scale)
      each_row(s, from, to, [v](F16 a, int64_t c, int n) { return a * F16::load_n(v + c, n); });
  });
  each([&](const Active& s, int64_t from, int64_t to) {
    if (const float* v = s.at->bias)
      each_row(s, from, to, [v, w = F16::set1(s.weight)](F16 a, int64_t c, int n) {
        return fma(w, F16::load_n(v + c, n), a);
      });
  });
}

}  // namespace

AdapterTasks::AdapterTasks(std::vector<Active> active) : active_(std::move(active)) {
  // By rows, so that a thread reads one adapter's modules, which lie together; stable, so that the
  // segments of a mixture keep their order.
  const auto by_row = [](const Active& a, const Active& b) {
    return std::pair(a.module, a.start) < std::pair(b.module, b.start);
  };
  if (!std::is_sorted(active_.begin(), active_.end(), by_row))
    std::stable_sort(active_.begin(), active_.end(), by_row);
  int64_t num_rows = 0;
  for (const Active& s : active_) {
    num_rows += s.end - s.start;
    work_ += (s.end - s.start) * (s.at->rank * (s.module->in + s.module->out) + s.module->out);
  }
  const int64_t share = num_rows / (2 * at::get_num_threads());
  const int64_t step = std::clamp<int64_t>(share, 4, kRows);
  tasks_.reserve(active_.size());
  for (const Active *s = active_.data(), *end = s + active_.size(); s != end;) {
    const Active* first = s;
    int64_t stop = s->end;
    for (++s; s != end && s->module == first->module && s->start < stop; ++s)
      stop = std::max(stop, s->end);
    for (int64_t row = first->start; row < stop; row += step)
      tasks_.push_back({first, s, row, std::min(row + step, stop)});
  }
  std::sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) {
    return std::pair(a.row, a.first) < std::pair(b.row, b.first);
  });
}

void AdapterTasks::run(int64_t i) const {
  const Task& task = tasks_[i];
  const bool last = i + 1 == size();
  const Active* next = last || tasks_[i + 1].first == task.first ? nullptr : tasks_[i + 1].first;
  adapt(task.first, task.last, task.row, task.stop, Ahead(next));
}

void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out) {
  std::memcpy(out, x, sizeof(float) * rows * in);
  for (const Segment& s : batch) {
    const ModuleAdapter* at = s.adapter->find(id);
    if (!at || !at->in_scale) continue;
    const float* v = at->in_scale;
    for (int64_t r = s.start; r < s.end; ++r)
      for (int64_t k = 0; k < in; ++k) out[r * in + k] *= v[k];
  }
}

}  // namespace polypeft
