// Scales whose products with stored vectors could leave float32's range.
#pragma once

#include <cmath>

namespace dgi::cpu {

// Of a scale beyond 2^64 products take part, `scale`, and the rest is a power of two: products of float32 stay finite.
template <class Real>
struct SplitScale {
  Real scale;
  double gain = 1;

  explicit SplitScale(Real whole) : scale(whole) {
    constexpr int kMost = 64;
    if (!(std::abs(static_cast<double>(whole)) > 0x1p64)) return;
    gain = std::ldexp(1.0, std::ilogb(whole) - kMost);
    scale = static_cast<Real>(whole / gain);
  }
};

}  // namespace dgi::cpu
