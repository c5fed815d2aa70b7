// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A keyed bijection of a 128-bit counter: 10 rounds of two 32x32 -> 64 bit products. No state, so any word of the
// noise can be made anywhere, in any order, and again in the backward pass.
#pragma once

#include <cstdint>

#include "dgi/macros.h"

namespace dgi {

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxBlock {  // a counter going in, four random words coming out
  uint32_t word[4];
};

DGI_HOST_DEVICE PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// Recursion instead of a loop: it is unrolled for certain, and a loop over blocks around it then vectorises.
template <int kRounds>
DGI_HOST_DEVICE PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
  if constexpr (kRounds == 0) {
    return counter;
  } else {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    const PhiloxBlock next{
        {static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key.low, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.high, static_cast<uint32_t>(product0)}};
    return philox<kRounds - 1>(next, PhiloxKey{key.low + 0x9E3779B9u, key.high + 0xBB67AE85u});
  }
}

DGI_HOST_DEVICE PhiloxBlock philox4x32_10(PhiloxBlock counter, PhiloxKey key) { return philox<10>(counter, key); }

}  // namespace dgi
