// The arguments of noise, checked: of gumbel_noise on every device, and the seed of other ops on the CPU.
#pragma once

#include "dgi/noise.h"
#include "register/tensors.h"

namespace dgi::registration {

inline NoiseShape noise_shape(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
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

// `op` begins the error.
inline int64_t seed_value(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                  "seed must be an int64 tensor of one element");
  return *data_of<int64_t>(seed);
}

}  // namespace dgi::registration
