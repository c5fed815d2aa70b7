// What the kernels need of torch: matrix products and threads.
#include "cpu/shared/host.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/shared/product.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

// A tensor over memory that stays its owner's.
template <class Real>
Tensor view(const dgi::cpu::Matrix<Real>& x) {
  const int64_t sizes[] = {x.rows, x.columns}, strides[] = {x.row_stride, x.column_stride};
  const int32_t dtype = std::is_same_v<Real, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(x.data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class Real>
void product(const dgi::cpu::Matrix<Real>& a, const dgi::cpu::Matrix<Real>& b, const dgi::cpu::Matrix<Real>& out,
             dgi::cpu::Into into) {
  if (out.rows == 0 || out.columns == 0) return;
  const Tensor left = view(a), right = view(b), target = view(out);
  if (into == dgi::cpu::Into::kAdd) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(target.get(), target.get(), left.get(), right.get(), 1.0,
                                                           1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), left.get(), right.get()));
  }
}

}  // namespace
}  // namespace dgi::registration

namespace dgi::cpu {

void matrix_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into) {
  if (has_own_product(a, out)) return own_product(a, b, out, into);
  registration::product(a, b, out, into);
}

void matrix_product(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out, Into into) {
  registration::product(a, b, out, into);
}

void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace dgi::cpu
