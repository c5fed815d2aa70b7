// Residual quantization on the CPU: soft, straight-through and hard, with all gradients.
//
//   s_nk = scale r^_n . e^_k,   p = softmax((s + g) / tau),   z~ = P E,   r' = r - z~
//
// Rows are taken in blocks through all levels, so that residuals stay in the cache; of a tile of kBlock x K nothing is
// left but sums of its rows and columns. With X = scale r^ the tile is X E^T, scaled by the codes' reciprocal norms.
// Backward makes tile and noise again and goes through the levels in reverse. Below X, the rows of dz~ share its products:
//
//   [s / rnorm; dP] = [X; dZ~] E^T,   dS = P (dP - rowsum(P dP)) / tau,   T = dS rnorm,
//   dr^ = scale T E,   dE = [T; P]^T [X; dZ~], key and value at once,
//
// and then dr and dE lose their radial parts: those of dE are the sums of columns of dS s, and dscale = sum r^ . (T E).
//
// Rows of which few entries count (dgi/gumbel_row.h) leave the tile as lists: all products but X E^T take those only.
//
// 14 N K D operations (forward 4, backward 10), twice the noise. HEADER_FIGURES
//
// Blocks, groups of rows and rows are worked off or added up in fixed order: the same bits on any number of threads, as
// far as torch's matrix product does.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "dgi/gumbel_row.h"
#include "dgi/vector.h"
#include "gumbel.h"
#include "host.h"
#include "isa.h"
#include "row_noise.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kGroup = 16;  // rows whose sums over columns are added up by one thread

int64_t grain(int64_t elements_per_row) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, elements_per_row)); }

int64_t block_rows(int64_t rows, int64_t codes) {
  constexpr int64_t kElements = int64_t{1} << 20;
  const int64_t fit = kElements / std::max<int64_t>(1, codes) / kGroup * kGroup;
  return std::max<int64_t>(1, std::min(rows, std::clamp<int64_t>(fit, 128, 256)));
}

template <NoiseAs kAs>
using As = std::integral_constant<NoiseAs, kAs>;

// Calls f with the kind of noise as a type. `needs_sum`: s + g itself is asked for.
template <class Real, class F>
void with_noise(const Quantize<Real>& in, bool needs_sum, const F& f) {
  if (!in.noise.present) return f(As<NoiseAs::kNone>{});
  if constexpr (std::is_same_v<Real, float>) {
    if (in.tau == 1 && !needs_sum) return f(As<NoiseAs::kExponential>{});
  }
  f(As<NoiseAs::kGumbel>{});
}

template <class Real>
RowNoise noise_of(const Quantize<Real>& in, int64_t level, int64_t row) {
  return {philox_key(in.noise.seed), static_cast<uint32_t>(level), 0,
          static_cast<uint32_t>(in.noise.row_offset + row)};
}

// One level's codebook.
template <class Real>
struct Level {
  int64_t number, first, codes;  // first: of all codes
  Matrix<Real> vectors;
  const Real* rnorm;
};

template <class Real>
class Codebooks {
 public:
  explicit Codebooks(const Quantize<Real>& in) {
    const int64_t total = std::accumulate(in.sizes.begin(), in.sizes.end(), int64_t{0});
    rnorm_ = make_buffer<Real>(total);
    parallel_for(total, grain(in.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          rnorm_[k] = reciprocal_norm<fused.value>(in.codebooks + k * in.dim, in.dim, in.eps);
        }
      });
    });
    int64_t first = 0;
    for (int64_t number = 0; number < in.levels(); ++number) {
      const int64_t codes = in.sizes[number];
      levels_.push_back({number, first, codes, {const_cast<Real*>(in.codebooks) + first * in.dim, codes, in.dim},
                         rnorm_.get() + first});
      first += codes;
    }
  }

  const Level<Real>& operator[](int64_t level) const { return levels_[level]; }
  int64_t codes() const { return levels_.back().first + levels_.back().codes; }

 private:
  Buffer<Real> rnorm_;
  std::vector<Level<Real>> levels_;
};

