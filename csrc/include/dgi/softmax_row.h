// One row of a tile of products S = x . e_k, x = a h: its softmax, its loss, and the row's share of the gradient in the
// place of the products.
//
//   s_k = f_k S_k + b_k,   Z = sum_k exp(s_k),   p_k = exp(s_k) / Z      (dgi/terms.h has f and b)
//   target distribution q_k = (1 - smoothing) [k = target] + smoothing / K
//   loss = -sum_k q_k log p_k,   g_k = weight (p_k - q_k) + weight of log Z p_k,   T_k = g_k f_k
//
// The target's own term is kept out of the sum: with R = Z - exp(s_target), -log p_target = log1p(R / exp(s_target))
// and p_target - 1 = -R / Z keep their relative accuracy where the softmax is peaked, which float32 sums would lose.
// Columns that stand for the same item as the target are left out too: they have no p, no q and T = 0, and K counts the
// others.
//
// Of a peaked row only the entries with p_k >= 2^-24 are listed, or more where they are few. What the others weigh in
// all is spread evenly over them, p_k ~ u, so that the gradients still sum to zero and a direction that all codes share
// gets its exact share. With label smoothing everything is then even but for the list: T_k = (g_k - v) f_k for the
// listed, and v f_k more for every code, v = weight (u - smoothing / K), which costs one vector per row and not one per
// entry.
//
// With a bias a score is rounded before the largest is subtracted, so that the largest itself becomes exactly 0 however
// large scores are, and what scores exp(-87) of it becomes 0: a bias of -inf takes its code out of the softmax. Rows of
// very large scores go the same way, with a bias of 0: `gain`, a power of two, is what their products lack.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "dgi/exp.h"
#include "dgi/macros.h"
#include "dgi/terms.h"

namespace dgi {

template <class Real>
struct SoftmaxRow {
  Real* products;  // (codes): S, overwritten
  CodeTerms<Real> terms;
  int64_t codes, target;
  // Ascending: the target and the columns that are left out because of it. Null: the target alone.
  const int64_t* apart = nullptr;
  int64_t num_apart = 1;

  DGI_HOST_DEVICE int64_t remaining() const { return codes - (num_apart - 1); }
};

// What an op asks of every row.
struct SoftmaxOptions {
  double smoothing;
  bool needs_maximum;  // some |s| > 64: exp(s) might leave float32's range
  double gain = 1;  // scores are this times those of the products
};

// For |s| <= 64, exp(s) and sums of it lie well inside of float32's range and no maximum has to be subtracted.
constexpr double kMaxScoreWithoutMaximum = 64;

// Beyond this |s| the rounding of the largest score, left over by a fused multiply-add, might overflow exp.
constexpr double kMaxScoreWithoutBias = 0x1p24;

// The weights of a row's loss and of its log Z in what is differentiated.
struct RowWeights {
  double loss, log_normalizer = 0;
};

struct SoftmaxSums {
  double offset;  // what was subtracted from the logits before exp
  double rest;  // sum of exp(s_k - offset) over the codes other than the target
  double target;  // exp(s_target - offset)
  double tilt;  // dL/da * a = sum_k g_k f_k S_k, for weight 1
  double mean;  // sum_k p_k f_k S_k
  double log_normalizer;  // log Z
  double total() const { return rest + target; }
};

namespace detail {

constexpr int64_t kChunk = 2048;  // sums over chunks are added in float64

// The runs of codes between those that are apart: while (runs.next()) there are codes [first, last).
struct Runs {
  const int64_t* apart;
  int64_t count, codes, first = 0, last = -1, passed = 0;

  template <class Real>
  DGI_HOST_DEVICE explicit Runs(const SoftmaxRow<Real>& row)
      : apart(row.apart == nullptr ? &row.target : row.apart), count(row.num_apart), codes(row.codes) {}

