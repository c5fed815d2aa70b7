// One row of a tile of products S = x . e_k, x = scale * h^: its softmax, its loss, and the row's share of the gradient in
// the place of the products.
//
//   s_k = rnorm_k S_k,   Z = sum_k exp(s_k),   p_k = exp(s_k) / Z
//   target distribution q_k = (1 - smoothing) [k = target] + smoothing / K
//   loss = -sum_k q_k log p_k,   g_k = weight (p_k - q_k),   T_k = g_k rnorm_k
//
// The target's own term is kept out of the sum: with R = Z - exp(s_target), -log p_target = log1p(R / exp(s_target)) and
// p_target - 1 = -R / Z keep their relative accuracy where the softmax is peaked, which float32 sums would lose.
//
// Of a peaked row only the entries with p_k >= 2^-24 are listed, or more where they are few. What the others weigh in all is
// spread evenly over them, p_k ~ u, so that the gradients still sum to zero and a direction that all codes share gets its
// exact share. With label smoothing everything is then even but for the list: T_k = (g_k - v) rnorm_k for the listed,
// and v rnorm_k more for every code, v = weight (u - smoothing / K), which costs one vector per row and not one per entry.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

template <class Real>
struct SoftmaxRow {
  Real* products;     // (codes): S, overwritten
  const Real* rnorm;  // (codes)
  int64_t codes, target;
};

// What an op asks of every row.
struct SoftmaxOptions {
  double smoothing;
  bool needs_maximum;  // |scale| > 64: exp(s) might leave float32's range
};

// For |s| <= 64, exp(s) and sums of it lie well inside of float32's range and no maximum has to be subtracted.
constexpr double kMaxScaleWithoutMaximum = 64;

struct SoftmaxSums {
  double offset;      // what was subtracted from the logits before exp
  double rest;        // sum of exp(s_k - offset) over the codes other than the target
  double target;      // exp(s_target - offset)
  double tilt;        // dL/dscale * scale = sum_k g_k s_k, for weight 1
  double total() const { return rest + target; }
};

namespace detail {

constexpr int64_t kChunk = 2048;  // sums over chunks are added in float64

// Adds sum exp(x) to `total` and sum x exp(x) to `moment`, for x = s - offset.
template <bool kFused, class Real>
DGI_HOST_DEVICE void exponentials(Real* s, const Real* rnorm, int64_t count, Real offset, double& total,
                                  double& moment) {
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
    Real sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t k = first; k < last; ++k) {
      const Real x = multiply_add<kFused>(s[k], rnorm[k], -offset), e = exponential<kFused>(x);
      s[k] = e;
      sum += e;
      weighted = multiply_add<kFused>(x, e, weighted);
    }
    total += sum;
    moment += weighted;
  }
}

template <bool kFused, class Real>
DGI_HOST_DEVICE double sum_of_logits(const Real* s, const Real* rnorm, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = first; k < last; ++k) sum = multiply_add<kFused>(s[k], rnorm[k], sum);
    total += sum;
  }
  return total;
}

template <class Real>
DGI_HOST_DEVICE Real maximum_logit(const Real* s, const Real* rnorm, int64_t count, Real maximum) {
#pragma omp simd reduction(max : maximum)
  for (int64_t k = 0; k < count; ++k) {
    const Real logit = s[k] * rnorm[k];
    maximum = maximum < logit ? logit : maximum;
  }
  return maximum;
}

template <bool kFused, class Real>
DGI_HOST_DEVICE void gradients(Real* e, const Real* rnorm, int64_t count, Real factor, Real shift) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) e[k] = multiply_add<kFused>(e[k], factor, shift) * rnorm[k];
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
template <bool kFused, class Real>
DGI_HOST_DEVICE SoftmaxSums softmax_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options, double* loss) {
  const int64_t after = row.target + 1, left = row.codes - after;
  Real *s = row.products, *rest = s + after;
  const Real *r = row.rnorm, *rest_r = r + after;
  const double logit = static_cast<double>(s[row.target]) * static_cast<double>(r[row.target]);
  Real offset = 0;
  if (options.needs_maximum) {
    offset = detail::maximum_logit(s, r, row.target, static_cast<Real>(logit));
    offset = detail::maximum_logit(rest, rest_r, left, offset);
  }
  double mean_logit = 0;
  if (options.smoothing != 0) {
    mean_logit = (detail::sum_of_logits<kFused>(s, r, row.target) + logit
                  + detail::sum_of_logits<kFused>(rest, rest_r, left)) / static_cast<double>(row.codes);
  }
  SoftmaxSums sums;
  sums.offset = offset;
  sums.rest = 0;
  double moment = 0;
  detail::exponentials<kFused>(s, r, row.target, offset, sums.rest, moment);
  detail::exponentials<kFused>(rest, rest_r, left, offset, sums.rest, moment);
  const double below = logit - offset;
  sums.target = std::exp(below);
  // log Z - s_target; exp(-700) is about the least that float64 divides by
  const double nll = below > -700 ? std::log1p(sums.rest / sums.target) : std::log(sums.rest) - below;
  *loss = nll + options.smoothing * (logit - mean_logit);
  sums.tilt = (moment - below * sums.rest) / sums.total() + options.smoothing * (logit - mean_logit);
  return sums;
}

