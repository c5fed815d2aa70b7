// Products of a matrix with a panel whose rows are lanes: an element of the matrix is multiplied with a whole row of
// the panel, and nothing is summed across lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/shared/isa.h"
#include "dgi/exp.h"

namespace dgi::cpu {

// Where the products of a matrix with a panel go.
enum class Emit { kStore, kAdd, kGelu };

// x/2 erfc(-x/sqrt(2)), with erfc as a polynomial in 1/(1 + |x|/2) times exp(-x^2), whose relative error is below
// 1.2e-7 on the whole line (Press et al., Numerical Recipes, 6.2).
template <bool kFused>
DGI_ALWAYS_INLINE inline float gelu(float x) {
  const float z = std::abs(x) * 0.70710678f, t = 1 / multiply_add<kFused>(z, 0.5f, 1.0f);
  float p = 0.17087277f;
  p = multiply_add<kFused>(p, t, -0.82215223f);
  p = multiply_add<kFused>(p, t, 1.48851587f);
  p = multiply_add<kFused>(p, t, -1.13520398f);
  p = multiply_add<kFused>(p, t, 0.27886807f);
  p = multiply_add<kFused>(p, t, -0.18628806f);
  p = multiply_add<kFused>(p, t, 0.09678418f);
  p = multiply_add<kFused>(p, t, 0.37409196f);
  p = multiply_add<kFused>(p, t, 1.00002368f);
  p = multiply_add<kFused>(p, t, -1.26551223f);
  const float tail = 0.5f * x * t * exponential_or_zero<kFused>(multiply_add<kFused>(-z, z, p));
  return x > 0 ? x - tail : tail;
}

// Rows [0, kOut) of the products of `matrix` (element (o, k) at o row_stride + k column_stride) with a panel (in,
// kLanes) of rows `panel_stride` apart.
template <bool kFused, Emit kEmit, int kOut, int kLanes>
DGI_ALWAYS_INLINE inline void few_products(const float* matrix, int64_t row_stride, int64_t column_stride,
                                           const float* bias, int64_t in, const float* panel, int64_t panel_stride,
                                           float* out, int64_t out_stride) {
  float sum[kOut][kLanes] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < in; ++k) {
#pragma GCC unroll 24
    for (int o = 0; o < kOut; ++o) {
      const float element = matrix[o * row_stride + k * column_stride];
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        sum[o][lane] = multiply_add<kFused>(element, panel[k * panel_stride + lane], sum[o][lane]);
      }
    }
  }
#pragma GCC unroll 24
  for (int o = 0; o < kOut; ++o) {
    const float add = bias == nullptr ? 0 : bias[o];
    float* const row = out + o * out_stride;
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = sum[o][lane] + add;
      if constexpr (kEmit == Emit::kAdd) row[lane] += value;
      if constexpr (kEmit == Emit::kStore) row[lane] = value;
      if constexpr (kEmit == Emit::kGelu) row[lane] = gelu<kFused>(value);
    }
  }
}

template <bool kFused, Emit kEmit, int kOut, int kLanes>
DGI_ALWAYS_INLINE inline void products(const float* matrix, int64_t row_stride, int64_t column_stride,
                                       const float* bias, int64_t rows, int64_t in, const float* panel,
                                       int64_t panel_stride, float* out, int64_t out_stride) {
  int64_t o = 0;
  const auto next = [&](auto count) DGI_ALWAYS_INLINE {
    constexpr int kCount = decltype(count)::value;
    for (; o + kCount <= rows; o += kCount) {
      few_products<kFused, kEmit, kCount, kLanes>(matrix + o * row_stride, row_stride, column_stride,
                                                  bias == nullptr ? nullptr : bias + o, in, panel, panel_stride,
                                                  out + o * out_stride, out_stride);
    }
  };
  next(std::integral_constant<int, kOut>{});
  if constexpr (kOut > 4) next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 1>{});
}

}  // namespace dgi::cpu
