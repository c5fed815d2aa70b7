// Hard residual quantization on the CPU: an argmax and a gather per level, for the final codes of a catalog.
//
//   c = argmax_k s_k,   r' = r - e_c,   s_k = a S_k f_k + b_k (quantize.cpp)
//
// No softmax and no P E. Codes are taken in tiles that stay in the second-level cache between the product that makes
// them and the pass that reduces them to a running maximum per row; who wants log sum_k exp(s_k / tau), too, pays for
// the exponentials that count. 2 N K D operations, no memory but the tile and a block of rows.
#include <limits>

#include "cpu/quantize/quantize_levels.h"
#include "cpu/quantize/quantize_panels.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kTileCodes = 1024;  // a multiple of kNoiseChunk

// The first of x that equals a value that is there, compared 16 at once.
template <class Real>
DGI_HOST_DEVICE int64_t first_of(const Real* x, int64_t count, Real value) {
  constexpr int64_t kCompared = 16;
  int64_t k = 0;
  for (; k + kCompared < count; k += kCompared) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < kCompared; ++i) any |= x[k + i] == value;
    if (any) break;
  }
  while (x[k] != value) ++k;
  return k;
}

// The first largest of the values seen so far, as argmax has it: the first NaN where there is one.
template <class Real>
struct Largest {
  Real value = -std::numeric_limits<Real>::infinity();
  int64_t code = 0;
  bool is_nan = false;

  // `x` are the values of codes first ..., none of them NaN, and `maximum` is theirs.
  DGI_HOST_DEVICE void take_ordered(const Real* x, int64_t first, int64_t count, Real maximum) {
    if (is_nan || !(maximum > value)) return;
    value = maximum;
    code = first + first_of(x, count, maximum);
  }

  // `x` are the values of codes first ...; returns their maximum.
  DGI_HOST_DEVICE Real take(const Real* x, int64_t first, int64_t count) {
    Real maximum = -std::numeric_limits<Real>::infinity();
    int nan = 0;
#pragma omp simd reduction(max : maximum) reduction(| : nan)
    for (int64_t k = 0; k < count; ++k) {
      maximum = maximum < x[k] ? x[k] : maximum;
      nan |= x[k] != x[k];
    }
    if (nan && !is_nan) {
      code = first + argmax_with_nan(x, count, maximum);
      is_nan = true;
    }
    if (!is_nan && maximum > value) {
      value = maximum;
      code = first + first_of(x, count, maximum);
    }
    return maximum;
  }
};

// log sum exp(x / tau) of the values seen so far.
template <class Real>
struct LogSum {
  Real offset = -std::numeric_limits<Real>::infinity();
  double sum = 0;

  template <bool kFused>
  DGI_HOST_DEVICE void take(const Real* x, int64_t count, Real maximum, Real inverse_tau) {
    constexpr Real kNothing = std::is_same_v<Real, float> ? Real(-40) : Real(-80);  // below rounding, and 10^8 times
    if ((maximum - offset) * inverse_tau < kNothing) return;
    if (maximum > offset) {
      sum *= std::exp(static_cast<double>((offset - maximum) * inverse_tau));
      offset = maximum;
    }
    Real more = 0;
#pragma omp simd reduction(+ : more)
    for (int64_t k = 0; k < count; ++k) more += exponential_or_zero<kFused>((x[k] - offset) * inverse_tau);
    sum += more;
  }

  double log(Real inverse_tau) const { return static_cast<double>(offset) * inverse_tau + std::log(sum); }
};

template <class Real>
class Hard {
 public:
  // `panels`: of each level, or none.
  Hard(const Quantize<Real>& in, const HardQuantized<Real>& out, const Codebooks<Real>& codebooks,
       const std::vector<Panels>& panels, int64_t block)
      : in_(in), out_(out), codebooks_(codebooks), panels_(panels), counts_(codebooks.codes(), 0),
        residual_(make_buffer<Real>(block * in.dim)), x_(make_buffer<Real>(block * in.dim)),
        tile_(make_buffer<Real>(block * kTileCodes)), own_(block), row_(block),
        nearest_(in.metric == Metric::kEuclidean ? block : 0) {}

