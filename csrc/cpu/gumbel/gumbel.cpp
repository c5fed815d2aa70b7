// Gumbel-Softmax on the CPU: out = softmax((logits + g) / tau), or the one-hot of its argmax.
//
// One pass over rows that fit the cache: logits are read, probabilities written, the noise never leaves the first-level
// cache. Backward makes noise and probabilities again, so that nothing is saved but the logits.
#include "cpu/gumbel/gumbel_cpu.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/row_noise.h"
#include "dgi/gumbel_row.h"
#include "dgi/noise.h"

namespace dgi::cpu {
namespace {

// exp((logits + g) / tau - offset) of one row, in `e`
template <bool kFused, class Stored>
DGI_HOST_DEVICE GumbelSums soften_row(const GumbelSoftmax<Stored>& in, int64_t row, Compute<Stored>* e,
                                      Compute<Stored>* noisy) {
  using Real = Compute<Stored>;
  const Stored* const logits = in.logits + row * in.codes;
#pragma omp simd
  for (int64_t k = 0; k < in.codes; ++k) e[k] = load(logits[k]);
  const RowNoise noise{philox_key(in.seed), 0, kStreamGumbelSoftmax, static_cast<uint32_t>(row)};
  const Real maximum = maximum_of(e, in.codes);
  if constexpr (std::is_same_v<Real, float>) {
    if (takes_exponential(in.tau) && noisy == nullptr) {
      return soften<kFused, NoiseAs::kExponential>(e, in.codes, maximum, in.tau, noise, e);
    }
  }
  return soften<kFused, NoiseAs::kGumbel>(e, in.codes, maximum, in.tau, noise, e, noisy);
}

}  // namespace

template <class Stored>
void gumbel_softmax(const GumbelSoftmax<Stored>& in, Stored* out) {
  using Real = Compute<Stored>;
  parallel_for(in.rows, grain(4 * in.codes), [&](int64_t first, int64_t last) {
    const Buffer<Real> e = make_buffer<Real>(in.codes);
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t row = first; row < last; ++row) {
        Stored* const to = out + row * in.codes;
        const GumbelSums sums = soften_row<fused.value>(in, row, e.get(), nullptr);
        Real weight = static_cast<Real>(1 / sums.sum);
        if (in.hard) {
          weight = weight == weight ? Real{0} : weight;  // NaN in the whole row where the softmax has one
          for (int64_t k = 0; k < in.codes; ++k) e[k] = 1;
        }
        const Real* const from = e.get();
#pragma omp simd
        for (int64_t k = 0; k < in.codes; ++k) store(from[k] * weight, to[k]);
        if (in.hard && weight == weight) store(Real{1}, to[sums.sampled]);
      }
    });
  });
}

template <class Stored>
void gumbel_softmax_backward(const GumbelSoftmax<Stored>& in, const Stored* dout, Stored* dlogits,
                             Compute<Stored>* dtau) {
  using Real = Compute<Stored>;
  std::vector<double> along(dtau != nullptr ? in.rows : 0);
  parallel_for(in.rows, grain(4 * in.codes), [&](int64_t first, int64_t last) {
    const Buffer<Real> e = make_buffer<Real>(in.codes), dp = make_buffer<Real>(in.codes);
    const Buffer<Real> noisy = make_buffer<Real>(dtau != nullptr ? in.codes : 0);
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t row = first; row < last; ++row) {
        const Stored* const upstream = dout + row * in.codes;
        Stored* const to = dlogits + row * in.codes;
        const GumbelSums sums = soften_row<fused.value>(in, row, e.get(), dtau != nullptr ? noisy.get() : nullptr);
        Real *const p = e.get(), *const g = dp.get();
#pragma omp simd
        for (int64_t k = 0; k < in.codes; ++k) g[k] = load(upstream[k]);
        const Real mean = static_cast<Real>(weighted_sum<fused.value>(p, g, in.codes) / sums.sum);
        const Real weight = static_cast<Real>(1 / sums.sum) / in.tau;
#pragma omp simd
        for (int64_t k = 0; k < in.codes; ++k) {
          p[k] = weight * p[k] * (g[k] - mean);
          store(p[k], to[k]);
        }
        if (dtau == nullptr) continue;
        double sum = 0;
        for (int64_t k = 0; k < in.codes; ++k) {
          // A logit of -inf has no probability at any tau.
          sum += noisy[k] == -std::numeric_limits<Real>::infinity() ? 0.0 : static_cast<double>(p[k]) * noisy[k];
        }
        along[row] = -sum / in.tau;
      }
    });
  });
  if (dtau == nullptr) return;
  double total = 0;
  for (double value : along) total += value;
  *dtau = static_cast<Real>(total);
}

#define DGI_INSTANTIATE(Stored)                                        \
  template void gumbel_softmax(const GumbelSoftmax<Stored>&, Stored*); \
  template void gumbel_softmax_backward(const GumbelSoftmax<Stored>&, const Stored*, Stored*, Compute<Stored>*);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
DGI_INSTANTIATE(BFloat16)
DGI_INSTANTIATE(Float16)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
