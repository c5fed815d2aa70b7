// What a metric makes of rows and codes: the terms of s_nk = a_n S_nk f_k + b_k + c_n (dgi/terms.h), S = r . e, and
// their gradients.
//
//   cosine       a = scale / ||r||,   f = 1 / ||e||
//   dot product  a = scale,           f = 1
//   Euclidean    a = 2 scale,         f = 1,   b = -scale ||e||^2,   c = -scale ||r||^2:   s = -scale ||r - e||^2
//
// The Euclidean metric takes r and e relative to the mean of the level's codes, lest the squares cancel where all of
// them are far from 0: distances do not change, nor do gradients. c is the same for all codes: it shows in the
// log-normalizer and in gradients of that alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/quantize/quantize_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/terms.h"
#include "dgi/vector.h"

namespace dgi::cpu {

// One level's codebook.
template <class Real>
struct Level {
  int64_t number, first, codes;  // first: of all codes
  Matrix<Real> vectors;          // E, what is emitted
  Matrix<Real> keys;             // E as rows are compared with it
  Matrix<Real> values;           // V, mixed as E is; its width may be 0
  const Real* centre;            // what keys are relative to; null: 0
  CodeTerms<Real> terms;
  const Real* length;  // ||e|| of the keys, where the metric needs it, else null
  Real longest;  // the largest of them
};

template <class Real>
class Codebooks {
 public:
  explicit Codebooks(const Quantize<Real>& in)
      : dim_(in.dim), factor_(make_buffer<Real>(total(in))), is_relative_(in.metric == Metric::kEuclidean),
        keys_(make_buffer<Real>(is_relative_ ? total(in) * in.dim : 0)),
        centres_(make_buffer<Real>(is_relative_ ? in.levels() * in.dim : 0)), square_(is_relative_ ? total(in) : 0),
        bias_(make_buffer<Real>(is_relative_ ? total(in) : 0)),
        length_(make_buffer<Real>(is_relative_ ? total(in) : 0)) {
    int64_t first = 0;
    for (int64_t number = 0; number < in.levels(); ++number) {
      const int64_t codes = in.sizes[number];
      const Matrix<Real> vectors{const_cast<Real*>(in.codebooks) + first * in.dim, codes, in.dim};
      const Matrix<Real> values{const_cast<Real*>(in.values) + first * in.width, codes, in.width};
      levels_.push_back({number, first, codes, vectors, vectors, values, nullptr, {factor_.get() + first}, nullptr, 0});
      if (is_relative_) make_relative(in, levels_.back());
      first += codes;
    }
    const bool divides = in.metric == Metric::kCosine;
    parallel_for(first, grain(in.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          factor_[k] = divides ? reciprocal_norm<fused.value>(in.codebooks + k * in.dim, in.dim, in.eps) : Real{1};
        }
      });
    });
  }

  const Level<Real>& operator[](int64_t level) const { return levels_[level]; }
  int64_t codes() const { return levels_.back().first + levels_.back().codes; }
  Real factor(int64_t code) const { return factor_[code]; }
  bool have_bias() const { return levels_.front().terms.bias != nullptr; }
  double bias_per_scale(int64_t code) const { return -square_[code]; }
  const Real* keys() const { return levels_.front().keys.data; }

 private:
  static int64_t total(const Quantize<Real>& in) {
    return std::accumulate(in.sizes.begin(), in.sizes.end(), int64_t{0});
  }

  void make_relative(const Quantize<Real>& in, Level<Real>& level) {
    const Real* const e = level.vectors.data;
    Real *const centre = centres_.get() + level.number * dim_, *const keys = keys_.get() + level.first * dim_;
    std::vector<double> sums(dim_, 0.0);
    double* const sum = sums.data();
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
      for (int64_t k = 0; k < level.codes; ++k) {
        const Real* const from = e + k * dim_;
#pragma omp simd
        for (int64_t d = 0; d < dim_; ++d) sum[d] += static_cast<double>(from[d]);
      }
    });
    for (int64_t d = 0; d < dim_; ++d) centre[d] = static_cast<Real>(sum[d] / static_cast<double>(level.codes));
    parallel_for(level.codes, grain(dim_), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          const Real* const from = e + k * dim_;
          Real* const to = keys + k * dim_;
          double square = 0;
#pragma omp simd reduction(+ : square)
          for (int64_t d = 0; d < dim_; ++d) {
            const Real key = from[d] - centre[d];
            to[d] = key;
            square += static_cast<double>(key) * static_cast<double>(key);
          }
          square_[level.first + k] = square;
          length_[level.first + k] = static_cast<Real>(std::sqrt(square));
          bias_[level.first + k] = static_cast<Real>(-static_cast<double>(in.scale) * square);
        }
      });
    });
    level.length = length_.get() + level.first;
    level.longest = *std::max_element(level.length, level.length + level.codes);
    level.keys.data = keys, level.centre = centre, level.terms.bias = bias_.get() + level.first;
  }

  int64_t dim_;
  Buffer<Real> factor_;
  bool is_relative_;
  Buffer<Real> keys_, centres_;
  std::vector<double> square_;
  Buffer<Real> bias_, length_;
  std::vector<Level<Real>> levels_;
};

