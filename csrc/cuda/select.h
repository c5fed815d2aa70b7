// The best of a block's keys by radix select, the lowest first. A key is a number of 64 bits; all are different.
#pragma once

#include <cstdint>

#include "cuda/block.h"
#include "cuda/device.h"

namespace dgi::cuda {

constexpr int kSelectThreads = 512;
constexpr uint64_t kNoKey = ~uint64_t{0};

// The keys make(0) to make(count - 1), kNoKey where there is none. Thread t has numbers t, t + 512, ...: the first of
// them in registers, those behind made again whenever they are asked for, kAtOnce side by side: one where a key is long
// to make, several where it is only read.
template <class Make, int kAtOnce = 1>
class Keys {
 public:
  __device__ Keys(uint32_t count, const Make& make) : count_(count), make_(make) {
    for (uint64_t& held : held_) held = kNoKey;
#pragma unroll 1
    for (uint32_t j = 0; j < kHeld; ++j) {  // not unrolled: make is long, and the instruction cache small
      const uint32_t i = threadIdx.x + j * kSelectThreads;
      if (i >= count) break;
      const uint64_t key = make(i);
#pragma unroll
      for (uint32_t place = 0; place < kHeld; ++place) held_[place] = place == j ? key : held_[place];
    }
  }

  template <class Use>
  __device__ __forceinline__ void for_each(const Use& use) const {
#pragma unroll
    for (uint32_t j = 0; j < kHeld; ++j) {
      if (held_[j] != kNoKey) use(held_[j]);
    }
#pragma unroll 1
    for (uint32_t i = threadIdx.x + kHeld * kSelectThreads; i < count_; i += kAtOnce * kSelectThreads) {
      uint64_t made[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t at = i + j * kSelectThreads;
        made[j] = at < count_ ? make_(at) : kNoKey;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (made[j] != kNoKey) use(made[j]);
      }
    }
  }

 private:
  static constexpr uint32_t kHeld = 8;

  uint64_t held_[kHeld];
  uint32_t count_;
  const Make& make_;
};

// A key such that at least `wanted` keys are not above it, or all are, and at most `room` (wanted <= room).
//
// Digits of 11 bits are counted from the first bit in which keys differ: scores of one step share sign and exponent,
// so that one or two rounds do for most steps. Where thousands of scores are equal, the low half of the keys takes
// three more.
template <class Keys>
__device__ uint64_t find_limit(const Keys& keys, uint32_t wanted, uint32_t room) {
  constexpr int kDigit = 11, kHalf = 32;  // bits
  constexpr uint32_t kBins = 1 << kDigit, kPerThread = kBins / kSelectThreads;
  DGI_SHARED(uint32_t, bins, kBins);
  DGI_SHARED(uint32_t, found, 3);  // the digit, the keys below it, the keys up to it

  struct Extent {  // of the keys' high halves
    uint32_t low, high, count;
  };
  Extent own{~0u, 0, 0};
  keys.for_each([&](uint64_t key) {
    const uint32_t half = static_cast<uint32_t>(key >> kHalf);
    own = {half < own.low ? half : own.low, half > own.high ? half : own.high, own.count + 1};
  });
  const Extent extent = combine_block(own, [](const Extent& a, const Extent& b) {
    return Extent{a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high, a.count + b.count};
  });
  if (extent.count <= room) return kNoKey - 1;

  int done = extent.low == extent.high ? kHalf : __clz(extent.low ^ extent.high);  // leading bits that are settled
  uint64_t prefix = done == 0 ? 0 : extent.low >> (kHalf - done);
  uint32_t below = 0;  // keys whose leading bits are less than the prefix
  for (;;) {
    const int bits = 64 - done < kDigit ? 64 - done : kDigit, shift = 64 - done - bits;
    __syncthreads();  // the last round's result has been read
    for (uint32_t bin = threadIdx.x; bin < kBins; bin += kSelectThreads) bins[bin] = 0;
    __syncthreads();
    keys.for_each([&](uint64_t key) {
      if (done > 0 && key >> (64 - done) != prefix) return;
      atomicAdd(bins + static_cast<uint32_t>(key >> shift & ((uint64_t{1} << bits) - 1)), 1u);
    });
    __syncthreads();
    uint32_t counts[kPerThread], sum = 0;
    for (uint32_t i = 0; i < kPerThread; ++i) sum += counts[i] = bins[threadIdx.x * kPerThread + i];
    uint32_t through = below + scan_block(sum).before;
    for (uint32_t i = 0; i < kPerThread; ++i) {  // one thread finds the digit at which `wanted` is reached
      if (through < wanted && wanted <= through + counts[i]) {
        found[0] = threadIdx.x * kPerThread + i, found[1] = through, found[2] = through + counts[i];
      }
      through += counts[i];
    }
    __syncthreads();
    prefix = prefix << bits | found[0], below = found[1], done += bits;
    if (found[2] <= room || shift == 0) return prefix << shift | ((uint64_t{1} << shift) - 1);
  }
}

// Sorts `count` keys. The buffer has room for a power of two that is not less; what lies behind the keys is kNoKey
// then.
template <class Buffer>
__device__ void sort_keys(uint32_t count, Buffer buffer) {
  const uint32_t whole = count == 0 ? 0 : std::bit_ceil(count);
  for (uint32_t i = count + threadIdx.x; i < whole; i += kSelectThreads) buffer[i] = kNoKey;
  sort_block(
      whole, [&](uint32_t i, uint32_t j) { return uint64_t{buffer[i]} < uint64_t{buffer[j]}; },
      [&](uint32_t i, uint32_t j) {
        const uint64_t first = buffer[i], second = buffer[j];
        buffer[i] = second, buffer[j] = first;
      });
}

// Puts keys that hold the best `wanted` into the buffer, in any order, and returns how many, at most `room`.
template <int kAtOnce = 1, class Make, class Buffer>
__device__ uint32_t collect_keys(uint32_t count, const Make& make, uint32_t wanted, uint32_t room, Buffer buffer) {
  DGI_SHARED(uint32_t, collected, 1);
  const Keys<Make, kAtOnce> keys(count, make);
  const uint64_t limit = find_limit(keys, wanted, room);
  if (threadIdx.x == 0) collected[0] = 0;
  __syncthreads();
  keys.for_each([&](uint64_t key) {
    if (key <= limit) buffer[atomicAdd(collected + 0, 1u)] = key;
  });
  __syncthreads();
  return collected[0];
}

// The same, sorted. The buffer has room for a power of two that is not less than `room`.
template <int kAtOnce = 1, class Make, class Buffer>
__device__ uint32_t select_keys(uint32_t count, const Make& make, uint32_t wanted, uint32_t room, Buffer buffer) {
  const uint32_t taken = collect_keys<kAtOnce>(count, make, wanted, room, buffer);
  sort_keys(taken, buffer);
  return taken;
}

}  // namespace dgi::cuda
