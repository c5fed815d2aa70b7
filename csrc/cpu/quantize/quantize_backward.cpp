// The gradients of residual quantization: quantize.cpp has the formulas.
#include "cpu/quantize/quantize_levels.h"

namespace dgi::cpu {
namespace {

template <class Real>
class Backward {
 public:
  // dE, of its rows, goes to the place of the result where it is the first share.
  Backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved, const QuantizeUpstream<Real>& upstream,
           const QuantizeGradients<Real>& out, const Codebooks<Real>& codebooks, int64_t block, bool is_first_share)
      : in_(in), saved_(saved), upstream_(upstream), out_(out), codebooks_(codebooks), sum_(codebooks_.codes(), 0.0),
        own_de_(make_buffer<Real>(is_first_share || out.codebooks == nullptr ? 0 : codebooks_.codes() * in.dim)),
        own_dv_(make_buffer<Real>(is_first_share || out.values == nullptr ? 0 : codebooks_.codes() * in.width)),
        de_(is_first_share ? out.codebooks : own_de_.get()), dv_(is_first_share ? out.values : own_dv_.get()),
        dr_(make_buffer<Real>(block * in.dim)), x_(make_buffer<Real>(2 * block * in.dim)),
        dm_(make_buffer<Real>(mixes() ? block * in.width : 0)), u_(make_buffer<Real>(block * in.dim)), row_(block),
        entry_(block), terms_(block), along_(block), dtau_(block), tile_(make_buffer<Real>(2 * block * in.widest())),
        columns_(block, in.widest()) {}

  void run_block(int64_t begin, int64_t count) {
    std::fill_n(dr_.get(), count * in_.dim, Real{0});
    for (int64_t number = in_.levels() - 1; number >= 0; --number) {
      const Level<Real>& level = codebooks_[number];
      start_level(level, begin, count);
      matrix_product({x_.get(), 2 * dense_, in_.dim}, level.keys.transposed(), {tile_.get(), 2 * dense_, level.codes},
                     Into::kOverwrite);
      if (mixes()) {
        matrix_product({dm_.get(), dense_, in_.width}, level.values.transposed(),
                       {tile_.get() + dense_ * level.codes, dense_, level.codes}, Into::kAdd);
      }
      with_noise(in_, out_.tau != nullptr, [&](auto as) { differentiate_dense<as.value>(level, begin); });
      differentiate_lists(level, begin, count);
      if (out_.tau != nullptr) {
        for (int64_t i = 0; i < count; ++i) dtau_sum_ += dtau_[i];
      }
      add_to_rows(level, begin, count);
      if (out_.codebooks != nullptr) add_to_codes(level, begin, count);
      if (out_.values != nullptr) add_to_values(level, begin, count);
    }
    if (out_.z != nullptr) std::copy_n(dr_.get(), count * in_.dim, out_.z + begin * in_.dim);
    is_first_ = false;
  }

  double dscale() const { return dscale_sum_; }
  double dtau() const { return dtau_sum_; }
  double sum(int64_t code) const { return sum_[code]; }
  const Real* de(int64_t code) const { return de_ + code * in_.dim; }
  const Real* dv(int64_t code) const { return dv_ + code * in_.width; }

 private:
  int64_t at(const Level<Real>& level, int64_t row) const { return in_.at(row, level.number); }

  // Rows by place: X of the dense rows, as in the tile, their dz~, X of the listed rows, their dz~.
  Real* x(int64_t place) { return x_.get() + (place < dense_ ? place : dense_ + place) * in_.dim; }
  Real* dz(int64_t place, int64_t count) {
    return x_.get() + (place < dense_ ? dense_ + place : count + place) * in_.dim;
  }

  // Whether mixtures have a gradient; its rows by place are dm_.
  bool mixes() const { return upstream_.mixtures != nullptr && in_.width > 0; }

  // What forward remembered of a row, by its place, and room for T and what goes into the sums over rows, of the same
  // entries.
  struct List {
    const int32_t* code;
    const Real* p;
    int64_t count;
    Real *t, *tilt;
  };
  List list(const Level<Real>& level, int64_t begin, int64_t place) {
    const int64_t* const range = saved_.lists.range + 2 * at(level, begin + row_[place]);
    return {saved_.lists.code + range[0], saved_.lists.p + range[0], range[1] - range[0], t_.data() + entry_[place],
            tilt_.data() + entry_[place]};
  }
  int64_t entries() const { return static_cast<int64_t>(t_.size()); }

