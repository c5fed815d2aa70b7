// Log-sum-exp of rows of any length on the CPU, such as a language model's vocabulary.
//
//   out_n = log sum_k exp(x_nk),   NaN and -inf add nothing, +inf counts as the largest finite number
//
// A row is cut into parts of about 2^14 logits, so that a few long rows keep all threads busy. A part is read once,
// block by block, in float32 and 16 bits with no other look at it than for the exponentials (running_sum.h). The sums
// of parts are added in their order: the same bits, whatever the number of threads.
//
// Bytes: the logits, once. 13 vector operations per logit, 7 of them multiply-adds, and 1 to convert one of 16 bits.
#include "cpu/normalizer/log_normalizer_cpu.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/normalizer/running_sum.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kPart = int64_t{1} << 14, kBlock = 2048;
constexpr int64_t kAhead = 2048;  // logits that are on their way from memory

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
  alignas(64) Real buffer[kBlock];
  std::conditional_t<std::is_same_v<Real, float>, RunningSum, LogSumExp<double>> sum;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t some = std::min(kBlock, count - first);
    const Stored* const block = x + first * stride;
    const auto plain = [&]() -> const Real* {
      if constexpr (std::is_same_v<Stored, Real>) {
        if (stride == 1) return block;
      }
      convert(block, stride, some, buffer);
      return buffer;
    };
    if constexpr (std::is_same_v<Real, double>) {
      sum.template add<false>(plain(), some);
    } else if (stride == 1) {
      sum.add(block, some, kAhead, plain);
    } else {
      const float* const values = plain();
      sum.add(values, some, 0, [&] { return values; });
    }
  }
  if constexpr (std::is_same_v<Real, double>)
    return sum;
  else
    return sum.sum();
}

}  // namespace

template <class Stored>
void log_normalizer(const LogitTable<Stored>& logits, Compute<Stored>* out) {
  using Real = Compute<Stored>;
  constexpr int64_t kLine = 64;
  const int64_t rows = logits.rows(), parts = (logits.codes + kPart - 1) / kPart;
  const int64_t part = (logits.codes / std::max<int64_t>(1, parts) / kLine + 1) * kLine;  // all alike, but the last
  const Buffer<LogSumExp<Real>> sums = make_buffer<LogSumExp<Real>>(rows * parts);
  parallel_for(rows * parts, grain(std::min(kPart, logits.codes)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % parts * part;
      sums[i] = sum_of_part(logits.row(i / parts) + begin * logits.code_stride, logits.code_stride,
                            std::min(part, logits.codes - begin));
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    LogSumExp<Real> sum;
    for (int64_t i = row * parts; i < (row + 1) * parts; ++i) sum.template add<false>(sums[i]);
    out[row] = sum.empty() ? -std::numeric_limits<Real>::infinity() : sum.maximum + sum.log_sum();
  }
}

template void log_normalizer(const LogitTable<float>&, float*);
template void log_normalizer(const LogitTable<double>&, double*);
template void log_normalizer(const LogitTable<BFloat16>&, float*);
template void log_normalizer(const LogitTable<Float16>&, float*);

}  // namespace dgi::cpu
