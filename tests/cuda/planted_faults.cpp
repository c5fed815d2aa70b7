// Small kernels, each right or with one fault, to test that cuda_on_cpu.h tells them apart. Called by
// test_cuda_on_cpu.py.
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace dgi::cuda {
namespace {

constexpr int kThreads = 96;

// out[i] = in[kThreads - 1 - i], by way of shared memory.
template <bool kBarrier, int kCount>
__global__ void reverse_kernel(const int* in, int* out) {
  DGI_SHARED(int, row, kCount);
  row[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

// The sum of the block, by shuffles and one value of each warp.
template <unsigned kMask>
__global__ void sum_kernel(const int* in, int* out) {
  DGI_SHARED(int, of_warp, kThreads / kWarp);
  int own = in[threadIdx.x];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) own += __shfl_xor_sync(kMask, own, lane);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = own;
  __syncthreads();
  int whole = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) whole += of_warp[warp];
  out[threadIdx.x] = whole;
}

__global__ void half_a_vote_kernel(const int* in, int* out) {
  if (threadIdx.x % kWarp < 16) out[threadIdx.x] = static_cast<int>(__ballot_sync(kAllLanes, in[threadIdx.x] > 0));
  __syncthreads();
}

__global__ void vote_after_return_kernel(const int* in, int* out) {
  if (threadIdx.x % kWarp == 5) return;
  out[threadIdx.x] = __any_sync(kAllLanes, in[threadIdx.x] > 0);
}

__global__ void shuffle_outside_mask_kernel(const int* in, int* out) {
  const unsigned mask = threadIdx.x % kWarp < 16 ? 0xFFFFu : 0xFFFF0000u;
  out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], 0);
}

__global__ void two_masks_kernel(const int* in, int* out) {
  const unsigned mask = threadIdx.x % kWarp < 16 ? kAllLanes : 0xFFFF0000u;
  out[threadIdx.x] = __any_sync(mask, in[threadIdx.x] > 0);
}

__global__ void divergent_barrier_kernel(const int* in, int* out) {
  if (threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers_kernel(const int* in, int* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void return_before_barrier_kernel(const int* in, int* out) {
  if (threadIdx.x >= 90) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void uninitialised_kernel(const int* in, int* out) {
  DGI_SHARED(int, row, kThreads);
  if (in[threadIdx.x] > 0) row[threadIdx.x] = 1;
  out[threadIdx.x] = row[threadIdx.x];
}

// Each lane reads its neighbour's value.
template <bool kSync>
__global__ void warp_exchange_kernel(const int* in, int* out) {
  DGI_SHARED(int, row, kThreads);
  row[threadIdx.x] = in[threadIdx.x];
  if (kSync) __syncwarp();
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}

// A barrier before the next round of writes is missing.
__global__ void overwrite_kernel(const int* in, int* out) {
  DGI_SHARED(int, row, kThreads);
  int value = in[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    row[threadIdx.x] = value;
    __syncthreads();
    value = row[(threadIdx.x + 32) % kThreads];
  }
  out[threadIdx.x] = value;
}

template <bool kAtomic>
__global__ void count_kernel(const int* in, int* out) {
  DGI_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(count + 0, in[threadIdx.x]);
  } else {
    count[0] += in[threadIdx.x];
  }
  __syncthreads();
  out[threadIdx.x] = count[0];
}

// Two arrays in dynamic memory of which the launch gives `kThreads` integers and as many floats.
template <int kOffset, int kFloats>
__global__ void dynamic_kernel(const int* in, int* out) {
  const Shared<int> integers = dynamic_shared<int>(0, kThreads);
  const Shared<float> floats = dynamic_shared<float>(kOffset, kFloats);
  integers[threadIdx.x] = in[threadIdx.x];
  floats[threadIdx.x] = 0.5f;
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(integers[0] + 2 * floats[kThreads - 1]);
}

__global__ void votes_kernel(const int* in, int* out) {
  const unsigned half = threadIdx.x % kWarp < 16 ? 0xFFFFu : 0xFFFF0000u;
  const unsigned odd = __ballot_sync(half, in[threadIdx.x] % 2 != 0);
  const unsigned equal = __match_any_sync(kAllLanes, in[threadIdx.x] / 8);
  const int up = __shfl_up_sync(kAllLanes, in[threadIdx.x], 1);
  out[threadIdx.x] = static_cast<int>(__popc(odd) * 10000 + __popc(equal) * 100) + up % 100
                     + __reduce_max_sync(half, in[threadIdx.x]) * 1000000;
}

using Kernel = void (*)(const int*, int*);

Kernel kernel_of(const std::string& name) {
  if (name == "reverse") return reverse_kernel<true, kThreads>;
  if (name == "missing barrier") return reverse_kernel<false, kThreads>;
  if (name == "off by one") return reverse_kernel<true, kThreads - 1>;
  if (name == "sum") return sum_kernel<kAllLanes>;
  if (name == "wrong mask") return sum_kernel<0x7FFFFFFF>;
  if (name == "half a vote") return half_a_vote_kernel;
  if (name == "vote after return") return vote_after_return_kernel;
  if (name == "shuffle outside mask") return shuffle_outside_mask_kernel;
  if (name == "two masks") return two_masks_kernel;
  if (name == "divergent barrier") return divergent_barrier_kernel;
  if (name == "two barriers") return two_barriers_kernel;
  if (name == "return before barrier") return return_before_barrier_kernel;
  if (name == "uninitialised") return uninitialised_kernel;
  if (name == "warp exchange") return warp_exchange_kernel<true>;
  if (name == "missing syncwarp") return warp_exchange_kernel<false>;
  if (name == "overwrite") return overwrite_kernel;
  if (name == "count") return count_kernel<true>;
  if (name == "count without atomics") return count_kernel<false>;
  if (name == "dynamic") return dynamic_kernel<4 * kThreads, kThreads>;
  if (name == "dynamic beyond the end") return dynamic_kernel<4 * kThreads, kThreads + 1>;
  if (name == "dynamic overlap") return dynamic_kernel<4 * kThreads - 4, kThreads>;
  if (name == "votes") return votes_kernel;
  throw std::runtime_error("no kernel " + name);
}

}  // namespace
}  // namespace dgi::cuda

// `in` and `out` (96,); returns the fault, empty where there is none.
extern "C" const char* run(const char* name, uint64_t seed, const int* in, int* out) {
  static std::string fault;
  fault.clear();
  cuda_on_cpu::generator.seed(seed);
  try {
    using namespace dgi::cuda;
    launch(kernel_of(name), 2, kThreads, 8 * kThreads, nullptr, in, out);
  } catch (const std::exception& error) {
    fault = error.what();
  }
  return fault.c_str();
}
