// Vectors as a warp reads them: each lane every 32nd element.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.h"
#include "dgi/convert.h"

namespace dgi::cuda {

// x . y and y . y, in every lane. The order of the sums depends on `dim` alone.
struct Products {
  float cross, square;
};

template <class Stored>
__device__ Products warp_products(const Stored* __restrict__ x, const Stored* __restrict__ y, int64_t dim) {
  Products sum{0, 0};
#pragma unroll 4
  for (int d = threadIdx.x % kWarp; d < static_cast<int>(dim); d += kWarp) {
    const float left = load(x[d]), right = load(y[d]);
    sum.cross += left * right, sum.square += right * right;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sum.cross += __shfl_xor_sync(kAllLanes, sum.cross, mask);
    sum.square += __shfl_xor_sync(kAllLanes, sum.square, mask);
  }
  return sum;
}

// 1 / max(||x||, eps), given x . x
__device__ inline float reciprocal_norm(float square, float eps) {
  const float norm = sqrtf(square);
  return 1 / (norm < eps ? eps : norm);
}

}  // namespace dgi::cuda
