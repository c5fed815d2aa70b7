// Gumbel noise on CUDA: one thread makes the four values of a Philox block and walks the blocks with a grid stride.
//
// Everything is recomputed from (row, code), nothing is read but the seed; 4 bytes per element are written. Bound by
// instruction issue, not by memory: per element a quarter of Philox's 10 rounds and two logarithms. Instructions and
// registers are listed by `make gpu-code`. Not yet run on a GPU.
#include "cuda/noise_cuda.h"

#include <algorithm>

#include "cuda/device.h"
#include "dgi/gumbel_log2.h"
#include "dgi/philox.h"

namespace dgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 16;  // enough to fill any GPU; the grid stride covers the rest

__global__ void __launch_bounds__(kThreads)
    gumbel_noise_kernel(NoiseShape shape, const int64_t* __restrict__ seed, float* __restrict__ out) {
  const PhiloxKey key = philox_key(*seed);
  const int64_t per_row = shape.blocks_per_row();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t rows_on = stride / per_row, blocks_on = stride % per_row;  // divided once, not for every block
  for (int64_t row = first / per_row, block = first % per_row; row < shape.rows;) {
    const PhiloxBlock random = philox4x32_10(shape.counter(row, block), key);
    float* target = out + row * shape.codes + 4 * block;
    float noise[4];
    for (int w = 0; w < 4; ++w) noise[w] = gumbel_in_base_2(random.word[w]) * kLogE2;
    if (shape.codes % 4 == 0) {  // then every target is aligned to 16 bytes
      *reinterpret_cast<float4*>(target) = make_float4(noise[0], noise[1], noise[2], noise[3]);
    } else {
      for (int w = 0; w < 4 && 4 * block + w < shape.codes; ++w) target[w] = noise[w];
    }
    row += rows_on;
    block += blocks_on;
    if (block >= per_row) {
      block -= per_row;
      ++row;
    }
  }
}

}  // namespace

const char* gumbel_noise(const NoiseShape& shape, const int64_t* seed, float* out, void* stream) {
  const int64_t grid = std::min((shape.blocks() + kThreads - 1) / kThreads, kMaxGrid);
  launch(gumbel_noise_kernel, static_cast<unsigned>(grid), kThreads, 0, stream, shape, seed, out);
  return launch_error();
}

}  // namespace dgi::cuda
