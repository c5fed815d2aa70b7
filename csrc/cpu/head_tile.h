// A tile of scaled cosine logits of many hidden states with all codes, and their log-sum-exps, made in one pass.
//
//   logit(row, k) = scale h^_row . e^_k
//
// Rows stand side by side in panels, one to a lane, so that a code's element is multiplied with all rows of a panel at
// once, the codebook is read where it lies, and nothing is ever summed across lanes. The products of a few codes with a
// panel stay in registers over the whole dimension. A block of codes stays in the second-level cache while all panels
// pass by; its logits are still in the first-level cache when their exponentials are summed.
//
// A row's bits do not depend on which rows share its panel, nor on the number of threads: the sums over blocks are put
// together in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "beam.h"
#include "dgi/log_sum_exp.h"
#include "dgi/vector.h"
#include "host.h"
#include "isa.h"

namespace dgi::cpu {

// `logits` (kCodes, kLanes) = products of kCodes codes with a panel (dim, kLanes), each times the code's factor. +inf
// becomes the largest number.
template <bool kFused, int kCodes, int kLanes, class Real>
DGI_ALWAYS_INLINE inline void panel_logits(const Real* const* codes, const Real* factors, const Real* panel, int64_t dim,
                                           Real* logits) {
  Real sum[kCodes][kLanes] = {};
  for (int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 24
    for (int c = 0; c < kCodes; ++c) {
      const Real element = codes[c][d];
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        sum[c][lane] = multiply_add<kFused>(element, panel[d * kLanes + lane], sum[c][lane]);
      }
    }
  }
  for (int c = 0; c < kCodes; ++c) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real logit = sum[c][lane] * factors[c];
      logits[c * kLanes + lane] = logit > std::numeric_limits<Real>::max() ? std::numeric_limits<Real>::max() : logit;
    }
  }
}

// Adds exp(logit - offset) to the sums lane by lane, none of which becomes less than 1. False, and nothing is done, where
// the quick way does not do.
template <bool kFused, int kLanes, class Real>
DGI_ALWAYS_INLINE inline bool add_power_terms(const Real* logits, int64_t count, const Real (&offset)[kLanes],
                                              Real (&sum)[kLanes]) {
  if constexpr (kFused && std::is_same_v<Real, float>) {
    using Terms = PowerTerms<kLanes, kLanes>;
    if (std::any_of(offset, offset + kLanes, [](float x) { return std::abs(x) > Terms::kMost; })) return false;
    const Terms terms(offset);
    for (int64_t k = 0; k < count; ++k) terms.add(logits + k * kLanes, sum);
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = std::max(1.0f, sum[lane] / terms.largest[lane]);
    return true;
  }
  return false;
}

// Lane by lane the largest of `count` logits and the sum of exp(logit - largest); 0 where all are NaN or -inf.
template <bool kFused, int kLanes, class Real>
DGI_ALWAYS_INLINE inline void panel_sums(const Real* logits, int64_t count, Real* maxima, Real* sums) {
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  Real largest[kLanes], offset[kLanes], sum[kLanes] = {};
  std::fill(largest, largest + kLanes, kNone);
  for (int64_t k = 0; k < count; ++k) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real logit = logits[k * kLanes + lane];
      largest[lane] = logit > largest[lane] ? logit : largest[lane];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) offset[lane] = largest[lane] == kNone ? 0 : largest[lane];
  if (!add_power_terms<kFused>(logits, count, offset, sum)) {
    for (int64_t k = 0; k < count; ++k) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        sum[lane] += exponential_term<kFused>(logits[k * kLanes + lane] - offset[lane]);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    maxima[lane] = largest[lane];
    sums[lane] = largest[lane] == kNone ? 0 : sum[lane];
  }
}

template <class Stored>
class HeadTile {
 public:
  using Real = Compute<Stored>;

