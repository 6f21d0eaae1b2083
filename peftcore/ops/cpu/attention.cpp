#include "attention.h"

#include "parallel.h"

namespace polypeft {
namespace {

constexpr int kSpan = 64;  // positions between two updates of the running maximum
#if defined(__AVX512F__)
constexpr int kQueries = 6, kWide = 4;
#else
constexpr int kQueries = 3, kWide = 2;
#endif
constexpr float kHidden = -1e30f;

// Rotates the first rotary.dim values of one head: x cos + rotate_half(x) sin (arXiv:2104.09864).
void rotate(const float* x, const Rotary& rotary, int64_t row, int64_t dim, float* out) {
  const int64_t half = rotary.cos ? rotary.dim / 2 : 0;
  const float* cos = rotary.cos + row * rotary.dim;
  const float* sin = rotary.sin + row * rotary.dim;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i + half] + a * sin[i + half];
  }
  std::memcpy(out + 2 * half, x + 2 * half, sizeof(float) * (dim - 2 * half));
}

template <class T>
struct Attention {
  const Cache& cache;
  const Scores& scores;
  int64_t heads, group;  // query heads; query heads of one kv head

  const T* key(int64_t block, int64_t head, int64_t place) const {
    const int64_t at = (block * cache.kv_heads + head) * cache.dim * cache.block_size + place;
    return static_cast<const T*>(cache.keys) + at;
  }
  // Of n positions from one on.
  void values_of(const Chunk& chunk, int64_t position, int n, int64_t head, const T** values) const {
    const int64_t size = cache.block_size;
    int64_t block = position / size, place = position % size;
    for (int j = 0; j < n; ++block, place = 0) {
      const int64_t first = (chunk.blocks[block] * cache.kv_heads + head) * size;
      for (; place < size && j < n; ++place, ++j)
        values[j] = static_cast<const T*>(cache.values) + (first + place) * cache.v_dim;
    }
  }

  // What comes after a span: its first keys in tiles of sixteen, and its values. Asked for while the span
  // is computed: blocks lie here and there, and no hardware foresees them.
  struct Next {
    const T* keys[kWide] = {};
    const T* values[kSpan] = {};
  };
  Next next_of(const Chunk& chunk, int64_t span, int64_t head) const {
    Next next;
    const int64_t end = chunk.position + chunk.num_rows;
    const int n = static_cast<int>(std::clamp<int64_t>(end - span, 0, kSpan));
    values_of(chunk, span, n, head, next.values);
    if (cache.block_size % kLanes == 0)
      for (int t = 0; t < std::min(kWide, (n + kLanes - 1) / kLanes); ++t) {
        const int64_t position = span + t * kLanes;
        next.keys[t] = key(chunk.blocks[position / cache.block_size], head, position % cache.block_size);
      }
    return next;
  }

  // The first span that a query sees.
  int64_t start_of(const Chunk& chunk, int64_t query) const {
    const int64_t position = chunk.position + query / group;
    return scores.window ? std::max<int64_t>(0, position - scores.window + 1) / kSpan * kSpan : 0;
  }

  // Sixteen positions' keys as [dim][stride]: in place, or gathered where blocks are no multiple of
  // sixteen.
  const T* keys_of(const Chunk& chunk, int64_t position, int64_t end, int64_t head, T* gathered,
                   int64_t& stride) const {
    const int64_t size = cache.block_size;
    if (size % kLanes == 0) {
      stride = size;
      return key(chunk.blocks[position / size], head, position % size);
    }
    stride = kLanes;
    for (int64_t p = position; p < position + kLanes; ++p) {
      const T* from = p < end ? key(chunk.blocks[p / size], head, p % size) : nullptr;
      for (int64_t d = 0; d < cache.dim; ++d)
        gathered[d * kLanes + p - position] = from ? from[d * size] : T(0.f);
    }
    return gathered;
  }

  // Scores of Q queries [Q][dim] with NT times sixteen keys into out [Q][kSpan].
  template <int Q, int NT>
  void dot(const float* queries, const T* const* keys, int64_t stride, const Next& next,
           float* out) const {
    F16 acc[Q][NT];
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < NT; ++t) acc[q][t] = F16::zero();
    for (int64_t d = 0; d < cache.dim; ++d) {
      F16 key[NT];
      for (int t = 0; t < NT; ++t) {
        key[t] = F16::load(keys[t] + d * stride);
        fetch(next.keys[t] + d * stride);
      }
      for (int q = 0; q < Q; ++q) {
        const F16 value = F16::set1(queries[q * cache.dim + d]);
        for (int t = 0; t < NT; ++t) acc[q][t] = fma(value, key[t], acc[q][t]);
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < NT; ++t) acc[q][t].store(out + q * kSpan + t * kLanes);
  }

