// What the files of this folder share.  They alone know torch: they give the ops their schemas, check their arguments
// and call the code that knows no torch.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.10 on and every Python from 3.10 on.
// The public Python functions check their arguments and name them in their errors; the checks here only keep a direct
// caller of torch.ops.dgi_kernels from reading or writing memory that is not there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dgi/convert.h"

// torch 2.10 and 2.11 have no name for this.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) \
  STD_TORCH_CHECK((call) == AOTI_TORCH_SUCCESS, "a call into torch failed: " #call)
#endif

namespace dgi::registration {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Philox takes its counter in words of 32 bits.
constexpr int64_t kWords = int64_t{1} << 32;

template <class Stored>
const Stored* data_of(const Tensor& x) {
  return static_cast<const Stored*>(x.const_data_ptr());
}

template <class Stored>
Stored* result(const std::optional<Tensor>& x) {
  return x ? static_cast<Stored*>(x->mutable_data_ptr()) : nullptr;
}

inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with the C++ type of the elements of x.
template <class F>
auto for_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(dgi::BFloat16{});
    case ScalarType::Half: return f(dgi::Float16{});
    default: STD_TORCH_CHECK(false, "dgi_kernels: inputs must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace dgi::registration
