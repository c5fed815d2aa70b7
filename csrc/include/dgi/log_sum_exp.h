// log-sum-exp of a row, chunk by chunk: sum_k exp(x_k - maximum) with the largest x seen so far as maximum.
//
// A chunk is read twice, the second time from the first-level cache, while what is to be read next is on its way. NaN
// and -inf add nothing; +inf counts as the largest finite number. The sum is never less than 1, so that its logarithm
// is never negative and no log-probability is ever positive, rounding included: searches cut off what cannot win by
// that.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

// 2^f for |f| <= 1/2: a polynomial of relative error 2e-7, exactly 1 at 0
constexpr int kFractionTerms = 6;
constexpr float kFraction[kFractionTerms] = {1.32647087e-3f, 9.67151113e-3f, 5.55073395e-2f,
                                             2.40222424e-1f, 6.93147004e-1f, 1.0f};

template <bool kFused>
DGI_HOST_DEVICE float power_of_fraction(float f) {
  float p = kFraction[0];
#pragma GCC unroll 8
  for (int term = 1; term < kFractionTerms; ++term) p = multiply_add<kFused>(p, f, kFraction[term]);
  return p;
}

constexpr float kRoundToInteger = 0x1.8p23f;  // adding it leaves an integer in the low bits

// exp(d) for d <= 0 as a term of a sum whose largest term is 1: absolute error 1e-7, relative error 3e-7 down to d =
// -8. Below -86 and for NaN exp(-86), which such a sum does not notice. Three operations fewer than exponential().
template <bool kFused>
DGI_HOST_DEVICE float exponential_term(float d) {
  d = d > -86.0f ? d : -86.0f;
  const float shifted = multiply_add<kFused>(d, kLog2E, kRoundToInteger);
  const float f = multiply_add<kFused>(d, kLog2E, kRoundToInteger - shifted);  // d = (n + f) ln 2, |f| <= 1/2
  return std::bit_cast<float>(std::bit_cast<uint32_t>(power_of_fraction<kFused>(f))
                              + (std::bit_cast<uint32_t>(shifted) << 23));
}

template <bool kFused>
DGI_HOST_DEVICE double exponential_term(double d) {
  return d > -700.0 ? std::exp(d) : 0.0;
}

// Adds exp(x[lane] - maximum) to sum[lane], times what it makes of the maximum itself (`largest`), as terms of the same
// kind, where multiply-adds are fused and |maximum| <= kMost: 11 vector operations. What is subtracted is a whole power
// of two close to exp(maximum): then x log2 e need not be rounded before the difference is taken, and adding one number
// rounds, subtracts and biases at once. The polynomial's first factor is left out, which saves a multiplication and a
// register: with one more the sums would not stay in registers. Division by `largest` makes up for that, for the power,
// for log2 e in float32 being 1.3e-8 off (the latter for x near the maximum), and leaves exactly 1 of a row of one
// number.
//
// kMaxima: 1, or as many as there are lanes. kAbove: numbers may lie above the maximum, as long as the sum is at most
// kMostSum; any further up make it larger, or NaN. Stage by stage over all lanes: one lane's operations wait for each
// other, and so many of them fill a scheduler before the next lane's come.
template <int kLanes, int kMaxima, bool kAbove = false>
struct PowerTerms {
  static constexpr float kMost = 1e6f, kMostSum = 1e6f;

  float lowest[kMaxima], highest[kMaxima], shift[kMaxima], largest[kLanes];

  DGI_HOST_DEVICE explicit PowerTerms(const float* maximum) : largest{} {
    constexpr float kBias = 127.0f;
    float x[kLanes];
    for (int i = 0; i < kMaxima; ++i) {
      const float whole = (maximum[i] * kLog2E + kRoundToInteger) - kRoundToInteger;
      lowest[i] = maximum[i] - 86.0f, highest[i] = maximum[i] + 86.0f;
      shift[i] = kRoundToInteger + kBias - whole;
    }
    for (int i = 0; i < kLanes; ++i) x[i] = maximum[kMaxima == 1 ? 0 : i];
    add(x, largest);
  }

