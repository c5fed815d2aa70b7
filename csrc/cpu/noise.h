#pragma once

#include <cstdint>

#include "dgi/noise.h"

namespace dgi::cpu {

// Philox blocks made at a time: words and results stay in the first-level cache, and loops have a constant length.
constexpr int64_t kNoiseTile = 64;

// Writes the noise of tiles [first, last), of kNoiseTile blocks each, into `out` (rows, codes). Tiles are independent.
void gumbel_noise(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out);

}  // namespace dgi::cpu