  HeadTile(const CosineLogits<Stored>& head, int64_t max_rows, bool wants_mean)
      : head_(head), blocks_((head.codes + kBlock - 1) / kBlock), rnorm_(make_buffer<Real>(head.codes)) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE { lanes_ = 2 * fused.kVectorBytes / static_cast<int>(sizeof(Real)); });
    const int64_t panels = (max_rows + lanes_ - 1) / lanes_;
    rows_ = make_buffer<Real>(panels * lanes_ * head.dim);
    logits_ = make_buffer<Real>(panels * lanes_ * blocks_ * kBlock);
    maxima_ = make_buffer<Real>(panels * lanes_ * blocks_);
    sums_ = make_buffer<Real>(panels * lanes_ * blocks_);
    if constexpr (!kInPlace) converted_ = make_buffer<Real>(head.codes * head.dim);
    const Buffer<Real> sums = make_buffer<Real>(wants_mean ? blocks_ * head.dim : 0);
    parallel_for(blocks_, grain(kBlock * head.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t block = first; block < last; ++block) {
          read_block<fused.value>(block, wants_mean ? sums.get() + block * head.dim : nullptr);
        }
      });
    });
    if (!wants_mean) return;
    mean_.assign(head.dim, Real{0});
    const Real factor = 1 / static_cast<Real>(head.codes);
    for (int64_t i = 0; i < blocks_ * head.dim; ++i) mean_[i % head.dim] += factor * sums[i];
  }

  // How many rows the next tile will have; each is to be set.
  void start(int64_t rows) {
    const int64_t in_last = rows % lanes_;  // their panel is padded with zeros, and narrower where half of it will do
    last_lanes_ = in_last == 0 || 2 * in_last > lanes_ ? lanes_ : lanes_ / 2;
    panels_ = (rows + lanes_ - 1) / lanes_;
    if (in_last != 0) {
      Real* const panel = rows_.get() + (panels_ - 1) * lanes_ * head_.dim;
      std::fill(panel, panel + last_lanes_ * head_.dim, Real{0});
    }
  }

  // Row `row` is scale h^.
  void set(int64_t row, const Stored* h) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      const Real factor = head_.scale, rnorm = reciprocal_norm<fused.value>(h, head_.dim, head_.eps);
      const int64_t panel = row / lanes_, lanes = lanes_of(panel);
      Real* const out = rows_.get() + panel * lanes_ * head_.dim + row % lanes_;
      for (int64_t d = 0; d < head_.dim; ++d) out[d * lanes] = factor * (rnorm * load(h[d]));
    });
  }

  // Makes the tile, and the log-sum-exps where they are wanted.
  void compute(bool wants_sums) {
    parallel_for(blocks_ * panels_, grain(kBlock * lanes_ * head_.dim / 16), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        constexpr int kWidth = fused.kVectorBytes / static_cast<int>(sizeof(Real));
        constexpr int kSums = fused.kVectorRegisters * 3 / 4;
        for (int64_t i = first; i < last; ++i) {
          const int64_t block = i / panels_, panel = i % panels_;
          if (lanes_of(panel) == 2 * kWidth) {
            compute_block<fused.value, kSums / 2, 2 * kWidth>(block, panel, wants_sums);
          } else {
            compute_block<fused.value, kSums, kWidth>(block, panel, wants_sums);
          }
        }
      });
    });
  }

  // A row's logit of code k lies at logits(row)[k * stride(row)].
  const Real* logits(int64_t row) const { return tile(row / lanes_) + row % lanes_; }
  int64_t stride(int64_t row) const { return lanes_of(row / lanes_); }

  template <bool kFused>
  DGI_ALWAYS_INLINE inline LogSumExp<Real> log_sum_exp(int64_t row) const {
    LogSumExp<Real> sum;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t at = (row / lanes_ * blocks_ + block) * lanes_ + row % lanes_;
      sum.template add<kFused>(LogSumExp<Real>{maxima_[at], sums_[at]});
    }
    return sum;
  }

  // mean_k e^_k, where it was wanted: what is summed at once are the codes of a block, then the blocks.
  const Real* mean() const { return mean_.data(); }
  static constexpr int64_t kBlock = 96;  // codes; a multiple of what is multiplied at once

  // (codes, dim) and the reciprocal norms of its rows
  const Real* codebook() const { return kInPlace ? reinterpret_cast<const Real*>(head_.codebook) : converted_.get(); }
  const Real* rnorm() const { return rnorm_.get(); }

 private:
  static constexpr bool kInPlace = std::is_same_v<Stored, Real>;  // the codebook needs no conversion

  // The norms of a block of codes, and their sum.
  template <bool kFused>
  DGI_ALWAYS_INLINE inline void read_block(int64_t block, Real* sum) {
    const int64_t dim = head_.dim, from = block * kBlock, count = std::min(kBlock, head_.codes - from);
    int32_t all[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = from + i;
      all[i] = static_cast<int32_t>(i);
      rnorm_[k] = reciprocal_norm<kFused>(head_.codebook + k * dim, dim, head_.eps);
      if constexpr (!kInPlace) {
        for (int64_t d = 0; d < dim; ++d) converted_[k * dim + d] = load(head_.codebook[k * dim + d]);
      }
    }
    if (sum == nullptr) return;
    std::fill(sum, sum + dim, Real{0});
    add_rows<kFused>(all, rnorm_.get() + from, count, codebook() + from * dim, dim, sum);
  }

  int64_t lanes_of(int64_t panel) const { return panel == panels_ - 1 ? last_lanes_ : lanes_; }
  Real* tile(int64_t panel) const { return logits_.get() + panel * lanes_ * blocks_ * kBlock; }

  template <bool kFused, int kCodes, int kLanes>
  DGI_ALWAYS_INLINE inline void compute_block(int64_t block, int64_t panel, bool wants_sums) {
    static_assert(kBlock % kCodes == 0);
    const Real* const x = rows_.get() + panel * lanes_ * head_.dim;
    const int64_t first = block * kBlock, last = std::min(head_.codes, first + kBlock);
    Real* const logits = tile(panel) + first * kLanes;
    for (int64_t k = first; k < last; k += kCodes) {
      const Real* codes[kCodes];
      Real factors[kCodes];
      for (int64_t c = 0; c < kCodes; ++c) {  // behind the last code it is repeated, which nobody reads
        const int64_t code = std::min(k + c, last - 1);
        codes[c] = codebook() + code * head_.dim;
        factors[c] = rnorm_[code];
      }
      panel_logits<kFused, kCodes, kLanes>(codes, factors, x, head_.dim, logits + (k - first) * kLanes);
    }
    const int64_t at = (panel * blocks_ + block) * lanes_;
    if (wants_sums) panel_sums<kFused, kLanes>(logits, last - first, maxima_.get() + at, sums_.get() + at);
  }

  const CosineLogits<Stored>& head_;
  int64_t blocks_, lanes_ = 0, last_lanes_ = 0, panels_ = 0;
  Buffer<Real> rnorm_, converted_, rows_, logits_, maxima_, sums_;
  std::vector<Real> mean_;
};

}  // namespace dgi::cpu
