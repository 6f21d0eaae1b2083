// The kernels as Python sees them: tensors are checked here, and the interpreter's lock is released.

#include <torch/csrc/utils/pybind.h>
#include <torch/python.h>

#include <map>
#include <memory>
#include <optional>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "optimizer.h"
#include "sequences.h"
#include "trained.h"

namespace py = pybind11;
using at::Tensor;
using namespace polypeft;

namespace {

constexpr const char* kCapability =
#if defined(__AVX512VNNI__)
    "AVX512_VNNI";
#elif defined(__AVX512F__)
    "AVX512";
#elif defined(__AVXVNNI__)
    "AVX2_VNNI";
#elif defined(__AVX2__)
    "AVX2";
#elif defined(__ARM_NEON)
    "NEON";
#else
    "PORTABLE";
#endif

void check(const Tensor& t, const char* name, c10::ScalarType type) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous() && t.scalar_type() == type, name,
                    ": expected a contiguous CPU tensor of ", type, ", got ", t.scalar_type(), " ",
                    t.sizes());
}

const float* floats(const std::optional<Tensor>& t, const char* name, int64_t count) {
  if (!t) return nullptr;
  check(*t, name, at::kFloat);
  TORCH_CHECK_VALUE(t->numel() == count, name, ": expected ", count, " values, got ", t->sizes());
  return t->data_ptr<float>();
}

Type type_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous(), name, ": not contiguous on the CPU");
  switch (t.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_VALUE(false, name, ": ", t.scalar_type(), " is not supported");
  }
}

struct PyWeight : Weight {
  Tensor codes_, scales_;
  std::optional<Tensor> bias_;

  PyWeight(Tensor codes, Tensor scales, std::optional<Tensor> bias, int64_t out, int64_t in,
           int activation_bits)
      : codes_(std::move(codes)), scales_(std::move(scales)), bias_(std::move(bias)) {
    nf4 = codes_.scalar_type() == at::kByte;
    check(codes_, "codes", nf4 ? at::kByte : at::kChar);
    check(scales_, "scales", at::kFloat);
    this->out = out;
    this->in = in;
    TORCH_CHECK_VALUE(out > 0 && in > 0, "a weight of [", out, ", ", in, "]");
    const int64_t tiles = num_tiles();
    TORCH_CHECK_VALUE(codes_.numel() == tiles * (nf4 ? in / 8 : (in + 3) / 4) * 64 &&
                          (!nf4 || in % 8 == 0),
                      "codes: ", codes_.sizes(), " is not a packed [", out, ", ", in, "]");
    TORCH_CHECK_VALUE(activation_bits == 0 || activation_bits == 8 || activation_bits == 16,
                      "activation_bits: ", activation_bits, " is not 0, 8 or 16");
    this->activation_bits = activation_bits;
    group = in;
    if (nf4) {
      const int64_t groups = scales_.numel() / (tiles * 16);
      TORCH_CHECK_VALUE(groups > 0 && groups * tiles * 16 == scales_.numel() && in % groups == 0 &&
                            in / groups % 8 == 0,
                        "scales: ", scales_.sizes(), " does not go with the codes");
      group = in / groups;
    } else {
      TORCH_CHECK_VALUE(scales_.numel() == tiles * 16, "scales: ", scales_.sizes());
    }
    this->codes = codes_.data_ptr();
    this->scales = scales_.data_ptr<float>();
    this->bias = floats(bias_, "bias", out);
  }
};

constexpr int64_t kMaxModules = 1 << 20;

// An adapter, and the tensors that it points into.
struct PyAdapter {
  Adapter adapter;
  std::vector<Tensor> held;

