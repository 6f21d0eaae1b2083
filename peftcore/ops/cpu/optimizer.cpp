#include "optimizer.h"

#include "parallel.h"
#include "simd.h"

namespace polypeft {

double clip_norm(const std::vector<Values>& all, double limit) {
  const int64_t count = static_cast<int64_t>(all.size());
  std::vector<double> squares(count);
  for_each_task(count, true, [&](int64_t i) {
    const auto [x, size] = all[i];
    F16 sums[4] = {F16::zero(), F16::zero(), F16::zero(), F16::zero()};
    int64_t k = 0;
    for (; k + 4 * kLanes <= size; k += 4 * kLanes)
      unrolled<4>([&](auto j) {
        const F16 value = F16::load(x + k + j * kLanes);
        sums[j] = fma(value, value, sums[j]);
      });
    for (; k < size; k += kLanes) {
      const F16 value = F16::load_n(x + k, static_cast<int>(std::min<int64_t>(kLanes, size - k)));
      sums[0] = fma(value, value, sums[0]);
    }
    squares[i] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  double total = 0;
  for (const double square : squares) total += square;
  const double norm = std::sqrt(total), factor = limit / (norm + 1e-6);
  if (!std::isfinite(norm) || factor >= 1) return norm;
  for_each_task(count, true, [&](int64_t i) {
    const auto [x, size] = all[i];
    for (int64_t k = 0; k < size; k += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, size - k));
      (F16::load_n(x + k, n) * F16::set1(static_cast<float>(factor))).store_n(x + k, n);
    }
  });
  return norm;
}

void adamw(const std::vector<AdamParameter>& all, const AdamStep& step) {
  const double n = static_cast<double>(step.count);
  const auto set = [](double value) { return F16::set1(static_cast<float>(value)); };
  const F16 kept = set(1 - step.lr * step.weight_decay), eps = set(step.eps);
  const F16 beta1 = set(step.beta1), beta2 = set(step.beta2);
  const F16 rest1 = set(1 - step.beta1), rest2 = set(1 - step.beta2);
  const F16 rate = set(-step.lr / (1 - std::pow(step.beta1, n)));
  const F16 root = set(std::sqrt(1 - std::pow(step.beta2, n)));
  for_each_task(static_cast<int64_t>(all.size()), true, [&](int64_t i) {
    const AdamParameter& p = all[i];
    for (int64_t k = 0; k < p.size; k += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, p.size - k));
      const F16 grad = F16::load_n(p.grad + k, count);
      const F16 mean = fma(beta1, F16::load_n(p.mean + k, count), rest1 * grad);
      const F16 square =
          fma(beta2, F16::load_n(p.mean_square + k, count), rest2 * (grad * grad));
      const F16 change = mean / (sqrt(square) / root + eps);
      const F16 values = fma(rate, change, kept * F16::load_n(p.values + k, count));
      mean.store_n(p.mean + k, count);
      square.store_n(p.mean_square + k, count);
      values.store_n(p.values + k, count);
    }
  });
}

}  // namespace polypeft
