// What the threads of a block do together. Blocks are one-dimensional, of whole warps.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cuda/device.h"

namespace dgi::cuda {

// What another lane gives, word by word: shuffle(word) is a warp's shuffle.
template <class T, class Shuffle>
__device__ __forceinline__ T from_lane(const T& own, const Shuffle& shuffle) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  std::memcpy(words, &own, sizeof(T));
  for (uint32_t& word : words) word = shuffle(word);
  T other;
  std::memcpy(&other, words, sizeof(T));
  return other;
}

// The values of the warp's first `lanes` lanes, combined in a fixed order; in lane 0.
template <class T, class Combine>
__device__ __forceinline__ T combine_lanes(T own, unsigned lanes, const Combine& combine) {
  for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = from_lane(own, [&](uint32_t word) { return __shfl_down_sync(kAllLanes, word, distance); });
    if (threadIdx.x % kWarp + distance < lanes) own = combine(own, other);
  }
  return own;
}

// The parts of all threads, combined in a fixed order: every thread gets the same bits.
template <class Part, class Combine>
__device__ Part combine_block(Part own, const Combine& combine) {
  DGI_SHARED(Part, of_warp, kMaxWarps);
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  own = combine_lanes(own, kWarp, combine);
  __syncthreads();  // the last call's parts have been read
  if (lane == 0) of_warp[threadIdx.x / kWarp] = own;
  __syncthreads();
  own = of_warp[lane < warps ? lane : 0];
  own = combine_lanes(own, warps, combine);
  return from_lane(own, [](uint32_t word) { return __shfl_sync(kAllLanes, word, 0); });
}

// The sum of what the threads before this one give, and that of all.
struct Scan {
  uint32_t before, whole;
};

// The sum up to and with this lane.
__device__ inline uint32_t scan_lanes(uint32_t own) {
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t earlier = __shfl_up_sync(kAllLanes, own, distance);
    if (threadIdx.x % kWarp >= distance) own += earlier;
  }
  return own;
}

__device__ inline Scan scan_block(uint32_t own) {
  DGI_SHARED(uint32_t, of_warp, kMaxWarps);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const uint32_t through = scan_lanes(own);
  __syncthreads();  // the last call's sums have been read
  if (lane == kWarp - 1) of_warp[warp] = through;
  __syncthreads();
  uint32_t sum = 0;
  if (lane < warps) sum = of_warp[lane];
  const uint32_t warps_through = scan_lanes(sum);
  return {__shfl_sync(kAllLanes, warps_through - sum, warp) + through - own,
          __shfl_sync(kAllLanes, warps_through, warps - 1)};
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