  void set(int64_t id, int64_t in, int64_t out, const std::optional<Tensor>& a,
           const std::optional<Tensor>& b, double scale, const std::optional<Tensor>& in_scale,
           const std::optional<Tensor>& out_scale, const std::optional<Tensor>& bias) {
    ModuleAdapter entry;
    entry.in = in;
    entry.out = out;
    TORCH_CHECK_VALUE(0 <= id && id < kMaxModules, "module id: ", id);
    TORCH_CHECK_VALUE(in > 0 && out > 0, "an adapter of [", out, ", ", in, "]");
    TORCH_CHECK_VALUE(a.has_value() == b.has_value(), "a and b come together");
    if (a) {
      TORCH_CHECK_VALUE(a->dim() == 2 && a->size(1) == in, "a: ", a->sizes());
      entry.rank = a->size(0);
      TORCH_CHECK_VALUE(b->numel() == (out + 15) / 16 * 16 * entry.rank, "b: ", b->sizes());
      entry.type = type_of(*a, "a");
      TORCH_CHECK_VALUE(type_of(*b, "b") == entry.type, "a and b are of two dtypes");
      entry.a = a->data_ptr();
      entry.b = b->data_ptr();
      entry.scale = static_cast<float>(scale);
    }
    entry.in_scale = floats(in_scale, "in_scale", in);
    entry.out_scale = floats(out_scale, "out_scale", out);
    entry.bias = floats(bias, "bias", out);
    if (id >= static_cast<int64_t>(adapter.modules.size())) adapter.modules.resize(id + 1);
    adapter.modules[id] = entry;
    for (const auto* t : {&a, &b, &in_scale, &out_scale, &bias})
      if (*t) held.push_back(**t);
  }
};

struct PyBatch {
  Batch segments;
  std::vector<std::shared_ptr<PyAdapter>> held;

  explicit PyBatch(
      const std::vector<std::tuple<int64_t, int64_t, std::shared_ptr<PyAdapter>, double>>& given) {
    for (const auto& [start, end, adapter, weight] : given) {
      TORCH_CHECK_VALUE(adapter, "a segment without an adapter");
      TORCH_CHECK_VALUE(0 <= start && start <= end, "segment [", start, ", ", end, ")");
      segments.push_back({start, end, &adapter->adapter, static_cast<float>(weight)});
      held.push_back(adapter);
    }
  }
  bool touches(int64_t id) const {
    for (const Segment& s : segments)
      if (s.adapter->find(id)) return true;
    return false;
  }
  void check_rows(int64_t rows) const {
    for (const Segment& s : segments)
      TORCH_CHECK_VALUE(s.end <= rows, "segment [", s.start, ", ", s.end, ") of ", rows, " rows");
  }
  // Without `out`: of an input scale.
  void check_sizes(int64_t id, int64_t in, std::optional<int64_t> out) const {
    for (const Segment& s : segments) {
      const ModuleAdapter* at = s.adapter->find(id);
      TORCH_CHECK_VALUE(!at || (at->in == in && at->out == out.value_or(at->out)), "module ", id,
                        ": an adapter for [", at->out, ", ", at->in, "] meets ", in, " inputs");
    }
  }
};

Tensor as_rows(const Tensor& x, int64_t in) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.device().is_cpu() && x.dim() > 0 &&
                        x.size(-1) == in,
                    "x: expected float32 [..., ", in, "], got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK_VALUE(in > 0, "x: ", x.sizes(), " has no features");
  return x.contiguous();
}

int64_t last_size(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() > 0, name, ": a number");
  return x.size(-1);
}

Tensor like(const Tensor& x, int64_t out) {
  auto shape = x.sizes().vec();
  shape.back() = out;
  return at::empty(shape, x.options());
}

std::vector<Tensor> py_linear(const Tensor& input, const std::vector<std::shared_ptr<PyWeight>>& weights,
                              const std::vector<int64_t>& ids, const PyBatch* batch) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() == ids.size(), "a module id for each weight");
  for (const auto& weight : weights) TORCH_CHECK_VALUE(weight, "weights: one is None");
  const Tensor x = as_rows(input, weights[0]->in);
  const int64_t rows = x.numel() / weights[0]->in;
  if (batch) batch->check_rows(rows);
  std::vector<Tensor> results;
  std::vector<Module> modules;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(weights[i]->in == weights[0]->in, "the weights read inputs of two sizes");
    if (batch) batch->check_sizes(ids[i], weights[i]->in, weights[i]->out);
    results.push_back(like(x, weights[i]->out));
    modules.push_back({weights[i].get(), ids[i], weights[i]->in, weights[i]->out,
                       results.back().data_ptr<float>()});
  }
  linear(x.data_ptr<float>(), rows, modules, batch ? &batch->segments : nullptr);
  return results;
}

