// Noise on CUDA, as torch sees it.
#include "cuda/noise_cuda.h"

#include "register/cuda/cuda_stream.h"
#include "register/noise_arguments.h"

namespace dgi::registration {
namespace {

Tensor gumbel_noise_cuda(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                         int64_t codes) {
  const NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
  const DeviceGuard guard(seed.get_device_index());
  Tensor out = torch::stable::empty({rows, codes}, ScalarType::Float, std::nullopt, seed.device());
  if (shape.blocks() == 0) return out;
  const char* error = dgi::cuda::gumbel_noise(shape, seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(),
                                              current_stream(seed));
  check_launch("gumbel_noise", error);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CUDA, m) { m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cuda)); }

}  // namespace dgi::registration