template <class Real>
struct RowTerms {
  Real factor;     // a / scale
  double own = 0;  // c
};

// out = a r, of one row.
template <bool kFused, class Real>
DGI_HOST_DEVICE RowTerms<Real> start_row(const Quantize<Real>& in, const Level<Real>& level, const Real* r, Real* out) {
  const Real scale = in.scale;
  if (in.metric == Metric::kEuclidean) {
    const Real* const centre = level.centre;
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < in.dim; ++d) {
      const Real x = r[d] - centre[d];
      out[d] = scale * (2 * x);
      square += static_cast<double>(x) * static_cast<double>(x);
    }
    return {2, -static_cast<double>(scale) * square};
  }
  const Real factor = in.metric == Metric::kCosine ? reciprocal_norm<kFused>(r, in.dim, in.eps) : Real{1};
#pragma omp simd
  for (int64_t d = 0; d < in.dim; ++d) out[d] = scale * (factor * r[d]);
  return {factor};
}

// The gradient of r, from u = (T E)_n, in the place of u; dscale's part of the row. `dlog` is the gradient of the row's
// log-normalizer, in units of a score: the sum of all ds.
template <bool kFused, class Real>
DGI_HOST_DEVICE double finish_row(const Quantize<Real>& in, const Level<Real>& level, const Real* r, Real factor,
                                  double dlog, Real* u) {
  if (in.metric == Metric::kEuclidean) {
    const Real* const centre = level.centre;
    const double twice = 2 * static_cast<double>(in.scale);
    double along = 0, square = 0;
#pragma omp simd reduction(+ : along, square)
    for (int64_t d = 0; d < in.dim; ++d) {
      const double x = static_cast<double>(r[d] - centre[d]), ud = static_cast<double>(u[d]);
      along += x * ud;
      square += x * x;
      u[d] = static_cast<Real>(twice * (ud - dlog * x));
    }
    return 2 * along - dlog * square;
  }
  const double dscale = static_cast<double>(factor) * dot<kFused>(r, u, in.dim);
  if (in.metric == Metric::kCosine) {
    through_normalization<kFused>(r, u, in.dim, factor, in.eps, in.scale * factor, u);
  } else {
#pragma omp simd
    for (int64_t d = 0; d < in.dim; ++d) u[d] *= in.scale;
  }
  return dscale;
}

// What the gradient of a code's key lacks yet, as a factor of the key. `sum` is over all rows: with a bias of ds,
// without of ds s.
template <class Real>
Real finish_code(const Quantize<Real>& in, Real factor, double sum) {
  switch (in.metric) {
    case Metric::kCosine: {
      const bool is_short = factor == 1 / in.eps;  // eps took the place of the norm: nothing is radial
      const double rnorm = factor;
      return static_cast<Real>(-rnorm * rnorm * (is_short ? 0.0 : sum));
    }
    case Metric::kDot: return 0;
    case Metric::kEuclidean: return static_cast<Real>(-2 * static_cast<double>(in.scale) * sum);
  }
  return 0;
}

