#include "elementwise.h"

#include "parallel.h"

namespace polypeft {
namespace {

// use(i, n) for pieces of at most sixteen of [0, count), by all threads where there are many.
template <class Use>
void each_piece(int64_t count, const Use& use) {
  constexpr int64_t kPiece = 4096;
  for_each_task((count + kPiece - 1) / kPiece, count > 1 << 14, [&](int64_t piece) {
    const int64_t stop = std::min(count, (piece + 1) * kPiece);
    for (int64_t i = piece * kPiece; i < stop; i += kLanes)
      use(i, static_cast<int>(std::min<int64_t>(kLanes, stop - i)));
  });
}

F16 silu(F16 x) { return x / (F16::set1(1.f) + exp(F16::zero() - x)); }

// x/2 · (1 + tanh u) = x · (1 − 1 / (1 + e^2u)) with u = √(2/π) (x + 0.044715 x³).
F16 gelu_tanh(F16 x) {
  const F16 one = F16::set1(1.f), cubic = F16::set1(0.044715f);
  const F16 u = F16::set1(1.5957691216057308f) * fma(cubic * x, x * x, x);
  return x * (one - one / (one + exp(u)));
}

}  // namespace

void rms_norm(const float* x, const float* weight, float offset, float eps, int64_t rows,
              int64_t dim, float* out) {
  for_each_task(rows, rows * dim > 1 << 15, [&](int64_t r) {
    const float* row = x + r * dim;
    float* to = out + r * dim;
    F16 squares = F16::zero();
    int64_t k = 0;
    for (; k + kLanes <= dim; k += kLanes) {
      const F16 value = F16::load(row + k);
      squares = fma(value, value, squares);
    }
    const int left = static_cast<int>(dim - k);
    const F16 tail = F16::load_n(row + k, left);
    squares = fma(tail, tail, squares);
    const F16 factor = F16::set1(1.f / std::sqrt(sum(squares) / dim + eps));
    const F16 plus = F16::set1(offset);
    for (k = 0; k + kLanes <= dim; k += kLanes)
      (F16::load(row + k) * factor * (plus + F16::load(weight + k))).store(to + k);
    (tail * factor * (plus + F16::load_n(weight + k, left))).store_n(to + k, left);
  });
}

void add(const float* x, const float* y, int64_t count, float* out) {
  each_piece(count, [&](int64_t i, int n) {
    (F16::load_n(x + i, n) + F16::load_n(y + i, n)).store_n(out + i, n);
  });
}

void gate(float* gate, const float* up, int64_t count, Activation activation) {
  each_piece(count, [&](int64_t i, int n) {
    const F16 x = F16::load_n(gate + i, n), other = F16::load_n(up + i, n);
    const F16 active = activation == Activation::kSilu ? silu(x) : gelu_tanh(x);
    (active * other).store_n(gate + i, n);
  });
}

}  // namespace polypeft