void py_add_adapters(const Tensor& y, const Tensor& input, int64_t id, const PyBatch& batch) {
  const Tensor x = as_rows(input, last_size(input, "x"));
  check(y, "y", at::kFloat);
  const int64_t in = x.size(-1), out = last_size(y, "y"), rows = x.numel() / in;
  TORCH_CHECK_VALUE(y.numel() == rows * out, "x: ", x.sizes(), " and y: ", y.sizes());
  batch.check_rows(rows);
  batch.check_sizes(id, in, out);
  linear(x.data_ptr<float>(), rows, {{nullptr, id, in, out, y.data_ptr<float>()}}, &batch.segments);
}

Tensor py_scale_input(const Tensor& input, int64_t id, const PyBatch& batch) {
  bool scaled = false;
  for (const Segment& s : batch.segments) {
    const ModuleAdapter* at = s.adapter->find(id);
    scaled |= at && at->in_scale;
  }
  if (!scaled) return input;
  const Tensor x = as_rows(input, last_size(input, "x"));
  batch.check_rows(x.numel() / x.size(-1));
  batch.check_sizes(id, x.size(-1), std::nullopt);
  Tensor out = at::empty_like(x);
  scale_input(x.data_ptr<float>(), x.numel() / x.size(-1), x.size(-1), id, batch.segments,
              out.data_ptr<float>());
  return out;
}

void py_unpack(const PyWeight& weight, int64_t start, int64_t stop, bool scaled, const Tensor& out) {
  TORCH_CHECK_VALUE(0 <= start && start < stop && stop <= weight.out, "rows [", start, ", ", stop, ")");
  const Type type = type_of(out, "out");
  TORCH_CHECK_VALUE(type != Type::kHalf && out.numel() == (stop - start) * weight.in, "out: ",
                    out.scalar_type(), " ", out.sizes());
  unpack(weight, start, stop, scaled, out.data_ptr(), type);
}

// [1, heads, rows, dim] as transformers hands it over, or [rows, heads, dim].
Heads heads_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.device().is_cpu() &&
                        (t.dim() == 3 || (t.dim() == 4 && t.size(0) == 1)) && t.stride(-1) == 1,
                    name, ": expected float32 [1, heads, rows, dim] or [rows, heads, dim] on the CPU ",
                    "with a dense last dimension, got ", t.scalar_type(), " ", t.sizes());
  if (t.dim() == 4) return {t.data_ptr<float>(), t.stride(2), t.stride(1)};
  return {t.data_ptr<float>(), t.stride(0), t.stride(1)};
}

// One step's places in the cache: the same for all layers.
struct PyPlan {
  Tensor slots_, blocks_;  // [rows] and all tables one after another, int64
  std::vector<Chunk> chunks;
  int64_t block_size, last_block = -1;

  // chunks: per sequence (first row, number of rows, first position, offset of its table).
  PyPlan(Tensor slots, Tensor blocks, const std::vector<std::array<int64_t, 4>>& given, int64_t block_size)
      : slots_(std::move(slots)), blocks_(std::move(blocks)), block_size(block_size) {
    TORCH_CHECK_VALUE(block_size > 0, "block_size: ", block_size);
    check(slots_, "slots", at::kLong);
    check(blocks_, "blocks", at::kLong);
    const int64_t* table = blocks_.data_ptr<int64_t>();
    for (int64_t i = 0; i < blocks_.numel(); ++i) {
      TORCH_CHECK_VALUE(table[i] >= 0, "blocks: ", table[i]);
      last_block = std::max(last_block, table[i]);
    }
    const int64_t* slot = slots_.data_ptr<int64_t>();
    for (int64_t i = 0; i < slots_.numel(); ++i) {
      TORCH_CHECK_VALUE(slot[i] >= 0, "slots: ", slot[i]);
      last_block = std::max(last_block, slot[i] / block_size);
    }
    for (const auto& [row, num_rows, position, offset] : given) {  // no sum here can overflow
      const int64_t rows = slots_.numel(), length = blocks_.numel();
      TORCH_CHECK_VALUE(num_rows > 0 && num_rows <= rows && row >= 0 && row <= rows - num_rows &&
                            offset >= 0 && offset <= length && position >= 0 &&
                            position / block_size < length - offset &&
                            (position % block_size + num_rows - 1) / block_size <
                                length - offset - position / block_size,
                        "chunk (", row, ", ", num_rows, ", ", position, ", ", offset,
                        ") lies outside the step of ", rows, " rows and ", length, " blocks");
      chunks.push_back({row, num_rows, position, table + offset});
    }
  }
};

