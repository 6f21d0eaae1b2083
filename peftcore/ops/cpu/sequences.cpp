#include "sequences.h"

#include "parallel.h"
#include "simd.h"

namespace polypeft {
namespace {

// One head's rows of a sequence as floats, [num_rows][dim].
template <class T>
void widen(const HeadRows& from, const Sequence& s, int64_t head, int64_t dim, float* to) {
  const T* values = static_cast<const T*>(from.values) + head * from.head;
  for (int64_t r = s.start; r < s.end; ++r, to += dim)
    for (int64_t k = 0; k < dim; k += kLanes) F16::load(values + r * from.row + k).store(to + k);
}
template <class T>
void narrow(const float* from, const Sequence& s, int64_t head, int64_t dim, const HeadRows& to) {
  T* values = static_cast<T*>(to.values) + head * to.head;
  for (int64_t r = s.start; r < s.end; ++r, from += dim)
    for (int64_t k = 0; k < dim; k += kLanes) F16::load(from + k).store(values + r * to.row + k);
}

float dot(const float* x, const float* y, int64_t dim) {
  F16 acc = F16::zero();
  for (int64_t k = 0; k < dim; k += kLanes) acc = fma(F16::load(x + k), F16::load(y + k), acc);
  return sum(acc);
}

// to += factor · from
void add(float factor, const float* from, int64_t dim, float* to) {
  for (int64_t k = 0; k < dim; k += kLanes)
    fma(F16::set1(factor), F16::load(from + k), F16::load(to + k)).store(to + k);
}

// x[j] = e^(x[j] − shift) for the first n; their sum. All are NaN where the shift is.
float exponentials(float* x, int64_t n, float shift) {
  if (std::isnan(shift)) {
    std::fill(x, x + n, shift);
    return shift;
  }
  F16 total = F16::zero();
  for (int64_t j = 0; j < n; j += kLanes) {
    F16 e = exp(F16::load(x + j) - F16::set1(shift));
    if (n - j < kLanes) e = keep(e, 0, static_cast<int>(n - j), 0.f);
    e.store(x + j);
    total = total + e;
  }
  return sum(total);
}

// NaN where one is.
float largest(const float* x, int64_t n) {
  float most = x[0];
  for (int64_t j = 1; j < n && !std::isnan(most); ++j)
    if (!(x[j] <= most)) most = x[j];
  return most;
}

// scores[j] = scale · q · k[j] for the first n.
void score(const float* q, const float* k, int64_t n, int64_t dim, float scale, float* scores) {
  for (int64_t j = 0; j < n; ++j) scores[j] = scale * dot(q, k + j * dim, dim);
}

template <class T>
void attend_head(const SelfAttention& a, const Sequence& s, int64_t head) {
  const int64_t n = s.end - s.start, dim = a.dim, kv = head / (a.heads / a.kv_heads);
  float* q = scratch(4 * n * dim + n + kLanes);
  float *k = q + n * dim, *v = k + n * dim, *out = v + n * dim, *weights = out + n * dim;
  widen<T>(a.q, s, head, dim, q);
  widen<T>(a.k, s, kv, dim, k);
  widen<T>(a.v, s, kv, dim, v);
  std::fill(out, out + n * dim, 0.f);
  for (int64_t i = 0; i < n; ++i) {
    score(q + i * dim, k, i + 1, dim, a.scale, weights);
    const float most = largest(weights, i + 1);
    const float total = exponentials(weights, i + 1, most);
    a.log_sums[head * a.rows + s.start + i] = most + std::log(total);
    for (int64_t j = 0; j <= i; ++j) add(weights[j] / total, v + j * dim, dim, out + i * dim);
  }
  narrow<T>(out, s, head, dim, a.out);
}

// One head of q's share in the gradients; those of k and v are sums over the heads that read them.
struct HeadGradients {
  const float *q, *k, *v, *out, *grad;  // [num_rows][dim]
  float *grad_q, *grad_k, *grad_v, *weights;
};

void attend_back(const HeadGradients& g, int64_t n, int64_t dim, float scale,
                 const float* log_sums) {
  for (int64_t i = 0; i < n; ++i) {
    const float* grad = g.grad + i * dim;
    score(g.q + i * dim, g.k, i + 1, dim, scale, g.weights);
    exponentials(g.weights, i + 1, log_sums[i]);
    const float mean = dot(grad, g.out + i * dim, dim);
    for (int64_t j = 0; j <= i; ++j) {
      const float weight = g.weights[j];
      const float change = scale * weight * (dot(grad, g.v + j * dim, dim) - mean);
      add(weight, grad, dim, g.grad_v + j * dim);
      add(change, g.k + j * dim, dim, g.grad_q + i * dim);
      add(change, g.q + i * dim, dim, g.grad_k + j * dim);
    }
  }
}

// All heads that read one head of keys and values.
template <class T>
void attend_back(const SelfAttention& a, const Sequence& s, int64_t kv, const HeadRows& grad,
                 const HeadRows& grad_q, const HeadRows& grad_k, const HeadRows& grad_v) {
  const int64_t n = s.end - s.start, dim = a.dim, size = n * dim, shared = a.heads / a.kv_heads;
  float* memory = scratch(8 * size + n + kLanes);
  float *q = memory, *k = q + size, *v = k + size, *out = v + size, *upstream = out + size;
  const HeadGradients g{q, k, v, out, upstream, upstream + size, upstream + 2 * size,
                        upstream + 3 * size, upstream + 4 * size};
  widen<T>(a.k, s, kv, dim, k);
  widen<T>(a.v, s, kv, dim, v);
  std::fill(g.grad_k, g.grad_k + 2 * size, 0.f);
  for (int64_t head = kv * shared; head < (kv + 1) * shared; ++head) {
    widen<T>(a.q, s, head, dim, q);
    widen<T>(a.out, s, head, dim, out);
    widen<T>(grad, s, head, dim, upstream);
    std::fill(g.grad_q, g.grad_q + size, 0.f);
    attend_back(g, n, dim, a.scale, a.log_sums + head * a.rows + s.start);
    narrow<T>(g.grad_q, s, head, dim, grad_q);
  }
  narrow<T>(g.grad_k, s, kv, dim, grad_k);
  narrow<T>(g.grad_v, s, kv, dim, grad_v);
}

}  // namespace

void attend_short(const SelfAttention& a, const std::vector<Sequence>& sequences) {
  for_each_task(static_cast<int64_t>(sequences.size()) * a.heads, true, [&](int64_t i) {
    const Sequence& s = sequences[i / a.heads];
    if (a.type == Type::kBFloat16)
      attend_head<BFloat16>(a, s, i % a.heads);
    else
      attend_head<float>(a, s, i % a.heads);
  });
}

void attend_short_back(const SelfAttention& a, const std::vector<Sequence>& sequences,
                       const HeadRows& grad, const HeadRows& grad_q, const HeadRows& grad_k,
                       const HeadRows& grad_v) {
  for_each_task(static_cast<int64_t>(sequences.size()) * a.kv_heads, true, [&](int64_t i) {
    const Sequence& s = sequences[i / a.kv_heads];
    if (a.type == Type::kBFloat16)
      attend_back<BFloat16>(a, s, i % a.kv_heads, grad, grad_q, grad_k, grad_v);
    else
      attend_back<float>(a, s, i % a.kv_heads, grad, grad_q, grad_k, grad_v);
  });
}

}  // namespace polypeft
