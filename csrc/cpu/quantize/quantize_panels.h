// Float32 scores of a few rows against all codes of a level, s_nk = x_n . key_k + b_k, x = a r, in a tile that stays in
// the cache for the pass that reads it.
//
// Keys are packed once for all rows: a panel holds as many codes as two vectors have lanes. A tile of 6 rows (12 where
// there are 32 registers) by one panel stays in registers. Beside a general matrix product nothing is packed for each
// block of rows, and no tile leaves for memory. bench/bench_kmeans.py and bench/bench_assign.py measure it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/quantize/quantize_metric.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/exp.h"

namespace dgi::cpu {

constexpr int64_t kMostPanelDim = 256;  // longer panels leave the first-level cache
constexpr int64_t kLeastPanelRows = 64;  // fewer do not pay for the packing

template <class Isa>
constexpr int kPanelLanes = 2 * Isa::kVectorBytes / static_cast<int>(sizeof(float));
template <class Isa>
constexpr int kPanelRows = Isa::kVectorRegisters == 32 ? 12 : 6;

template <bool kFused, int kRows, int kLanes>
DGI_ALWAYS_INLINE inline void few_scores(const float* x, int64_t dim, const float* panel, const float* bias, float* out,
                                         int64_t stride) {
  float sum[kRows][kLanes] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const float element = x[i * dim + d];
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        sum[i][lane] = multiply_add<kFused>(element, panel[d * kLanes + lane], sum[i][lane]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) out[i * stride + lane] = sum[i][lane] + bias[lane];
  }
}

class Panels {
 public:
  // Of a level without factors. The last panel is filled up by codes that no row chooses.
  Panels(const Level<float>& level, int64_t dim)
      : codes_(level.codes), dim_(dim), longest_(static_cast<double>(level.longest)),
        is_finite_(std::all_of(level.terms.bias, level.terms.bias + level.codes,
                               [](float bias) { return std::isfinite(bias); })) {
    with_best_instructions([&](auto isa) DGI_ALWAYS_INLINE { lanes_ = kPanelLanes<decltype(isa)>; });
    const int64_t panels = (codes_ + lanes_ - 1) / lanes_;
    keys_ = make_buffer<float>(panels * dim * lanes_), bias_ = make_buffer<float>(panels * lanes_);
    parallel_for(panels, grain(dim * lanes_), [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        float* const to = keys_.get() + panel * dim * lanes_;
        for (int64_t lane = 0; lane < lanes_; ++lane) {
          const int64_t code = panel * lanes_ + lane;
          const bool is_code = code < codes_;
          bias_[code] = is_code ? level.terms.bias[code] : -std::numeric_limits<float>::infinity();
          for (int64_t d = 0; d < dim; ++d) {
            to[d * lanes_ + lane] = is_code ? level.keys.data[code * level.keys.row_stride + d] : 0.0f;
          }
        }
      }
    });
  }

  // Whether each score of rows with |c| <= `own` is sure to be finite.
  bool scores_are_finite(float scale, double own) const {
    constexpr double kMost = 1e37;
    const double factor = std::fabs(static_cast<double>(scale));
    return is_finite_ && own < kMost && factor < kMost && factor * longest_ * longest_ < kMost
           && 4 * std::sqrt(factor * own) * longest_ < kMost;
  }

  // Columns of a tile: codes, and those that fill up the last panel.
  int64_t width() const { return (codes_ + lanes_ - 1) / lanes_ * lanes_; }

  // Rows of a tile of at most 128 KB, or the fewest that are efficient.
  int64_t rows_at_once() const { return std::max<int64_t>(12, 32768 / width() / 12 * 12); }

  // out (rows, width) of x (rows, dim).
  template <class Isa>
  DGI_ALWAYS_INLINE void scores(Isa, const float* x, int64_t rows, float* out) const {
    constexpr int kLanes = kPanelLanes<Isa>, kRows = kPanelRows<Isa>;
    const int64_t stride = width();
    for (int64_t first = 0; first < stride; first += kLanes) {
      const float *const panel = keys_.get() + first * dim_, *const bias = bias_.get() + first;
      int64_t i = 0;
      for (; i + kRows <= rows; i += kRows) {
        few_scores<Isa::value, kRows, kLanes>(x + i * dim_, dim_, panel, bias, out + i * stride + first, stride);
      }
      for (; i < rows; ++i) {
        few_scores<Isa::value, 1, kLanes>(x + i * dim_, dim_, panel, bias, out + i * stride + first, stride);
      }
    }
  }

 private:
  int64_t codes_, dim_, lanes_ = 0;
  double longest_;
  bool is_finite_;
  Buffer<float> keys_, bias_;
};

// Of the Euclidean metric: the others have factors, and no check of codes that are within rounding of each other.
inline bool panels_pay(const Quantize<float>& in) {
  return in.metric == Metric::kEuclidean && in.rows >= kLeastPanelRows && in.dim >= 4 && in.dim <= kMostPanelDim;
}

// The largest number of a row, and bounds: no other number is larger than `second`, and no number but one in each of 16
// lanes is larger than `rest`. `second` equals `first` where two numbers do.
struct TwoLargest {
  float first, second, rest;
};

// `count` is a multiple of 16 or less than that, and no x is NaN.
DGI_ALWAYS_INLINE inline TwoLargest two_largest(const float* x, int64_t count) {
  constexpr int kLanes = 16;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float first[kLanes], second[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) first[lane] = second[lane] = kNone;
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = x[k + lane], lower = value < first[lane] ? value : first[lane];
      second[lane] = second[lane] < lower ? lower : second[lane];
      first[lane] = first[lane] < value ? value : first[lane];
    }
  }
  for (int lane = 0; k < count; ++k, ++lane) {
    second[lane] = std::max(second[lane], std::min(x[k], first[lane]));
    first[lane] = std::max(first[lane], x[k]);
  }
  float most = kNone, rest = kNone;
#pragma omp simd reduction(max : most, rest)
  for (int lane = 0; lane < kLanes; ++lane) {
    most = most < first[lane] ? first[lane] : most;
    rest = rest < second[lane] ? second[lane] : rest;
  }
  int holders = 0;
  float next = kNone;
#pragma omp simd reduction(max : next) reduction(+ : holders)
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool holds = first[lane] == most;
    holders += holds;
    const float other = holds ? kNone : first[lane];
    next = next < other ? other : next;
  }
  return {most, holders > 1 ? most : std::max(rest, next), rest};
}

}  // namespace dgi::cpu