Tensor py_attention(const Tensor& queries, const Tensor& keys, const Tensor& values,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    const Tensor& key_cache, const Tensor& value_cache, const PyPlan& plan,
                    double scale, std::optional<int64_t> window, std::optional<double> softcap,
                    const std::optional<Tensor>& sinks, bool causal) {
  const Type type = type_of(key_cache, "key_cache");
  TORCH_CHECK_VALUE(type != Type::kBFloat16 && type_of(value_cache, "value_cache") == type &&
                        key_cache.dim() == 4 && value_cache.dim() == 4,
                    "caches: float32 or float16, four-dimensional");
  const Cache cache{key_cache.data_ptr(), value_cache.data_ptr(), type, key_cache.size(1),
                    key_cache.size(2), value_cache.size(3), key_cache.size(3)};
  const Heads q = heads_of(queries, "queries"), k = heads_of(keys, "keys"),
              v = heads_of(values, "values");
  const int64_t rows = plan.slots_.numel(), heads = queries.size(1);
  const auto fits = [&](const Tensor& t, int64_t num, int64_t dim) {
    return t.size(-1) == dim && t.size(1) == num && t.numel() == rows * num * dim;
  };
  TORCH_CHECK_VALUE(cache.kv_heads > 0 && cache.dim > 0 && cache.v_dim > 0 && fits(queries, heads, cache.dim) && fits(keys, cache.kv_heads, cache.dim) &&
                        fits(values, cache.kv_heads, cache.v_dim) && heads % cache.kv_heads == 0 &&
                        value_cache.size(1) == cache.kv_heads && plan.last_block < key_cache.size(0) &&
                        value_cache.size(0) == key_cache.size(0) &&
                        value_cache.size(2) == cache.block_size &&
                        plan.block_size == cache.block_size,
                    "attention: queries ", queries.sizes(), ", keys ", keys.sizes(), ", values ",
                    values.sizes(), " do not fit the caches ", key_cache.sizes(), ", ",
                    value_cache.sizes(), " or the plan of ", rows, " rows in blocks of ",
                    plan.block_size);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin come together");
  TORCH_CHECK_VALUE(!window || (*window > 0 && causal), "window: ", *window,
                    causal ? "" : ", and without causality there is none");
  Rotary rotary{nullptr, nullptr, 0};
  if (cos) {
    rotary.dim = last_size(*cos, "cos");
    TORCH_CHECK_VALUE(rotary.dim % 2 == 0 && rotary.dim <= cache.dim, "cos: ", cos->sizes());
    rotary.cos = floats(cos, "cos", rows * rotary.dim);
    rotary.sin = floats(sin, "sin", rows * rotary.dim);
  }
  const Scores scores{static_cast<float>(scale), window.value_or(0),
                      static_cast<float>(softcap.value_or(0.0)), floats(sinks, "sinks", heads),
                      causal};
  Tensor out = at::zeros({1, rows, heads, cache.v_dim}, queries.options());
  write(cache, plan.slots_.data_ptr<int64_t>(), rows, k, v, rotary);
  attend(cache, plan.chunks, q, heads, rotary, scores, out.data_ptr<float>());
  return out;
}