// exp(s - offset) becomes T.
template <bool kFused, class Real>
DGI_HOST_DEVICE void dense_gradient_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options,
                                        const SoftmaxSums& sums, double weight) {
  const int64_t after = row.target + 1;
  const double uniform = options.smoothing / static_cast<double>(row.codes);
  const Real factor = static_cast<Real>(weight / sums.total()), shift = static_cast<Real>(-weight * uniform);
  detail::gradients<kFused>(row.products, row.rnorm, row.target, factor, shift);
  detail::gradients<kFused>(row.products + after, row.rnorm + after, row.codes - after, factor, shift);
  const double target = weight * (options.smoothing - uniform - sums.rest / sums.total());
  row.products[row.target] = static_cast<Real>(target) * row.rnorm[row.target];
}

// Entries below a share of their row are skipped: below 2^-24 of what is not the target's, if then the list is short; else
// below 2^-24 or 2^-25 of the row, if what they skip changes the row's gradient by no more than about what a
// float32 softmax rounds away: by kNoise for every code in the norm of p (a sum near 1 loses part of every small term), and
// by kDrift in the sum of p. Scales that need a maximum are held to less noise: there a float32 softmax rounds less away.
constexpr double kNegligible = 0x1p-24, kNoise = 1.25e-10, kNoiseOfLargeScale = 0.8e-10, kDrift = 0x1p-14;

constexpr int64_t list_capacity(int64_t limit) { return limit + 1 + detail::kGroup; }

// The list of a row that is worth one: positions ascending, the target among them, and T_k without what is even.
template <class Real>
struct SparseRow {
  int32_t* index;
  Real* value;
  int64_t count;
  double even;  // v: every code k gets T_k = v rnorm_k on top
};

namespace detail {

// The norm of what is below `cut`, relative to the cut, lest squares of small numbers vanish.
template <bool kFused, class Real>
DGI_HOST_DEVICE double norm_below(const SoftmaxRow<Real>& row, Real cut) {
  const Real per_cut = 1 / cut;
  const int64_t after = row.target + 1;
  double total = 0;
  const struct {
    int64_t first, last;
  } ranges[] = {{0, row.target}, {after, row.codes}};
  for (const auto [begin, end] : ranges) {
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t last = first + kChunk < end ? first + kChunk : end;
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

// Lists what is at least `cut`, and the target; returns the target's place in the list, or -1 beyond `limit`.
template <class Real>
DGI_HOST_DEVICE int64_t list_row(const SoftmaxRow<Real>& row, Real cut, int64_t limit, SparseRow<Real>& list) {
  const int64_t before = list_entries(row.products, 0, row.target, cut, list.index, 0, limit);
  if (before < 0) return -1;
  list.index[before] = static_cast<int32_t>(row.target);
  list.count = list_entries(row.products, row.target + 1, row.codes, cut, list.index, before + 1, limit);
  return list.count < 0 ? -1 : before;
}

}  // namespace detail

// Lists the entries that count, where they are at most `limit` and the rest is negligible; false where not, and where
// anything is NaN. `list.index` and `list.value` have room for list_capacity(limit) entries.
template <bool kFused, class Real>
DGI_HOST_DEVICE bool sparse_gradient_row(const SoftmaxRow<Real>& row, const SoftmaxOptions& options,
                                         const SoftmaxSums& sums, double weight, int64_t limit,
                                         SparseRow<Real>& list) {
  const double total = sums.total(), codes = static_cast<double>(row.codes);
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
  const double left = codes - static_cast<double>(list.count), even = left > 0 ? skipped / left : 0.0;
  list.even = weight * (even - options.smoothing / codes);
  for (int64_t j = 0; j < list.count; ++j) {
    const int64_t k = list.index[j];
    const double g = j == before ? options.smoothing - sums.rest / total : static_cast<double>(row.products[k]) / total;
    list.value[j] = static_cast<Real>(weight * (g - even)) * row.rnorm[k];
  }
  return true;
}

}  // namespace dgi
