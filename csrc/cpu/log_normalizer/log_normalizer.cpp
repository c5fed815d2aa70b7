// Log-sum-exp of rows of any length on the CPU, such as a language model's vocabulary.
//
//   out_n = log sum_k exp(x_nk),   NaN and -inf add nothing, +inf counts as the largest finite number
//
// A row is cut into parts of 2^15 logits, so that a few long rows keep all threads busy. A part is read once, chunk by
// chunk; each chunk is read a second time from the first-level cache (dgi/log_sum_exp.h). The sums of parts are added
// in their order: the same bits, whatever the number of threads.
//
// Bytes: the logits, once. 14 vector operations per logit, and 3 to convert one of 16 bits.
#include "cpu/log_normalizer/log_normalizer_cpu.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kPart = int64_t{1} << 15, kChunk = 2048;

// Compiled by itself: in the midst of other code the sums do not stay in registers.
template <class Real>
DGI_NEVER_INLINE LogSumExp<Real> log_sum_exp_of(const Real* x, int64_t count) {
  LogSumExp<Real> sum;
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE { sum.template add<fused.value>(x, count); });
  return sum;
}

template <class Stored>
DGI_NEVER_INLINE void convert(const Stored* x, int64_t stride, int64_t count, Compute<Stored>* out) {
  with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
    if (stride == 1) {
      for (int64_t k = 0; k < count; ++k) out[k] = load(x[k]);
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = load(x[k * stride]);
    }
  });
}

template <class Stored>
LogSumExp<Compute<Stored>> sum_of_part(const Stored* x, int64_t stride, int64_t count) {
  using Real = Compute<Stored>;
  alignas(64) Real buffer[kChunk];
  LogSumExp<Real> sum;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t some = std::min(kChunk, count - first);
    const Real* values = nullptr;
    if constexpr (std::is_same_v<Stored, Real>) values = stride == 1 ? x + first : nullptr;
    if (values == nullptr) {
      convert(x + first * stride, stride, some, buffer);
      values = buffer;
    }
    sum.template add<false>(log_sum_exp_of(values, some));
  }
  return sum;
}

}  // namespace

template <class Stored>
void log_normalizer(const LogitTable<Stored>& logits, Compute<Stored>* out) {
  using Real = Compute<Stored>;
  const int64_t rows = logits.rows(), parts = (logits.codes + kPart - 1) / kPart;
  const Buffer<LogSumExp<Real>> sums = make_buffer<LogSumExp<Real>>(rows * parts);
  parallel_for(rows * parts, grain(std::min(kPart, logits.codes)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % parts * kPart;
      sums[i] = sum_of_part(logits.row(i / parts) + begin * logits.code_stride, logits.code_stride,
                            std::min(kPart, logits.codes - begin));
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    LogSumExp<Real> sum;
    for (int64_t part = 0; part < parts; ++part) sum.template add<false>(sums[row * parts + part]);
    out[row] = sum.empty() ? -std::numeric_limits<Real>::infinity() : sum.maximum + sum.log_sum();
  }
}

template void log_normalizer(const LogitTable<float>&, float*);
template void log_normalizer(const LogitTable<double>&, double*);
template void log_normalizer(const LogitTable<BFloat16>&, float*);
template void log_normalizer(const LogitTable<Float16>&, float*);

}  // namespace dgi::cpu