  // out [Q][padded v_dim] = out · factor + p V for NT tiles from column c; the last of `width` columns.
  template <int Q, int NT>
  void add_values(const float* p, const T* const* values, int n, const float* factors, int64_t c,
                  int width, int64_t padded, const Next& next, float* out) const {
    constexpr int kLine = 64 / sizeof(T);
    F16 acc[Q][NT];
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < NT; ++t)
        acc[q][t] = F16::load(out + q * padded + c + t * kLanes) * F16::set1(factors[q]);
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < NT * kLanes; i += kLine) fetch(next.values[j] + c + i);
      F16 value[NT];
      unrolled<NT>([&](auto t) {
        const T* at = values[j] + c + t * kLanes;
        value[t] = NT > 1 || width == kLanes ? F16::load(at) : load_n(at, width);
      });
      for (int q = 0; q < Q; ++q) {
        const F16 weight = F16::set1(p[q * kSpan + j]);
        for (int t = 0; t < NT; ++t) acc[q][t] = fma(weight, value[t], acc[q][t]);
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < NT; ++t) acc[q][t].store(out + q * padded + c + t * kLanes);
  }

  // Queries [first, first + Q) of one kv head; query v is head v % group of row v / group.
  template <int Q>
  void queries(const Chunk& chunk, int64_t head, int64_t first, Heads q, const Rotary& rotary,
               const Next& first_of_next, float* out) const {
    const int64_t dim = cache.dim, padded = (cache.v_dim + kLanes - 1) / kLanes * kLanes;
    float* memory = scratch(Q * (dim + kSpan + padded) + dim * kLanes);
    float* query = memory;
    float* p = query + Q * dim;
    float* sums = p + Q * kSpan;
    T* gathered = reinterpret_cast<T*>(sums + Q * padded);
    std::fill(sums, sums + Q * padded, 0.f);
    int64_t lowest[Q], seen[Q];  // the positions [lowest, seen) are visible
    float maximum[Q], total[Q];
    for (int i = 0; i < Q; ++i) {
      const int64_t row = chunk.row + (first + i) / group;
      const int64_t position = chunk.position + (first + i) / group;
      lowest[i] = scores.window ? std::max<int64_t>(0, position - scores.window + 1) : 0;
      seen[i] = scores.causal ? position + 1 : chunk.position + chunk.num_rows;
      maximum[i] = kHidden;
      total[i] = 0.f;
      rotate(q.at(row, head * group + (first + i) % group), rotary, row, dim, query + i * dim);
      for (int64_t d = 0; d < dim; ++d) query[i * dim + d] *= scores.scale;
    }
    const int64_t end = seen[Q - 1];
    for (int64_t span = lowest[0] / kSpan * kSpan; span < end; span += kSpan) {
      const int n = static_cast<int>(std::min<int64_t>(kSpan, end - span));
      const int tiles = (n + kLanes - 1) / kLanes;
      const Next next = span + kSpan < end ? next_of(chunk, span + kSpan, head) : first_of_next;
      for (int t = 0; t < tiles; t += kWide)
        score<Q>(chunk, span, t, tiles, end, head, query, p, next, gathered);
      float factors[Q];
      for (int i = 0; i < Q; ++i)
        factors[i] = soften(p + i * kSpan, tiles, lowest[i] - span, seen[i] - span,
                            maximum[i], total[i]);
      const T* values[kSpan];
      values_of(chunk, span, n, head, values);
      int64_t c = 0;
      for (; c + kWide * kLanes <= cache.v_dim; c += kWide * kLanes)
        add_values<Q, kWide>(p, values, n, factors, c, kLanes, padded, next, sums);
      for (; c < cache.v_dim; c += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(kLanes, cache.v_dim - c));
        add_values<Q, 1>(p, values, n, factors, c, width, padded, next, sums);
      }
    }
    for (int i = 0; i < Q; ++i) {
      const int64_t at = head * group + (first + i) % group;
      float factor = 1.f;
      if (scores.sinks) {
        const float sink = scores.sinks[at], top = std::max(maximum[i], sink);
        factor = std::exp(maximum[i] - top);
        total[i] = total[i] * factor + std::exp(sink - top);
      }
      float* row = out + ((chunk.row + (first + i) / group) * heads + at) * cache.v_dim;
      for (int64_t d = 0; d < cache.v_dim; ++d) row[d] = sums[i * padded + d] * factor / total[i];
    }
  }

  // Scores of the tiles [t, t + kWide) of a span, as far as there are any.
  template <int Q>
  void score(const Chunk& chunk, int64_t span, int t, int tiles, int64_t end, int64_t head,
             const float* query, float* p, const Next& next, T* gathered) const {
    int64_t stride = 0;
    const T* keys[kWide];
    const auto some = [&](auto count) {
      constexpr int NT = decltype(count)::value;
      for (int i = 0; i < NT; ++i)
        keys[i] = keys_of(chunk, span + (t + i) * kLanes, end, head, gathered, stride);
      dot<Q, NT>(query, keys, stride, next, p + t * kLanes);
      t += NT;
    };
    const int stop = std::min(t + kWide, tiles);
    if (cache.block_size % kLanes == 0) {  // else there is room to gather one
      if (t + kWide <= stop) some(Int<kWide>());
      while (t + 2 <= stop) some(Int<2>());
    }
    while (t < stop) some(Int<1>());
  }

  // Scores to weights e^(s − max), 0 outside [from, to); returns what earlier sums are to be
  // multiplied with.
  float soften(float* p, int tiles, int64_t from, int64_t to, float& maximum, float& total) const {
    // Most tiles are seen as a whole.
    const auto seen = [&](F16 x, int t, float fill) {
      const int64_t first = from - t * kLanes, last = to - t * kLanes;
      if (first <= 0 && last >= kLanes) return x;
      const auto bounded = [](int64_t at) { return static_cast<int>(std::clamp<int64_t>(at, 0, 16)); };
      return keep(x, bounded(first), bounded(last), fill);
    };
    F16 tops = F16::set1(maximum);
    for (int t = 0; t < tiles; ++t) {
      float* at = p + t * kLanes;
      if (scores.softcap != 0.f)
        for (int i = 0; i < kLanes; ++i)
          at[i] = scores.softcap * std::tanh(at[i] / scores.softcap);
      const F16 kept = seen(F16::load(at), t, kHidden);
      kept.store(at);
      tops = max(tops, kept);
    }
    const float top = max_lane(tops);
    F16 sums = F16::zero();
    for (int t = 0; t < tiles; ++t) {
      float* at = p + t * kLanes;
      const F16 weights = seen(exp(F16::load(at) - F16::set1(top)), t, 0.f);
      weights.store(at);
      sums = sums + weights;
    }
    const float factor = maximum == top ? 1.f : std::exp(maximum - top);
    total = total * factor + sum(sums);
    maximum = top;
    return factor;
  }

  template <int Q = kQueries>
  void some_queries(int count, const Chunk& chunk, int64_t head, int64_t first, Heads q,
                    const Rotary& rotary, const Next& next, float* out) const {
    if (count == Q) return queries<Q>(chunk, head, first, q, rotary, next, out);
    if constexpr (Q > 1) some_queries<Q - 1>(count, chunk, head, first, q, rotary, next, out);
  }
};

