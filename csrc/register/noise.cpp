// Noise, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include "register/noise_arguments.h"

#include "cpu/gumbel/noise_cpu.h"
#include "cpu/shared/pages.h"

namespace dgi::registration {
namespace {

Tensor gumbel_noise_cpu(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                        int64_t codes) {
  const NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("gumbel_noise(Tensor seed, int level, int stream, SymInt row_offset, int rows, int codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) { m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cpu)); }

}  // namespace dgi::registration