// Sums over columns of a tile: each group of rows has its own, which are then added in order.
template <class Real>
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t codes) : partial_(make_buffer<Real>((rows + kGroup - 1) / kGroup * codes)) {}

  Real* start(int64_t group, int64_t codes) {
    Real* const sums = partial_.get() + group * codes;
    std::fill_n(sums, codes, Real{0});
    return sums;
  }

  void add_to(double* total, int64_t groups, int64_t codes) const {
    parallel_for(codes, grain(groups), [&](int64_t first, int64_t last) {
      for (int64_t group = 0; group < groups; ++group) {
        const Real* const sums = partial_.get() + group * codes;
#pragma omp simd
        for (int64_t k = first; k < last; ++k) total[k] += static_cast<double>(sums[k]);
      }
    });
  }

 private:
  Buffer<Real> partial_;
};

// With more entries than this a list saves nothing over its row of a matrix product.
template <class Real>
int64_t list_limit(int64_t codes) {
  return std::is_same_v<Real, float> ? std::min<int64_t>(codes / 16, 1024) : 0;
}

// The entries that count of peaked rows, positions ascending. What `p`, `t` and `along` hold is the user's.
template <class Real>
class Lists {
 public:
  Lists(int64_t rows, int64_t limit)
      : capacity_(limit), stride_(limit + detail::kGroup), count_(rows), index_(make_buffer<int32_t>(rows * stride_)),
        values_(make_buffer<Real>(3 * rows * stride_)) {}

  int64_t capacity() const { return capacity_; }
  int64_t& count(int64_t row) { return count_[row]; }
  int32_t* index(int64_t row) { return index_.get() + row * stride_; }
  Real* p(int64_t row) { return values_.get() + 3 * row * stride_; }
  Real* t(int64_t row) { return p(row) + stride_; }
  Real* along(int64_t row) { return t(row) + stride_; }

 private:
  int64_t capacity_, stride_;
  std::vector<int64_t> count_;
  Buffer<int32_t> index_;
  Buffer<Real> values_;
};

// Calls body(group, first row, last row) for the groups of a block, in parallel.
template <class Body>
void for_each_group(int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  parallel_for(groups, grain(kGroup * elements_per_row), [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) body(group, group * kGroup, std::min(rows, (group + 1) * kGroup));
  });
}

// out = scale r^; returns the reciprocal norm of r.
template <bool kFused, class Real>
DGI_HOST_DEVICE Real scaled_unit(const Real* r, const Quantize<Real>& in, Real* out) {
  const Real rnorm = reciprocal_norm<kFused>(r, in.dim, in.eps), scale = in.scale;
#pragma omp simd
  for (int64_t d = 0; d < in.dim; ++d) out[d] = scale * (rnorm * r[d]);
  return rnorm;
}

template <class Real>
class Forward {
 public:
  Forward(const Quantize<Real>& in, const Quantized<Real>& out, int64_t block)
      : in_(in), out_(out), codebooks_(in), usage_(codebooks_.codes(), 0.0),
        residual_(make_buffer<Real>(block * in.dim)), x_(make_buffer<Real>(block * in.dim)),
        emitted_(make_buffer<Real>(block * in.dim)), weight_(block), slot_(block),
        tile_(make_buffer<Real>(block * widest())), columns_(block, widest()), lists_(block, list_limit<Real>(widest())) {}

  void run_block(int64_t begin, int64_t count) {
    std::copy_n(in_.z + begin * in_.dim, count * in_.dim, residual_.get());
    for (int64_t number = 0; number < in_.levels(); ++number) {
      const Level<Real>& level = codebooks_[number];
      start_level(level, begin, count);
      matrix_product({x_.get(), count, in_.dim}, level.vectors.transposed(), {tile_.get(), count, level.codes},
                     Into::kOverwrite);
      with_noise(in_, false, [&](auto as) { assign<as.value>(level, begin, count); });
      if (in_.mode == QuantizeMode::kSoft) multiply_dense_rows(level, begin, count);
      emit(level, begin, count);
    }
  }

  void finish() {
    const double rows = static_cast<double>(std::max<int64_t>(1, in_.rows));
    for (size_t k = 0; k < usage_.size(); ++k) out_.usage[k] = static_cast<Real>(usage_[k] / rows);
  }

