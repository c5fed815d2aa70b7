// Gumbel noise on CUDA: one thread makes the four values of a Philox block and walks the blocks with a grid stride.
//
// Everything is recomputed from (row, code), nothing is read but the seed; 4 bytes per element are written. Bound by
// instruction issue, not by memory: per element a quarter of Philox's 10 rounds and two polynomial logarithms.
//
// Compiles to cubin for sm_80, sm_90a and sm_100 with 28, 29 and 26 registers and no spills (nvcc 13.0, -Xptxas -v),
// and links and loads with a CUDA torch. Not yet run on a GPU.
#include "noise.h"

#include <algorithm>

#include "device.h"
#include "dgi/gumbel.h"
#include "dgi/philox.h"

namespace dgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 16;  // enough to fill any GPU; the grid stride covers the rest

__global__ void __launch_bounds__(kThreads)
    gumbel_noise_kernel(NoiseShape shape, const int64_t* __restrict__ seed, float* __restrict__ out) {
  const PhiloxKey key = philox_key(*seed);
  const int64_t per_row = shape.blocks_per_row(), blocks = shape.blocks();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < blocks; i += stride) {
    const int64_t row = i / per_row, block = i % per_row;
    const PhiloxBlock random = philox4x32_10(shape.counter(row, block), key);
    float* target = out + row * shape.codes + 4 * block;
    float noise[4];
    for (int w = 0; w < 4; ++w) noise[w] = gumbel_from_word(random.word[w]);
    if (shape.codes % 4 == 0) {  // then every target is aligned to 16 bytes
      *reinterpret_cast<float4*>(target) = make_float4(noise[0], noise[1], noise[2], noise[3]);
    } else {
      for (int w = 0; w < 4 && 4 * block + w < shape.codes; ++w) target[w] = noise[w];
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
