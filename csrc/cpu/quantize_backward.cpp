// The gradients of residual quantization: quantize.cpp has the formulas.
#include "quantize.h"

namespace dgi::cpu {
namespace {

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
    // Peaked rows by their code: neighbours take the same rows of E and dE, which are in the cache then.
    std::stable_sort(row_.begin() + dense_, row_.begin() + count, [&](int64_t a, int64_t b) {
      return saved_.sampled[at(level, begin + a)] < saved_.sampled[at(level, begin + b)];
    });
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

  // The same for the entries that count of peaked rows: dP one by one, T and P as lists, and T E.
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
          Real* const u = u_.get() + place * dim;  // now, while these rows of E are in the cache
          std::fill_n(u, dim, Real{0});
          add_rows<fused.value>(index, t, listed, level.vectors.data, dim, u);
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

}  // namespace

template <class Real>
void residual_quantize_backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved,
                                const QuantizeUpstream<Real>& upstream, const QuantizeGradients<Real>& out) {
  const int64_t block = block_rows(in);
  run(in, block, Backward<Real>(in, saved, upstream, out, block));
}

#define DGI_INSTANTIATE(Real)                                                                  \
  template void residual_quantize_backward(const Quantize<Real>&, const QuantizeSaved<Real>&,  \
                                           const QuantizeUpstream<Real>&, const QuantizeGradients<Real>&);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