  void run_block(int64_t begin, int64_t count) {
    std::copy_n(in_.z + begin * in_.dim, count * in_.dim, residual_.get());
    for (int64_t number = 0; number < in_.levels(); ++number) {
      const Level<Real>& level = codebooks_[number];
      std::fill_n(row_.begin(), count, Row{});
      start_rows(in_, level, begin, count, residual_.get(), out_.residuals, x_.get(), own_.data());
      if (in_.metric == Metric::kEuclidean) start_nearest(level, count);
      if (choose_by_panels(level, count)) {
        gather(level, begin, count);
        continue;
      }
      for (int64_t first = 0; first < level.codes; first += kTileCodes) {
        const int64_t codes = std::min(kTileCodes, level.codes - first);
        const Matrix<Real> keys = level.keys.rows_from(first, codes);
        matrix_product({x_.get(), count, in_.dim}, keys.transposed(), {tile_.get(), count, codes}, Into::kOverwrite);
        if (in_.noise.present) {
          reduce<NoiseAs::kGumbel>(level, begin, count, first, codes);
        } else if (out_.log_normalizer == nullptr) {
          choose(level, count, first, codes);
        } else {
          reduce<NoiseAs::kNone>(level, begin, count, first, codes);
        }
      }
      gather(level, begin, count);
    }
  }

  int64_t uses(int64_t code) const { return counts_[code]; }

 private:
  struct Row {
    Largest<Real> chosen, sampled;
    LogSum<Real> log_sum;
  };

  void start_nearest(const Level<Real>& level, int64_t count) {
    for (int64_t i = 0; i < count; ++i) nearest_[i] = {in_, level, residual_.get() + i * in_.dim, own_[i]};
  }

  int64_t code_of(int64_t i) const {
    const bool is_checked = !nearest_.empty() && !row_[i].chosen.is_nan && nearest_[i].code() >= 0;
    return is_checked ? nearest_[i].code() : row_[i].chosen.code;
  }

