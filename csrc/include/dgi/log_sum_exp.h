// log-sum-exp of a row, chunk by chunk: sum_k exp(x_k - maximum) with the largest x seen so far as maximum.
//
// A chunk is read twice, the second time from the first-level cache. NaN and -inf add nothing; +inf counts as the largest
// finite number. The largest term is exactly 1, so the logarithm of the sum is never negative and no log-probability is
// ever positive, rounding included: searches cut off what cannot win by that.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

// exp(d) for d <= 0 as a term of a sum whose largest term is 1: absolute error 1e-7, relative error 3e-7 down to d = -8.
// Below -86 and for NaN exp(-86), which such a sum does not notice. Three operations fewer than exponential().
template <bool kFused>
DGI_HOST_DEVICE float exponential_term(float d) {
  constexpr float kRound = 0x1.8p23f, kLog2E = 1.44269504f;
  d = d > -86.0f ? d : -86.0f;
  const float shifted = multiply_add<kFused>(d, kLog2E, kRound);
  const float f = multiply_add<kFused>(d, kLog2E, kRound - shifted);  // d = (n + f) ln 2, |f| <= 1/2
  float p = 1.32647087e-3f;  // 2^f, relative error 2e-7, exactly 1 at 0
  p = multiply_add<kFused>(p, f, 9.67151113e-3f);
  p = multiply_add<kFused>(p, f, 5.55073395e-2f);
  p = multiply_add<kFused>(p, f, 2.40222424e-1f);
  p = multiply_add<kFused>(p, f, 6.93147004e-1f);
  p = multiply_add<kFused>(p, f, 1.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

template <bool kFused>
DGI_HOST_DEVICE double exponential_term(double d) {
  return d > -700.0 ? std::exp(d) : 0.0;
}

template <class Real>
struct LogSumExp {
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real sum = 0;  // of exp(x - maximum)

  DGI_HOST_DEVICE bool empty() const { return sum == 0; }
  DGI_HOST_DEVICE Real log_sum() const { return std::log(sum); }

  // Adds the sum over other numbers.
  template <bool kFused>
  DGI_HOST_DEVICE void add(const LogSumExp& other) {
    if (other.empty()) return;
    const LogSumExp &large = other.maximum > maximum ? other : *this, &small = other.maximum > maximum ? *this : other;
    sum = small.empty() ? large.sum : large.sum + small.sum * exponential_term<kFused>(small.maximum - large.maximum);
    maximum = large.maximum;
  }

  template <bool kFused>
  DGI_HOST_DEVICE void add(const Real* x, int64_t count) {
    Real largest = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < count; ++k) largest = x[k] > largest ? x[k] : largest;
    if (largest == -std::numeric_limits<Real>::infinity()) return;
    const bool clamps = largest > std::numeric_limits<Real>::max();
    if (clamps) largest = std::numeric_limits<Real>::max();
    if (largest > maximum) {
      if (!empty()) sum *= exponential_term<kFused>(maximum - largest);
      maximum = largest;
    }
    sum += clamps ? terms<kFused, true>(x, count) : terms<kFused, false>(x, count);
  }

 private:
  template <bool kFused, bool kClamps>
  DGI_HOST_DEVICE Real terms(const Real* x, int64_t count) const {
    constexpr Real kLargest = std::numeric_limits<Real>::max();
    const Real offset = maximum;
    Real total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < count; ++k) {
      const Real value = kClamps && x[k] > kLargest ? kLargest : x[k];
      total += exponential_term<kFused>(value - offset);
    }
    return total;
  }
};

}  // namespace dgi