  DGI_HOST_DEVICE bool next() {
    if (passed > count) return false;
    first = last + 1;
    last = passed < count ? apart[passed] : codes;
    ++passed;
    return true;
  }
};

// What softmax_row subtracts.
template <class Real>
struct Offsets {
  Real offset;  // from the score
  Real own;  // the target's f S, with a bias
  Real gain;
};

// Terms come by value: by reference gcc vectorises no loop that writes scores.
// Adds sum exp(x) to `total`, for x = s - offset, and sum x exp(x) to `moment`; with a bias sum (f S - own) exp(x).
template <bool kFused, bool kHasBias, class Real>
DGI_HOST_DEVICE void exponentials(Real* s, const CodeTerms<Real> terms, int64_t count, const Offsets<Real>& less,
                                  double& total, double& moment) {
  const Real offset = less.offset, own = less.own, gain = less.gain;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
    Real sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t k = first; k < last; ++k) {
      if constexpr (kHasBias) {
        const Real part = s[k] * terms.factor[k];
        const Real e = exponential_or_zero<kFused>((terms.template score<kFused, true>(s[k], k) - offset) * gain);
        s[k] = e;
        sum += e;
        weighted = multiply_add<kFused>(part - own, e, weighted);
      } else {
        const Real x = multiply_add<kFused>(s[k], terms.factor[k], -offset), e = exponential<kFused>(x);
        s[k] = e;
        sum += e;
        weighted = multiply_add<kFused>(x, e, weighted);
      }
    }
    total += sum;
    moment += weighted;
  }
}

// Adds up the scores, and what of them is no bias.
template <bool kFused, bool kHasBias, class Real>
DGI_HOST_DEVICE void add_scores(const Real* s, const CodeTerms<Real> terms, int64_t count, double& scores,
                                double& parts) {
  double total = 0, part_total = 0;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
    Real sum = 0, bias = 0;
#pragma omp simd reduction(+ : sum, bias)
    for (int64_t k = first; k < last; ++k) {
      sum = multiply_add<kFused>(s[k], terms.factor[k], sum);
      if constexpr (kHasBias) bias += terms.bias[k];
    }
    part_total += sum;
    total += kHasBias ? static_cast<double>(sum) + bias : static_cast<double>(sum);
  }
  scores += total;
  parts += part_total;
}

template <bool kFused, bool kHasBias, class Real>
DGI_HOST_DEVICE Real maximum_score(const Real* s, const CodeTerms<Real> terms, int64_t count, Real maximum) {
#pragma omp simd reduction(max : maximum)
  for (int64_t k = 0; k < count; ++k) {
    const Real score = terms.template score<kFused, kHasBias>(s[k], k);
    maximum = maximum < score ? score : maximum;
  }
  return maximum;
}

// exp(s - offset) becomes T; g is added to `column_sums` where that is not null.
template <bool kFused, class Real>
DGI_HOST_DEVICE void gradients(Real* e, const Real* f, int64_t count, Real factor, Real shift, Real* column_sums) {
  if (column_sums == nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) e[k] = multiply_add<kFused>(e[k], factor, shift) * f[k];
  } else {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const Real g = multiply_add<kFused>(e[k], factor, shift);
      column_sums[k] += g;
      e[k] = g * f[k];
    }
  }
}

constexpr int64_t kGroup = 32;  // entries that are looked at together

// Appends the positions of entries of at least `cut`; returns how many there are now, or -1 beyond `limit`.
template <class Real>
DGI_HOST_DEVICE int64_t list_entries(const Real* e, int64_t first, int64_t last, Real cut, int32_t* index,
                                     int64_t count, int64_t limit) {
  int64_t k = first;
  for (; k + kGroup <= last; k += kGroup) {
    uint32_t flags = 0;
#pragma omp simd reduction(| : flags)
    for (int64_t i = 0; i < kGroup; ++i) flags |= e[k + i] >= cut ? uint32_t{1} << i : 0;
    for (; flags != 0; flags &= flags - 1) index[count++] = static_cast<int32_t>(k + std::countr_zero(flags));
    if (count > limit) return -1;
  }
  for (; k < last; ++k) {
    index[count] = static_cast<int32_t>(k);
    count += e[k] >= cut;
  }
  return count > limit ? -1 : count;
}

}  // namespace detail

