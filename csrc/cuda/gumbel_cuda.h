#pragma once

#include <cstdint>

#include "cuda/types.h"
#include "dgi/noise.h"

namespace dgi::cuda {

// All pointers are device memory: `seed` and `tau` are read by the kernels, so that the host never waits and a CUDA
// graph can be replayed with others. Functions launch on `stream` (a cudaStream_t) and return the launch's error, or
// null.
struct GumbelSoftmax {
  const void* logits;  // (rows, codes) of `dtype`
  Float dtype;
  NoiseShape shape;
  const int64_t* seed;
  const float* tau;
};

const char* gumbel_softmax(const GumbelSoftmax& inputs, bool hard, void* out, void* stream);

// `row_dtau` (rows,) is each row's part of `dtau` (1,).
const char* gumbel_softmax_backward(const GumbelSoftmax& inputs, const void* upstream, void* dlogits, float* row_dtau,
                                    float* dtau, void* stream);

}  // namespace dgi::cuda