// A value as the cache keeps it: what half precision cannot hold becomes its largest, not infinite.
float within(const Half*, float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }
float within(const float*, float x) { return x; }

template <class T>
void write_as(const Cache& cache, const int64_t* slots, int64_t num_rows, Heads keys, Heads values,
              const Rotary& rotary) {
  for_each_task(num_rows, num_rows > 8, [&](int64_t row) {
    const int64_t block = slots[row] / cache.block_size, place = slots[row] % cache.block_size;
    float* rotated = scratch(cache.dim);
    for (int64_t head = 0; head < cache.kv_heads; ++head) {
      const int64_t at = block * cache.kv_heads + head;
      rotate(keys.at(row, head), rotary, row, cache.dim, rotated);
      T* key = static_cast<T*>(cache.keys) + at * cache.dim * cache.block_size + place;
      for (int64_t d = 0; d < cache.dim; ++d) key[d * cache.block_size] = within(key, rotated[d]);
      T* value = static_cast<T*>(cache.values) + (at * cache.block_size + place) * cache.v_dim;
      const float* from = values.at(row, head);
      for (int64_t d = 0; d < cache.v_dim; ++d) value[d] = within(value, from[d]);
    }
  });
}

template <class T>
void attend_as(const Cache& cache, const std::vector<Chunk>& chunks, Heads queries, int64_t heads,
               const Rotary& rotary, const Scores& scores, float* out) {
  const Attention<T> attention{cache, scores, heads, heads / cache.kv_heads};
  struct Task { const Chunk* chunk; int64_t head, first; };
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Chunk& chunk : chunks) {
    const int64_t count = chunk.num_rows * attention.group;
    work += count * (chunk.position + chunk.num_rows) * cache.kv_heads * cache.dim;
    for (int64_t head = 0; head < cache.kv_heads; ++head)
      for (int64_t first = 0; first < count; first += kQueries) tasks.push_back({&chunk, head, first});
  }
  for_each_task(tasks.size(), work > 1 << 15, [&](int64_t i) {
    const auto [chunk, head, first] = tasks[i];
    const int64_t count = chunk->num_rows * attention.group;
    const Task& after = tasks[std::min<int64_t>(i + 1, tasks.size() - 1)];
    const auto next = attention.next_of(*after.chunk, attention.start_of(*after.chunk, after.first), after.head);
    attention.some_queries(static_cast<int>(std::min<int64_t>(kQueries, count - first)), *chunk,
                           head, first, queries, rotary, next, out);
  });
}

}  // namespace

void write(const Cache& cache, const int64_t* slots, int64_t num_rows, Heads keys, Heads values,
           const Rotary& rotary) {
  if (cache.type == Type::kHalf)
    write_as<Half>(cache, slots, num_rows, keys, values, rotary);
  else
    write_as<float>(cache, slots, num_rows, keys, values, rotary);
}

void attend(const Cache& cache, const std::vector<Chunk>& chunks, Heads queries, int64_t heads,
            const Rotary& rotary, const Scores& scores, float* out) {
  if (cache.type == Type::kHalf)
    attend_as<Half>(cache, chunks, queries, heads, rotary, scores, out);
  else
    attend_as<float>(cache, chunks, queries, heads, rotary, scores, out);
}

}  // namespace polypeft
