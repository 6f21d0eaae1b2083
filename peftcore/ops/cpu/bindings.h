// Checks of the tensors that Python hands over.
#pragma once

#include <torch/csrc/utils/pybind.h>
#include <torch/python.h>

#include <optional>

#include "weight.h"

namespace polypeft {

using at::Tensor;

inline void check(const Tensor& t, const char* name, c10::ScalarType type) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous() && t.scalar_type() == type, name,
                    ": expected a contiguous CPU tensor of ", type, ", got ", t.scalar_type(), " ",
                    t.sizes());
}

inline const float* floats(const std::optional<Tensor>& t, const char* name, int64_t count) {
  if (!t) return nullptr;
  check(*t, name, at::kFloat);
  TORCH_CHECK_VALUE(t->numel() == count, name, ": expected ", count, " values, got ", t->sizes());
  return t->data_ptr<float>();
}

inline Type type_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous(), name, ": not contiguous on the CPU");
  switch (t.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_VALUE(false, name, ": ", t.scalar_type(), " is not supported");
  }
}

// What trains; the rest is the module's own.
void bind_training(pybind11::module_& m);

}  // namespace polypeft
