// Noise, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include "tensors.h"
#include "cpu/noise.h"
#include "cpu/pages.h"

#ifdef DGI_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/noise.h"
#endif

namespace dgi::registration {
namespace {

dgi::NoiseShape noise_shape(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                            int64_t codes) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "gumbel_noise: seed must be an int64 tensor of one element");
  STD_TORCH_CHECK(0 <= level && level < kWords, "gumbel_noise: level must be in [0, 2**32); got ", level);
  STD_TORCH_CHECK(0 <= stream && stream < kWords, "gumbel_noise: stream must be in [0, 2**32); got ", stream);
  STD_TORCH_CHECK(0 <= rows && rows <= kWords, "gumbel_noise: rows must be in [0, 2**32]; got ", rows);
  STD_TORCH_CHECK(0 <= codes && codes <= kWords, "gumbel_noise: codes must be in [0, 2**32]; got ", codes);
  STD_TORCH_CHECK(0 <= row_offset && row_offset <= kWords - rows,
                  "gumbel_noise: row_offset must be in [0, 2**32 - rows]; got ", row_offset, " with rows = ", rows);
  return {static_cast<uint32_t>(level), static_cast<uint32_t>(stream), row_offset, rows, codes};
}

Tensor gumbel_noise_cpu(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                        int64_t codes) {
  const dgi::NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
  Tensor out = torch::stable::empty({rows, codes}, ScalarType::Float);
  float* const data = out.mutable_data_ptr<float>();
  dgi::cpu::ask_for_huge_pages(data, rows * codes * static_cast<int64_t>(sizeof(float)));
  const int64_t seed_value = *seed.const_data_ptr<int64_t>();
  const int64_t tiles = (shape.blocks() + dgi::cpu::kNoiseTile - 1) / dgi::cpu::kNoiseTile;
  constexpr int64_t kGrain = 128;  // 32768 elements, about 0.1 ms: below that a second thread does not pay
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t first, int64_t last) {
    dgi::cpu::gumbel_noise(shape, seed_value, first, last, data);
  });
  return out;
}

#ifdef DGI_WITH_CUDA
Tensor gumbel_noise_cuda(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                         int64_t codes) {
  const dgi::NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor out = torch::stable::empty({rows, codes}, ScalarType::Float, std::nullopt, seed.device());
  if (shape.blocks() == 0) return out;
  const char* error = dgi::cuda::gumbel_noise(shape, seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(),
                                              current_stream(seed));
  STD_TORCH_CHECK(error == nullptr, "gumbel_noise: the CUDA kernel could not be launched: ", error);
  return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("gumbel_noise(Tensor seed, int level, int stream, int row_offset, int rows, int codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cpu));
}

#ifdef DGI_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CUDA, m) {
  m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cuda));
}
#endif

}  // namespace dgi::registration