  void start_level(const Level<Real>& level, int64_t begin, int64_t count) {
    std::iota(row_.begin(), row_.begin() + count, int64_t{0});
    dense_ = count;
    if (saved_.lists.room > 0) {
      const auto range = [&](int64_t i) { return saved_.lists.range + 2 * at(level, begin + i); };
      const auto first_listed = std::stable_partition(row_.begin(), row_.begin() + count,
                                                      [&](int64_t i) { return range(i)[0] == range(i)[1]; });
      dense_ = first_listed - row_.begin();
      // Listed rows by their code: neighbours take the same rows of E and dE, which are in the cache then.
      std::stable_sort(first_listed, row_.begin() + count, [&](int64_t a, int64_t b) {
        return saved_.sampled[at(level, begin + a)] < saved_.sampled[at(level, begin + b)];
      });
      int64_t entries = 0;
      for (int64_t place = dense_; place < count; ++place) {
        entry_[place] = entries;
        entries += range(row_[place])[1] - range(row_[place])[0];
      }
      t_.resize(entries);
      tilt_.resize(entries);
    }
    parallel_for(count, grain(in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          const int64_t from = at(level, begin + row_[place]) * in_.dim;
          terms_[place] = start_row<fused.value>(in_, level, saved_.residuals + from, x(place));
          const Real* const dr = dr_.get() + row_[place] * in_.dim;
          Real* const to = dz(place, count);
          for (int64_t d = 0; d < in_.dim; ++d) {
            to[d] = (upstream_.quantized != nullptr ? upstream_.quantized[from + d] : Real{0}) - dr[d];
          }
          if (mixes()) {
            std::copy_n(upstream_.mixtures + at(level, begin + row_[place]) * in_.width, in_.width,
                        dm_.get() + place * in_.width);
          }
        }
      });
    });
  }

  // [S; dP] becomes [T; P].
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
          const Real maximum = score_row<fused.value>(s, level.terms, codes, s);
          const int64_t row = begin + row_[place];
          const GumbelSums sum = soften_row<fused.value, kAs>(in_, level.number, row, s, codes, maximum, e.get(),
                                                              wants_tau ? noisy.get() : nullptr);
          if (dusage != nullptr && in_.is_counted(row)) {
            const Real share = Real{1} / static_cast<Real>(counted_);
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
            dtau_[place] = -(static_cast<double>(along) + dnormalizer(level, row) * terms_[place].own) * inverse
                           * inverse;
          }
          if (out_.noise_scale != nullptr) {
            out_.noise_scale[row] += inverse * weight * along_noise<fused.value>(level, row, e.get(), dp, shift);
          }
          const Real* const factor = level.terms.factor;
          with_bias(level.terms, [&](auto has_bias) DGI_ALWAYS_INLINE {
#pragma omp simd
            for (int64_t k = 0; k < codes; ++k) {
              const Real p = weight * e[k], ds = p * (dp[k] - shift) * inverse;
              sums[k] = multiply_add<fused.value>(ds, has_bias.value ? Real{1} : s[k], sums[k]);
              s[k] = ds * factor[k];
              dp[k] = p;
            }
          });
        }
      });
    });
    columns_.add_to(sum_.data() + level.first, groups_of(dense_), codes);
  }

  // sum_k e_k (dp_k - shift) g_k
  template <bool kFused>
  DGI_HOST_DEVICE Real along_noise(const Level<Real>& level, int64_t row, const Real* e, const Real* dp, Real shift) {
    if (!in_.noise.present) return 0;
    Real g[kNoiseChunk], along = 0;
    for (int64_t first = 0; first < level.codes; first += kNoiseChunk) {
      const int64_t count = std::min(kNoiseChunk, level.codes - first);
      noise_of(in_, level.number, row).template fill<kFused, NoiseAs::kGumbel>(first, count, g);
#pragma omp simd reduction(+ : along)
      for (int64_t k = 0; k < count; ++k) along += e[first + k] * (dp[first + k] - shift) * g[k];
    }
    return along;
  }

  // The same for the rows that forward listed: s and dP at their codes alone, T as a list, and T E.
  void differentiate_lists(const Level<Real>& level, int64_t begin, int64_t count) {
    if (dense_ == count) return;
    const int64_t dim = in_.dim, entries_per_row = entries() / (count - dense_);
    const Real* const dusage = upstream_.usage != nullptr ? upstream_.usage + level.first : nullptr;
    parallel_for(count - dense_, grain(3 * entries_per_row * dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = dense_ + first; place < dense_ + last; ++place) {
          const List row = list(level, begin, place);
          const Real *const key = x(place), *const value = dz(place, count);
          const int64_t to = at(level, begin + row_[place]);
          const bool is_counted = in_.is_counted(begin + row_[place]);
          double mean = 0;
          for (int64_t j = 0; j < row.count; ++j) {
            const int64_t k = row.code[j];
            const Real* const e = level.keys.data + k * dim;
            row.tilt[j] = level.terms.bias != nullptr ? Real{1} : level.terms.factor[k] * dot<fused.value>(e, key, dim);
            row.t[j] = dot<fused.value>(e, value, dim);
            if (mixes()) {
              row.t[j] += dot<fused.value>(level.values.data + k * in_.width, dm_.get() + place * in_.width, in_.width);
            }
            if (dusage != nullptr && is_counted) row.t[j] += dusage[k] / static_cast<Real>(counted_);
            mean += static_cast<double>(row.p[j]) * row.t[j];
          }
          const Real shift = static_cast<Real>(mean) - dnormalizer(level, begin + row_[place]), inverse = 1 / in_.tau;
          double tau_sum = 0;
          for (int64_t j = 0; j < row.count; ++j) {
            const Real ds = row.p[j] * (row.t[j] - shift) * inverse;
            // (s + g) / tau = log p + log Z
            if (out_.tau != nullptr)
              tau_sum += static_cast<double>(ds) * (std::log(row.p[j]) + saved_.log_normalizer[to]);
            row.tilt[j] *= ds;
            row.t[j] = ds * level.terms.factor[row.code[j]];
          }
          dtau_[place] = -tau_sum;
          Real* const u = u_.get() + place * dim;  // now, while these rows of E are in the cache
          std::fill_n(u, dim, Real{0});
          add_rows<fused.value>(row.code, row.t, row.count, level.keys.data, dim, u);
        }
      });
    });
  }

  Real dnormalizer(const Level<Real>& level, int64_t row) const {
    return upstream_.log_normalizer != nullptr ? upstream_.log_normalizer[at(level, row)] : Real{0};
  }

  void add_to_rows(const Level<Real>& level, int64_t begin, int64_t count) {
    matrix_product({tile_.get(), dense_, level.codes}, level.keys, {u_.get(), dense_, in_.dim}, Into::kOverwrite);
    parallel_for(count, grain(4 * in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          Real *const u = u_.get() + place * in_.dim, *const dr = dr_.get() + row_[place] * in_.dim;
          const int64_t from = at(level, begin + row_[place]) * in_.dim;
          const Real* const r = saved_.residuals + from;
          const double dlog = dnormalizer(level, begin + row_[place]) / static_cast<double>(in_.tau);
          along_[place] = finish_row<fused.value>(in_, level, r, terms_[place].factor, dlog, u);
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
    Real* const de = de_ + level.first * in_.dim;
    if (rows > 0) {
      matrix_product(Matrix<Real>{tile_.get(), rows, level.codes}.transposed(), {x_.get(), rows, in_.dim},
                     {de, level.codes, in_.dim}, is_first_ ? Into::kOverwrite : Into::kAdd);
    } else if (is_first_) {
      std::fill_n(de, level.codes * in_.dim, Real{0});
    }
    add_lists_to_codes(level, begin, count, de);
    if (soft) return;
    for (int64_t place = 0; place < count; ++place) {
      Real* const row = de + saved_.sampled[at(level, begin + row_[place])] * in_.dim;
      const Real* const from = dz(place, count);
      for (int64_t d = 0; d < in_.dim; ++d) row[d] += from[d];
    }
  }

  // Each thread has codes of its own, and each code takes the rows in order.
  void add_lists_to_codes(const Level<Real>& level, int64_t begin, int64_t count, Real* de) {
    if (dense_ == count) return;
    const bool soft = in_.mode == QuantizeMode::kSoft;
    parallel_for(level.codes, grain(2 * (1 + entries() / level.codes) * in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = dense_; place < count; ++place) {
          const List row = list(level, begin, place);
          const Real *const key = x(place), *const value = dz(place, count);
          int64_t j = std::lower_bound(row.code, row.code + row.count, first) - row.code;
          for (; j < row.count && row.code[j] < last; ++j) {
            Real* const to = de + row.code[j] * in_.dim;
            const Real t = row.t[j], p = soft ? row.p[j] : Real{0};
            sum_[level.first + row.code[j]] += static_cast<double>(row.tilt[j]);
#pragma omp simd
            for (int64_t d = 0; d < in_.dim; ++d) {
              to[d] = multiply_add<fused.value>(t, key[d], multiply_add<fused.value>(p, value[d], to[d]));
            }
          }
        }
      });
    });
  }

  // dV = P^T dM, or of a straight-through row its sampled code's.
  void add_to_values(const Level<Real>& level, int64_t begin, int64_t count) {
    const bool soft = in_.mode == QuantizeMode::kSoft;
    const int64_t width = in_.width;
    Real* const dv = dv_ + level.first * width;
    if (mixes() && soft && dense_ > 0) {
      matrix_product(Matrix<Real>{tile_.get() + dense_ * level.codes, dense_, level.codes}.transposed(),
                     {dm_.get(), dense_, width}, {dv, level.codes, width}, is_first_ ? Into::kOverwrite : Into::kAdd);
    } else if (is_first_) {
      std::fill_n(dv, level.codes * width, Real{0});
    }
    if (!mixes()) return;
    for (int64_t place = soft ? dense_ : 0; place < count; ++place) {
      const Real* const dm = dm_.get() + place * width;
      if (soft) {
        const List row = list(level, begin, place);
        for (int64_t j = 0; j < row.count; ++j) add_scaled(row.p[j], dm, dv + row.code[j] * width);
      } else {
        add_scaled(Real{1}, dm, dv + saved_.sampled[at(level, begin + row_[place])] * width);
      }
    }
  }

  void add_scaled(Real factor, const Real* dm, Real* to) const {
    for (int64_t d = 0; d < in_.width; ++d) to[d] += factor * dm[d];
  }

  const Quantize<Real>& in_;
  const QuantizeSaved<Real>& saved_;
  const QuantizeUpstream<Real>& upstream_;
  const QuantizeGradients<Real>& out_;
  const Codebooks<Real>& codebooks_;
  const double counted_ = in_.counted();
  std::vector<double> sum_;  // over all rows, of every code: of ds where it has a bias, else of ds s
  Buffer<Real> own_de_, own_dv_;
  Real *de_, *dv_;  // dE with its radial part, dV
  Buffer<Real> dr_;             // of the residual that the level leaves, then of the one it saw
  Buffer<Real> x_, dm_, u_;
  std::vector<int64_t> row_;    // of the block, by place
  std::vector<int64_t> entry_;  // the first of a listed row, by place
  int64_t dense_ = 0;           // rows that are not listed
  std::vector<Real> t_, tilt_;  // of all listed entries: T, and ds or ds s
  std::vector<RowTerms<Real>> terms_;  // by place
  std::vector<double> along_, dtau_;
  Buffer<Real> tile_;
  ColumnSums<Real> columns_;
  double dscale_sum_ = 0, dtau_sum_ = 0;
  bool is_first_ = true;
};

