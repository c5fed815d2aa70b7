// One row of a Gumbel-Softmax, and its gradient.
//
//   p_k = exp((s_k + g_k) / tau) / Z,   dL/ds_k = p_k (dp_k - sum_i p_i dp_i) / tau
//
// The noise is made chunk by chunk in the first-level cache, forward and backward alike. At tau = 1 and tau = 1/2 it is
// needed as E = exp(-g) only: exp((s + g) / tau) = (exp(s) / E)^(1 / tau) saves the second logarithm.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "dgi/exp.h"
#include "dgi/macros.h"
#include "dgi/softmax_row.h"
#include "dgi/terms.h"

namespace dgi {

constexpr int64_t kNoiseChunk = 256;  // codes whose noise is made at a time

enum class NoiseAs { kNone, kGumbel, kExponential };

// Whether the noise may be taken as E. Larger powers overflow float32: 1 / E goes up to 2^33.
template <class Real>
constexpr bool takes_exponential(Real tau) {
  return std::is_same_v<Real, float> && (tau == 1 || tau == Real(0.5));
}

// The first k with x_k = value; -1 where there is none.
template <class Real>
DGI_HOST_DEVICE int64_t first_equal(const Real* x, int64_t count, Real value) {
  constexpr int64_t kCompared = 64;  // at once
  int64_t k = 0;
  for (; k + kCompared <= count; k += kCompared) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < kCompared; ++i) any |= x[k + i] == value;
    if (any) break;
  }
  for (; k < count; ++k) {
    if (x[k] == value) return k;
  }
  return -1;
}

// The argmax as torch has it, given the maximum of what is not NaN: the first NaN where there is one.
template <class Real>
DGI_HOST_DEVICE int64_t argmax_with_nan(const Real* x, int64_t count, Real maximum) {
  for (int64_t k = 0; k < count; ++k) {
    if (x[k] != x[k]) return k;
  }
  return first_equal(x, count, maximum);
}

template <class Real>
DGI_HOST_DEVICE Real maximum_of(const Real* x, int64_t count) {
  Real maximum = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t k = 0; k < count; ++k) maximum = maximum < x[k] ? x[k] : maximum;
  return maximum;
}

namespace detail {

// Terms come by value: by reference gcc does not vectorise the loop, which made a whole call take 1.3 times as long.
template <bool kFused, bool kHasBias, class Real>
DGI_HOST_DEVICE Real score_row(const Real* products, const CodeTerms<Real> terms, int64_t count, Real* s) {
  Real maximum = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t k = 0; k < count; ++k) {
    const Real value = terms.template score<kFused, kHasBias>(products[k], k);
    s[k] = value;
    maximum = maximum < value ? value : maximum;
  }
  return maximum;
}

}  // namespace detail

// Scores of products that have their row's a_n; returns their maximum. `s` may be `products`.
template <bool kFused, class Real>
DGI_HOST_DEVICE Real score_row(const Real* products, const CodeTerms<Real>& terms, int64_t count, Real* s) {
  return terms.bias == nullptr ? detail::score_row<kFused, false>(products, terms, count, s)
                               : detail::score_row<kFused, true>(products, terms, count, s);
}

struct GumbelSums {
  int64_t sampled;  // argmax of s + g
  double sum;  // of what is written
  double log_normalizer;
};

// Writes exp((s + g) / tau - offset), with the offset of its choice; `out` may be `s`. `maximum` is that of s. Where
// `noisy` is given, s + g is kept there.
template <bool kFused, NoiseAs kAs, class Real, class Noise>
DGI_HOST_DEVICE GumbelSums soften(const Real* s, int64_t codes, Real maximum, Real tau, const Noise& noise, Real* out,
                                  Real* noisy = nullptr) {
  GumbelSums result{0, 0.0, 0.0};
  Real buffer[kNoiseChunk];
  const Real inverse = 1 / tau;
  if constexpr (kAs == NoiseAs::kExponential) {
    Real largest = 0;
    const bool is_squared = tau != 1;
    for (int64_t first = 0; first < codes; first += kNoiseChunk) {
      const int64_t count = first + kNoiseChunk < codes ? kNoiseChunk : codes - first;
      noise.template fill<kFused, kAs>(first, count, buffer);
      const Real* const in = s + first;
      Real *const to = out + first, sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
      for (int64_t k = 0; k < count; ++k) {
        const Real root = exponential_or_zero<kFused>(in[k] - maximum) / buffer[k];
        const Real e = is_squared ? root * root : root;
        to[k] = e;
        sum += e;
        largest = largest < e ? e : largest;
      }
      result.sum += sum;
    }
    result.sampled = first_equal(out, codes, largest);
    result.log_normalizer = static_cast<double>(maximum) / static_cast<double>(tau) + std::log(result.sum);
  } else {
    if constexpr (kAs == NoiseAs::kGumbel) {
      maximum = -std::numeric_limits<Real>::infinity();
      for (int64_t first = 0; first < codes; first += kNoiseChunk) {
        const int64_t count = first + kNoiseChunk < codes ? kNoiseChunk : codes - first;
        noise.template fill<kFused, kAs>(first, count, buffer);
        const Real* const in = s + first;
        Real* const to = out + first;
#pragma omp simd reduction(max : maximum)
        for (int64_t k = 0; k < count; ++k) {
          const Real value = in[k] + buffer[k];
          to[k] = value;
          maximum = maximum < value ? value : maximum;
        }
      }
      s = out;
    }
    result.sampled = first_equal(s, codes, maximum);
    if (result.sampled < 0) result.sampled = argmax_with_nan(s, codes, maximum);
    if (noisy != nullptr) {
      for (int64_t k = 0; k < codes; ++k) noisy[k] = s[k];
    }
    for (int64_t first = 0; first < codes; first += kNoiseChunk) {
      const int64_t count = first + kNoiseChunk < codes ? kNoiseChunk : codes - first;
      const Real* const in = s + first;
      Real *const to = out + first, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < count; ++k) {
        const Real e = exponential_or_zero<kFused>((in[k] - maximum) * inverse);
        to[k] = e;
        sum += e;
      }
      result.sum += sum;
    }
    result.log_normalizer = static_cast<double>(maximum) / static_cast<double>(tau) + std::log(result.sum);
  }
  if (result.sum != result.sum) result.sampled = argmax_with_nan(out, codes, Real{0});
  return result;
}

// What a list may leave out of a row in all: half a unit in the last place of a float32 sum.
constexpr double kNegligibleShare = 0x1p-23;

// Lists the entries that count, at least `share` of the row's mean each. Returns how many, or -1 where there are more
// than `limit`; `index` holds limit + detail::kGroup.
template <class Real>
DGI_HOST_DEVICE int64_t list_row(const Real* e, int64_t codes, double sum, double share, int64_t limit,
                                 int32_t* index) {
  if (!(sum > 0) || !(sum <= 0x1p126)) return -1;
  const Real cut = static_cast<Real>(share * sum / static_cast<double>(codes));
  return detail::list_entries(e, 0, codes, cut, index, 0, limit);
}

// sum_k e_k dp_k
template <bool kFused, class Real>
DGI_HOST_DEVICE double weighted_sum(const Real* e, const Real* dp, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kNoiseChunk) {
    const int64_t last = first + kNoiseChunk < count ? first + kNoiseChunk : count;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = first; k < last; ++k) sum = multiply_add<kFused>(e[k], dp[k], sum);
    total += sum;
  }
  return total;
}

}  // namespace dgi
