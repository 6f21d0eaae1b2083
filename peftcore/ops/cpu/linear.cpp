#include "linear.h"

#include "parallel.h"

namespace polypeft {
namespace {

// Register tiles: rows × tiles of sixteen outputs. Each output is summed over the inputs one after
// another, by whichever tile: that is why no result depends on the number of rows.
#if defined(__AVX512F__)
constexpr int kRows = 6, kTiles = 4, kTall = 16;
#else
constexpr int kRows = 6, kTiles = 1, kTall = 6;
#endif
constexpr int64_t kBlockRows = 192;     // of one task
constexpr int64_t kPanelInputs = 1024;  // inputs of a widened panel: it stays in the L2 cache
constexpr int64_t kShrinkRows = 32;  // of one task

bool is_tall(int64_t rows) { return rows > kRows && rows <= kTall; }

// QLoRA's sixteen values (arXiv:2305.14314), as bitsandbytes has them.
const float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                        0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                        0.7229568362236023f, 1.0f};

// Weights as the loop below reads them: `step` calls `use(k, w)` for inputs [from, to) in order.

struct Int8Tiles {
  const int8_t* codes;
  int64_t in;

  template <int NT, class Use>
  void step(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const int8_t* at = codes + tile * in * kLanes;
    for (int64_t k = from; k < to; ++k) {
      F16 w[NT];
      for (int t = 0; t < NT; ++t) w[t] = F16::load(at + (t * in + k) * kLanes);
      use(k, w);
    }
  }
};

struct Nf4Tiles {
  const uint8_t* codes;
  const float* scales;
  int64_t in, group;

  template <int NT, class Use>
  void step(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const Table16 table(kNf4);
    const uint8_t* at = codes + tile * in / 2 * kLanes;
    const float* scale_at = scales + tile * (in / group) * kLanes;
    for (int64_t k = from; k < to;) {
      const int64_t g = k / group, end = std::min((g + 1) * group, to);
      F16 scale[NT];
      for (int t = 0; t < NT; ++t) scale[t] = F16::load(scale_at + (t * (in / group) + g) * kLanes);
      for (; k < end; k += 2) {
        F16 even[NT], odd[NT];
        for (int t = 0; t < NT; ++t) {
          table.look_up(at + (t * in / 2 + k / 2) * kLanes, even[t], odd[t]);
          even[t] = even[t] * scale[t];
          odd[t] = odd[t] * scale[t];
        }
        use(k, even);
        use(k + 1, odd);
      }
    }
  }
};

// A widened panel [inputs][NT][16] of one tile and range of inputs.
struct Panel {
  const float* values;