 private:
  int64_t widest() const { return *std::max_element(in_.sizes.begin(), in_.sizes.end()); }
  int64_t at(const Level<Real>& level, int64_t row) const { return row * in_.levels() + level.number; }

  void start_level(const Level<Real>& level, int64_t begin, int64_t count) {
    parallel_for(count, grain(in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const Real* const r = residual_.get() + i * in_.dim;
          std::copy_n(r, in_.dim, out_.residuals + at(level, begin + i) * in_.dim);
          scaled_unit<fused.value>(r, in_, x_.get() + i * in_.dim);
        }
      });
    });
  }

  // Turns the tile into exp((s + g) / tau), not yet normalised; codes, usage and the rows' sums.
  template <NoiseAs kAs>
  void assign(const Level<Real>& level, int64_t begin, int64_t count) {
    const bool hard = in_.mode == QuantizeMode::kHard;
    for_each_group(count, 4 * level.codes, [&](int64_t group, int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        Real* const sums = hard ? nullptr : columns_.start(group, level.codes);
        for (int64_t i = first; i < last; ++i) {
          Real* const s = tile_.get() + i * level.codes;
          const int64_t to = at(level, begin + i);
          const Real maximum = scale_row(s, level.rnorm, level.codes);
          int64_t code = first_equal(s, level.codes, maximum);
          const GumbelSums row = soften<fused.value, kAs>(s, level.codes, maximum, in_.tau,
                                                          noise_of(in_, level.number, begin + i), s);
          if (row.sum != row.sum) code = row.sampled;
          out_.codes[to] = code;
          out_.sampled[to] = row.sampled;
          out_.log_normalizer[to] = static_cast<Real>(row.log_normalizer);
          const Real weight = static_cast<Real>(1 / row.sum);
          weight_[i] = weight;
          out_.is_peaked[to] = false;
          if (hard) continue;
          lists_.count(i) = list_row(s, level.codes, row.sum, kNegligibleShare, list_limit<Real>(level.codes),
                                     lists_.index(i));
          out_.is_peaked[to] = lists_.count(i) > 0;
          if (out_.is_peaked[to] && in_.mode == QuantizeMode::kSoft) {
            const int32_t* const index = lists_.index(i);
            Real* const p = lists_.p(i);
            for (int64_t j = 0; j < lists_.count(i); ++j) p[j] = s[index[j]];
          }
#pragma omp simd
          for (int64_t k = 0; k < level.codes; ++k) sums[k] = multiply_add<fused.value>(weight, s[k], sums[k]);
        }
      });
    });
    if (hard) {
      for (int64_t i = 0; i < count; ++i) usage_[level.first + out_.codes[at(level, begin + i)]] += 1;
    } else {
      columns_.add_to(usage_.data() + level.first, (count + kGroup - 1) / kGroup, level.codes);
    }
  }

  // P E of the rows that are not peaked, which move up in the tile.
  void multiply_dense_rows(const Level<Real>& level, int64_t begin, int64_t count) {
    int64_t dense = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (out_.is_peaked[at(level, begin + i)]) continue;
      if (dense < i) std::copy_n(tile_.get() + i * level.codes, level.codes, tile_.get() + dense * level.codes);
      slot_[i] = dense++;
    }
    matrix_product({tile_.get(), dense, level.codes}, level.vectors, {emitted_.get(), dense, in_.dim}, Into::kOverwrite);
  }

  void emit(const Level<Real>& level, int64_t begin, int64_t count) {
    const int64_t* const chosen = in_.mode == QuantizeMode::kHard ? out_.codes : out_.sampled;
    parallel_for(count, grain(4 * in_.dim), [&](int64_t first, int64_t last) {
      const Buffer<Real> sum = make_buffer<Real>(in_.dim);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const int64_t to = at(level, begin + i);
          Real *const r = residual_.get() + i * in_.dim, *const quantized = out_.quantized + to * in_.dim;
          const Real* emitted = sum.get();
          if (in_.mode == QuantizeMode::kSoft && out_.is_peaked[to]) {
            std::fill_n(sum.get(), in_.dim, Real{0});
            add_rows<fused.value>(lists_.index(i), lists_.p(i), lists_.count(i), level.vectors.data, in_.dim, sum.get());
          } else {
            emitted = emitted_.get() + slot_[i] * in_.dim;
          }
          Real factor = weight_[i];
          if (in_.mode != QuantizeMode::kSoft) {
            emitted = level.vectors.data + chosen[to] * in_.dim;
            // A row of E to the bit, but NaN where the softmax is.
            factor = in_.mode == QuantizeMode::kHard || factor == factor ? Real{1} : factor;
          }
#pragma omp simd
          for (int64_t d = 0; d < in_.dim; ++d) {
            const Real value = factor * emitted[d];
            quantized[d] = value;
            r[d] -= value;
          }
        }
      });
    });
  }

  const Quantize<Real>& in_;
  const Quantized<Real>& out_;
  const Codebooks<Real> codebooks_;
  std::vector<double> usage_;
  Buffer<Real> residual_, x_, emitted_;
  std::vector<Real> weight_;
  std::vector<int64_t> slot_;  // of a dense row in the tile and in `emitted_`
  Buffer<Real> tile_;
  ColumnSums<Real> columns_;
  Lists<Real> lists_;
};

