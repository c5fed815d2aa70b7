// Residual quantization on the CPU: soft and straight-through, with all gradients. quantize_hard.cpp has the hard one.
//
//   s_nk = a_n S_nk f_k + b_k,   S = r . e,   p = softmax((s + g) / tau),   z~ = P E,   r' = r - z~
//
// with the a, f and b of the metric (quantize_metric.h); g times the row's sigma, where it has one. Values V are mixed
// as the codes are, P V, by products of their own with the same tile: backward adds dM V^T to dP.
//
// Rows are processed in blocks through all levels, so that residuals stay in the cache; of a tile (a block of rows x K)
// only sums of its rows and columns are kept. With X = a r the tile is X E^T, times the codes' f, plus b (dgi/terms.h).
// Backward computes tile and noise again and goes through the levels in reverse. Below X, the rows of dz~ share its
// products:
//
//   [(s - b) / f; dP] = [X; dZ~] E^T,   ds = P (dP - rowsum(P dP)) / tau,   T = ds f,
//   d(a r) = T E,   dE = [T; P]^T [X; dZ~], key and value at once,
//
// and dscale = sum (a / scale) r . (T E). What the metric adds to that is of a row or of a code alone: of a cosine the
// radial parts, which for dE are the sums of columns of ds s, and of a bias the sums of columns of ds.
//
// Rows of which few entries count (dgi/gumbel_row.h) leave the tile as lists, which are kept for backward: forward
// takes X E^T whole and all other products at the listed codes alone, backward neither tile nor noise.
//
// 14 N K D operations (forward 4, backward 10), twice the noise. `python bench/bench_quantize.py` measures them against
// the products alone.
//
// Blocks, groups of rows and rows are worked off or added up in fixed order: the same bits on any number of threads, as
// far as torch's matrix product does.
#include "cpu/quantize/quantize_levels.h"

namespace dgi::cpu {
namespace {

// The entries that count of a block's peaked rows: codes ascending, and p, which sums to 1 over them.
template <class Real>
class Lists {
 public:
  Lists(int64_t rows, int64_t limit)
      : stride_(list_capacity(limit)), count_(rows), code_(make_buffer<int32_t>(rows * stride_)),
        p_(make_buffer<Real>(rows * stride_)) {}

  // Lists row `row`, whose exponentials are `e`, where at most `limit` of them count.
  DGI_HOST_DEVICE void take(int64_t row, const Real* e, int64_t codes, double sum, int64_t limit) {
    int32_t* const code = code_.get() + row * stride_;
    Real* const p = p_.get() + row * stride_;
    const int64_t listed = list_row(e, codes, sum, kNegligibleShare, limit, code);
    count_[row] = std::max<int64_t>(0, listed);
    double total = 0;
    for (int64_t j = 0; j < listed; ++j) total += e[code[j]];
    for (int64_t j = 0; j < listed; ++j) p[j] = static_cast<Real>(e[code[j]] / total);
  }

  int64_t count(int64_t row) const { return count_[row]; }
  const int32_t* code(int64_t row) const { return code_.get() + row * stride_; }
  const Real* p(int64_t row) const { return p_.get() + row * stride_; }

 private:
  int64_t stride_;
  std::vector<int64_t> count_;  // 0: not listed
  Buffer<int32_t> code_;
  Buffer<Real> p_;
};

template <class Real>
class Forward {
 public:
  // Its lists may take [first_entry, last_entry) of the room for them.
  Forward(const Quantize<Real>& in, const Quantized<Real>& out, const Codebooks<Real>& codebooks, int64_t block,
          int64_t first_entry, int64_t last_entry)
      : in_(in), out_(out), codebooks_(codebooks), usage_(codebooks_.codes(), 0.0),
        residual_(make_buffer<Real>(block * in.dim)), x_(make_buffer<Real>(block * in.dim)),
        emitted_(make_buffer<Real>(block * in.dim)), mixed_(make_buffer<Real>(block * in.width)), own_(block),
        weight_(block), slot_(block), order_(block), tile_(make_buffer<Real>(block * in.widest())),
        columns_(block, in.widest()), lists_(block, list_limit<Real>(in.widest())), remembered_(first_entry),
        last_entry_(last_entry) {}