  // What reduce() does where nothing but codes is asked for: one pass makes scores and their maximum.
  void choose(const Level<Real>& level, int64_t count, int64_t first_code, int64_t codes) {
    const CodeTerms<Real> terms = level.terms.from(first_code);
    parallel_for(count, grain(codes), [&](int64_t first, int64_t last) {
      const Buffer<Real> scores = make_buffer<Real>(codes);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        with_bias(terms, [&](auto has_bias) DGI_ALWAYS_INLINE {
          for (int64_t i = first; i < last; ++i) {
            const Real* const products = tile_.get() + i * codes;
            const CodeTerms<Real> own = terms;  // copies: by reference the loop is not vectorised
            const int64_t width = codes;
            Real* const x = scores.get();
            Real maximum = -std::numeric_limits<Real>::infinity(), nothing = 0;  // NaN where a score is, or is infinite
#pragma omp simd reduction(max : maximum) reduction(+ : nothing)
            for (int64_t k = 0; k < width; ++k) {
              const Real s = own.template score<fused.value, has_bias.value>(products[k], k);
              x[k] = s;
              maximum = maximum < s ? s : maximum;
              nothing += s * Real{0};
            }
            Largest<Real>& chosen = row_[i].chosen;
            if (nothing == 0) {
              chosen.take_ordered(x, first_code, codes, maximum);
            } else {
              maximum = chosen.take(x, first_code, codes);
            }
            if (!nearest_.empty()) nearest_[i].take(x, first_code, codes, maximum, chosen.code);
          }
        });
      });
    });
  }

  // choose() by panels in place of a matrix product, where there are any; false where a score may not be finite.
  bool choose_by_panels(const Level<Real>& level, int64_t count) {
    if constexpr (std::is_same_v<Real, float>) {
      if (panels_.empty()) return false;
      const Panels& panels = panels_[level.number];
      double own = 0;  // NaN where one is
      for (int64_t i = 0; i < count; ++i) own = std::fabs(own_[i]) <= own ? own : std::fabs(own_[i]);
      if (!panels.scores_are_finite(in_.scale, own)) return false;
      const int64_t most = panels.rows_at_once(), width = panels.width();
      parallel_for((count + most - 1) / most, grain(most * width), [&](int64_t from, int64_t to) {
        const Buffer<float> scores = make_buffer<float>(most * width);
        for (int64_t begin = from * most; begin < std::min(count, to * most); begin += most) {
          const int64_t rows = std::min(most, count - begin);
          with_best_instructions([&](auto isa) DGI_ALWAYS_INLINE {
            panels.scores(isa, x_.get() + begin * in_.dim, rows, scores.get());
            for (int64_t i = 0; i < rows; ++i) {
              const float* const x = scores.get() + i * width;
              const auto [first, second, _] = two_largest(x, width);
              Largest<float>& chosen = row_[begin + i].chosen;
              chosen.take_ordered(x, 0, level.codes, first);
              Nearest<float>& nearest = nearest_[begin + i];
              if (!nearest.is_certain(first, second)) nearest.take(x, 0, level.codes, first, chosen.code);
            }
          });
        }
      });
      return true;
    }
    return false;
  }

  template <NoiseAs kAs>
  void reduce(const Level<Real>& level, int64_t begin, int64_t count, int64_t first_code, int64_t codes) {
    const bool wants_sum = out_.log_normalizer != nullptr;
    const Real inverse_tau = 1 / in_.tau;
    parallel_for(count, grain(codes), [&](int64_t first, int64_t last) {
      Real x[kNoiseChunk], noise[kNoiseChunk];
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          for (int64_t chunk = 0; chunk < codes; chunk += kNoiseChunk) {
            const int64_t here = first_code + chunk, width = std::min(kNoiseChunk, codes - chunk);
            score_row<fused.value>(tile_.get() + i * codes + chunk, level.terms.from(here), width, x);
            Real maximum = row_[i].chosen.take(x, here, width);
            if (!nearest_.empty()) nearest_[i].take(x, here, width, maximum, row_[i].chosen.code);
            if constexpr (kAs == NoiseAs::kGumbel) {
              const Real scale = in_.noise.scale == nullptr ? Real{1} : in_.noise.scale[begin + i];
              noise_of(in_, level.number, begin + i).template fill<fused.value, kAs>(here, width, noise);
#pragma omp simd
              for (int64_t k = 0; k < width; ++k) x[k] += scale * noise[k];
              maximum = row_[i].sampled.take(x, here, width);
            }
            if (wants_sum) row_[i].log_sum.template take<fused.value>(x, width, maximum, inverse_tau);
          }
        }
      });
    });
  }

  void gather(const Level<Real>& level, int64_t begin, int64_t count) {
    parallel_for(count, grain(4 * in_.dim), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t to = in_.at(begin + i, level.number), code = code_of(i);
        const Real* const e = level.vectors.data + code * in_.dim;
        Real* const r = residual_.get() + i * in_.dim;
        out_.codes[to] = code;
        const bool is_noisy = in_.noise.present && (in_.noise.scale == nullptr || in_.noise.scale[begin + i] != 0);
        if (out_.sampled != nullptr) out_.sampled[to] = is_noisy ? row_[i].sampled.code : code;
        if (out_.log_normalizer != nullptr) {
          out_.log_normalizer[to] = row_[i].chosen.is_nan ? std::numeric_limits<Real>::quiet_NaN()
                                                          : static_cast<Real>(row_[i].log_sum.log(1 / in_.tau)
                                                                              + own_[i] / static_cast<double>(in_.tau));
        }
        if (out_.quantized != nullptr) std::copy_n(e, in_.dim, out_.quantized + to * in_.dim);
        if (level.number + 1 == in_.levels()) continue;  // no level sees what is left
        for (int64_t d = 0; d < in_.dim; ++d) r[d] -= e[d];
      }
    });
    for (int64_t i = 0; i < count; ++i) counts_[level.first + code_of(i)] += in_.is_counted(begin + i);
  }

  const Quantize<Real>& in_;
  const HardQuantized<Real>& out_;
  const Codebooks<Real>& codebooks_;
  const std::vector<Panels>& panels_;
  std::vector<int64_t> counts_;
  Buffer<Real> residual_, x_, tile_;
  std::vector<double> own_;
  std::vector<Row> row_;
  std::vector<Nearest<Real>> nearest_;  // of the Euclidean metric alone
};

}  // namespace

template <class Real>
void residual_quantize_hard(const Quantize<Real>& in, const HardQuantized<Real>& out) {
  const Codebooks<Real> codebooks(in);
  std::vector<Panels> panels;
  if constexpr (std::is_same_v<Real, float>) {
    const bool wants_codes = !in.noise.present && out.log_normalizer == nullptr;
    for (int64_t level = 0; wants_codes && panels_pay(in) && level < in.levels(); ++level) {
      panels.emplace_back(codebooks[level], in.dim);
    }
  }
  const auto shares = run<Hard<Real>>(in, [&](int64_t, int64_t, int64_t block) {
    return std::make_unique<Hard<Real>>(in, out, codebooks, panels, block);
  });
  if (out.usage == nullptr) return;
  const double rows = in.counted();
  for (int64_t k = 0; k < codebooks.codes(); ++k) {
    int64_t uses = 0;
    for (const auto& share : shares) uses += share->uses(k);
    out.usage[k] = static_cast<Real>(static_cast<double>(uses) / rows);
  }
}

template void residual_quantize_hard(const Quantize<float>&, const HardQuantized<float>&);
template void residual_quantize_hard(const Quantize<double>&, const HardQuantized<double>&);

}  // namespace dgi::cpu