// Products become exp(s - offset), but the target's stays a product. Writes the loss.
template <bool kFused, bool kHasBias = false, class Real>
DGI_HOST_DEVICE SoftmaxSums softmax_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options, double* loss) {
  using detail::Runs;
  Real* const s = row.products;
  const CodeTerms<Real>& terms = row.terms;
  const double own = static_cast<double>(s[row.target]) * static_cast<double>(terms.factor[row.target]);
  const double logit = kHasBias ? terms.template score<kFused, true>(s[row.target], row.target) : own;
  Real offset = 0;
  if (options.needs_maximum) {
    offset = static_cast<Real>(logit);
    for (Runs run(row); run.next();) {
      offset = detail::maximum_score<kFused, kHasBias>(s + run.first, terms.from(run.first), run.last - run.first,
                                                       offset);
    }
  }
  double mean_score = 0, mean_part = 0;
  if (options.smoothing != 0) {
    for (Runs run(row); run.next();) {
      detail::add_scores<kFused, kHasBias>(s + run.first, terms.from(run.first), run.last - run.first, mean_score,
                                           mean_part);
      if (run.last == row.target) mean_score += logit, mean_part += own;
    }
    mean_score /= static_cast<double>(row.remaining());
    mean_part /= static_cast<double>(row.remaining());
  }
  SoftmaxSums sums;
  sums.offset = offset;
  sums.rest = 0;
  double moment = 0;
  const detail::Offsets<Real> less{offset, static_cast<Real>(own), static_cast<Real>(options.gain)};
  for (Runs run(row); run.next();) {
    detail::exponentials<kFused, kHasBias>(s + run.first, terms.from(run.first), run.last - run.first, less, sums.rest,
                                           moment);
    if (run.last != row.target && run.last < row.codes) s[run.last] = 0;
  }
  const double below = options.gain * (logit - offset);
  sums.target = std::exp(below);
  // log Z - s_target; exp(-700) is about the least that float64 divides by
  const double nll = below > -700 ? std::log1p(sums.rest / sums.target) : std::log(sums.rest) - below;
  const double even = options.smoothing * (logit - mean_score);
  sums.log_normalizer = options.gain * offset + std::log(sums.total());
  const bool is_masked = kHasBias && logit == -std::numeric_limits<double>::infinity();  // even might be inf - inf
  *loss = is_masked ? nll : nll + options.gain * even;
  const double tilt = kHasBias ? moment / sums.total() : (moment - below * sums.rest) / sums.total();
  sums.tilt = tilt + (kHasBias ? options.smoothing * (own - mean_part) : even);
  sums.mean = own + tilt;
  return sums;
}

// exp(s - offset) becomes T. Each g is added to `column_sums` (codes) where that is not null.
template <bool kFused, class Real>
DGI_HOST_DEVICE void dense_gradient_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options,
                                        const SoftmaxSums& sums, const RowWeights& weights,
                                        Real* column_sums = nullptr) {
  const double uniform = options.smoothing / static_cast<double>(row.remaining()), weight = weights.loss;
  const Real factor = static_cast<Real>((weight + weights.log_normalizer) / sums.total());
  const Real shift = static_cast<Real>(-weight * uniform);
  for (detail::Runs run(row); run.next();) {
    detail::gradients<kFused>(row.products + run.first, row.terms.factor + run.first, run.last - run.first, factor,
                              shift, column_sums == nullptr ? nullptr : column_sums + run.first);
  }
  double target = weight * (options.smoothing - uniform - sums.rest / sums.total());
  if (weights.log_normalizer != 0) target += weights.log_normalizer * (sums.target / sums.total());
  row.products[row.target] = static_cast<Real>(target) * row.terms.factor[row.target];
  if (column_sums != nullptr) column_sums[row.target] += static_cast<Real>(target);
}

// Entries below a share of their row are skipped: below 2^-24 of what is not the target's, if then the list is short;
// else below 2^-24 or 2^-25 of the row, if what they skip changes the row's gradient by no more than about what a
// float32 softmax rounds away: by kNoise for every code in the norm of p (a sum near 1 loses part of every small term),
// and by kDrift in the sum of p. Scales that need a maximum are held to less noise: there a float32 softmax rounds less
// away.
constexpr double kNegligible = 0x1p-24, kNoise = 1.25e-10, kNoiseOfLargeScale = 0.8e-10, kDrift = 0x1p-14;

constexpr int64_t list_capacity(int64_t limit) { return limit + 1 + detail::kGroup; }

// The list of a row that is worth one: positions ascending, the target among them, and T_k without what is even.
template <class Real>
struct SparseRow {
  int32_t* index;
  Real* value;
  int64_t count;
  double even;  // v: every code k gets T_k = v f_k on top
};

