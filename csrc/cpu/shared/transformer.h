// Parameters of a transformer's layers.
#pragma once

#include <cstdint>

namespace dgi::cpu {

// y = weight x + bias, weight (out, in)
struct LinearMap {
  const float *weight, *bias;
  int64_t out, in;
};

struct LayerNorm {
  const float *weight, *bias;
};

}  // namespace dgi::cpu