  template <int NT, class Use>
  void step(int64_t, int64_t from, int64_t to, const Use& use) const {
    const float* at = values;
    for (int64_t k = from; k < to; ++k, at += NT * kLanes) {
      F16 w[NT];
      for (int t = 0; t < NT; ++t) w[t] = F16::load(at + t * kLanes);
      use(k, w);
    }
  }
};

// Inputs as they are, [rows][in], or transposed, [in][rows] for all the rows of a tall tile.
struct Rows {
  const float* x;
  int64_t in;
  float at(int r, int64_t k) const { return x[r * in + k]; }
};
template <int MR>
struct Columns {
  const float* x;
  float at(int r, int64_t k) const { return x[k * MR + r]; }
};

// y[r][t] over MR rows and NT tiles: starts at 0 where `from` is 0, else goes on from y.
template <int MR, int NT, class Tiles, class Inputs>
void multiply(const Tiles& tiles, const Inputs& x, const Weight& w, int64_t tile, int64_t from,
              int64_t to, float* y) {
  const int64_t in = w.in, out = w.out, column = tile * kLanes;
  const int last = static_cast<int>(std::min<int64_t>(kLanes, out - column - (NT - 1) * kLanes));
  F16 acc[MR][NT];
  for (int r = 0; r < MR; ++r)
    for (int t = 0; t < NT; ++t) {
      const float* at = y + r * out + column + t * kLanes;
      acc[r][t] = from == 0                         ? F16::zero()
                  : t + 1 < NT || last == kLanes ? F16::load(at)
                                                 : F16::load_n(at, last);
    }
  tiles.template step<NT>(tile, from, to, [&](int64_t k, const F16(&weight)[NT]) {
    for (int r = 0; r < MR; ++r) {
      const F16 value = F16::set1(x.at(r, k));
      for (int t = 0; t < NT; ++t) acc[r][t] = fma(value, weight[t], acc[r][t]);
    }
  });
  const bool finished = to == in;
  for (int t = 0; t < NT; ++t) {
    const int n = t + 1 < NT ? kLanes : last;
    const int64_t c = column + t * kLanes;
    F16 scale, bias;
    if (finished && !w.nf4) scale = F16::load(w.scales + c);
    if (finished && w.bias) bias = F16::load_n(w.bias + c, n);
    for (int r = 0; r < MR; ++r) {
      F16 value = acc[r][t];
      if (finished && !w.nf4) value = value * scale;
      if (finished && w.bias) value = value + bias;
      float* at = y + r * out + c;
      n == kLanes ? value.store(at) : value.store_n(at, n);
    }
  }
}

template <int NT, class Tiles, int MR = kRows>
void multiply_rows(int rows, const Tiles& tiles, const float* x, const Weight& w, int64_t tile,
                   int64_t from, int64_t to, float* y) {
  if (rows == MR) return multiply<MR, NT>(tiles, Rows{x, w.in}, w, tile, from, to, y);
  if constexpr (MR > 1)
    multiply_rows<NT, Tiles, MR - 1>(rows, tiles, x, w, tile, from, to, y);
}

// Up to kTall rows at once over one tile: every weight is widened once, and in the loop. x: [in][rows].
template <class Tiles, int MR = kTall>
void multiply_tall(int rows, const Tiles& tiles, const float* x, const Weight& w, int64_t tile,
                   float* y) {
  if (rows == MR) return multiply<MR, 1>(tiles, Columns<MR>{x}, w, tile, 0, w.in, y);
  if constexpr (MR > kRows + 1) multiply_tall<Tiles, MR - 1>(rows, tiles, x, w, tile, y);
}

// Rows in register tiles of nearly one size.
template <int NT, class Tiles>
void all_rows(const Tiles& tiles, const float* x, int64_t rows, const Weight& w, int64_t tile,
              int64_t from, int64_t to, float* y) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t start = rows * i / parts, stop = rows * (i + 1) / parts;
    multiply_rows<NT>(static_cast<int>(stop - start), tiles, x + start * w.in, w, tile, from, to,
                      y + start * w.out);
  }
}

template <int NT, class Tiles>
void widen(const Tiles& tiles, int64_t tile, int64_t from, int64_t to, float* panel) {
  tiles.template step<NT>(tile, from, to, [&](int64_t, const F16(&w)[NT]) {
    for (int t = 0; t < NT; ++t) w[t].store(panel + t * kLanes);
    panel += NT * kLanes;
  });
}

// All rows of NT tiles from `tile`: up to kRows the loop widens the weights, else a panel is widened
// once for all of them.
template <int NT, class Tiles>
void block(const Tiles& tiles, const float* x, int64_t rows, const Weight& w, int64_t tile,
           float* y) {
  if (rows <= kRows) return all_rows<NT>(tiles, x, rows, w, tile, 0, w.in, y);
  float* panel = scratch(kPanelInputs * NT * kLanes);
  for (int64_t from = 0; from < w.in; from += kPanelInputs) {
    const int64_t to = std::min(from + kPanelInputs, w.in);
    widen<NT>(tiles, tile, from, to, panel);
    all_rows<NT>(Panel{panel}, x, rows, w, tile, from, to, y);
  }
}

// W x + b for the tiles [tile, end). x: [rows][in], or [in][rows] where all the launch's rows make
// a tall tile: a last block may have as few rows, but has them as they are.
template <class Tiles>
void blocks(const Tiles& tiles, const float* x, int64_t rows, bool tall, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  if (tall) {
    for (; tile < end; ++tile)
      multiply_tall(static_cast<int>(rows), tiles, x, w, tile, y);
    return;
  }
  for (; tile + kTiles <= end; tile += kTiles) block<kTiles>(tiles, x, rows, w, tile, y);
  if constexpr (kTiles > 2)
    for (; tile + 2 <= end; tile += 2) block<2>(tiles, x, rows, w, tile, y);
  for (; tile < end; ++tile) block<1>(tiles, x, rows, w, tile, y);
}

