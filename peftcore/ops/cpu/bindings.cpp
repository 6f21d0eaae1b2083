// The kernels as Python sees them: tensors are checked here, and the interpreter's lock is released.

#include "bindings.h"

#include <array>
#include <map>
#include <memory>

#include "allocator.h"
#include "attention.h"
#include "elementwise.h"
#include "layer.h"
#include "linear.h"
#include "matmul.h"
#include "quantize.h"

namespace py = pybind11;
using namespace polypeft;

namespace {

constexpr const char* kCapability =
#if defined(__AMX_INT8__)
    "AVX512_AMX";
#elif defined(__AVX512VNNI__)
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
    TORCH_CHECK_VALUE(activation_bits >= 0 && activation_bits <= 24 && activation_bits % 8 == 0,
                      "activation_bits: ", activation_bits, " is not 0, 8, 16 or 24");
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

constexpr int64_t kMaxModules = 1 << 20, kMaxRank = 1 << 20;

// An adapter, and the tensors that it points into.
class PyAdapter {
 public:
  Adapter adapter;
  std::vector<Tensor> held;

  void set(int64_t id, int64_t in, int64_t out, const std::optional<Tensor>& a,
           const std::optional<Tensor>& b, double scale, const std::optional<Tensor>& scales,
           const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale,
           const std::optional<Tensor>& bias) {
    ModuleAdapter entry = entry_of(id, in, out);
    TORCH_CHECK_VALUE(a.has_value() == b.has_value(), "a and b come together");
    TORCH_CHECK_VALUE(scales.has_value() == (a && a->scalar_type() == at::kChar),
                      "scales go with codes");
    if (a) take_factors(entry, *a, *b, scale, scales);
    entry.in_scale = floats(in_scale, "in_scale", in);
    entry.out_scale = floats(out_scale, "out_scale", out);
    entry.bias = floats(bias, "bias", out);
    adapter.set(id, entry);
    for (const auto* t : {&a, &b, &scales, &in_scale, &out_scale, &bias})
      if (*t) held.push_back(**t);
  }

  // id, in, out, rank, dtype, scale, and where a, b and scales begin in the buffer, or −1.
  using Update = std::tuple<int64_t, int64_t, int64_t, int64_t, at::ScalarType, double, int64_t, int64_t,
                            int64_t>;
  void set_low_rank(const Tensor& buffer, const std::vector<Update>& updates) {
    check(buffer, "buffer", at::kByte);
    const auto view = [&](const char* name, int64_t offset, const std::vector<int64_t>& shape,
                          at::ScalarType dtype) {
      int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
      for (int64_t size : shape) {
        TORCH_CHECK_VALUE(size <= buffer.numel() / bytes, name, ": ", shape, " in ", buffer.numel(), " bytes");
        bytes *= size;
      }
      TORCH_CHECK_VALUE(0 <= offset && offset <= buffer.numel() - bytes && offset % 64 == 0, name, ": ",
                        bytes, " bytes at ", offset, " of ", buffer.numel());
      return at::from_blob(buffer.data_ptr<uint8_t>() + offset, shape, at::dtype(dtype));
    };
    for (const auto& [id, in, out, rank, dtype, scale, a, b, scales] : updates) {
      ModuleAdapter entry = entry_of(id, in, out);
      TORCH_CHECK_VALUE(0 < rank && std::max({rank, in, out}) <= buffer.numel(), "an update of [", out,
                        ", ", in, "] and rank ", rank, " in ", buffer.numel(), " bytes");
      const int64_t tiles = (out + 15) / 16, ranks = (rank + 15) / 16;
      if (dtype == at::kChar)
        take_factors(entry, view("a", a, {ranks, (in + 3) / 4, 16, 4}, dtype),
                     view("b", b, {tiles, (rank + 3) / 4, 16, 4}, dtype), scale,
                     view("scales", scales, {ranks, 16}, at::kFloat));
      else
        take_factors(entry, view("a", a, {rank, in}, dtype), view("b", b, {tiles, rank, 16}, dtype),
                     scale, std::nullopt);
      adapter.set(id, entry);
    }
    held.push_back(buffer);
  }