// The nearest code of a row, by distances in float64 of all codes that may have the best score.
//
// Rounding of a score grows with the code's own length: |error_k| <= h_k = c eps scale ||e_k|| (||r|| + ||e_k|| / 2),
// so code k may be the best if s_k + h_k >= s_best - h_best. A bound by the longest code would recheck all short ones.
template <class Real>
class Nearest {
 public:
  Nearest() = default;

  // `own` is the row's: -scale ||r||^2.
  Nearest(const Quantize<Real>& in, const Level<Real>& level, const Real* r, double own)
      : in_(&in), level_(&level), r_(r) {
    const double scale = std::fabs(static_cast<double>(in.scale));
    const double row = scale > 0 ? std::sqrt(std::fabs(own) / scale) : 0.0;
    const double c = std::numeric_limits<Real>::epsilon() * (6 + std::sqrt(static_cast<double>(in.dim)));
    by_length_ = static_cast<Real>(c * scale * row), by_square_ = static_cast<Real>(c * scale / 2);
  }

  // Scores x of `count` codes from `first` on, and their maximum; `leader` has the largest of all so far,
  // -1 where all are NaN. A distance is taken only of two codes that are within rounding of each other.
  DGI_HOST_DEVICE void take(const Real* x, int64_t first, int64_t count, Real maximum, int64_t leader) {
    constexpr int64_t kCompared = 16;  // at once: one by one they are compared where one of them is near
    best_score_ = std::max(best_score_, static_cast<double>(maximum));
    if (leader < 0) return;
    certain_ = std::max(certain_, best_score_ - static_cast<double>(rounding(level_->length[leader])));
    const Real cut = static_cast<Real>(certain_);
    if (maximum + rounding(level_->longest) < cut) return;
    if (possible_ < cut) code_ = -1;  // what was best before is not near it
    const Real *const length = level_->length + first, by_length = by_length_, by_square = by_square_;
    for (int64_t begin = 0; begin < count; begin += kCompared) {
      const int64_t end = std::min(count, begin + kCompared);
      int any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t k = begin; k < end; ++k) {
        any |= !(x[k] + length[k] * (by_length + length[k] * by_square) < cut);
      }
      for (int64_t k = begin; any && k < end; ++k) {
        const Real possible = x[k] + rounding(length[k]);
        if (!(possible < cut)) consider(first + k, possible);
      }
    }
  }

  // Whether no code can be nearer than the one of score `first`, if no other score is above `second`.
  DGI_HOST_DEVICE bool is_certain(Real first, Real second) const {
    return first - second > 2 * rounding(level_->longest);
  }

  int64_t code() const { return code_; }

 private:
  DGI_HOST_DEVICE Real rounding(Real length) const { return length * (by_length_ + length * by_square_); }

  DGI_NEVER_INLINE void consider(int64_t code, Real possible) {
    if (code_ >= 0) {
      const double sign = in_->scale == 0 ? 0 : in_->scale < 0 ? -1 : 1;
      if (!is_measured_) distance_ = sign * square_distance(code_);
      is_measured_ = true;
      const double distance = sign * square_distance(code);
      if (!(distance < distance_)) return;
      distance_ = distance;
    } else {
      is_measured_ = false;
    }
    code_ = code, possible_ = possible;
  }

  double square_distance(int64_t code) const {
    const Real *const r = r_, *const e = level_->vectors.data + code * in_->dim;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < in_->dim; ++d) {
      const double difference = static_cast<double>(r[d]) - static_cast<double>(e[d]);
      sum += difference * difference;
    }
    return sum;
  }

  const Quantize<Real>* in_ = nullptr;
  const Level<Real>* level_ = nullptr;
  const Real* r_ = nullptr;
  Real by_length_ = 0, by_square_ = 0;  // of h
  double best_score_ = -std::numeric_limits<double>::infinity();
  double certain_ = -std::numeric_limits<double>::infinity();  // the best score is no lower
  double distance_ = 0;  // of code_, if is_measured_
  Real possible_ = -std::numeric_limits<Real>::infinity();  // the score of code_ is no higher
  bool is_measured_ = false;
  int64_t code_ = -1;
};

}  // namespace dgi::cpu