Tensor py_rms_norm(const Tensor& input, const Tensor& weight, double offset, double eps) {
  const int64_t dim = weight.numel();
  const Tensor x = as_rows(input, dim);
  check(weight, "weight", at::kFloat);
  Tensor out = at::empty_like(x);
  rms_norm(x.data_ptr<float>(), weight.data_ptr<float>(), static_cast<float>(offset),
           static_cast<float>(eps), x.numel() / dim, dim, out.data_ptr<float>());
  return out;
}

void py_gate(const Tensor& gates, const Tensor& up, const std::string& activation) {
  check(gates, "gate", at::kFloat);
  check(up, "up", at::kFloat);
  TORCH_CHECK_VALUE(gates.sizes() == up.sizes(), "gate: ", gates.sizes(), ", up: ", up.sizes());
  TORCH_CHECK_VALUE(activation == "silu" || activation == "gelu_tanh", "activation: ", activation);
  gate(gates.data_ptr<float>(), up.data_ptr<float>(), gates.numel(),
       activation == "silu" ? Activation::kSilu : Activation::kGeluTanh);
}

// Of training: the rows [start, end) of a part and the factor of its update; four tensors a part:
// a, b, v and inputs of its own, each or none.
using Spans = std::vector<std::tuple<int64_t, int64_t, double>>;
using Given = std::vector<std::optional<Tensor>>;

// The parts over memory of the module's dtype, checked.
std::vector<TrainedPart> trained_parts(const Spans& spans, const Given& given, int64_t rows,
                                       c10::ScalarType dtype, const std::optional<Tensor>& x,
                                       int64_t in, int64_t out) {
  TORCH_CHECK_VALUE(given.size() == 4 * spans.size(), given.size(), " tensors of parts");
  if (x) {
    check(*x, "x", dtype);
    TORCH_CHECK_VALUE(x->numel() == rows * in, "x: ", x->sizes());
  }
  std::vector<TrainedPart> parts;
  for (size_t i = 0; i < spans.size(); ++i) {
    const auto& [start, end, scale] = spans[i];
    const auto &a = given[4 * i], &b = given[4 * i + 1], &v = given[4 * i + 2], &own = given[4 * i + 3];
    TORCH_CHECK_VALUE((parts.empty() ? 0 : parts.back().end) <= start && start <= end && end <= rows,
                      "part [", start, ", ", end, ") of ", rows, " rows");
    TrainedPart part{start, end, nullptr};
    if (own) {
      check(*own, "own", dtype);
      TORCH_CHECK_VALUE(own->numel() == (end - start) * in, "own: ", own->sizes());
      part.x = own->data_ptr();
    } else if (x) {
      part.x = static_cast<const char*>(x->data_ptr()) + start * in * x->element_size();
    }
    TORCH_CHECK_VALUE(a.has_value() == b.has_value() && (!a || part.x), "a, b and x come together");
    if (a) {
      part.rank = a->size(0);
      part.a = floats(a, "a", part.rank * in);
      part.b = floats(b, "b", part.rank * out);
      part.scale = static_cast<float>(scale);
    }
    part.v = floats(v, "v", out);
    parts.push_back(part);
  }
  return parts;
}

Given py_adapt(const Tensor& y, const std::optional<Tensor>& x, int64_t in, const Spans& spans,
               const Given& given) {
  const Type type = type_of(y, "y");
  TORCH_CHECK_VALUE(type != Type::kHalf, "y: float16 is not trained in");
  const int64_t rows = y.size(0), out = y.size(1);
  auto parts = trained_parts(spans, given, rows, y.scalar_type(), x, in, out);
  Given kept;
  for (TrainedPart& p : parts) {
    std::optional<Tensor> low, before;
    if (p.rank) p.low = low.emplace(at::empty({p.end - p.start, p.rank}, at::kFloat)).data_ptr<float>();
    if (p.v) p.before = before.emplace(at::empty({p.end - p.start, out}, y.options())).data_ptr();
    kept.insert(kept.end(), {low, before});
  }
  adapt(y.data_ptr(), type, in, out, parts);
  return kept;
}