void base(const float* x, int64_t rows, bool tall, const Weight& w, int64_t tile, int64_t end,
          float* y) {
  if (w.nf4)
    blocks(Nf4Tiles{static_cast<const uint8_t*>(w.codes), w.scales, w.in, w.group}, x, rows,
           tall, w, tile, end, y);
  else
    blocks(Int8Tiles{static_cast<const int8_t*>(w.codes), w.in}, x, rows, tall, w, tile, end, y);
}

// A segment at one module, and where its shrunk rows [rows][rank] are.
struct Active {
  int64_t module, start, end;
  const ModuleAdapter* at;
  float weight;
  float* shrunk;
  int64_t rows() const { return end - start; }
};

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
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) shrunk[r * rank + j] = factor * sum(acc[r][j]);
}

template <class T>
void shrink(const Active& s, const float* x, int64_t in, int64_t from, int64_t to) {
  const auto* a = static_cast<const T*>(s.at->a);
  const int64_t rank = s.at->rank;
  const float factor = s.weight * s.at->scale;
  int64_t r = from;
  const auto rows = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; r + R <= to; r += R) {
      const float* row = x + (s.start + r) * in;
      float* out = s.shrunk + r * rank;
      int64_t j = 0;
      for (; j + 4 <= rank; j += 4) dots<R, 4>(row, in, a + j * in, factor, out + j, rank);
      for (; j < rank; ++j) dots<R, 1>(row, in, a + j * in, factor, out + j, rank);
    }
  };
#if defined(__AVX512F__)
  rows(std::integral_constant<int, 4>());
#endif
  rows(std::integral_constant<int, 1>());
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

template <class T>
void expand(const Active& s, int64_t row, int64_t stop, int64_t tile, int64_t end, int64_t out,
            float* y) {
  const int64_t rank = s.at->rank;
  const int64_t from = std::max(row, s.start) - s.start, to = std::min(stop, s.end) - s.start;
  for (; tile < end; ++tile) {
    const T* b = static_cast<const T*>(s.at->b) + tile * rank * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, out - tile * kLanes));
    float* at = y + s.start * out + tile * kLanes;
    int64_t r = from;
    for (; r + 8 <= to; r += 8) expand<8>(s.shrunk + r * rank, rank, b, at + r * out, out, n);
    for (; r < to; ++r) expand<1>(s.shrunk + r * rank, rank, b, at + r * out, out, n);
  }
}

template <template <class> class Call, class... Args>
void by_type(Type type, Args&&... args) {
  switch (type) {
    case Type::kFloat: return Call<float>::run(args...);
    case Type::kHalf: return Call<Half>::run(args...);
    case Type::kBFloat16: return Call<BFloat16>::run(args...);
  }
}
template <class T>
struct Shrink {
  template <class... Args>
  static void run(Args&&... args) { shrink<T>(args...); }
};
template <class T>
struct Expand {
  template <class... Args>
  static void run(Args&&... args) { expand<T>(args...); }
};

// y = op(y, vector) on those of the segment's rows in [row, stop), and the columns of the tiles.
template <class Op>
void each_row(const Active& s, int64_t row, int64_t stop, int64_t tile, int64_t end, int64_t out,
              float* y, const Op& op) {
  const int64_t last = std::min(end * kLanes, out);
  for (int64_t r = std::max(row, s.start); r < std::min(stop, s.end); ++r)
    for (int64_t c = tile * kLanes; c < last; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, last - c));
      float* at = y + r * out + c;
      if (n == kLanes)
        op(F16::load(at), c, n).store(at);
      else
        op(F16::load_n(at, n), c, n).store_n(at, n);
    }
}

