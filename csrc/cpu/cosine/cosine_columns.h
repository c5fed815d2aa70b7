// What columns have beside their vectors: their terms of the scores, which of them are the same item, and the sums of
// their gradients. cosine.cpp has the symbols. An option of columns is a member of Cosine or CrossEntropy, and is
// worked off here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/cosine/cosine_cpu.h"
#include "cpu/shared/host.h"
#include "dgi/softmax_row.h"
#include "dgi/terms.h"

namespace dgi::cpu::cosine {

// The terms of scores that `gain` is still to be multiplied with. A bias of zeros is made for scales that need the
// scores of one (dgi/softmax_row.h).
template <class Stored>
class ColumnTerms {
 public:
  using Real = Compute<Stored>;

  ColumnTerms(const Cosine<Stored>& in, double gain)
      : bias_(in.bias), largest_score_(std::abs(static_cast<double>(in.scale))) {
    if (bias_ == nullptr) {
      if (largest_score_ > kMaxScoreWithoutBias) own_bias_.assign(in.codes, Real{0});
      return;
    }
    Real largest = 0;
    for (int64_t k = 0; k < in.codes; ++k) {
      const Real size = std::abs(bias_[k]);
      if (std::isfinite(size))
        largest = std::max(largest, size);
      else if (bias_[k] > 0)
        largest = std::numeric_limits<Real>::infinity();
    }
    largest_score_ += static_cast<double>(largest);
    if (gain == 1) return;
    own_bias_.resize(in.codes);
    for (int64_t k = 0; k < in.codes; ++k) own_bias_[k] = static_cast<Real>(bias_[k] / gain);
  }

  CodeTerms<Real> terms(const Real* factor) const { return {factor, own_bias_.empty() ? bias_ : own_bias_.data()}; }

  // A bound of all |s|, but for biases that are infinite.
  double largest_score() const { return largest_score_; }

 private:
  const Real* bias_;
  double largest_score_;
  std::vector<Real> own_bias_;
};

// The columns of every item. An item's columns lie side by side, ascending.
class ItemColumns {
 public:
  // `item_of` (codes) may be null: every column is an item of its own.
  ItemColumns(const int64_t* item_of, int64_t codes) {
    if (item_of == nullptr) return;
    columns_.resize(codes);
    std::iota(columns_.begin(), columns_.end(), int64_t{0});
    std::stable_sort(columns_.begin(), columns_.end(), [=](int64_t a, int64_t b) { return item_of[a] < item_of[b]; });
    first_.resize(codes), count_.resize(codes);
    for (int64_t begin = 0, end = 0; begin < codes; begin = end) {
      while (end < codes && item_of[columns_[end]] == item_of[columns_[begin]]) ++end;
      for (int64_t i = begin; i < end; ++i) first_[columns_[i]] = begin, count_[columns_[i]] = end - begin;
    }
  }

  // Those of the item of `column`, itself among them; null where all columns differ.
  const int64_t* same_as(int64_t column) const { return columns_.empty() ? nullptr : columns_.data() + first_[column]; }
  int64_t count(int64_t column) const { return columns_.empty() ? 1 : count_[column]; }

 private:
  std::vector<int64_t> columns_, first_, count_;
};

// sum_n g_nk over rows n: of a few rows at a time in Real, each group in a row of its own while it is in the cache, and
// of groups in float64. The order is that of the rows, whatever the number of threads.
template <class Real>
class ColumnSums {
 public:
  static constexpr int64_t kRows = 16;  // of a group

  // Of so many rows at a time; nothing is summed that has no place in `out`.
  template <class Stored>
  ColumnSums(const CosineGradients<Stored>& out, int64_t codes, int64_t rows)
      : codes_(out.dbias != nullptr ? codes : 0), groups_(make_buffer<Real>((rows + kRows - 1) / kRows * codes_)),
        total_(codes_, 0.0) {}

  bool is_wanted() const { return codes_ > 0; }

  // The sums of a group that starts.
  Real* start(int64_t group) const {
    if (!is_wanted()) return nullptr;
    Real* const sums = groups_.get() + group * codes_;
    std::fill_n(sums, codes_, Real{0});
    return sums;
  }

  // What every column gets.
  void add_to_all(double even) { even_ += even; }

  // The sums of the first `groups` are complete.
  void add_groups(int64_t groups) {
    parallel_for(codes_, grain(groups), [&](int64_t first, int64_t last) {
      for (int64_t group = 0; group < groups; ++group) {
        const Real* const sums = groups_.get() + group * codes_;
        for (int64_t k = first; k < last; ++k) total_[k] += static_cast<double>(sums[k]);
      }
    });
  }

  // The sums over the rows of all `shares` go to `out`.
  template <class Stored>
  static void finish(const std::vector<const ColumnSums*>& shares, const CosineGradients<Stored>& out) {
    for (int64_t k = 0; k < shares[0]->codes_; ++k) {
      double sum = 0;
      for (const ColumnSums* share : shares) sum += share->total_[k] + share->even_;
      out.dbias[k] = static_cast<Real>(sum);
    }
  }

 private:
  const int64_t codes_;
  Buffer<Real> groups_;
  std::vector<double> total_;
  double even_ = 0;
};

}  // namespace dgi::cpu::cosine