  void run_block(int64_t begin, int64_t count) {
    std::copy_n(in_.z + begin * in_.dim, count * in_.dim, residual_.get());
    for (int64_t number = 0; number < in_.levels(); ++number) {
      const Level<Real>& level = codebooks_[number];
      start_rows(in_, level, begin, count, residual_.get(), out_.residuals, x_.get(), own_.data());
      matrix_product({x_.get(), count, in_.dim}, level.keys.transposed(), {tile_.get(), count, level.codes},
                     Into::kOverwrite);
      with_noise(in_, false, [&](auto as) { assign<as.value>(level, begin, count); });
      remember_lists(level, begin, count);
      if (in_.mode == QuantizeMode::kSoft) multiply_dense_rows(level, count);
      emit(level, begin, count);
    }
  }

  // sum_n p_nk of the rows of all blocks
  double usage(int64_t code) const { return usage_[code]; }

 private:
  // Turns the tile into exp((s + g) / tau), not yet normalised; codes, usage and the rows' sums.
  template <NoiseAs kAs>
  void assign(const Level<Real>& level, int64_t begin, int64_t count) {
    for_each_group(count, 4 * level.codes, [&](int64_t group, int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        Real* const sums = columns_.start(group, level.codes);
        for (int64_t i = first; i < last; ++i) {
          Real* const s = tile_.get() + i * level.codes;
          const int64_t to = in_.at(begin + i, level.number);
          const Real maximum = score_row<fused.value>(s, level.terms, level.codes, s);
          int64_t code = first_equal(s, level.codes, maximum);
          if (in_.metric == Metric::kEuclidean) {
            Nearest<Real> nearest(in_, level, residual_.get() + i * in_.dim, own_[i]);
            nearest.take(s, 0, level.codes, maximum, code);
            if (nearest.code() >= 0) code = nearest.code();
          }
          const GumbelSums row = soften_row<fused.value, kAs>(in_, level.number, begin + i, s, level.codes, maximum, s);
          if (row.sum != row.sum) code = row.sampled;
          out_.codes[to] = code;
          out_.sampled[to] = is_noisy<kAs>(begin + i) ? row.sampled : code;
          out_.log_normalizer[to] = static_cast<Real>(row.log_normalizer + own_[i] / static_cast<double>(in_.tau));
          const Real weight = static_cast<Real>(1 / row.sum);
          weight_[i] = weight;
          lists_.take(i, s, level.codes, row.sum, list_limit<Real>(level.codes));
          if (!in_.is_counted(begin + i)) continue;
#pragma omp simd
          for (int64_t k = 0; k < level.codes; ++k) sums[k] = multiply_add<fused.value>(weight, s[k], sums[k]);
        }
      });
    });
    columns_.add_to(usage_.data() + level.first, groups_of(count), level.codes);
  }

  template <NoiseAs kAs>
  bool is_noisy(int64_t row) const {
    return kAs != NoiseAs::kNone && (in_.noise.scale == nullptr || in_.noise.scale[row] != 0);
  }

