// What forward and backward of residual quantization share: quantize.cpp explains both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/quantize/quantize_cpu.h"
#include "cpu/quantize/quantize_metric.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/row_noise.h"
#include "cpu/shared/shares.h"
#include "dgi/gumbel_row.h"
#include "dgi/noise.h"

namespace dgi::cpu {

constexpr int64_t kSummedRows = 16;  // rows whose sums over columns are added up by one thread

inline int64_t groups_of(int64_t rows) { return (rows + kSummedRows - 1) / kSummedRows; }

template <NoiseAs kAs>
using As = std::integral_constant<NoiseAs, kAs>;

// Calls f with the kind of noise as a type. `needs_sum`: s + g itself is asked for.
template <class Real, class F>
void with_noise(const Quantize<Real>& in, bool needs_sum, const F& f) {
  if (!in.noise.present) return f(As<NoiseAs::kNone>{});
  if constexpr (std::is_same_v<Real, float>) {
    if (takes_exponential(in.tau) && !needs_sum) return f(As<NoiseAs::kExponential>{});
  }
  f(As<NoiseAs::kGumbel>{});
}

template <class Real>
RowNoise noise_of(const Quantize<Real>& in, int64_t level, int64_t row) {
  return {philox_key(in.noise.seed), static_cast<uint32_t>(level), kStreamResidualQuantize,
          static_cast<uint32_t>(in.noise.row_offset + row)};
}

// The noise of a row, times sigma.
template <class Real>
struct ScaledNoise {
  RowNoise noise;
  Real scale;

  template <bool kFused, NoiseAs kAs>
  DGI_HOST_DEVICE void fill(int64_t first, int64_t count, Real* out) const {
    noise.template fill<kFused, kAs>(first, count, out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
  }
};

// soften() of one row, with the row's own sigma. kExponential is for sigma = 1 alone: E^sigma would be a power.
template <bool kFused, NoiseAs kAs, class Real>
DGI_HOST_DEVICE GumbelSums soften_row(const Quantize<Real>& in, int64_t level, int64_t row, const Real* s,
                                      int64_t codes, Real maximum, Real* out, Real* noisy = nullptr) {
  const RowNoise noise = noise_of(in, level, row);
  if constexpr (kAs != NoiseAs::kNone) {
    const Real scale = in.noise.scale == nullptr ? Real{1} : in.noise.scale[row];
    if (scale == 0) return soften<kFused, NoiseAs::kNone>(s, codes, maximum, in.tau, noise, out, noisy);
    if (scale != 1) {
      return soften<kFused, NoiseAs::kGumbel>(s, codes, maximum, in.tau, ScaledNoise<Real>{noise, scale}, out, noisy);
    }
  }
  return soften<kFused, kAs>(s, codes, maximum, in.tau, noise, out, noisy);
}

// Sums over columns of a tile: each group of rows has its own, which are then added in order.
template <class Real>
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t codes) : partial_(make_buffer<Real>(groups_of(rows) * codes)) {}

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

// Calls body(group, first row, last row) for the groups of a block, in parallel.
template <class Body>
void for_each_group(int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t groups = groups_of(rows);
  parallel_for(groups, grain(kSummedRows * elements_per_row), [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      body(group, group * kSummedRows, std::min(rows, (group + 1) * kSummedRows));
    }
  });
}

// Keeps the residuals of a block's rows as `level` sees them, in `residuals` if it is not null, and makes x = a r;
// `own` are the rows' c.
template <class Real>
void start_rows(const Quantize<Real>& in, const Level<Real>& level, int64_t begin, int64_t count, const Real* residual,
                Real* residuals, Real* x, double* own) {
  parallel_for(count, grain(in.dim), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t i = first; i < last; ++i) {
        const Real* const r = residual + i * in.dim;
        if (residuals != nullptr) std::copy_n(r, in.dim, residuals + in.at(begin + i, level.number) * in.dim);
        own[i] = start_row<fused.value>(in, level, r, x + i * in.dim).own;
      }
    });
  });
}

constexpr int64_t kRowsWorthTwoShares = 512;

// Rows that a share takes through the levels at once: enough for efficient products.
template <class Real>
int64_t block_rows(const Quantize<Real>& in, int64_t shares) {
  const int64_t elements = (thread_pairs() << 21) / shares, most = shares == 1 ? 512 * thread_pairs() : 512;
  const int64_t block = std::clamp<int64_t>(elements / in.widest() / kSummedRows * kSummedRows, 128, most);
  return std::max<int64_t>(1, std::min((in.rows + shares - 1) / shares, block));
}

// Makes a pass for every share of the rows by make(share, shares, rows of a block), and runs them side by side.
template <class Pass, class Real, class Make>
std::vector<std::unique_ptr<Pass>> run(const Quantize<Real>& in, const Make& make) {
  const int64_t codes = std::accumulate(in.sizes.begin(), in.sizes.end(), int64_t{0});
  const int64_t bytes_of_sums = codes * in.dim * static_cast<int64_t>(sizeof(Real));
  const int64_t shares = shares_of(in.rows, kRowsWorthTwoShares, bytes_of_sums), block = block_rows(in, shares);
  std::vector<std::unique_ptr<Pass>> passes;
  for (int64_t share = 0; share < shares; ++share) passes.push_back(make(share, shares, block));
  const auto run_share = [&](int64_t share) {
    const int64_t end = (share + 1) * in.rows / shares;
    for (int64_t begin = share * in.rows / shares; begin < end; begin += block) {
      passes[share]->run_block(begin, std::min(block, end - begin));
    }
  };
  if (shares == 1) {
    run_share(0);  // not within parallel_for, where products and loops have one thread
  } else {
    parallel_for(shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share) run_share(share);
    });
  }
  return passes;
}

}  // namespace dgi::cpu
