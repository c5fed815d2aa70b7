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

// E = -log1p(-u) = -log t, t = 1 - u. The word as a signed number gives u - [u >= 1/2] to full resolution at both ends:
// w = -u where u < 1/2, else w = 1 - u. Above sqrt(1/2), where its exponent is 0, t is too coarse for a small u, and
// the polynomial's argument t - 1 is w itself.
template <bool kFused = false>
DGI_HOST_DEVICE float exponential_from_word(uint32_t x) {
  const float signed_word = static_cast<float>(static_cast<int32_t>(x));
  const float w = multiply_add<kFused>(signed_word, -0x1p-32f, -0x1p-33f);  // the product is exact
  const Reduced t = reduce(w + (static_cast<int32_t>(x) < 0 ? 0.0f : 1.0f));
  const float f = t.exponent == 0 ? w : t.mantissa - 1.0f;
  return -multiply_add<kFused>(static_cast<float>(t.exponent), kLn2, log1p_reduced<kFused>(f));
}

// g = -log E
template <bool kFused = false>
DGI_HOST_DEVICE float gumbel_from_exponential(float e) {
  const Reduced reduced = reduce(e);
  return -multiply_add<kFused>(static_cast<float>(reduced.exponent), kLn2,
                               log1p_reduced<kFused>(reduced.mantissa - 1.0f));
}

template <bool kFused = false>
DGI_HOST_DEVICE float gumbel_from_word(uint32_t x) {
  return gumbel_from_exponential<kFused>(exponential_from_word<kFused>(x));
}

}  // namespace dgi