int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// Ask for memory that will be read soon: factors are read once a step, and in short pieces.
void fetch(const void* from, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// What `adapt` will read, so that it comes while the base multiplies.
void fetch(const Active* first, const Active* last, int64_t tile, int64_t end) {
  for (auto s = first; s != last; ++s) {
    const int64_t size = s->at->rank * kLanes * size_of(s->at->type);
    fetch(static_cast<const char*>(s->at->b) + tile * size, (end - tile) * size);
  }
}

// What the segments [first, last) do to y's rows [row, stop) and tiles [tile, end).
void adapt(const Active* first, const Active* last, int64_t row, int64_t stop, int64_t tile,
           int64_t end, int64_t out, float* y) {
  for (auto s = first; s != last; ++s)
    if (s->at->rank) by_type<Expand>(s->at->type, *s, row, stop, tile, end, out, y);
  for (auto s = first; s != last; ++s)
    if (const float* v = s->at->out_scale)
      each_row(*s, row, stop, tile, end, out, y,
               [v](F16 a, int64_t c, int n) { return a * F16::load_n(v + c, n); });
  for (auto s = first; s != last; ++s)
    if (const float* v = s->at->bias)
      each_row(*s, row, stop, tile, end, out, y, [v, w = F16::set1(s->weight)](F16 a, int64_t c, int n) {
        return fma(w, F16::load_n(v + c, n), a);
      });
}

}  // namespace

void scale_input(const float* x, int64_t rows, int64_t in, int64_t id, const Batch& batch,
                 float* out) {
  std::memcpy(out, x, sizeof(float) * rows * in);
  for (const Segment& s : batch) {
    const auto found = s.adapter->find(id);
    if (found == s.adapter->end() || !found->second.in_scale) continue;
    const float* v = found->second.in_scale;
    for (int64_t r = s.start; r < s.end; ++r)
      for (int64_t k = 0; k < in; ++k) out[r * in + k] *= v[k];
  }
}

void linear(const float* x, int64_t rows, const std::vector<Module>& modules, const Batch* batch) {
  if (rows == 0) return;
  thread_local std::vector<Active> active_memory;
  thread_local std::vector<float> float_memory;
  auto& active = active_memory;  // other threads' tasks must see the caller's
  auto& memory = float_memory;
  active.clear();
  std::vector<size_t> ends(modules.size(), 0);
  std::vector<const float*> inputs(modules.size(), x);
  int64_t num_shrunk = 0, num_scaled = 0, num_transposed = 0;
  for (size_t m = 0; m < modules.size(); ++m) {
    bool scaled = false;
    if (batch)
      for (const Segment& s : *batch) {
        const auto found = s.adapter->find(modules[m].id);
        if (found == s.adapter->end() || s.start == s.end) continue;
        const ModuleAdapter& at = found->second;
        active.push_back({static_cast<int64_t>(m), s.start, s.end, &at, s.weight, nullptr});
        num_shrunk += (s.end - s.start) * at.rank;
        scaled |= at.in_scale != nullptr && modules[m].weight != nullptr;
      }
    ends[m] = active.size();
    if (is_tall(rows) && modules[m].weight) num_transposed += rows * modules[m].in;  // at most
    if (scaled) {
      inputs[m] = nullptr;
      num_scaled += rows * modules[m].in;
    }
  }
  if (memory.size() < static_cast<size_t>(num_shrunk + num_scaled + num_transposed))
    memory.resize(num_shrunk + num_scaled + num_transposed);
  float* free = memory.data();
  for (size_t m = 0; m < modules.size(); ++m)
    if (!inputs[m]) {
      scale_input(x, rows, modules[m].in, modules[m].id, *batch, free);
      inputs[m] = free;
      free += rows * modules[m].in;
    }

  // What the base multiplies: one transposed copy for all modules with the same inputs.
  std::vector<const float*> columns(inputs);
  for (size_t m = 0; m < modules.size() && num_transposed; ++m) {
    if (!modules[m].weight) continue;
    if (m > 0 && inputs[m] == inputs[m - 1]) {
      columns[m] = columns[m - 1];
      continue;
    }
    const int64_t in = modules[m].in;
    for (int64_t k = 0; k < in; ++k)
      for (int64_t r = 0; r < rows; ++r) free[k * rows + r] = inputs[m][r * in + k];
    columns[m] = free;
    free += rows * in;
  }

  std::vector<std::pair<const Active*, int64_t>> shrinks;  // a segment, and its first row
  int64_t shrink_work = 0;
  for (Active& s : active) {
    s.shrunk = free;
    free += s.rows() * s.at->rank;
    if (!s.at->rank) continue;
    for (int64_t r = 0; r < s.rows(); r += kShrinkRows) shrinks.emplace_back(&s, r);
    shrink_work += s.rows() * s.at->rank * modules[s.module].in;
  }
  const int64_t ahead = at::get_num_threads();
  for_each_task(shrinks.size(), shrink_work > 1 << 15, [&](int64_t i) {
    const auto [s, from] = shrinks[i];
    if (i + ahead < static_cast<int64_t>(shrinks.size())) {
      const Active& next = *shrinks[i + ahead].first;
      const int64_t count = next.at->rank * modules[next.module].in;
      if (&next != s) fetch(next.at->a, count * size_of(next.at->type));
    }
    by_type<Shrink>(s->at->type, *s, inputs[s->module], modules[s->module].in, from,
                    std::min(from + kShrinkRows, s->rows()));
  });

  // A task is a few tiles of one module and a block of rows.
  int64_t num_tiles = 0, work = 0;
  for (const Module& m : modules) {
    num_tiles += (m.out + kLanes - 1) / kLanes;
    work += m.weight ? rows * m.in * m.out : rows * m.out;
  }
  const int64_t step = num_tiles >= 512 ? 8 : num_tiles >= 96 || rows > kBlockRows ? 4 : 2;
  struct Task { size_t module; int64_t tile, end, row; };
  std::vector<Task> tasks;
  for (size_t m = 0; m < modules.size(); ++m) {
    const int64_t tiles = (modules[m].out + kLanes - 1) / kLanes;
    if (!modules[m].weight && ends[m] == (m ? ends[m - 1] : 0)) continue;
    for (int64_t row = 0; row < rows; row += kBlockRows)
      for (int64_t t = 0; t < tiles; t += step)
        tasks.push_back({m, t, std::min(t + step, tiles), row});
  }
  for_each_task(tasks.size(), work > 1 << 15, [&](int64_t i) {
    const auto [m, tile, end, row] = tasks[i];
    const Module& module = modules[m];
    const int64_t stop = std::min(row + kBlockRows, rows);
    const Active* first = active.data() + (m ? ends[m - 1] : 0);
    const Active* last = active.data() + ends[m];
    if (rows <= kTall) fetch(first, last, tile, end);
    if (module.weight)
      base(columns[m] + row * module.in, stop - row, is_tall(rows), *module.weight, tile, end,
           module.y + row * module.out);
    adapt(first, last, row, stop, tile, end, module.out, module.y);
  });
}

