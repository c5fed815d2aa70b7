// A tile of scaled cosine logits of many hidden states with all codes, and their log-sum-exps, made in one pass.
//
//   logit(row, k) = scale h^_row . e^_k
//
// A scale beyond 2^64 is split: rows take part of it, and the codes' factors a power of two.
//
// Rows stand side by side in panels, one to a lane, so that a code's element is multiplied with all rows of a panel at
// once, the codebook is read where it lies, and nothing is ever summed across lanes. The products of a few codes with a
// panel stay in registers over the whole dimension. A block of codes stays in the second-level cache while all panels
// pass by; its logits are still in the first-level cache when their exponentials are summed, and go no further but for
// those that are asked for: single ones, or all of a row.
//
// A row's bits do not depend on which rows share its panel, nor on the number of threads: the sums over blocks are put
// together in order.
//
// The codes come in stages of about as many blocks each. Between two of them panels may be dropped: those whose rows,
// by the sums so far, cannot be among the best.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/beam/beam_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/scale.h"
#include "dgi/log_sum_exp.h"
#include "dgi/terms.h"
#include "dgi/vector.h"

namespace dgi::cpu {

// `logits` (kCodes, kLanes) = products of kCodes codes with a panel (dim, kLanes), each times the code's factor. +inf
// becomes the largest number.
template <bool kFused, int kCodes, int kLanes, class Real>
DGI_ALWAYS_INLINE inline void panel_logits(const Real* const* codes, const Real* factors, const Real* panel,
                                           int64_t dim, Real* logits) {
  Real sum[kCodes][kLanes] = {};
#pragma GCC unroll 2
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

// Adds exp(logit - offset) to the sums lane by lane, none of which becomes less than 1. False, and nothing is done,
// where the quick way does not do.
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

// out[j * stride + i] = square[i][j]
template <class Real>
DGI_ALWAYS_INLINE inline void transpose(const Real (&square)[4][4], Real* out, int64_t stride) {
  typedef Real Row __attribute__((vector_size(4 * sizeof(Real)), aligned(sizeof(Real))));
  const Row* const in = reinterpret_cast<const Row*>(square);
  const Row low0 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  const Row low2 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const Row high0 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const Row high2 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  *reinterpret_cast<Row*>(out) = __builtin_shufflevector(low0, low2, 0, 1, 4, 5);
  *reinterpret_cast<Row*>(out + stride) = __builtin_shufflevector(low0, low2, 2, 3, 6, 7);
  *reinterpret_cast<Row*>(out + 2 * stride) = __builtin_shufflevector(high0, high2, 0, 1, 4, 5);
  *reinterpret_cast<Row*>(out + 3 * stride) = __builtin_shufflevector(high0, high2, 2, 3, 6, 7);
}

template <class Stored>
class HeadTile {
 public:
  using Real = Compute<Stored>;

  HeadTile(const CosineLogits<Stored>& head, int64_t max_rows, bool wants_means)
      : head_(head), scale_(head.scale), blocks_((head.codes + kBlock - 1) / kBlock),
        factor_(make_buffer<Real>(head.codes)) {
    with_best_instructions([&](auto fused)
                               DGI_ALWAYS_INLINE { lanes_ = 2 * fused.kVectorBytes / static_cast<int>(sizeof(Real)); });
    const int64_t panels = (max_rows + lanes_ - 1) / lanes_;
    rows_ = make_buffer<Real>(panels * lanes_ * head.dim);
    logits_ = make_buffer<Real>(panels * lanes_ * blocks_ * kBlock);
    maxima_ = make_buffer<Real>(panels * lanes_ * blocks_);
    sums_ = make_buffer<Real>(panels * lanes_ * blocks_);
    if constexpr (!kInPlace) converted_ = make_buffer<Real>(head.codes * head.dim);
    const Buffer<Real> sums = make_buffer<Real>(wants_means ? blocks_ * head.dim : 0);
    parallel_for(blocks_, grain(kBlock * head.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t block = first; block < last; ++block) {
          read_block<fused.value>(block, wants_means ? sums.get() + block * head.dim : nullptr);
        }
      });
    });
    if (!wants_means) return;
    std::vector<Real> sum(head.dim, Real{0});
    means_.resize(kStages * head.dim);
    int64_t block = blocks_;
    for (int stage = kStages - 1; stage >= 0; --stage) {
      while (block > begin(stage)) {
        --block;
        for (int64_t d = 0; d < head.dim; ++d) sum[d] += sums[block * head.dim + d];
      }
      const Real factor = 1 / static_cast<Real>(std::max<int64_t>(1, codes_from(stage)));
      for (int64_t d = 0; d < head.dim; ++d) means_[stage * head.dim + d] = factor * sum[d];
    }
  }

  // The first block of a stage.
  int64_t begin(int stage) const { return blocks_ * stage / kStages; }

  // How many codes a stage and those after it have, and mean_k e^_k over these, where it was wanted: what is summed at
  // once are the codes of a block, then the blocks.
  int64_t codes_from(int stage) const { return head_.codes - std::min(head_.codes, begin(stage) * kBlock); }
  const Real* mean_from(int stage) const { return means_.data() + stage * head_.dim; }

  // How many rows the next tile will have; each is to be set, and to be kept or its logits asked for.
  void start(int64_t rows) {
    panels_ = panels_left_ = (rows + lanes_ - 1) / lanes_;
    wanted_.clear();
    first_wanted_.assign(static_cast<size_t>(panels_ * blocks_), -1);
    keeps_.assign(static_cast<size_t>(panels_), false);
    const int64_t in_last = rows % lanes_;  // their panel is padded with zeros, and narrower where half of it will do
    last_lanes_ = in_last == 0 || 2 * in_last > lanes_ ? lanes_ : lanes_ / 2;
    if (in_last != 0) {
      Real* const panel = rows_.get() + (panels_ - 1) * lanes_ * head_.dim;
      std::fill(panel, panel + last_lanes_ * head_.dim, Real{0});
    }
  }

  // The rows from `row` on, a multiple of kRowsAtOnce, are scale h^ for each of the `count` <= kRowsAtOnce hidden
  // states.
  void set(int64_t row, const Stored* const* h, int64_t count) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      const int64_t panel = row / lanes_, lanes = lanes_of(panel), dim = head_.dim;
      Real* const out = rows_.get() + panel * lanes_ * dim + row % lanes_;
      const Real factor = scale_.scale;
      Real rnorm[kRowsAtOnce];
      for (int64_t i = 0; i < count; ++i) rnorm[i] = reciprocal_norm<fused.value>(h[i], dim, head_.eps);
      int64_t d = 0;
      if (count == kRowsAtOnce) {
        for (; d + kRowsAtOnce <= dim; d += kRowsAtOnce) {
          Real square[kRowsAtOnce][kRowsAtOnce];
          for (int64_t i = 0; i < kRowsAtOnce; ++i) {
#pragma omp simd
            for (int64_t j = 0; j < kRowsAtOnce; ++j) square[i][j] = factor * (rnorm[i] * load(h[i][d + j]));
          }
          transpose(square, out + d * lanes, lanes);
        }
      }
      for (; d < dim; ++d) {
        for (int64_t i = 0; i < count; ++i) out[d * lanes + i] = factor * (rnorm[i] * load(h[i][d]));
      }
    });
  }

  // All logits of a row will be read, by logits().
  void keep(int64_t row) { keeps_[row / lanes_] = true; }

  // compute() is to write one logit of a row.
  void want(int64_t row, int64_t code, Real* logit) {
    int64_t& first = first_wanted_[row / lanes_ * blocks_ + code / kBlock];
    wanted_.push_back({row % lanes_, code, logit, std::exchange(first, static_cast<int64_t>(wanted_.size()))});
  }

  // Makes the tile for the stages [first, end) and the panels that are left, and the log-sum-exps where they are
  // wanted.
  void compute(int first_stage, int end_stage, bool wants_sums) {
    const int64_t from = begin(first_stage), blocks = begin(end_stage) - from, panels = panels_left_;
    parallel_for(blocks * panels, grain(kBlock * lanes_ * head_.dim / 16), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        constexpr int kWidth = fused.kVectorBytes / static_cast<int>(sizeof(Real));
        constexpr int kSums = fused.kVectorRegisters * 3 / 4;
        const Buffer<Real> logits = make_buffer<Real>(kBlock * lanes_);
        for (int64_t i = first; i < last; ++i) {
          const int64_t block = from + i / panels, panel = i % panels;
          if (lanes_of(panel) == 2 * kWidth) {
            compute_block<fused.value, kSums / 2, 2 * kWidth>(block, panel, wants_sums, logits.get());
          } else {
            compute_block<fused.value, kSums, kWidth>(block, panel, wants_sums, logits.get());
          }
        }
      });
    });
  }

  // Panels of `lanes` rows each that have not been dropped: the first ones, of which the last may be.
  int64_t panels_left() const { return panels_left_; }
  void drop_last() { --panels_left_; }
  int64_t lanes() const { return lanes_; }

  // The logit of code k of a row that is kept lies at logits(row)[k * stride(row)].
  const Real* logits(int64_t row) const { return tile(row / lanes_) + row % lanes_; }
  int64_t stride(int64_t row) const { return lanes_of(row / lanes_); }

  // Of the codes before a stage.
  template <bool kFused>
  DGI_ALWAYS_INLINE inline LogSumExp<Real> log_sum_exp(int64_t row, int stage = kStages) const {
    LogSumExp<Real> sum;
    for (int64_t block = 0; block < begin(stage); ++block) {
      const int64_t at = (row / lanes_ * blocks_ + block) * lanes_ + row % lanes_;
      sum.template add<kFused>(LogSumExp<Real>{maxima_[at], sums_[at]});
    }
    return sum;
  }

  static constexpr int kStages = 8;
  static constexpr int64_t kRowsAtOnce = 4;
  static constexpr int64_t kBlock = 96;  // codes; a multiple of what is multiplied at once

  // (codes, dim), and what its rows' products are multiplied with: reciprocal norms, times the scale's gain
  const Real* codebook() const { return kInPlace ? reinterpret_cast<const Real*>(head_.codebook) : converted_.get(); }
  CodeTerms<Real> terms() const { return {factor_.get()}; }

 private:
  static constexpr bool kInPlace = std::is_same_v<Stored, Real>;  // the codebook needs no conversion

  // The norms of a block of codes, and their sum.
  template <bool kFused>
  DGI_ALWAYS_INLINE inline void read_block(int64_t block, Real* sum) {
    constexpr int64_t kAtOnce = 4;  // codes, which are added up while they are in the first-level cache
    constexpr int32_t kAll[kAtOnce] = {0, 1, 2, 3};
    const int64_t dim = head_.dim, last = std::min(head_.codes, (block + 1) * kBlock);
    const Real gain = static_cast<Real>(scale_.gain);
    if (sum != nullptr) std::fill(sum, sum + dim, Real{0});
    for (int64_t from = block * kBlock; from < last; from += kAtOnce) {
      const int64_t count = std::min(kAtOnce, last - from);
      for (int64_t k = from; k < from + count; ++k) {
        factor_[k] = gain * reciprocal_norm<kFused>(head_.codebook + k * dim, dim, head_.eps);
        if constexpr (!kInPlace) {
          for (int64_t d = 0; d < dim; ++d) converted_[k * dim + d] = load(head_.codebook[k * dim + d]);
        }
      }
      if (sum != nullptr) add_rows<kFused>(kAll, factor_.get() + from, count, codebook() + from * dim, dim, sum);
    }
  }

  int64_t lanes_of(int64_t panel) const { return panel == panels_ - 1 ? last_lanes_ : lanes_; }
  Real* tile(int64_t panel) const { return logits_.get() + panel * lanes_ * blocks_ * kBlock; }

  // `buffer` takes the logits that nobody keeps.
  template <bool kFused, int kCodes, int kLanes>
  DGI_ALWAYS_INLINE inline void compute_block(int64_t block, int64_t panel, bool wants_sums, Real* buffer) {
    static_assert(kBlock % kCodes == 0);
    const Real* const x = rows_.get() + panel * lanes_ * head_.dim;
    const int64_t first = block * kBlock, last = std::min(head_.codes, first + kBlock);
    Real* const logits = keeps_[panel] ? tile(panel) + first * kLanes : buffer;
    for (int64_t k = first; k < last; k += kCodes) {
      const Real* codes[kCodes];
      Real factors[kCodes];
      for (int64_t c = 0; c < kCodes; ++c) {  // behind the last code it is repeated, which nobody reads
        const int64_t code = std::min(k + c, last - 1);
        codes[c] = codebook() + code * head_.dim;
        factors[c] = factor_[code];
      }
      panel_logits<kFused, kCodes, kLanes>(codes, factors, x, head_.dim, logits + (k - first) * kLanes);
    }
    for (int64_t i = first_wanted_[panel * blocks_ + block]; i >= 0; i = wanted_[i].next) {
      *wanted_[i].logit = logits[(wanted_[i].code - first) * kLanes + wanted_[i].lane];
    }
    const int64_t at = (panel * blocks_ + block) * lanes_;
    if (wants_sums) panel_sums<kFused, kLanes>(logits, last - first, maxima_.get() + at, sums_.get() + at);
  }

  struct Wanted {
    int64_t lane, code;
    Real* logit;
    int64_t next;  // of the same block and panel; -1: none
  };

  const CosineLogits<Stored>& head_;
  const SplitScale<Real> scale_;
  std::vector<Wanted> wanted_;
  std::vector<int64_t> first_wanted_;  // (panels, blocks)
  std::vector<char> keeps_;  // (panels)
  int64_t blocks_, lanes_ = 0, last_lanes_ = 0, panels_ = 0, panels_left_ = 0;
  Buffer<Real> factor_, converted_, rows_, logits_, maxima_, sums_;
  std::vector<Real> means_;  // (kStages, dim)
};

}  // namespace dgi::cpu