 private:
  static ModuleAdapter entry_of(int64_t id, int64_t in, int64_t out) {
    TORCH_CHECK_VALUE(0 <= id && id < kMaxModules, "module id: ", id);
    TORCH_CHECK_VALUE(in > 0 && out > 0, "an adapter of [", out, ", ", in, "]");
    ModuleAdapter entry;
    entry.in = in;
    entry.out = out;
    return entry;
  }
  // scales: where a and b are codes.
  static void take_factors(ModuleAdapter& entry, const Tensor& a, const Tensor& b, double scale,
                           const std::optional<Tensor>& scales) {
    const int64_t in = entry.in, out = entry.out;
    Factors& factors = entry.factors;
    int64_t rank;
    if (scales) {
      check(b, "b", at::kChar);
      TORCH_CHECK_VALUE(b.dim() == 4, "b: ", b.sizes());
      rank = 4 * b.size(1);
      TORCH_CHECK_VALUE(rank > 0, "b: ", b.sizes());
      factors.type = Type::kByte;
      factors.a_scales = PyWeight(a, *scales, std::nullopt, rank, in, 16).scales;
    } else {
      TORCH_CHECK_VALUE(a.dim() == 2 && a.size(1) == in, "a: ", a.sizes());
      rank = a.size(0);
      factors.type = type_of(a, "a");
      TORCH_CHECK_VALUE(type_of(b, "b") == factors.type, "a and b are of two dtypes");
    }
    TORCH_CHECK_VALUE(rank <= kMaxRank && b.numel() == (out + 15) / 16 * 16 * rank, "b: ", b.sizes());
    factors.rank = static_cast<int32_t>(rank);
    factors.a = a.data_ptr();
    factors.b = b.data_ptr();
    factors.scale = static_cast<float>(scale);
  }
};

struct PyBatch {
  std::vector<std::shared_ptr<PyAdapter>> held;
  int64_t num_rows = 0;
  Batch batch;

