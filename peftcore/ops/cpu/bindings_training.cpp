// The kernels of training as Python sees them.

#include "bindings.h"
#include "optimizer.h"
#include "sequences.h"
#include "trained.h"

namespace py = pybind11;

namespace polypeft {
namespace {

// The rows [start, end) of a part and the factor of its update; four tensors a part:
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

void bind_training(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
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
}

}  // namespace polypeft