  void remember_lists(const Level<Real>& level, int64_t begin, int64_t count) {
    const ListedRows<Real>& lists = out_.lists;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t listed = remembered_ + lists_.count(i) <= last_entry_ ? lists_.count(i) : 0;
      std::copy_n(lists_.code(i), listed, lists.code + remembered_);
      std::copy_n(lists_.p(i), listed, lists.p + remembered_);
      int64_t* const range = lists.range + 2 * in_.at(begin + i, level.number);
      range[0] = remembered_;
      range[1] = remembered_ += listed;
    }
  }

  // P E and P V of the rows that are not peaked, which move up in the tile.
  void multiply_dense_rows(const Level<Real>& level, int64_t count) {
    int64_t dense = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (lists_.count(i) > 0) continue;
      if (dense < i) std::copy_n(tile_.get() + i * level.codes, level.codes, tile_.get() + dense * level.codes);
      slot_[i] = dense++;
    }
    matrix_product({tile_.get(), dense, level.codes}, level.vectors, {emitted_.get(), dense, in_.dim},
                   Into::kOverwrite);
    if (in_.width > 0) {
      matrix_product({tile_.get(), dense, level.codes}, level.values, {mixed_.get(), dense, in_.width},
                     Into::kOverwrite);
    }
  }

  void emit(const Level<Real>& level, int64_t begin, int64_t count) {
    const int64_t* const sampled = out_.sampled;
    // By code: neighbours take the same rows of E, which are in the cache then.
    std::iota(order_.begin(), order_.begin() + count, int64_t{0});
    std::stable_sort(order_.begin(), order_.begin() + count, [&](int64_t a, int64_t b) {
      return sampled[in_.at(begin + a, level.number)] < sampled[in_.at(begin + b, level.number)];
    });
    parallel_for(count, grain(4 * in_.dim), [&](int64_t first, int64_t last) {
      const Buffer<Real> sum = make_buffer<Real>(in_.dim);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t place = first; place < last; ++place) {
          const int64_t i = order_[place], to = in_.at(begin + i, level.number);
          Real *const r = residual_.get() + i * in_.dim, *const quantized = out_.quantized + to * in_.dim;
          const Real* emitted = sum.get();
          Real factor = weight_[i];
          if (in_.mode == QuantizeMode::kSoft && lists_.count(i) > 0) {
            std::fill_n(sum.get(), in_.dim, Real{0});
            add_rows<fused.value>(lists_.code(i), lists_.p(i), lists_.count(i), level.vectors.data, in_.dim, sum.get());
            factor = 1;
          } else {
            emitted = emitted_.get() + slot_[i] * in_.dim;
          }
          if (in_.mode != QuantizeMode::kSoft) {
            emitted = level.vectors.data + sampled[to] * in_.dim;
            factor = factor == factor ? Real{1} : factor;  // a row of E to the bit, but NaN where the softmax is
          }
#pragma omp simd
          for (int64_t d = 0; d < in_.dim; ++d) {
            const Real value = factor * emitted[d];
            quantized[d] = value;
            r[d] -= value;
          }
          if (in_.width > 0) emit_mixture<fused.value>(level, i, to);
        }
      });
    });
  }

  // What emit() does with E, with V.
  template <bool kFused>
  DGI_HOST_DEVICE void emit_mixture(const Level<Real>& level, int64_t i, int64_t to) {
    Real* const mixture = out_.mixtures + to * in_.width;
    const bool soft = in_.mode == QuantizeMode::kSoft;
    if (soft && lists_.count(i) > 0) {
      std::fill_n(mixture, in_.width, Real{0});
      add_rows<kFused>(lists_.code(i), lists_.p(i), lists_.count(i), level.values.data, in_.width, mixture);
      return;
    }
    const Real* const from = soft ? mixed_.get() + slot_[i] * in_.width
                                  : level.values.data + out_.sampled[to] * in_.width;
    const Real weight = weight_[i], factor = soft || weight != weight ? weight : Real{1};
    for (int64_t d = 0; d < in_.width; ++d) mixture[d] = factor * from[d];
  }

  const Quantize<Real>& in_;
  const Quantized<Real>& out_;
  const Codebooks<Real>& codebooks_;
  std::vector<double> usage_;
  Buffer<Real> residual_, x_, emitted_, mixed_;
  std::vector<double> own_;
  std::vector<Real> weight_;
  std::vector<int64_t> slot_;  // of a dense row in the tile and in `emitted_`
  std::vector<int64_t> order_;
  Buffer<Real> tile_;
  ColumnSums<Real> columns_;
  Lists<Real> lists_;
  int64_t remembered_, last_entry_;  // where the next list for backward goes, and where its room ends
};

}  // namespace

template <class Real>
void residual_quantize(const Quantize<Real>& in, const Quantized<Real>& out) {
  const Codebooks<Real> codebooks(in);
  const int64_t room = out.lists.room;
  const auto shares = run<Forward<Real>>(in, [&](int64_t share, int64_t shares, int64_t block) {
    return std::make_unique<Forward<Real>>(in, out, codebooks, block, share * room / shares,
                                           (share + 1) * room / shares);
  });
  const double rows = in.counted();
  for (int64_t k = 0; k < codebooks.codes(); ++k) {
    double usage = 0;
    for (const auto& share : shares) usage += share->usage(k);
    out.usage[k] = static_cast<Real>(usage / rows);
  }
}

template void residual_quantize(const Quantize<float>&, const Quantized<float>&);
template void residual_quantize(const Quantize<double>&, const Quantized<double>&);

}  // namespace dgi::cpu
