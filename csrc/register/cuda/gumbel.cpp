// Gumbel-Softmax on CUDA, as torch sees it.
#include "cuda/gumbel_cuda.h"

#include "register/cuda/cuda_stream.h"

namespace dgi::registration {
namespace {

constexpr const char* kOp = "gumbel_softmax";
constexpr const char* kGumbel = "dgi_kernels, gumbel_softmax: ";

dgi::cuda::GumbelSoftmax softmax_inputs_cuda(const Tensor& logits, const Tensor& tau, const Tensor& seed) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) <= kWords && logits.size(1) > 0,
                  kGumbel, "logits must be contiguous (N, K) with K > 0");
  STD_TORCH_CHECK(tau.numel() == 1 && tau.scalar_type() == ScalarType::Float && tau.device() == logits.device(),
                  kGumbel, "tau must hold one float32 on the device of logits");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && seed.device() == logits.device(),
                  kGumbel, "seed must hold one int64 on the device of logits");
  const auto dtype = [&] {
    switch (logits.scalar_type()) {
      case ScalarType::Float: return dgi::cuda::Float::kFloat32;
      case ScalarType::BFloat16: return dgi::cuda::Float::kBFloat16;
      case ScalarType::Half: return dgi::cuda::Float::kFloat16;
      default: STD_TORCH_CHECK(false, kGumbel, "logits must be float32, bfloat16 or float16");
    }
  }();
  return {logits.const_data_ptr(),
          dtype,
          {0, kStreamGumbelSoftmax, 0, logits.size(0), logits.size(1)},
          seed.const_data_ptr<int64_t>(),
          tau.const_data_ptr<float>()};
}

Tensor gumbel_softmax_cuda(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  const auto inputs = softmax_inputs_cuda(logits, tau, seed);
  const DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::empty_like(logits);
  if (logits.size(0) == 0) return out;
  const char* error = dgi::cuda::gumbel_softmax(inputs, hard, out.mutable_data_ptr(), current_stream(logits));
  check_launch(kOp, error);
  return out;
}

std::tuple<Tensor, Tensor> gumbel_softmax_backward_cuda(const Tensor& dout, const Tensor& logits, const Tensor& tau,
                                                        const Tensor& seed, bool wants_tau) {
  const auto inputs = softmax_inputs_cuda(logits, tau, seed);
  STD_TORCH_CHECK(dout.is_contiguous() && dout.scalar_type() == logits.scalar_type() && dout.device() == logits.device()
                      && dout.dim() == 2 && dout.size(0) == logits.size(0) && dout.size(1) == logits.size(1),
                  kGumbel, "dout must be contiguous (N, K) of the dtype and device of logits");
  const DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = torch::stable::empty_like(logits), dtau = torch::stable::empty_like(tau);
  Tensor row_dtau = torch::stable::empty({logits.size(0)}, ScalarType::Float, std::nullopt, logits.device());
  const char* error = dgi::cuda::gumbel_softmax_backward(inputs, dout.const_data_ptr(), dlogits.mutable_data_ptr(),
                                                         row_dtau.mutable_data_ptr<float>(),
                                                         dtau.mutable_data_ptr<float>(), current_stream(logits));
  check_launch(kOp, error);
  if (wants_tau) return {dlogits, dtau};
  return {dlogits, torch::stable::empty({0}, ScalarType::Float, std::nullopt, logits.device())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CUDA, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax_cuda));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&gumbel_softmax_backward_cuda));
}

}  // namespace dgi::registration