template <class Real>
class Backward {
 public:
  Backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved, const QuantizeUpstream<Real>& upstream,
           const QuantizeGradients<Real>& out, int64_t block)
      : in_(in), saved_(saved), upstream_(upstream), out_(out), codebooks_(in), radial_(codebooks_.codes(), 0.0),
        dr_(make_buffer<Real>(block * in.dim)), x_(make_buffer<Real>(2 * block * in.dim)),
        u_(make_buffer<Real>(block * in.dim)), row_(block), rnorm_(block), along_(block), dtau_(block),
        tile_(make_buffer<Real>(2 * block * widest())), columns_(block, widest()),
        lists_(block, 2 * list_limit<Real>(widest())) {}

  void run_block(int64_t begin, int64_t count) {
    std::fill_n(dr_.get(), count * in_.dim, Real{0});
    for (int64_t number = in_.levels() - 1; number >= 0; --number) {
      const Level<Real>& level = codebooks_[number];
      start_level(level, begin, count);
      const int64_t products = 2 * dense_ + (count - dense_);
      matrix_product({x_.get(), products, in_.dim}, level.vectors.transposed(), {tile_.get(), products, level.codes},
                     Into::kOverwrite);
      with_noise(in_, out_.tau != nullptr, [&](auto as) {
        differentiate_dense<as.value>(level, begin);
        differentiate_lists<as.value>(level, begin, count);
      });
      if (out_.tau != nullptr) {
        for (int64_t i = 0; i < count; ++i) dtau_sum_ += dtau_[i];
      }
      add_to_rows(level, begin, count);
      if (out_.codebooks != nullptr) add_to_codes(level, begin, count);
    }
    if (out_.z != nullptr) std::copy_n(dr_.get(), count * in_.dim, out_.z + begin * in_.dim);
    is_first_ = false;
  }

  void finish() {
    if (out_.scale != nullptr) *out_.scale = static_cast<Real>(dscale_sum_);
    if (out_.tau != nullptr) *out_.tau = static_cast<Real>(dtau_sum_);
    if (out_.codebooks == nullptr) return;
    if (is_first_) std::fill_n(out_.codebooks, codebooks_.codes() * in_.dim, Real{0});
    parallel_for(codebooks_.codes(), grain(in_.dim), [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const double rnorm = codebooks_[0].rnorm[k];
        if (codebooks_[0].rnorm[k] == 1 / in_.eps) continue;  // eps took the place of the norm: nothing is radial
        const Real factor = static_cast<Real>(-rnorm * rnorm * radial_[k]);
        const Real* const e = in_.codebooks + k * in_.dim;
        Real* const de = out_.codebooks + k * in_.dim;
        for (int64_t d = 0; d < in_.dim; ++d) de[d] += factor * e[d];
      }
    });
  }

 private:
  int64_t widest() const { return *std::max_element(in_.sizes.begin(), in_.sizes.end()); }
  int64_t at(const Level<Real>& level, int64_t row) const { return row * in_.levels() + level.number; }

  // Places of a row in the order of the tile: dense rows, their dz~, then peaked rows, whose dz~ need no place in it.
  int64_t dz_place(int64_t place, int64_t count) const { return place < dense_ ? dense_ + place : count + place; }
  int64_t x_place(int64_t place) const { return place < dense_ ? place : dense_ + place; }
  Real* x(int64_t place) { return x_.get() + x_place(place) * in_.dim; }
  Real* dz(int64_t place, int64_t count) { return x_.get() + dz_place(place, count) * in_.dim; }

  void start_level(const Level<Real>& level, int64_t begin, int64_t count) {
    dense_ = 0;
    for (const bool peaked : {false, true}) {
      int64_t place = peaked ? dense_ : 0;
      for (int64_t i = 0; i < count; ++i) {
        if (saved_.is_peaked[at(level, begin + i)] == peaked) row_[place++] = i;
      }
      if (!peaked) dense_ = place;
    }
    parallel_for(count, grain(in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          const int64_t from = at(level, begin + row_[place]) * in_.dim;
          rnorm_[place] = scaled_unit<fused.value>(saved_.residuals + from, in_, x(place));
          const Real* const dr = dr_.get() + row_[place] * in_.dim;
          Real* const to = dz(place, count);
          for (int64_t d = 0; d < in_.dim; ++d) {
            to[d] = (upstream_.quantized != nullptr ? upstream_.quantized[from + d] : Real{0}) - dr[d];
          }
        }
      });
    });
  }

  // [s / rnorm; dP] becomes [T; P].
  template <NoiseAs kAs>
  void differentiate_dense(const Level<Real>& level, int64_t begin) {
    if (dense_ == 0) return;
    const int64_t codes = level.codes;
    const Real* const dusage = upstream_.usage != nullptr ? upstream_.usage + level.first : nullptr;
    for_each_group(dense_, 4 * codes, [&](int64_t group, int64_t first, int64_t last) {
      Real* const sums = columns_.start(group, codes);
      const bool wants_tau = out_.tau != nullptr;
      const Buffer<Real> e = make_buffer<Real>(codes), noisy = make_buffer<Real>(wants_tau ? codes : 0);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          Real *const s = tile_.get() + place * codes, *const dp = tile_.get() + (dense_ + place) * codes;
          const Real maximum = scale_row(s, level.rnorm, codes);
          const int64_t row = begin + row_[place];
          const GumbelSums sum = soften<fused.value, kAs>(s, codes, maximum, in_.tau, noise_of(in_, level.number, row),
                                                          e.get(), wants_tau ? noisy.get() : nullptr);
          if (dusage != nullptr) {
            const Real share = Real{1} / static_cast<Real>(in_.rows);
#pragma omp simd
            for (int64_t k = 0; k < codes; ++k) dp[k] = multiply_add<fused.value>(share, dusage[k], dp[k]);
          }
          const Real shift = static_cast<Real>(weighted_sum<fused.value>(e.get(), dp, codes) / sum.sum)
                             - dnormalizer(level, row);
          const Real weight = static_cast<Real>(1 / sum.sum), inverse = 1 / in_.tau;
          if (wants_tau) {
            Real along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t k = 0; k < codes; ++k) along += weight * e[k] * (dp[k] - shift) * noisy[k];
            dtau_[place] = -static_cast<double>(along) * inverse * inverse;
          }
          const Real* const rnorm = level.rnorm;
#pragma omp simd
          for (int64_t k = 0; k < codes; ++k) {
            const Real p = weight * e[k], ds = p * (dp[k] - shift) * inverse;
            sums[k] = multiply_add<fused.value>(ds, s[k], sums[k]);
            s[k] = ds * rnorm[k];
            dp[k] = p;
          }
        }
      });
    });
    columns_.add_to(radial_.data() + level.first, (dense_ + kGroup - 1) / kGroup, codes);
  }

  // The same for the entries that count of peaked rows: dP one by one, T and P as lists.
  template <NoiseAs kAs>
  void differentiate_lists(const Level<Real>& level, int64_t begin, int64_t count) {
    const int64_t codes = level.codes, dim = in_.dim;
    const Real* const dusage = upstream_.usage != nullptr ? upstream_.usage + level.first : nullptr;
    parallel_for(count - dense_, grain(4 * codes), [&](int64_t first, int64_t last) {
      const bool wants_tau = out_.tau != nullptr;
      const Buffer<Real> buffer = make_buffer<Real>(codes), noisy = make_buffer<Real>(wants_tau ? codes : 0);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = dense_ + first; place < dense_ + last; ++place) {
          Real *const s = tile_.get() + x_place(place) * codes, *const e = buffer.get();
          const Real maximum = scale_row(s, level.rnorm, codes);
          const int64_t row = begin + row_[place];
          const GumbelSums sum = soften<fused.value, kAs>(s, codes, maximum, in_.tau, noise_of(in_, level.number, row), e,
                                                          wants_tau ? noisy.get() : nullptr);
          int32_t* const index = lists_.index(place);
          // Twice as many entries as in forward find room; this product's rounding cannot make more, but nothing breaks.
          int64_t listed = -1;
          for (double share = kNegligibleShare; listed < 0 && share < 1; share *= 16) {
            listed = list_row(e, codes, sum.sum, share, lists_.capacity(), index);
          }
          if (listed < 0) {
            index[0] = static_cast<int32_t>(sum.sampled);
            listed = 1;
          }
          lists_.count(place) = listed;
          Real *const p = lists_.p(place), *const t = lists_.t(place), *const along = lists_.along(place);
          double total = 0, weighted = 0;
          for (int64_t j = 0; j < listed; ++j) {
            const int64_t k = index[j];
            t[j] = dot<fused.value>(level.vectors.data + k * dim, dz(place, count), dim);
            if (dusage != nullptr) t[j] += dusage[k] / static_cast<Real>(in_.rows);
            total += e[k];
            weighted += static_cast<double>(e[k]) * t[j];
          }
          const Real shift = static_cast<Real>(weighted / total) - dnormalizer(level, row), inverse = 1 / in_.tau;
          double tau_sum = 0;
          for (int64_t j = 0; j < listed; ++j) {
            const int64_t k = index[j];
            p[j] = static_cast<Real>(e[k] / total);
            const Real ds = p[j] * (t[j] - shift) * inverse;
            if (wants_tau) tau_sum += static_cast<double>(ds) * noisy[k];
            along[j] = ds * s[k];
            t[j] = ds * level.rnorm[k];
          }
          dtau_[place] = -tau_sum * inverse;
        }
      });
    });
  }

  Real dnormalizer(const Level<Real>& level, int64_t row) const {
    return upstream_.log_normalizer != nullptr ? upstream_.log_normalizer[at(level, row)] : Real{0};
  }

  void add_to_rows(const Level<Real>& level, int64_t begin, int64_t count) {
    matrix_product({tile_.get(), dense_, level.codes}, level.vectors, {u_.get(), dense_, in_.dim}, Into::kOverwrite);
    parallel_for(count, grain(4 * in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          Real *const u = u_.get() + place * in_.dim, *const dr = dr_.get() + row_[place] * in_.dim;
          if (place >= dense_) {
            std::fill_n(u, in_.dim, Real{0});
            add_rows<fused.value>(lists_.index(place), lists_.t(place), lists_.count(place), level.vectors.data, in_.dim, u);
          }
          const int64_t from = at(level, begin + row_[place]) * in_.dim;
          const Real* const r = saved_.residuals + from;
          along_[place] = static_cast<double>(rnorm_[place]) * dot<fused.value>(r, u, in_.dim);
          through_normalization<fused.value>(r, u, in_.dim, rnorm_[place], in_.eps, in_.scale * rnorm_[place], u);
          for (int64_t d = 0; d < in_.dim; ++d) {
            dr[d] += u[d] + (upstream_.residuals != nullptr ? upstream_.residuals[from + d] : Real{0});
          }
        }
      });
    });
    for (int64_t i = 0; i < count; ++i) dscale_sum_ += along_[i];
  }

  void add_to_codes(const Level<Real>& level, int64_t begin, int64_t count) {
    const bool soft = in_.mode == QuantizeMode::kSoft;
    const int64_t rows = soft ? 2 * dense_ : dense_;
    Real* const de = out_.codebooks + level.first * in_.dim;
    if (rows > 0) {
      matrix_product(Matrix<Real>{tile_.get(), rows, level.codes}.transposed(), {x_.get(), rows, in_.dim},
                     {de, level.codes, in_.dim}, is_first_ ? Into::kOverwrite : Into::kAdd);
    } else if (is_first_) {
      std::fill_n(de, level.codes * in_.dim, Real{0});
    }
    add_lists_to_codes(level, count, de);
    if (soft) return;
    for (int64_t place = 0; place < count; ++place) {
      Real* const row = de + saved_.sampled[at(level, begin + row_[place])] * in_.dim;
      const Real* const from = dz(place, count);
      for (int64_t d = 0; d < in_.dim; ++d) row[d] += from[d];
    }
  }

  // Each thread has codes of its own, and each code takes the rows in order.
  void add_lists_to_codes(const Level<Real>& level, int64_t count, Real* de) {
    int64_t entries = 0;
    for (int64_t place = dense_; place < count; ++place) entries += lists_.count(place);
    if (entries == 0) return;
    const bool soft = in_.mode == QuantizeMode::kSoft;
    parallel_for(level.codes, grain(2 * entries * in_.dim / level.codes), [&](int64_t begin, int64_t end) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = dense_; place < count; ++place) {
          const int32_t* const index = lists_.index(place);
          const int64_t listed = lists_.count(place);
          const Real *const key = x(place), *const value = dz(place, count);
          for (int64_t j = std::lower_bound(index, index + listed, begin) - index; j < listed && index[j] < end; ++j) {
            Real* const to = de + index[j] * in_.dim;
            const Real t = lists_.t(place)[j], p = soft ? lists_.p(place)[j] : Real{0};
            radial_[level.first + index[j]] += static_cast<double>(lists_.along(place)[j]);
#pragma omp simd
            for (int64_t d = 0; d < in_.dim; ++d) {
              to[d] = multiply_add<fused.value>(t, key[d], multiply_add<fused.value>(p, value[d], to[d]));
            }
          }
        }
      });
    });
  }

  const Quantize<Real>& in_;
  const QuantizeSaved<Real>& saved_;
  const QuantizeUpstream<Real>& upstream_;
  const QuantizeGradients<Real>& out_;
  const Codebooks<Real> codebooks_;
  std::vector<double> radial_;  // sum_n dS s of every code
  Buffer<Real> dr_;             // of the residual that the level leaves, then of the one it saw
  Buffer<Real> x_, u_;
  std::vector<int64_t> row_;    // of the block, by place
  int64_t dense_ = 0;           // rows that are not peaked
  std::vector<Real> rnorm_;
  std::vector<double> along_, dtau_;
  Buffer<Real> tile_;
  ColumnSums<Real> columns_;
  Lists<Real> lists_;
  double dscale_sum_ = 0, dtau_sum_ = 0;
  bool is_first_ = true;
};

template <class Real, class Pass>
void run(const Quantize<Real>& in, int64_t block, Pass&& pass) {
  for (int64_t begin = 0; begin < in.rows; begin += block) pass.run_block(begin, std::min(block, in.rows - begin));
  pass.finish();
}

template <class Real>
int64_t block_rows(const Quantize<Real>& in) {
  return block_rows(in.rows, *std::max_element(in.sizes.begin(), in.sizes.end()));
}

}  // namespace

template <class Real>
void residual_quantize(const Quantize<Real>& in, const Quantized<Real>& out) {
  const int64_t block = block_rows(in);
  run(in, block, Forward<Real>(in, out, block));
}

template <class Real>
void residual_quantize_backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved,
                                const QuantizeUpstream<Real>& upstream, const QuantizeGradients<Real>& out) {
  const int64_t block = block_rows(in);
  run(in, block, Backward<Real>(in, saved, upstream, out, block));
}

#define DGI_INSTANTIATE(Real)                                                                            \
  template void residual_quantize(const Quantize<Real>&, const Quantized<Real>&);                        \
  template void residual_quantize_backward(const Quantize<Real>&, const QuantizeSaved<Real>&,            \
                                           const QuantizeUpstream<Real>&, const QuantizeGradients<Real>&);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