namespace {

template <class Tiles, class T>
void unpack_tile(const Tiles& tiles, const Weight& w, int64_t tile, int64_t start, int64_t stop,
                 bool scaled, T* out) {
  const int64_t first = std::max(start, tile * kLanes), width = stop - start;
  const int skipped = static_cast<int>(first - tile * kLanes);
  const int n = static_cast<int>(std::min(stop, (tile + 1) * kLanes) - first);
  const F16 scale = scaled && !w.nf4 ? F16::load(w.scales + tile * kLanes) : F16::set1(1.f);
  T* row = out + first - start;
  tiles.template step<1>(tile, 0, w.in, [&](int64_t, const F16(&value)[1]) {
    if (n == kLanes) {
      (value[0] * scale).store(row);
    } else {
      T full[kLanes];
      (value[0] * scale).store(full);
      std::copy(full + skipped, full + skipped + n, row);
    }
    row += width;
  });
}

template <class T>
void unpack_as(const Weight& w, int64_t start, int64_t stop, bool scaled, T* out) {
  const int64_t first = start / kLanes, last = (stop + kLanes - 1) / kLanes;
  for_each_task(last - first, true, [&](int64_t i) {
    if (w.nf4)
      unpack_tile(Nf4Tiles{static_cast<const uint8_t*>(w.codes), w.scales, w.in, w.group}, w,
                  first + i, start, stop, scaled, out);
    else
      unpack_tile(Int8Tiles{static_cast<const int8_t*>(w.codes), w.in}, w, first + i, start, stop,
                  scaled, out);
  });
}

}  // namespace

void unpack(const Weight& w, int64_t start, int64_t stop, bool scaled, void* out, Type type) {
  if (type == Type::kBFloat16)
    unpack_as(w, start, stop, scaled, static_cast<BFloat16*>(out));
  else
    unpack_as(w, start, stop, scaled, static_cast<float*>(out));
}

}  // namespace polypeft