Given py_adapt_back(const Tensor& grad, const std::optional<Tensor>& x, int64_t in, const Spans& spans,
                    const Given& given, const Given& kept, const std::vector<bool>& wanted,
                    const std::optional<Tensor>& grad_x) {
  const Type type = type_of(grad, "grad");
  TORCH_CHECK_VALUE(type != Type::kHalf, "grad: float16 is not trained in");
  const int64_t rows = grad.size(0), out = grad.size(1);
  auto parts = trained_parts(spans, given, rows, grad.scalar_type(), x, in, out);
  TORCH_CHECK_VALUE(kept.size() == 2 * parts.size() && wanted.size() == 4 * parts.size(),
                    "what `adapt` kept, and what is wanted, of each part");
  if (grad_x) {
    check(*grad_x, "grad_x", grad.scalar_type());
    TORCH_CHECK_VALUE(grad_x->numel() == rows * in, "grad_x: ", grad_x->sizes());
  }
  Given grads(given.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    TrainedPart& p = parts[i];
    const auto &low = kept[2 * i], &before = kept[2 * i + 1];
    p.low = const_cast<float*>(floats(low, "low", (p.end - p.start) * p.rank));
    TORCH_CHECK_VALUE(low.has_value() == (p.rank > 0) && before.has_value() == (p.v != nullptr),
                      "what `adapt` kept of part ", i);
    if (before) {
      check(*before, "before", grad.scalar_type());
      TORCH_CHECK_VALUE(before->numel() == (p.end - p.start) * out, "before: ", before->sizes());
      p.before = before->data_ptr();
    }
    for (size_t j = 4 * i; j < 4 * i + 4; ++j)
      if (wanted[j] && given[j])
        grads[j] = j % 4 == 3 ? at::zeros_like(*given[j]) : at::empty_like(*given[j]);
    const auto of = [&](int j) { return grads[4 * i + j] ? grads[4 * i + j]->data_ptr<float>() : nullptr; };
    p.grad_a = of(0);
    p.grad_b = of(1);
    p.grad_v = of(2);
    if (given[4 * i + 3])
      p.grad_x = grads[4 * i + 3] ? grads[4 * i + 3]->data_ptr() : nullptr;
    else if (grad_x)
      p.grad_x = static_cast<char*>(grad_x->data_ptr()) + p.start * in * grad_x->element_size();
  }
  adapt_back(grad.data_ptr(), type, in, out, parts);
  return grads;
}

// t: [1, heads, rows, dim], features beside each other.
HeadRows head_rows(const Tensor& t, const char* name, const Tensor& q, int64_t heads) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.device().is_cpu() && t.scalar_type() == q.scalar_type() &&
                        t.size(0) == 1 && t.size(1) == heads && t.size(2) == q.size(2) &&
                        t.size(3) == q.size(3) && t.stride(3) == 1,
                    name, ": ", t.scalar_type(), " ", t.sizes(), " beside queries ", q.sizes());
  return {t.data_ptr(), t.stride(2), t.stride(1)};
}
Tensor head_rows_like(const Tensor& t) {  // [1, heads, rows, dim], the heads of a row together
  return at::zeros({1, t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
}

// Checked operands; sequences: (start, end) in order.
SelfAttention self_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor& log_sums, double scale,
                             const std::vector<std::array<int64_t, 2>>& sequences) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && q.size(3) % 16 == 0 && k.size(1) > 0 &&
                        q.size(1) % k.size(1) == 0 && q.scalar_type() != at::kHalf,
                    "queries ", q.scalar_type(), " ", q.sizes(), ", keys ", k.sizes());
  const int64_t heads = q.size(1), kv_heads = k.size(1), rows = q.size(2);
  int64_t done = 0;
  for (const auto& [start, end] : sequences) {
    TORCH_CHECK_VALUE(done <= start && start <= end && end <= rows, "sequence [", start, ", ", end,
                      ") of ", rows, " rows");
    done = end;
  }
  const auto sums = const_cast<float*>(floats(log_sums, "log_sums", heads * rows));
  const Type type = q.scalar_type() == at::kBFloat16 ? Type::kBFloat16 : Type::kFloat;
  TORCH_CHECK_VALUE(type == Type::kBFloat16 || q.scalar_type() == at::kFloat, "q: ", q.scalar_type());
  return {type, heads, kv_heads, q.size(3), rows, static_cast<float>(scale),
          head_rows(q, "q", q, heads), head_rows(k, "k", q, kv_heads), head_rows(v, "v", q, kv_heads),
          head_rows(out, "out", q, heads), sums};
}
std::vector<Sequence> as_sequences(const std::vector<std::array<int64_t, 2>>& given) {
  std::vector<Sequence> sequences;
  for (const auto& [start, end] : given) sequences.push_back({start, end});
  return sequences;
}