  using Given = std::vector<std::tuple<int64_t, int64_t, std::shared_ptr<PyAdapter>, double>>;
  explicit PyBatch(const Given& given) : batch(segments_of(given)) {
    for (const auto& [start, end, adapter, weight] : given) {
      num_rows = std::max(num_rows, end);
      held.push_back(adapter);
    }
  }
  static std::vector<Segment> segments_of(const Given& given) {
    std::vector<Segment> segments;
    for (const auto& [start, end, adapter, weight] : given) {
      TORCH_CHECK_VALUE(adapter, "a segment without an adapter");
      TORCH_CHECK_VALUE(0 <= start && start <= end, "segment [", start, ", ", end, ")");
      segments.push_back({start, end, &adapter->adapter, static_cast<float>(weight)});
    }
    return segments;
  }
  bool touches(int64_t id) const { return !batch.at(id).empty(); }
  void check_rows(int64_t rows) const {
    TORCH_CHECK_VALUE(num_rows <= rows, "segments of ", num_rows, " rows in a batch of ", rows);
  }
  // Without `out`: of an input scale.
  void check_sizes(int64_t id, int64_t in, std::optional<int64_t> out) const {
    for (const Part& part : batch.at(id))
      TORCH_CHECK_VALUE(part.in == in && part.out == out.value_or(part.out), "module ", id,
                        ": an adapter for [", part.out, ", ", part.in, "] meets ", in, " inputs");
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
  linear(x.data_ptr<float>(), rows, modules, batch ? &batch->batch : nullptr);
  return results;
}

void py_add_adapters(const Tensor& y, const Tensor& input, int64_t id, const PyBatch& batch) {
  const Tensor x = as_rows(input, last_size(input, "x"));
  check(y, "y", at::kFloat);
  const int64_t in = x.size(-1), out = last_size(y, "y"), rows = x.numel() / in;
  TORCH_CHECK_VALUE(y.numel() == rows * out, "x: ", x.sizes(), " and y: ", y.sizes());
  batch.check_rows(rows);
  batch.check_sizes(id, in, out);
  linear(x.data_ptr<float>(), rows, {{nullptr, id, in, out, y.data_ptr<float>()}}, &batch.batch);
}

Tensor py_scale_input(const Tensor& input, int64_t id, const PyBatch& batch) {
  bool scaled = false;
  for (const Part& part : batch.batch.at(id)) scaled |= part.scales_inputs;
  if (!scaled) return input;
  const Tensor x = as_rows(input, last_size(input, "x"));
  batch.check_rows(x.numel() / x.size(-1));
  batch.check_sizes(id, x.size(-1), std::nullopt);
  Tensor out = at::empty_like(x);
  scale_input(x.data_ptr<float>(), x.numel() / x.size(-1), x.size(-1), id, batch.batch,
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

Activation activation_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "silu" || name == "gelu_tanh", "activation: ", name);
  return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

// The caches of one layer, [blocks, kv_heads, dim, block_size] and [blocks, kv_heads, block_size, v_dim],
// where a plan's blocks are.
Cache cache_of(const Tensor& key_cache, const Tensor& value_cache, const PyPlan& plan) {
  const Type type = type_of(key_cache, "key_cache");
  TORCH_CHECK_VALUE(type != Type::kBFloat16 && type_of(value_cache, "value_cache") == type &&
                        key_cache.dim() == 4 && value_cache.dim() == 4,
                    "caches: float32 or float16, four-dimensional");
  const Cache cache{key_cache.data_ptr(), value_cache.data_ptr(), type, key_cache.size(1),
                    key_cache.size(2), value_cache.size(3), key_cache.size(3)};
  TORCH_CHECK_VALUE(cache.kv_heads > 0 && cache.dim > 0 && cache.v_dim > 0 &&
                        value_cache.size(1) == cache.kv_heads && plan.last_block < key_cache.size(0) &&
                        value_cache.size(0) == key_cache.size(0) &&
                        value_cache.size(2) == cache.block_size && plan.block_size == cache.block_size,
                    "caches of ", key_cache.sizes(), " and ", value_cache.sizes(),
                    " do not go together, or with a plan up to block ", plan.last_block, " of ",
                    plan.block_size, " positions");
  return cache;
}

Rotary rotary_of(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t rows,
                 int64_t head_dim) {
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (!cos) return {nullptr, nullptr, 0};
  const int64_t dim = last_size(*cos, "cos");
  TORCH_CHECK_VALUE(dim % 2 == 0 && dim <= head_dim, "cos: ", cos->sizes());
  return {floats(cos, "cos", rows * dim), floats(sin, "sin", rows * dim), dim};
}

Scores scores_of(double scale, std::optional<int64_t> window, std::optional<double> softcap,
                 const float* sinks, bool causal) {
  TORCH_CHECK_VALUE(!window || (*window > 0 && causal), "window: ", *window,
                    causal ? "" : ", and without causality there is none");
  return {static_cast<float>(scale), window.value_or(0), static_cast<float>(softcap.value_or(0.0)),
          sinks, causal};
}

Tensor py_attention(const Tensor& queries, const Tensor& keys, const Tensor& values,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    const Tensor& key_cache, const Tensor& value_cache, const PyPlan& plan,
                    double scale, std::optional<int64_t> window, std::optional<double> softcap,
                    const std::optional<Tensor>& sinks, bool causal) {
  const Cache cache = cache_of(key_cache, value_cache, plan);
  const Heads q = heads_of(queries, "queries"), k = heads_of(keys, "keys"),
              v = heads_of(values, "values");
  const int64_t rows = plan.slots_.numel(), heads = queries.size(1);
  const auto fits = [&](const Tensor& t, int64_t num, int64_t dim) {
    return t.size(-1) == dim && t.size(1) == num && t.numel() == rows * num * dim;
  };
  TORCH_CHECK_VALUE(fits(queries, heads, cache.dim) && fits(keys, cache.kv_heads, cache.dim) &&
                        fits(values, cache.kv_heads, cache.v_dim) && heads % cache.kv_heads == 0,
                    "attention: queries ", queries.sizes(), ", keys ", keys.sizes(), ", values ",
                    values.sizes(), " do not fit the caches ", key_cache.sizes(), ", ",
                    value_cache.sizes(), " or the plan of ", rows, " rows");
  const Rotary rotary = rotary_of(cos, sin, rows, cache.dim);
  const Scores scores = scores_of(scale, window, softcap, floats(sinks, "sinks", heads), causal);
  Tensor out = at::zeros({1, rows, heads, cache.v_dim}, queries.options());
  write(cache, plan.slots_.data_ptr<int64_t>(), rows, k, v, rotary);
  attend(cache, plan.chunks, q, heads, rotary, scores, out.data_ptr<float>());
  return out;
}

// Seconds by part since they were last asked for, of all layers.
LayerSeconds layer_seconds;

// A decoder layer, and the tensors that it points into.
class PyLayer {
 public:
  using Linear = std::pair<std::shared_ptr<PyWeight>, int64_t>;       // and the module's id
  using GivenNorm = std::optional<std::tuple<Tensor, double, double>>;  // weight, offset, eps

  PyLayer(std::array<Linear, 7> linears, std::array<GivenNorm, 6> norms, int64_t head_dim,
          int64_t v_dim, double scale, std::optional<int64_t> window, std::optional<double> softcap,
          const std::string& activation)
      : linears_(std::move(linears)), norms_(std::move(norms)) {
    for (const auto& [weight, id] : linears_) TORCH_CHECK_VALUE(weight, "linears: one is None");
    Projection* const to[] = {&layer_.q, &layer_.k, &layer_.v, &layer_.o, &layer_.gate, &layer_.up,
                              &layer_.down};
    for (size_t i = 0; i < linears_.size(); ++i) *to[i] = {linears_[i].first.get(), linears_[i].second};
    const Layer& l = layer_;
    const int64_t hidden = l.q.weight->in, inner = l.gate.weight->out;
    TORCH_CHECK_VALUE(head_dim > 0 && v_dim > 0 && l.q.weight->out % head_dim == 0 &&
                          l.k.weight->out % head_dim == 0 && l.v.weight->out % v_dim == 0 &&
                          l.k.weight->out / head_dim == l.v.weight->out / v_dim &&
                          l.q.weight->out / head_dim * v_dim == l.o.weight->in &&
                          l.q.weight->out / head_dim % (l.k.weight->out / head_dim) == 0,
                      "heads of ", head_dim, " and ", v_dim, " do not fit the projections");
    TORCH_CHECK_VALUE(l.k.weight->in == hidden && l.v.weight->in == hidden &&
                          l.o.weight->out == hidden && l.gate.weight->in == hidden &&
                          l.up.weight->in == hidden && l.up.weight->out == inner &&
                          l.down.weight->in == inner && l.down.weight->out == hidden,
                      "the projections do not fit each other");
    layer_.head_dim = head_dim;
    layer_.v_dim = v_dim;
    layer_.before_attention = norm_of(0, hidden);
    layer_.of_queries = norm_of(1, head_dim);
    layer_.of_keys = norm_of(2, head_dim);
    layer_.after_attention = norm_of(3, hidden);
    layer_.before_mlp = norm_of(4, hidden);
    layer_.after_mlp = norm_of(5, hidden);
    TORCH_CHECK_VALUE(norms_[0] && norms_[4], "norms: those before the branches are needed");
    layer_.scores = scores_of(scale, window, softcap, nullptr, true);
    layer_.activation = activation_of(activation);
  }

  Tensor call(const Tensor& input, const Tensor& cos, const Tensor& sin, const Tensor& key_cache,
              const Tensor& value_cache, const PyPlan& plan, const PyBatch* batch) const {
    const Tensor x = as_rows(input, layer_.q.weight->in);
    const int64_t rows = x.numel() / layer_.q.weight->in;
    const Cache cache = cache_of(key_cache, value_cache, plan);
    TORCH_CHECK_VALUE(rows == plan.slots_.numel() && cache.dim == layer_.head_dim &&
                          cache.v_dim == layer_.v_dim &&
                          cache.kv_heads * cache.dim == layer_.k.weight->out,
                      "x: ", x.sizes(), " or caches of ", key_cache.sizes(), ", ",
                      value_cache.sizes(), " do not fit the layer or the plan of ",
                      plan.slots_.numel(), " rows");
    if (batch) {
      batch->check_rows(rows);
      for (const auto& [weight, id] : linears_) batch->check_sizes(id, weight->in, weight->out);
    }
    const Rotary rotary = rotary_of(cos, sin, rows, cache.dim);
    Tensor out = at::empty_like(x);
    const Tensor memory = at::empty({scratch_floats(layer_, rows)}, x.options());
    run(layer_, x.data_ptr<float>(), rows, cache, plan.slots_.data_ptr<int64_t>(), plan.chunks, rotary,
        batch ? &batch->batch : nullptr, memory.data_ptr<float>(), out.data_ptr<float>(),
        layer_seconds);
    return out;
  }

 private:
  Norm norm_of(size_t i, int64_t dim) const {
    if (!norms_[i]) return {nullptr, 0.f, 0.f};
    const auto& [weight, offset, eps] = *norms_[i];
    return {floats(weight, "norms", dim), static_cast<float>(offset), static_cast<float>(eps)};
  }

  std::array<Linear, 7> linears_;
  std::array<GivenNorm, 6> norms_;
  Layer layer_;
};

std::map<std::string, double> take_layer_seconds() {
  LayerSeconds& s = layer_seconds;
  return {{"linear", s.linear.exchange(0)}, {"attention", s.attention.exchange(0)},
          {"norms", s.norms.exchange(0)}, {"gates", s.gates.exchange(0)}};
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
  gate(gates.data_ptr<float>(), up.data_ptr<float>(), gates.numel(), activation_of(activation));
}

void py_quantize_nf4(const Tensor& weight, const Tensor& bounds, const Tensor& codes, const Tensor& absmax) {
  check(weight, "weight", at::kFloat);
  check(bounds, "bounds", at::kFloat);
  check(codes, "codes", at::kByte);
  check(absmax, "absmax", at::kFloat);
  const int64_t blocks = absmax.numel();
  TORCH_CHECK_VALUE(bounds.numel() == kBounds && weight.numel() == blocks * kBlock &&
                        codes.numel() == blocks * kBlock / 2,
                    "weight: ", weight.sizes(), ", bounds: ", bounds.sizes(), ", codes: ",
                    codes.sizes(), ", absmax: ", absmax.sizes(), ", in blocks of ", kBlock);
  quantize_nf4(weight.data_ptr<float>(), blocks, bounds.data_ptr<float>(), codes.data_ptr<uint8_t>(),
               absmax.data_ptr<float>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.attr("CAPABILITY") = kCapability;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  m.attr("BYTE_DOTS") = true;  // instructions for dot products of bytes
#else
  m.attr("BYTE_DOTS") = false;
#endif
  m.attr("FLOAT_BITS") = float_bits();
  py::class_<PyWeight, std::shared_ptr<PyWeight>>(m, "Weight")
      .def(py::init<Tensor, Tensor, std::optional<Tensor>, int64_t, int64_t, int>(),
           py::arg("codes"), py::arg("scales"), py::arg("bias"), py::arg("out"), py::arg("in_"),
           py::arg("activation_bits") = 0);
  py::class_<PyAdapter, std::shared_ptr<PyAdapter>>(m, "Adapter")
      .def(py::init<>())
      .def("set", &PyAdapter::set, py::arg("id"), py::arg("in_"), py::arg("out"), py::kw_only(),
           py::arg("a") = py::none(), py::arg("b") = py::none(), py::arg("scale") = 0.0,
           py::arg("scales") = py::none(), py::arg("in_scale") = py::none(), py::arg("out_scale") = py::none(),
           py::arg("bias") = py::none())
      .def("set_low_rank", &PyAdapter::set_low_rank)
      .def("__len__", [](const PyAdapter& a) { return a.adapter.num_modules(); });
  py::class_<PyBatch, std::shared_ptr<PyBatch>>(m, "Batch")
      .def(py::init<const PyBatch::Given&>())
      .def("touches", &PyBatch::touches);
  py::class_<PyPlan, std::shared_ptr<PyPlan>>(m, "Plan")
      .def(py::init<Tensor, Tensor, const std::vector<std::array<int64_t, 4>>&, int64_t>(),
           py::arg("slots"), py::arg("blocks"), py::arg("chunks"), py::arg("block_size"));
  py::class_<PyLayer, std::shared_ptr<PyLayer>>(m, "Layer")
      .def(py::init<std::array<PyLayer::Linear, 7>, std::array<PyLayer::GivenNorm, 6>, int64_t, int64_t,
                    double, std::optional<int64_t>, std::optional<double>, const std::string&>(),
           py::arg("linears"), py::arg("norms"), py::arg("head_dim"), py::arg("v_head_dim"),
           py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("activation"))
      .def("__call__", &PyLayer::call, py::arg("x"), py::arg("cos"), py::arg("sin"),
           py::arg("key_cache"), py::arg("value_cache"), py::arg("plan"), py::arg("batch"), unlocked);
  m.def("take_layer_seconds", &take_layer_seconds);
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
  m.def("gate_", &py_gate, py::arg("gate"), py::arg("up"), py::arg("activation"), unlocked);
  m.def("quantize_nf4_", &py_quantize_nf4, py::arg("weight"), py::arg("bounds"), py::arg("codes"),
        py::arg("absmax"), unlocked);
  m.def("allocate_by_malloc", &allocate_by_malloc);
  bind_training(m);
}
