// log-sum-exp of float32 numbers in one pass.
//
//   sum += sum_k exp(x_k - offset),   offset = the largest number of the first block
//
// Blocks after the first are not looked through for their largest number: the offset serves as long as their sum shows
// that none of them lies far above it. Where one does, the sum is closed, and the block begins another.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/shared/isa.h"
#include "dgi/convert.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {

// Adds the terms of some numbers, whichever lane each goes to.
template <class Terms, class Stored, int kLanes>
DGI_HOST_DEVICE void add_some(const Terms& terms, const Stored* x, float (&sum)[kLanes]) {
  if constexpr (std::is_same_v<Stored, float>) {
    terms.add(x, sum);
    return;
  }
  float values[kLanes];
  if constexpr (std::is_same_v<Stored, BFloat16>) {  // two to a word: one operation for each
    constexpr int kWords = kLanes / 2;
    typedef uint32_t Word __attribute__((may_alias, aligned(2)));
    const Word* const words = reinterpret_cast<const Word*>(x);
#pragma omp simd
    for (int i = 0; i < kWords; ++i) values[i] = std::bit_cast<float>(words[i] << 16);
#pragma omp simd
    for (int i = 0; i < kWords; ++i) values[kWords + i] = std::bit_cast<float>(words[i] & 0xFFFF0000u);
  } else {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) values[i] = load(x[i]);
  }
  terms.add(values, sum);
}

// The largest of some numbers.
DGI_NEVER_INLINE inline float largest_of(const float* x, int64_t count) {
  float largest = 0;
  with_best_instructions([&](auto) DGI_ALWAYS_INLINE { largest = LogSumExp<float>::largest_of(x, count); });
  return largest;
}

// sum_k exp(x_k - offset) for |offset| <= kMost; more than kMostSum, or NaN, where a number lies too far above the
// offset (or where this machine has no quick way). Numbers `ahead` places behind start on their way to the cache.
//
// Compiled by itself: in the midst of other code the sums do not stay in registers.
template <class Stored>
DGI_NEVER_INLINE float power_sum(const float& offset, const Stored* x, int64_t count, int64_t ahead) {
  float result = std::numeric_limits<float>::quiet_NaN();
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
    if constexpr (fused.value) {
      constexpr int kLanes = fused.kVectorRegisters / 8 * fused.kVectorBytes / 4, kLine = 64 / sizeof(Stored);
      const PowerTerms<kLanes, 1, true> terms(&offset);
      const int64_t whole = count / kLanes * kLanes;
      float sum[kLanes] = {}, total = 0;
      for (int64_t k = 0; k < whole; k += kLanes) {
        for (int line = 0; line < kLanes; line += kLine) prefetch_line(x + k + ahead + line);
        add_some(terms, x + k, sum);
      }
#pragma omp simd reduction(+ : total)
      for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
      if (whole < count) {
        float rest[kLanes], of_rest[kLanes] = {};
        for (int i = 0; i < kLanes; ++i) rest[i] = whole + i < count ? load(x[whole + i]) : terms.lowest[0];
        terms.add(rest, of_rest);
        for (int lane = 0; lane < kLanes; ++lane) total += of_rest[lane];
      }
      result = total / terms.largest[0];
    }
  });
  return result;
}

class RunningSum {
 public:
  // A block of numbers, of which `plain()` gives the float32 numbers where they are needed otherwise.
  template <class Stored, class Plain>
  void add(const Stored* x, int64_t count, int64_t ahead, const Plain& plain) {
    if (is_open_) {
      const float sum = power_sum(offset_, x, count, ahead);
      if (sum <= kMostSum) {
        sum_ += sum;
        return;
      }
      close();
    }
    const float* const values = plain();
    offset_ = largest_of(values, count);
    if (std::abs(offset_) <= kMost) {
      const float sum = power_sum(offset_, x, count, ahead);
      is_open_ = sum <= kMostSum;
      if (is_open_) {
        sum_ = sum;
        return;
      }
    }
    closed_.add<false>(values, count);
  }

  LogSumExp<float> sum() {
    if (is_open_) close();
    return closed_;
  }

 private:
  static constexpr float kMost = PowerTerms<1, 1, true>::kMost, kMostSum = PowerTerms<1, 1, true>::kMostSum;

  void close() {
    closed_.add<false>(LogSumExp<float>{offset_, static_cast<float>(sum_)});
    is_open_ = false;
  }

  LogSumExp<float> closed_;
  float offset_ = 0;
  double sum_ = 0;
  bool is_open_ = false;
};

}  // namespace dgi::cpu
