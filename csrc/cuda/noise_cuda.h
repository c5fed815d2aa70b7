#pragma once

#include <cstdint>

#include "dgi/noise.h"

namespace dgi::cuda {

// Writes all the noise into `out` (rows, codes) on `stream` (a cudaStream_t). `seed` and `out` are device memory: the
// seed is read by the kernel, so that the host never waits and a CUDA graph can be replayed with another seed.
// Returns the launch's error, or null.
const char* gumbel_noise(const NoiseShape& shape, const int64_t* seed, float* out, void* stream);

}  // namespace dgi::cuda
