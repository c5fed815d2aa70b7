// Barriers, and what the lanes of a warp do together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"

namespace cuda_on_cpu {

// Values of up to eight bytes as the collectives carry them.
template <class T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

// What lane `source` gives; the caller's own value where `source` lies outside its segment of the warp.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside) {
  const uint64_t* const received = Block::current()->meet(Collective::kShuffle, mask, pack(value));
  if (!inside) return value;
  if (!(mask >> source & 1)) {
    Block::current()->fault("a shuffle reads lane " + std::to_string(source) + ", outside its mask");
  }
  return unpack<T>(received[source]);
}

template <class T, class Combine>
T reduce(unsigned mask, T value, const Combine& combine) {
  const uint64_t* const received = Block::current()->meet(Collective::kReduce, mask, pack(value));
  bool any = false;
  T whole{};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    whole = any ? combine(whole, unpack<T>(received[i])) : unpack<T>(received[i]);
    any = true;
  }
  return whole;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::Block::current()->barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  cuda_on_cpu::Block::current()->meet(cuda_on_cpu::Collective::kSync, mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int segment = static_cast<int>(cuda_on_cpu::lane()) & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, segment + (source & (width - 1)), true);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(cuda_on_cpu::lane()), source = lane ^ lane_mask;
  return cuda_on_cpu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_on_cpu::lane()), source = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source, source >= (lane & ~(width - 1)));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_on_cpu::lane()), source = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* const received = cuda_on_cpu::Block::current()->meet(cuda_on_cpu::Collective::kVote, mask, predicate);
  unsigned votes = 0;
  for (unsigned i = 0; i < cuda_on_cpu::kWarp; ++i) votes |= static_cast<unsigned>(received[i] & 1) << i;
  return votes;
}

inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_on_cpu::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t own = cuda_on_cpu::pack(value);
  const uint64_t* const received = cuda_on_cpu::Block::current()->meet(cuda_on_cpu::Collective::kMatch, mask, own);
  unsigned equal = 0;
  for (unsigned i = 0; i < cuda_on_cpu::kWarp; ++i) equal |= unsigned{(mask >> i & 1) && received[i] == own} << i;
  return equal;
}
