#pragma once

#include <cstdint>

#include "cpu/shared/philox_cpu.h"
#include "dgi/noise.h"

namespace dgi::cpu {

// Writes the noise of tiles [first, last), of kNoiseTile blocks each, into `out` (rows, codes). Tiles are independent.
void gumbel_noise(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out);

}  // namespace dgi::cpu
