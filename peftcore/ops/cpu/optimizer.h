// What happens to all gradients of an adapter between the backward pass and the next forward one.
#pragma once

#include <cstdint>
#include <vector>

namespace polypeft {

struct Values {
  float* at;
  int64_t size;
};

// The norm of all of them together; where `limit` is less, they become limit / (norm + 1e-6) times
// what they are, as by torch's clip_grad_norm_. NaN or infinite where they are, and they then stay.
double clip_norm(const std::vector<Values>& all, double limit);

// One parameter of `size` values, its gradient, and the means of that and of its square.
struct AdamParameter {
  float *values, *mean, *mean_square;
  const float* grad;
  int64_t size;
};

// The `count`-th step of AdamW (arXiv:1711.05101), as torch.optim.AdamW makes it.
struct AdamStep {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t count;
};

void adamw(const std::vector<AdamParameter>& all, const AdamStep& step);

}  // namespace polypeft
