// Gumbel-Softmax on CUDA: one block of threads a row. The kernel to learn the noise from: dgi/gumbel_lanes.h says what
// a thread does, and here is how threads meet.
//
// Read: the logits twice forward, thrice backward, the later times from cache; written: the result once. The noise is
// made in each pass: it is bound by instruction issue, a quarter of Philox and two logarithms a code, not by memory.
//
// Not yet run on a GPU. Compiles to cubin for sm_80, sm_90 and sm_100 without spills (nvcc -cubin -Xptxas -v); the
// logic of a thread is tested in C++.
#include "cuda/gumbel_cuda.h"

#include <algorithm>

#include "cuda/block.h"
#include "cuda/device.h"
#include "dgi/gumbel_lanes.h"

namespace dgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 16;  // enough to fill any GPU; the grid stride covers the rest

__device__ SoftmaxPart merge_block(const SoftmaxPart& own) {
  return combine_block(own, [](const SoftmaxPart& a, const SoftmaxPart& b) { return merge(a, b); });
}

__device__ float sum_block(float own) {
  return combine_block(own, [](float a, float b) { return a + b; });
}

template <class Stored>
__device__ GumbelRow<Stored> row_of(const GumbelSoftmax& inputs, int64_t row) {
  return {static_cast<const Stored*>(inputs.logits) + row * inputs.shape.codes, inputs.shape, row,
          philox_key(*inputs.seed), 1 / *inputs.tau};
}

template <class Stored>
__global__ void __launch_bounds__(kThreads) softmax_kernel(GumbelSoftmax inputs, bool hard, Stored* __restrict__ out) {
  for (int64_t n = blockIdx.x; n < inputs.shape.rows; n += gridDim.x) {
    const auto row = row_of<Stored>(inputs, n);
    const SoftmaxPart whole = merge_block(row.part(threadIdx.x, kThreads));
    row.emit(threadIdx.x, kThreads, whole, hard, out + n * inputs.shape.codes);
  }
}

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    softmax_backward_kernel(GumbelSoftmax inputs, const Stored* __restrict__ upstream, Stored* __restrict__ out,
                            float* __restrict__ row_dtau) {
  for (int64_t n = blockIdx.x; n < inputs.shape.rows; n += gridDim.x) {
    const auto row = row_of<Stored>(inputs, n);
    const Stored* const u = upstream + n * inputs.shape.codes;
    const SoftmaxPart whole = merge_block(row.part(threadIdx.x, kThreads));
    const float mean = sum_block(row.mean(threadIdx.x, kThreads, whole, u));
    const float dtau = sum_block(row.gradient(threadIdx.x, kThreads, whole, u, mean, out + n * inputs.shape.codes));
    if (threadIdx.x == 0) row_dtau[n] = dtau;
  }
}

// One block: the order of the sum depends on the number of rows alone.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* __restrict__ x, int64_t count, float* __restrict__ out) {
  float own = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += x[i];
  const float whole = sum_block(own);
  if (threadIdx.x == 0) *out = whole;
}

template <class F>
const char* for_dtype(Float dtype, const F& f) {
  switch (dtype) {
    case Float::kFloat32: f(float{}); break;
    case Float::kBFloat16: f(BFloat16{}); break;
    case Float::kFloat16: f(Float16{}); break;
  }
  return launch_error();
}

unsigned grid(const GumbelSoftmax& inputs) {
  // No rows still have a gradient of tau.
  return static_cast<unsigned>(std::clamp<int64_t>(inputs.shape.rows, 1, kMaxGrid));
}

}  // namespace

const char* gumbel_softmax(const GumbelSoftmax& inputs, bool hard, void* out, void* stream) {
  return for_dtype(inputs.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    launch(softmax_kernel<Stored>, grid(inputs), kThreads, 0, stream, inputs, hard, static_cast<Stored*>(out));
  });
}

const char* gumbel_softmax_backward(const GumbelSoftmax& inputs, const void* upstream, void* dlogits, float* row_dtau,
                                    float* dtau, void* stream) {
  return for_dtype(inputs.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    launch(softmax_backward_kernel<Stored>, grid(inputs), kThreads, 0, stream, inputs,
           static_cast<const Stored*>(upstream), static_cast<Stored*>(dlogits), row_dtau);
    launch(sum_kernel, 1, kThreads, 0, stream, row_dtau, inputs.shape.rows, dtau);
  });
}

}  // namespace dgi::cuda