namespace detail {

// The norm of what is below `cut`, relative to the cut, so that squares of small values do not underflow.
template <bool kFused, class Real>
DGI_HOST_DEVICE double norm_below(const SoftmaxRow<Real>& row, Real cut) {
  const Real per_cut = 1 / cut;
  double total = 0;
  for (Runs run(row); run.next();) {
    for (int64_t first = run.first; first < run.last; first += kChunk) {
      const int64_t last = first + kChunk < run.last ? first + kChunk : run.last;
      Real squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t k = first; k < last; ++k) {
        const Real part = row.products[k] < cut ? row.products[k] * per_cut : Real{0};
        squares = multiply_add<kFused>(part, part, squares);
      }
      total += squares;
    }
  }
  return std::sqrt(total);
}

// Lists what is at least `cut`, and what is apart; returns the target's place in the list, or -1 beyond `limit`.
template <class Real>
DGI_HOST_DEVICE int64_t list_row(const SoftmaxRow<Real>& row, Real cut, int64_t limit, SparseRow<Real>& list) {
  int64_t before = -1;
  list.count = 0;
  for (Runs run(row); run.next();) {
    list.count = list_entries(row.products, run.first, run.last, cut, list.index, list.count, limit);
    if (list.count < 0) return -1;
    if (run.last == row.codes) break;
    if (run.last == row.target) before = list.count;
    list.index[list.count++] = static_cast<int32_t>(run.last);
    if (list.count > limit) return -1;
  }
  return before;
}

}  // namespace detail

// Lists the entries that count, where they are at most `limit` and the rest is negligible; false where not, and where
// anything is NaN. `list.index` and `list.value` have room for list_capacity(limit) entries. Each g but for what is
// even is added to `column_sums` (codes) where that is not null.
template <bool kFused, class Real>
DGI_HOST_DEVICE bool sparse_gradient_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options,
                                         const SoftmaxSums& sums, const RowWeights& weights, int64_t limit,
                                         SparseRow<Real>& list, Real* column_sums = nullptr) {
  const double total = sums.total(), codes = static_cast<double>(row.remaining());
  if (!(total > 0x1p-60 && total < 0x1p120)) return false;
  const double most_noise = (options.needs_maximum ? kNoiseOfLargeScale : kNoise) * codes;
  double share = kNegligible * sums.rest / total, skipped = 0;
  int64_t before = detail::list_row(row, static_cast<Real>(share * total), limit / 4, list);
  if (before < 0) {
    share = kNegligible;
    before = detail::list_row(row, static_cast<Real>(share * total), limit, list);
  }
  for (;;) {
    if (before < 0) return false;
    skipped = sums.rest;
    for (int64_t j = 0; j < list.count; ++j) {
      if (j != before) skipped -= static_cast<double>(row.products[list.index[j]]);
    }
    skipped = skipped < 0 ? 0 : skipped / total;
    const double noise = share * detail::norm_below<kFused>(row, static_cast<Real>(share * total)) / most_noise;
    const double excess = std::fmax(noise, skipped / kDrift);
    if (excess <= 1) break;
    if (share <= kNegligible / 2) return false;
    share = kNegligible / 2;  // not between the two: rows that just pass would add up to more than eager loses
    before = detail::list_row(row, static_cast<Real>(share * total), limit, list);
  }

  // The rest's even part follows from the listed ones, so that the gradients sum to zero.
  const double left = static_cast<double>(row.codes - list.count), even = left > 0 ? skipped / left : 0.0;
  const double of_target = options.smoothing - sums.rest / total, uniform = options.smoothing / codes;
  list.even = weights.loss * (even - uniform) + weights.log_normalizer * even;
  detail::Runs run(row);
  run.next();
  for (int64_t j = 0; j < list.count; ++j) {
    const int64_t k = list.index[j];
    const bool is_apart = k == run.last;
    if (is_apart) run.next();
    double g;
    if (is_apart && j != before) {
      g = -list.even;  // nothing, once every code has what is even
    } else {
      const double p = is_apart ? sums.target / total : static_cast<double>(row.products[k]) / total;
      g = weights.loss * ((is_apart ? of_target : p) - even) + weights.log_normalizer * (p - even);
    }
    list.value[j] = static_cast<Real>(g) * row.terms.factor[k];
    if (column_sums != nullptr) column_sums[k] += static_cast<Real>(g);
  }
  return true;
}

}  // namespace dgi
