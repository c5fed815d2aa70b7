// What the threads of a block do together. Blocks are one-dimensional, of whole warps.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace dgi::cuda {

// The value that lane `own ^ mask` holds, word by word.
template <class T>
__device__ __forceinline__ T from_lane(const T& own, int mask) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  std::memcpy(words, &own, sizeof(T));
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, mask);
  T other;
  std::memcpy(&other, words, sizeof(T));
  return other;
}

// The parts of all threads, combined in a fixed order: every thread gets the same bits.
template <class Part, class Combine>
__device__ Part combine_block(Part own, const Combine& combine) {
  DGI_SHARED(Part, of_warp, kMaxWarps);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) own = combine(own, from_lane(own, mask));
  __syncthreads();  // the last call's parts have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = own;
  __syncthreads();
  Part whole = of_warp[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) whole = combine(whole, of_warp[warp]);
  return whole;
}

// The sum of what the threads before this one give, and that of all.
struct Scan {
  uint32_t before, whole;
};

__device__ inline Scan scan_block(uint32_t own) {
  DGI_SHARED(uint32_t, of_warp, kMaxWarps);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t through = own;  // the sum up to this lane
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t earlier = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += earlier;
  }
  __syncthreads();  // the last call's sums have been read
  if (lane == kWarp - 1) of_warp[warp] = through;
  __syncthreads();
  Scan scan{through - own, 0};
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    const uint32_t sum = of_warp[w];
    if (w < warp) scan.before += sum;
    scan.whole += sum;
  }
  return scan;
}

// Sorts `count` elements, a power of two, by Batcher's bitonic network: less(i, j) compares two of them, swap(i, j)
// exchanges them. Begins and ends with a barrier.
template <class Less, class Swap>
__device__ void sort_block(uint32_t count, const Less& less, const Swap& swap) {
  __syncthreads();
  for (uint32_t size = 2; size <= count; size *= 2) {
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      for (uint32_t pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
        const uint32_t i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        if (less(j, i) == ((i & size) == 0)) swap(i, j);
      }
      __syncthreads();
    }
  }
}

}  // namespace dgi::cuda
