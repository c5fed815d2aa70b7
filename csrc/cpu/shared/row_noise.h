// The noise of one row, made where it is used.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/shared/philox_cpu.h"
#include "dgi/gumbel.h"
#include "dgi/gumbel_row.h"

namespace dgi::cpu {

static_assert(kNoiseChunk == 4 * kNoiseTile);

struct RowNoise {
  PhiloxKey key;
  uint32_t level, stream, row;

  // The noise of codes first ... first + count - 1, count <= kNoiseChunk; `out` holds kNoiseChunk. In float64 it is the
  // definition's (docs/method.md) to the bit: the formula in float64, rounded to float32.
  template <bool kFused, NoiseAs kAs, class Real>
  DGI_HOST_DEVICE void fill(int64_t first, int64_t count, Real* out) const {
    const int64_t blocks = (count + 4 * kPhiloxStep - 1) / (4 * kPhiloxStep) * kPhiloxStep;
    uint32_t words[kNoiseChunk];
    philox.run(key, static_cast<uint32_t>(first / 4), row, blocks, level, stream, words);
    if constexpr (std::is_same_v<Real, double>) {
      for (int64_t i = 0; i < 4 * blocks; ++i) {
        const double rate = -std::log1p(-((static_cast<double>(words[i]) + 0.5) * 0x1p-32));
        out[i] = static_cast<double>(static_cast<float>(-std::log(rate)));
      }
    } else {
      for (int64_t i = 0; i < 4 * blocks; ++i) out[i] = exponential_from_word<kFused>(words[i]);
      if constexpr (kAs == NoiseAs::kExponential) return;
      for (int64_t i = 0; i < 4 * blocks; ++i) out[i] = gumbel_from_exponential<kFused>(out[i]);
    }
  }
};

}  // namespace dgi::cpu
