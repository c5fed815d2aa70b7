// Balanced assignment by Sinkhorn's algorithm in the log domain.
//
//   s_nk = -cost_nk / (epsilon amplitude)        amplitude = (max cost - min cost) / 2 + 1e-5
//   f_n = -log sum_k exp(s_nk + g_k)             each row has the same weight
//   g_k = -log sum_n exp(s_nk + f_n)             each code has the same weight; after so many rounds
//   code_n = argmax_k s_nk + g_k
//
// The scores of a tile of rows are made in each round, with g in the place of the codes' bias, from products that are
// kept as far as 16 MB go and made again beyond that: memory is these, the tile, f and g. One pass makes both sums: p =
// exp(s + g + f) / sum is a row's softmax, with the f of the round before (the row's largest score where that is far
// off), and a code's weight the sum of its column. A code so far from all rows
// that its column is lost to float32 has its log-sum-exp taken by its own maximum, from the products of such codes
// alone; that is the first rounds. N K exponentials a round, and 2 N K D operations where nothing is kept.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/clustering/balanced_cpu.h"
#include "cpu/quantize/quantize_levels.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kRows = 256;  // of a tile
constexpr int64_t kKeptBytes = int64_t{16} << 20;
constexpr int64_t kMostParts = 16;  // of the rows, each with sums of its own, whatever the threads
constexpr int64_t kRowsWorthAPart = 512;
constexpr double kLost = 1e-25;  // weight of a column that float32 may have lost terms of
constexpr double kSmallestAmplitude = 1e-5;
constexpr float kLeastSum = 0.01f;  // of exponentials, for the last round's offset to do

// out = exp(s - offset) of a row's products; returns their sum. Terms come by value: by reference the loop is not
// vectorised.
template <bool kFused, bool kHasBias, class Real>
DGI_ALWAYS_INLINE inline Real exponentials(const Real* products, const CodeTerms<Real> terms, int64_t count,
                                           Real offset, Real* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    out[k] = exponential_term<kFused>(terms.template score<kFused, kHasBias>(products[k], k) - offset);
    sum += out[k];
  }
  return sum;
}

template <class Real>
class Balanced {
 public:
  Balanced(const Quantize<Real>& in, double epsilon)
      : in_(in), parts_(std::clamp<int64_t>(in.rows / kRowsWorthAPart, 1, kMostParts)), scaled_(in),
        kept_rows_(std::min(in.rows, kKeptBytes / (in.sizes[0] * static_cast<int64_t>(sizeof(Real))))),
        kept_(make_buffer<Real>(kept_rows_ * in.sizes[0])), own_(in.rows), g_(in.sizes[0], 0.0), f_(in.rows),
        bias_(make_buffer<Real>(in.sizes[0])) {
    scaled_.scale = static_cast<Real>(1 / (epsilon * amplitude()));
  }

  void run(int64_t iterations, int64_t* codes) {
    const Codebooks<Real> codebooks(scaled_);
    const Level<Real>& level = codebooks[0];
    for (int64_t i = 0; i < iterations; ++i) update(level);
    set_bias(level);
    for_kept_tiles(level, [&](int64_t, int64_t begin, int64_t count, const Real* tile) {
      choose(level, begin, count, tile, codes);
    });
  }

 private:
  int64_t codes() const { return in_.sizes[0]; }

  enum class Products { kMake, kKeep, kTake };  // kTake: made before

  // Calls body(part, first row, rows, products) for tiles of a r . key, parts side by side; own_ is that of `in` where
  // products are made.
  template <class Body>
  void for_tiles(const Quantize<Real>& in, const Level<Real>& level, const Body& body,
                 Products products = Products::kMake) {
    parallel_for(parts_, 1, [&](int64_t first, int64_t last) {
      const Buffer<Real> x = make_buffer<Real>(kRows * in.dim), tile = make_buffer<Real>(kRows * level.codes);
      for (int64_t part = first; part < last; ++part) {
        const int64_t end = (part + 1) * in.rows / parts_;
        for (int64_t begin = part * in.rows / parts_; begin < end; begin += kRows) {
          const int64_t count = std::min(kRows, end - begin);
          const bool is_kept = products != Products::kMake && begin + count <= kept_rows_;
          Real* const to = is_kept ? kept_.get() + begin * level.codes : tile.get();
          if (!is_kept || products == Products::kKeep) {
            start_rows(in, level, begin, count, in.z + begin * in.dim, static_cast<Real*>(nullptr), x.get(),
                       own_.data() + begin);
            matrix_product({x.get(), count, in.dim}, level.keys.transposed(), {to, count, level.codes},
                           Into::kOverwrite);
          }
          body(part, begin, count, to);
        }
      }
    });
  }

