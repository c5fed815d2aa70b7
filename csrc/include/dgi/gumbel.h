// A random word x becomes u = (x + 0.5) 2^-32, E = -log1p(-u) ~ Exponential(1), g = -log E ~ Gumbel(0, 1).
//
// Everything in float32 with a relative error of E below 1e-6, hence |g - exact| < 2e-6 for every one of the 2^32 words
// (g runs from -3.13 to 22.87, where half a unit in the last place is 1e-6); a test walks both ends and a sample.
// Both logarithms share one polynomial and a bit-trick range reduction: no table, no division, no branch, so that a
// loop over words vectorises. With kFused, multiply-adds are fused: faster, but of other bits where a machine has none.
#pragma once

#include <cstdint>
#include <cstring>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

// log1p(f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1, relative error 2e-7: minimax fit of log1p(f) / f, degree 7.
template <bool kFused = false>
DGI_HOST_DEVICE float log1p_reduced(float f) {
  float p = -0.1010689064860344f;
  p = multiply_add<kFused>(p, f, 0.16222578287124634f);
  p = multiply_add<kFused>(p, f, -0.17250829935073853f);
  p = multiply_add<kFused>(p, f, 0.19900165498256683f);
  p = multiply_add<kFused>(p, f, -0.24969908595085144f);
  p = multiply_add<kFused>(p, f, 0.33335059881210327f);
  p = multiply_add<kFused>(p, f, -0.5000036358833313f);
  p = multiply_add<kFused>(p, f, 0.9999999403953552f);
  return p * f;
}

// x = mantissa * 2^exponent with sqrt(1/2) <= mantissa < sqrt(2), for positive normal x.
struct Reduced {
  float mantissa;
  int32_t exponent;
};

DGI_HOST_DEVICE Reduced reduce(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // 0x3F3504F3 is sqrt(1/2)
  bits -= exponent * (1 << 23);
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  return {mantissa, exponent};
}

constexpr float kLn2 = 0.6931471805599453f;

// E = -log1p(-u). Below 1 - sqrt(1/2) the argument of log1p_reduced is -u itself, which keeps full resolution as u -> 0;
// above, log(1 - u) is reduced from 1 - u = (2^32 - x - 0.5) 2^-32, which keeps it as u -> 1. Not from the complement ~x:
// gcc's instruction for it waits for the iteration before, which halves the speed.
template <bool kFused = false>
DGI_HOST_DEVICE float exponential_from_word(uint32_t x) {
  const bool is_low = x < 0x4AFB0CCDu;  // (1 - sqrt(1/2)) 2^32
  const uint32_t distance = is_low ? x : 0u - x;
  const float t = (static_cast<float>(distance) + (is_low ? 0.5f : -0.5f)) * 0x1p-32f;
  const Reduced rest = reduce(t);
  const float f = is_low ? -t : rest.mantissa - 1.0f;
  const float exponent = is_low ? 0.0f : static_cast<float>(rest.exponent);
  return -multiply_add<kFused>(exponent, kLn2, log1p_reduced<kFused>(f));
}

// g = -log E
template <bool kFused = false>
DGI_HOST_DEVICE float gumbel_from_exponential(float e) {
  const Reduced reduced = reduce(e);
  return -multiply_add<kFused>(static_cast<float>(reduced.exponent), kLn2, log1p_reduced<kFused>(reduced.mantissa - 1.0f));
}

template <bool kFused = false>
DGI_HOST_DEVICE float gumbel_from_word(uint32_t x) {
  return gumbel_from_exponential<kFused>(exponential_from_word<kFused>(x));
}

}  // namespace dgi