// What the shares make together; the first one's dE lies in the place of the result.
template <class Real>
void finish(const Quantize<Real>& in, const QuantizeGradients<Real>& out, const Codebooks<Real>& codebooks,
            const std::vector<std::unique_ptr<Backward<Real>>>& shares) {
  double dscale = 0, dtau = 0;
  for (const auto& share : shares) dscale += share->dscale(), dtau += share->dtau();
  for (const auto& share : shares) {
    for (int64_t k = 0; codebooks.have_bias() && k < codebooks.codes(); ++k) {
      dscale += codebooks.bias_per_scale(k) * share->sum(k);
    }
  }
  if (out.scale != nullptr) *out.scale = static_cast<Real>(dscale);
  if (out.tau != nullptr) *out.tau = static_cast<Real>(dtau);
  if (out.values != nullptr) {
    if (in.rows == 0) std::fill_n(out.values, codebooks.codes() * in.width, Real{0});
    for (size_t i = 1; i < shares.size(); ++i) {
      const Real* const more = shares[i]->dv(0);
      for (int64_t d = 0; d < codebooks.codes() * in.width; ++d) out.values[d] += more[d];
    }
  }
  if (out.codebooks == nullptr) return;
  if (in.rows == 0) std::fill_n(out.codebooks, codebooks.codes() * in.dim, Real{0});
  parallel_for(codebooks.codes(), grain(in.dim), [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      double sum = 0;
      for (const auto& share : shares) sum += share->sum(k);
      const Real factor = finish_code(in, codebooks.factor(k), sum);
      const Real* const e = codebooks.keys() + k * in.dim;
      Real* const de = out.codebooks + k * in.dim;
      for (size_t i = 1; i < shares.size(); ++i) {
        const Real* const more = shares[i]->de(k);
        for (int64_t d = 0; d < in.dim; ++d) de[d] += more[d];
      }
      for (int64_t d = 0; d < in.dim; ++d) de[d] += factor * e[d];
    }
  });
}

}  // namespace

template <class Real>
void residual_quantize_backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved,
                                const QuantizeUpstream<Real>& upstream, const QuantizeGradients<Real>& out) {
  const Codebooks<Real> codebooks(in);
  if (out.noise_scale != nullptr) std::fill_n(out.noise_scale, in.rows, Real{0});
  const auto shares = run<Backward<Real>>(in, [&](int64_t share, int64_t, int64_t block) {
    return std::make_unique<Backward<Real>>(in, saved, upstream, out, codebooks, block, share == 0);
  });
  finish(in, out, codebooks, shares);
}

#define DGI_INSTANTIATE(Real)                                                                 \
  template void residual_quantize_backward(const Quantize<Real>&, const QuantizeSaved<Real>&, \
                                           const QuantizeUpstream<Real>&, const QuantizeGradients<Real>&);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