  // The same for all rounds, of scaled_ and all codes.
  template <class Body>
  void for_kept_tiles(const Level<Real>& level, const Body& body) {
    for_tiles(scaled_, level, body, is_kept_ ? Products::kTake : Products::kKeep);
    is_kept_ = true;
  }

  // Half the range of the costs, as LETTER scales them.
  double amplitude() {
    const Codebooks<Real> codebooks(in_);
    const Level<Real>& level = codebooks[0];
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    std::vector<double> lowest(parts_, kInfinity), highest(parts_, -kInfinity);
    for_tiles(in_, level, [&](int64_t part, int64_t begin, int64_t count, const Real* tile) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        std::vector<Real> x(codes());
        for (int64_t i = 0; i < count; ++i) {
          score_row<fused.value>(tile + i * codes(), level.terms, codes(), x.data());
          Real low = x[0], high = x[0];
          const Real* const s = x.data();
          const int64_t width = codes();
#pragma omp simd reduction(min : low) reduction(max : high)
          for (int64_t k = 0; k < width; ++k) {
            low = s[k] < low ? s[k] : low;
            high = high < s[k] ? s[k] : high;
          }
          lowest[part] = std::min(lowest[part], static_cast<double>(low) + own_[begin + i]);
          highest[part] = std::max(highest[part], static_cast<double>(high) + own_[begin + i]);
        }
      });
    });
    const double low = *std::min_element(lowest.begin(), lowest.end());
    const double high = *std::max_element(highest.begin(), highest.end());
    return (high - low) / 2 + kSmallestAmplitude;
  }

  void set_bias(const Level<Real>& level) {
    for (int64_t k = 0; k < codes(); ++k) {
      const double own = level.terms.bias == nullptr ? 0.0 : static_cast<double>(level.terms.bias[k]);
      bias_[k] = static_cast<Real>(own + g_[k]);
    }
  }

  CodeTerms<Real> biased(const Level<Real>& level) const { return {level.terms.factor, bias_.get()}; }

  // One round: f of the rows by g, then g by f.
  void update(const Level<Real>& level) {
    set_bias(level);
    std::vector<double> weight(parts_ * codes(), 0.0);
    for_kept_tiles(level, [&](int64_t part, int64_t begin, int64_t count, const Real* tile) {
      add_softmax(level, begin, count, tile, weight.data() + part * codes());
    });
    has_f_ = true;
    std::vector<int64_t> lost;
    for (int64_t k = 0; k < codes(); ++k) {
      double sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += weight[part * codes() + k];
      if (sum < kLost) {
        lost.push_back(k);
      } else {
        g_[k] -= std::log(sum * static_cast<double>(codes()) / static_cast<double>(in_.rows));
      }
    }
    if (!lost.empty()) find_lost(level, lost);
  }

  // weight_k += sum over the rows of a tile of their softmax.
  void add_softmax(const Level<Real>& level, int64_t begin, int64_t count, const Real* tile, double* weight) {
    const int64_t width = codes();
    std::vector<Real> x(width), column(width, 0);
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      Real *const e = x.data(), *const sums = column.data();
      const CodeTerms<Real> terms = biased(level);
      for (int64_t i = 0; i < count; ++i) {
        const Real* const products = tile + i * width;
        Real offset = static_cast<Real>(-f_[begin + i]), sum = 0;
        if (has_f_) sum = exponentials<fused.value, true>(products, terms, width, offset, e);
        if (!(sum > kLeastSum && sum < 1 / kLeastSum)) {
          offset = score_row<fused.value>(products, terms, width, e);
          sum = exponentials<fused.value, true>(products, terms, width, offset, e);
        }
        const Real factor = 1 / sum;
#pragma omp simd
        for (int64_t k = 0; k < width; ++k) sums[k] += factor * e[k];
        f_[begin + i] = -(static_cast<double>(offset) + std::log(static_cast<double>(sum)));
      }
    });
    for (int64_t k = 0; k < width; ++k) weight[k] += static_cast<double>(column[k]);
  }

  // g of codes that have next to no weight, by log-sum-exp over the rows, the rows in order.
  void find_lost(const Level<Real>& level, const std::vector<int64_t>& lost) {
    const int64_t width = static_cast<int64_t>(lost.size()), dim = in_.dim;
    const Buffer<Real> keys = make_buffer<Real>(width * dim), factor = make_buffer<Real>(width),
                       bias = make_buffer<Real>(width);
    for (int64_t j = 0; j < width; ++j) {
      std::copy_n(level.keys.data + lost[j] * dim, dim, keys.get() + j * dim);
      factor[j] = level.terms.factor[lost[j]], bias[j] = bias_[lost[j]];
    }
    Level<Real> part_level = level;
    part_level.codes = width, part_level.keys = {keys.get(), width, dim};
    part_level.terms = {factor.get(), bias.get()};
    constexpr double kNothing = -std::numeric_limits<double>::infinity();
    std::vector<double> maximum(parts_ * width, kNothing), sum(parts_ * width, 0.0);
    for_tiles(scaled_, part_level, [&](int64_t part, int64_t begin, int64_t count, const Real* tile) {
      double *const most = maximum.data() + part * width, *const sums = sum.data() + part * width;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const double x = static_cast<double>(tile[i * width + j] * factor[j] + bias[j]) + f_[begin + i];
          if (x > most[j]) {
            sums[j] = sums[j] * std::exp(most[j] - x) + 1;
            most[j] = x;
          } else if (x > most[j] - 50) {
            sums[j] += std::exp(x - most[j]);
          }
        }
      }
    });
    for (int64_t j = 0; j < width; ++j) {
      double most = kNothing, total = 0;
      for (int64_t part = 0; part < parts_; ++part) most = std::max(most, maximum[part * width + j]);
      for (int64_t part = 0; part < parts_; ++part) {
        total += sum[part * width + j] * std::exp(maximum[part * width + j] - most);
      }
      g_[lost[j]] -= most + std::log(total * static_cast<double>(codes()) / static_cast<double>(in_.rows));
    }
  }

  // The best code of each row; of those within rounding of it by costs in float64.
  void choose(const Level<Real>& level, int64_t begin, int64_t count, const Real* tile, int64_t* out) const {
    const int64_t width = codes();
    double most = 0;
    for (int64_t k = 0; k < width; ++k) most = std::max(most, std::fabs(static_cast<double>(bias_[k])));
    std::vector<Real> scores(width);
    for (int64_t i = 0; i < count; ++i) {
      const Real* const r = in_.z + (begin + i) * in_.dim;
      Real maximum = 0;
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        maximum = score_row<fused.value>(tile + i * width, biased(level), width, scores.data());
      });
      const double slack = std::numeric_limits<Real>::epsilon() * (4 + std::sqrt(static_cast<double>(in_.dim)))
                           * (std::fabs(static_cast<double>(maximum)) + 2 * std::fabs(own_[begin + i]) + most);
      const Real cut = static_cast<Real>(static_cast<double>(maximum) - slack);
      int64_t best = -1, candidates = 0;
      for (int64_t k = 0; k < width; ++k) candidates += scores[k] >= cut;
      double highest = -std::numeric_limits<double>::infinity();
      for (int64_t k = 0; k < width; ++k) {
        if (!(scores[k] >= cut)) continue;
        const double score = candidates == 1 ? 0.0 : exact(level, r, k);
        if (best < 0 || score > highest) best = k, highest = score;
      }
      out[begin + i] = best;
    }
  }

  // s + g of a row and a code, in float64.
  double exact(const Level<Real>& level, const Real* r, int64_t code) const {
    const Real* const e = level.vectors.data + code * in_.dim;
    double re = 0, rr = 0, ee = 0, square = 0;
    for (int64_t d = 0; d < in_.dim; ++d) {
      const double x = static_cast<double>(r[d]), y = static_cast<double>(e[d]);
      re += x * y, rr += x * x, ee += y * y, square += (x - y) * (x - y);
    }
    const double eps = static_cast<double>(in_.eps);
    const double norms = std::max(std::sqrt(rr), eps) * std::max(std::sqrt(ee), eps);
    const double score = in_.metric == Metric::kEuclidean ? -square : in_.metric == Metric::kDot ? re : re / norms;
    return static_cast<double>(scaled_.scale) * score + g_[code];
  }

  const Quantize<Real>& in_;
  const int64_t parts_;
  Quantize<Real> scaled_;
  const int64_t kept_rows_;
  const Buffer<Real> kept_;  // (kept_rows_, codes): products
  bool is_kept_ = false;
  std::vector<double> own_;  // c of the rows
  std::vector<double> g_, f_;
  bool has_f_ = false;
  Buffer<Real> bias_;
};

}  // namespace

template <class Real>
void balanced_codes(const Quantize<Real>& in, double epsilon, int64_t iterations, int64_t* codes) {
  if (in.rows > 0) Balanced<Real>(in, epsilon).run(iterations, codes);
}

template void balanced_codes(const Quantize<float>&, double, int64_t, int64_t*);
template void balanced_codes(const Quantize<double>&, double, int64_t, int64_t*);

}  // namespace dgi::cpu