std::vector<Tensor> py_attend_short(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const std::vector<std::array<int64_t, 2>>& sequences,
                                    double scale) {
  TORCH_CHECK_VALUE(q.dim() == 4, "q: ", q.sizes());
  const Tensor out = head_rows_like(q);
  const Tensor log_sums = at::zeros({q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  attend_short(self_attention(q, k, v, out, log_sums, scale, sequences), as_sequences(sequences));
  return {out, log_sums};
}

std::vector<Tensor> py_attend_short_back(const Tensor& grad, const Tensor& q, const Tensor& k,
                                         const Tensor& v, const Tensor& out, const Tensor& log_sums,
                                         const std::vector<std::array<int64_t, 2>>& sequences,
                                         double scale) {
  const SelfAttention a = self_attention(q, k, v, out, log_sums, scale, sequences);
  const std::vector<Tensor> grads = {head_rows_like(q), head_rows_like(k), head_rows_like(v)};
  attend_short_back(a, as_sequences(sequences), head_rows(grad, "grad", q, a.heads),
                    head_rows(grads[0], "q", q, a.heads), head_rows(grads[1], "k", q, a.kv_heads),
                    head_rows(grads[2], "v", q, a.kv_heads));
  return grads;
}

double py_clip_norm(const std::vector<Tensor>& tensors, double limit) {
  std::vector<Values> all;
  for (const Tensor& t : tensors) {
    check(t, "tensors", at::kFloat);
    all.push_back({t.data_ptr<float>(), t.numel()});
  }
  return clip_norm(all, limit);
}

void py_adamw(const std::vector<Tensor>& values, const std::vector<Tensor>& grads,
              const std::vector<Tensor>& means, const std::vector<Tensor>& squares, double lr,
              double beta1, double beta2, double eps, double weight_decay, int64_t count) {
  TORCH_CHECK_VALUE(grads.size() == values.size() && means.size() == values.size() &&
                        squares.size() == values.size(),
                    "a gradient and two means for each of ", values.size(), " parameters");
  std::vector<AdamParameter> all;
  for (size_t i = 0; i < values.size(); ++i) {
    for (const Tensor* t : {&values[i], &grads[i], &means[i], &squares[i]}) {
      check(*t, "parameters", at::kFloat);
      TORCH_CHECK_VALUE(t->numel() == values[i].numel(), "parameter ", i, ": ", t->sizes());
    }
    all.push_back({values[i].data_ptr<float>(), means[i].data_ptr<float>(),
                   squares[i].data_ptr<float>(), grads[i].data_ptr<float>(), values[i].numel()});
  }
  adamw(all, {lr, beta1, beta2, eps, weight_decay, count});
}

Tensor py_row_norms(const Tensor& a, const Tensor& b, const Tensor& across, const Tensor& squares,
                    double scale) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2, "a: ", a.sizes(), ", b: ", b.sizes());
  const int64_t rank = a.size(0), in = a.size(1), out = b.size(0);
  Tensor norms = at::empty({out}, a.options());
  row_norms(floats(a, "a", rank * in), floats(b, "b", out * rank),
            floats(across, "across", rank * out), floats(squares, "squares", out),
            static_cast<float>(scale), rank, in, out, norms.data_ptr<float>());
  return norms;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.attr("CAPABILITY") = kCapability;
  py::class_<PyWeight, std::shared_ptr<PyWeight>>(m, "Weight")
      .def(py::init<Tensor, Tensor, std::optional<Tensor>, int64_t, int64_t, int>(),
           py::arg("codes"), py::arg("scales"), py::arg("bias"), py::arg("out"), py::arg("in_"),
           py::arg("activation_bits") = 0);
  py::class_<PyAdapter, std::shared_ptr<PyAdapter>>(m, "Adapter")
      .def(py::init<>())
      .def("set", &PyAdapter::set, py::arg("id"), py::arg("in_"), py::arg("out"), py::kw_only(),
           py::arg("a") = py::none(), py::arg("b") = py::none(), py::arg("scale") = 0.0,
           py::arg("in_scale") = py::none(), py::arg("out_scale") = py::none(),
           py::arg("bias") = py::none())
      .def("__len__", [](const PyAdapter& a) {
        const auto& all = a.adapter.modules;
        return std::count_if(all.begin(), all.end(), [](const ModuleAdapter& m) { return m.in; });
      });
  py::class_<PyBatch, std::shared_ptr<PyBatch>>(m, "Batch")
      .def(py::init<const std::vector<
               std::tuple<int64_t, int64_t, std::shared_ptr<PyAdapter>, double>>&>())
      .def("touches", &PyBatch::touches);
  py::class_<PyPlan, std::shared_ptr<PyPlan>>(m, "Plan")
      .def(py::init<Tensor, Tensor, const std::vector<std::array<int64_t, 4>>&, int64_t>(),
           py::arg("slots"), py::arg("blocks"), py::arg("chunks"), py::arg("block_size"));
  m.def("linear", &py_linear, py::arg("x"), py::arg("weights"), py::arg("ids"),
        py::arg("batch") = py::none(), unlocked);
  m.def("add_adapters_", &py_add_adapters, py::arg("y"), py::arg("x"), py::arg("id"),
        py::arg("batch"), unlocked);
  m.def("scale_input", &py_scale_input, py::arg("x"), py::arg("id"), py::arg("batch"), unlocked);
  m.def("unpack_", &py_unpack, py::arg("weight"), py::arg("start"), py::arg("stop"),
        py::arg("scaled"), py::arg("out"), unlocked);
  m.def("attention", &py_attention, py::arg("queries"), py::arg("keys"), py::arg("values"),
        py::arg("cos"), py::arg("sin"), py::arg("key_cache"), py::arg("value_cache"),
        py::arg("plan"), py::arg("scale"), py::arg("window") = py::none(),
        py::arg("softcap") = py::none(), py::arg("sinks") = py::none(), py::arg("causal") = true,
        unlocked);
  m.def("rms_norm", &py_rms_norm, py::arg("x"), py::arg("weight"), py::arg("offset"),
        py::arg("eps"), unlocked);
  m.def("adapt_", &py_adapt, py::arg("y"), py::arg("x"), py::arg("in_"), py::arg("spans"),
        py::arg("given"), unlocked);
  m.def("adapt_back_", &py_adapt_back, py::arg("grad"), py::arg("x"), py::arg("in_"),
        py::arg("spans"), py::arg("given"), py::arg("kept"), py::arg("wanted"), py::arg("grad_x"),
        unlocked);
  m.def("attend_short", &py_attend_short, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("sequences"), py::arg("scale"), unlocked);
  m.def("attend_short_back", &py_attend_short_back, py::arg("grad"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("out"), py::arg("log_sums"), py::arg("sequences"), py::arg("scale"),
        unlocked);
  m.def("clip_norm_", &py_clip_norm, py::arg("tensors"), py::arg("limit"), unlocked);
  m.def("adamw_", &py_adamw, py::arg("values"), py::arg("grads"), py::arg("means"),
        py::arg("squares"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("count"), unlocked);
  m.def("row_norms", &py_row_norms, py::arg("a"), py::arg("b"), py::arg("across"),
        py::arg("squares"), py::arg("scale"), unlocked);
  m.def("gate_", &py_gate, py::arg("gate"), py::arg("up"), py::arg("activation"), unlocked);
}
