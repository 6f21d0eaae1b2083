#include "trained.h"

#include "parallel.h"
#include "simd.h"

namespace polypeft {
namespace {

constexpr int64_t kBlockRows = 32;  // of one task that goes along the rows
constexpr int64_t kTaskTiles = 8;   // of one task that goes along the features
constexpr int64_t kParallelWork = 1 << 15;  // multiplications

int lanes_left(int64_t size, int64_t at) {
  return static_cast<int>(std::min<int64_t>(kLanes, size - at));
}

template <class T>
F16 read(const T* p, int n) {
  return n == kLanes ? F16::load(p) : load_n(p, n);
}
inline void write(F16 value, float* p, int n) { value.store_n(p, n); }
inline void write(F16 value, BFloat16* p, int n) {
  if (n == kLanes) return value.store(p);
  BFloat16 full[kLanes];
  value.store(full);
  std::copy(full, full + n, p);
}

// Calls body(Int<R>(), r) for all rows in groups of R, and for those left by themselves.
template <int R, class Body>
void grouped(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) body(Int<R>(), r);
  for (; r < rows; ++r) body(Int<1>(), r);
}

// low[r][j] = A[j] · x[r] for R rows and J of the ranks.
template <int R, int J, class T>
void dots(const T* x, int64_t in, const float* a, float* low, int64_t rank) {
  F16 acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = F16::zero();
  for (int64_t k = 0; k < in; k += kLanes) {
    const int n = lanes_left(in, k);
    F16 row[R];
    for (int r = 0; r < R; ++r) row[r] = read(x + r * in + k, n);
    for (int j = 0; j < J; ++j) {
      const F16 factors = read(a + j * in + k, n);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(row[r], factors, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) low[r * rank + j] = sum(acc[r][j]);
}

// low of the rows [from, to).
template <class T>
void shrink(const TrainedPart& p, int64_t in, int64_t from, int64_t to) {
  const T* x = static_cast<const T*>(p.x) + from * in;
  float* low = p.low + from * p.rank;
  grouped<4>(p.rank, [&](auto ranks, int64_t j) {
    grouped<4>(to - from, [&](auto rows, int64_t r) {
      dots<decltype(rows)::value, decltype(ranks)::value>(x + r * in, in, p.a + j * in,
                                                          low + r * p.rank + j, p.rank);
    });
  });
}

// y of R rows and the n outputs from `column`; b: [rank][16], those outputs' factors.
template <int R, class T>
void expand(const TrainedPart& p, int64_t out, int64_t column, int n, const float* b, int64_t row,
            T* y) {
  F16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = F16::zero();
  for (int64_t j = 0; j < p.rank; ++j) {
    const F16 factors = F16::load(b + j * kLanes);
    for (int r = 0; r < R; ++r)
      acc[r] = fma(F16::set1(p.low[(row + r) * p.rank + j]), factors, acc[r]);
  }
  for (int r = 0; r < R; ++r) {
    T* at = y + (p.start + row + r) * out + column;
    F16 value = fma(F16::set1(p.scale), acc[r], read(at, n));
    if (p.before) write(value, static_cast<T*>(p.before) + (row + r) * out + column, n);
    if (p.v) value = value * read(p.v + column, n);
    write(value, at, n);
  }
}

// The factors b, [out][rank], of a tile's outputs as [rank][16], filled up with zeros.
const float* factors_of_tile(const float* b, int64_t rank, int64_t out, int64_t column) {
  const int n = lanes_left(out, column);
  float* tile = scratch(rank * kLanes);
  for (int64_t j = 0; j < rank; ++j)
    for (int o = 0; o < kLanes; ++o)
      tile[j * kLanes + o] = o < n ? b[(column + o) * rank + j] : 0.f;
  return tile;
}

template <class T>
void expand_tile(const TrainedPart& p, int64_t out, int64_t column, T* y) {
  const float* b = factors_of_tile(p.b, p.rank, out, column);
  grouped<8>(p.end - p.start, [&](auto rows, int64_t r) {
    expand<decltype(rows)::value>(p, out, column, lanes_left(out, column), b, r, y);
  });
}

// grad_v of a tile, and the gradient through the scale.
template <class T>
void scale_back(const TrainedPart& p, int64_t out, int64_t column, T* grad) {
  const int n = lanes_left(out, column);
  const F16 v = read(p.v + column, n);
  F16 sums = F16::zero();
  for (int64_t r = 0; r < p.end - p.start; ++r) {
    T* at = grad + (p.start + r) * out + column;
    const F16 g = read(at, n);
    if (p.grad_v)
      sums = fma(g, read(static_cast<const T*>(p.before) + r * out + column, n), sums);
    write(g * v, at, n);
  }
  if (p.grad_v) write(sums, p.grad_v + column, n);
}

// grad_low[r] = scale · Bᵀ grad[r] for R rows; grad: [R][out].
template <int R>
void shrink_back(const TrainedPart& p, int64_t out, const float* grad, float* grad_low) {
  for (int64_t j = 0; j < p.rank; j += kLanes) {
    const int n = lanes_left(p.rank, j);
    F16 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = F16::zero();
    for (int64_t o = 0; o < out; ++o) {
      const F16 factors = read(p.b + o * p.rank + j, n);
      for (int r = 0; r < R; ++r) acc[r] = fma(F16::set1(grad[r * out + o]), factors, acc[r]);
    }
    for (int r = 0; r < R; ++r)
      write(acc[r] * F16::set1(p.scale), grad_low + r * p.rank + j, n);
  }
}

template <class T>
void shrink_back(const TrainedPart& p, int64_t out, int64_t from, int64_t to, const T* grad,
                 float* grad_low) {
  const T* rows = grad + (p.start + from) * out;
  float* widened = scratch(8 * out);
  grouped<8>(to - from, [&](auto count, int64_t r) {
    constexpr int R = decltype(count)::value;
    for (int64_t i = 0; i < R * out; i += kLanes) {
      const int n = lanes_left(R * out, i);
      write(read(rows + r * out + i, n), widened + i, n);
    }
    shrink_back<R>(p, out, widened, grad_low + (from + r) * p.rank);
  });
}

// grad_b[o] = scale · Σ grad[r][o] low[r] for the outputs of a tile.
template <class T>
void grad_b_tile(const TrainedPart& p, int64_t out, int64_t column, const T* grad) {
  const int width = lanes_left(out, column);
  for (int64_t j = 0; j < p.rank; j += kLanes) {
    const int n = lanes_left(p.rank, j);
    F16 acc[kLanes];
    unrolled<kLanes>([&](auto o) { acc[o] = F16::zero(); });
    for (int64_t r = 0; r < p.end - p.start; ++r) {
      float g[kLanes];
      read(grad + (p.start + r) * out + column, width).store(g);
      const F16 low = read(p.low + r * p.rank + j, n);
      unrolled<kLanes>([&](auto o) { acc[o] = fma(F16::set1(g[o]), low, acc[o]); });
    }
    const F16 scale = F16::set1(p.scale);
    for (int o = 0; o < width; ++o) write(acc[o] * scale, p.grad_b + (column + o) * p.rank + j, n);
  }
}

// grad_a[j] = Σ grad_low[r][j] x[r] for J of the ranks and n features from `column`.
template <int J, class T>
void grad_a_tile(const TrainedPart& p, int64_t in, int64_t column, int n, int64_t j,
                 const float* grad_low) {
  F16 acc[J];
  for (int i = 0; i < J; ++i) acc[i] = F16::zero();
  for (int64_t r = 0; r < p.end - p.start; ++r) {
    const F16 x = read(static_cast<const T*>(p.x) + r * in + column, n);
    const float* low = grad_low + r * p.rank + j;
    for (int i = 0; i < J; ++i) acc[i] = fma(F16::set1(low[i]), x, acc[i]);
  }
  for (int i = 0; i < J; ++i) write(acc[i], p.grad_a + (j + i) * in + column, n);
}

// grad_x[r] += Aᵀ grad_low[r] for R rows and n features from `column`.
template <int R, class T>
void grad_x_tile(const TrainedPart& p, int64_t in, int64_t column, int n, int64_t row,
                 const float* grad_low) {
  F16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = F16::zero();
  for (int64_t j = 0; j < p.rank; ++j) {
    const F16 factors = read(p.a + j * in + column, n);
    for (int r = 0; r < R; ++r)
      acc[r] = fma(F16::set1(grad_low[(row + r) * p.rank + j]), factors, acc[r]);
  }
  for (int r = 0; r < R; ++r) {
    T* at = static_cast<T*>(p.grad_x) + (row + r) * in + column;
    write(acc[r] + read(at, n), at, n);
  }
}

template <class T>
void input_tile(const TrainedPart& p, int64_t in, int64_t column, const float* grad_low) {
  const int n = lanes_left(in, column);
  if (p.grad_a)
    grouped<8>(p.rank, [&](auto ranks, int64_t j) {
      grad_a_tile<decltype(ranks)::value, T>(p, in, column, n, j, grad_low);
    });
  if (p.grad_x)
    grouped<8>(p.end - p.start, [&](auto rows, int64_t r) {
      grad_x_tile<decltype(rows)::value, T>(p, in, column, n, r, grad_low);
    });
}

// Some rows or features of a part.
struct Piece {
  const TrainedPart* part;
  int64_t from, to;
};

// Every part of `wanted` cut into pieces of `size(part)`.
template <class Wanted, class Size>
std::vector<Piece> pieces(const std::vector<TrainedPart>& parts, int64_t step, const Wanted& wanted,
                          const Size& size) {
  std::vector<Piece> found;
  for (const TrainedPart& p : parts) {
    const int64_t end = wanted(p) ? size(p) : 0;
    for (int64_t from = 0; from < end; from += step)
      found.push_back({&p, from, std::min(from + step, end)});
  }
  return found;
}

int64_t num_rows(const TrainedPart& p) { return p.end - p.start; }
bool has_update(const TrainedPart& p) { return p.rank > 0; }

int64_t work_of(const std::vector<TrainedPart>& parts, int64_t in, int64_t out) {
  int64_t work = 0;
  for (const TrainedPart& p : parts) work += num_rows(p) * (p.rank * (in + out) + out);
  return work;
}

// `tile(part, column)` for the tiles of each piece, as tasks of a phase.
template <class Tile>
Phase tiles(const std::vector<Piece>& work, const Tile& tile) {
  return {static_cast<int64_t>(work.size()), [&work, tile](int64_t i) {
            for (int64_t c = work[i].from; c < work[i].to; c += kLanes) tile(*work[i].part, c);
          }};
}

template <class T>
void adapt_as(T* y, int64_t in, int64_t out, const std::vector<TrainedPart>& parts) {
  const auto blocks = pieces(parts, kBlockRows / 2, has_update, num_rows);
  const auto outputs = pieces(parts, kTaskTiles * kLanes, [](const auto&) { return true; },
                              [out](const auto&) { return out; });
  const auto row = [&](int64_t i) { shrink<T>(*blocks[i].part, in, blocks[i].from, blocks[i].to); };
  run_phases({{static_cast<int64_t>(blocks.size()), row},
              tiles(outputs, [=](const TrainedPart& p, int64_t c) { expand_tile(p, out, c, y); })},
             work_of(parts, in, out) > kParallelWork);
}

template <class T>
void adapt_back_as(T* grad, int64_t in, int64_t out, const std::vector<TrainedPart>& parts) {
  std::vector<std::vector<float>> low;
  for (const TrainedPart& p : parts) low.emplace_back(num_rows(p) * p.rank);
  const auto grad_low = [&](const TrainedPart& p) { return low[&p - parts.data()].data(); };
  const auto all_out = [out](const auto&) { return out; };
  const int64_t step = kTaskTiles * kLanes;
  const auto scaled = pieces(parts, step, [](const auto& p) { return p.v; }, all_out);
  const auto blocks = pieces(parts, kBlockRows / 4, has_update, num_rows);
  const auto outputs =
      pieces(parts, step, [](const auto& p) { return p.rank && p.grad_b; }, all_out);
  const auto inputs = pieces(parts, step, has_update, [in](const auto&) { return in; });
  const auto row = [&](int64_t i) {
    const auto [p, from, to] = blocks[i];
    shrink_back(*p, out, from, to, grad, grad_low(*p));
  };
  run_phases(
      {tiles(scaled, [=](const TrainedPart& p, int64_t c) { scale_back(p, out, c, grad); }),
       {static_cast<int64_t>(blocks.size()), row},
       tiles(outputs, [=](const TrainedPart& p, int64_t c) { grad_b_tile(p, out, c, grad); }),
       tiles(inputs, [&](const TrainedPart& p, int64_t c) { input_tile<T>(p, in, c, grad_low(p)); })},
      2 * work_of(parts, in, out) > kParallelWork);
}

}  // namespace

void adapt(void* y, Type type, int64_t in, int64_t out, const std::vector<TrainedPart>& parts) {
  if (type == Type::kBFloat16)
    adapt_as(static_cast<BFloat16*>(y), in, out, parts);
  else
    adapt_as(static_cast<float*>(y), in, out, parts);
}

void adapt_back(void* grad, Type type, int64_t in, int64_t out,
                const std::vector<TrainedPart>& parts) {
  if (type == Type::kBFloat16)
    adapt_back_as(static_cast<BFloat16*>(grad), in, out, parts);
  else
    adapt_back_as(static_cast<float*>(grad), in, out, parts);
}

void row_norms(const float* a, const float* b, const float* across, const float* squares,
               float scale, int64_t rank, int64_t in, int64_t out, float* norms) {
  std::vector<float> products(rank * rank);  // A Aᵀ
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < rank; ++j)
      dots<1, 1>(a + i * in, in, a + j * in, products.data() + i * rank + j, rank);
  const auto tile = [&](int64_t t) {
    const int64_t column = t * kLanes;
    const int n = lanes_left(out, column);
    const float* factors = factors_of_tile(b, rank, out, column);
    F16 sums = read(squares + column, n);
    for (int64_t i = 0; i < rank; ++i) {
      F16 own = F16::zero();
      for (int64_t j = 0; j < rank; ++j)
        own = fma(F16::set1(products[i * rank + j]), F16::load(factors + j * kLanes), own);
      own = own * F16::set1(scale * scale);
      const F16 both = fma(F16::set1(2 * scale), read(across + i * out + column, n), own);
      sums = fma(F16::load(factors + i * kLanes), both, sums);
    }
    float squared[kLanes];
    sums.store(squared);
    // Of what is not finite nothing is hidden: only what rounding left below zero becomes zero.
    for (int o = 0; o < n; ++o) norms[column + o] = std::sqrt(squared[o] < 0 ? 0.f : squared[o]);
  };
  for_each_task((out + kLanes - 1) / kLanes, rank * rank * out > kParallelWork * 8, tile);
}

}  // namespace polypeft