  DGI_HOST_DEVICE void add(const float* x, float (&sum)[kLanes]) const {
    constexpr auto of = [](int lane) { return kMaxima == 1 ? 0 : lane; };
    float value[kLanes], shifted[kLanes], f[kLanes], p[kLanes];
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) value[i] = x[i] > lowest[of(i)] ? x[i] : lowest[of(i)];
    if constexpr (kAbove) {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) value[i] = value[i] < highest[of(i)] ? value[i] : highest[of(i)];
    }
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) shifted[i] = multiply_add<true>(value[i], kLog2E, shift[of(i)]);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) f[i] = shift[of(i)] - shifted[i];
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) f[i] = multiply_add<true>(value[i], kLog2E, f[i]);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) p[i] = f[i] + kFraction[1] / kFraction[0];
    for (int term = 2; term < kFractionTerms; ++term) {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) p[i] = multiply_add<true>(p[i], f[i], kFraction[term] / kFraction[0]);
    }
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      sum[i] = multiply_add<true>(p[i], std::bit_cast<float>(std::bit_cast<uint32_t>(shifted[i]) << 23), sum[i]);
    }
  }
};

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

  // `ahead`: as many numbers that will be read next, or null.
  template <bool kFused>
  DGI_HOST_DEVICE void add(const Real* x, int64_t count, const Real* ahead = nullptr) {
    const Real largest = largest_of(x, count);
    if (largest == -std::numeric_limits<Real>::infinity()) return;
    LogSumExp chunk;
    chunk.maximum = largest > std::numeric_limits<Real>::max() ? std::numeric_limits<Real>::max() : largest;
    const Real terms = chunk.maximum < largest ? chunk.template terms<kFused, true>(x, count, ahead)
                                               : chunk.template terms<kFused, false>(x, count, ahead);
    chunk.sum = terms > 1 ? terms : 1;
    add<kFused>(chunk);
  }

  // -inf where there is nothing but that and NaN.
  DGI_HOST_DEVICE static Real largest_of(const Real* x, int64_t count) {
    constexpr Real kNone = -std::numeric_limits<Real>::infinity();
    constexpr int kApart = 4 * kLanes;  // maxima side by side, so that none waits for the one before
    Real lanes[kApart], largest = kNone;
    for (Real& lane : lanes) lane = kNone;
    int64_t k = 0;
    for (; k + kApart <= count; k += kApart) {
#pragma omp simd
      for (int lane = 0; lane < kApart; ++lane) lanes[lane] = x[k + lane] > lanes[lane] ? x[k + lane] : lanes[lane];
    }
    for (; k < count; ++k) largest = x[k] > largest ? x[k] : largest;
#pragma omp simd reduction(max : largest)
    for (int lane = 0; lane < kApart; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
  }

 private:
  static constexpr int kLanes = 64 / sizeof(Real);

  template <bool kFused, bool kClamps>
  DGI_HOST_DEVICE Real terms(const Real* x, int64_t count, [[maybe_unused]] const Real* ahead) const {
    if constexpr (kFused && !kClamps && std::is_same_v<Real, float>) {
      if (std::abs(maximum) <= PowerTerms<kLanes, 1>::kMost) return power_terms(x, count, ahead == nullptr ? x : ahead);
    }
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

  DGI_HOST_DEVICE float power_terms(const float* x, int64_t count, const float* ahead) const {
    const PowerTerms<kLanes, 1> terms(&maximum);
    float sum[kLanes] = {}, rest[kLanes];
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      prefetch_line(ahead + k);
      terms.add(x + k, sum);
    }
    if (k < count) {
      for (int lane = 0; lane < kLanes; ++lane) rest[lane] = k + lane < count ? x[k + lane] : terms.lowest[0];
      terms.add(rest, sum);
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    return total / terms.largest[0];
  }
};

}  // namespace dgi
