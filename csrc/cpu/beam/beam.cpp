// Beam steps on the CPU, from logits or from hidden states and a head. For each live beam, best first: the log-sum-exp
// of its logits, then its existing children. Beams that can no longer be among the best are skipped (beam_request.h).
//
// Given logits are read once, chunk by chunk; a row is copied only if it must be converted or gathered. For a head, a
// tile of raw products is computed for the best beams of several requests at a time and used while it is in the cache.
// If only the children count and they are few, only their products are computed.
//
// Bytes read: those of the logits, once, and 2 or 4 per child for its token; per logit 12 vector operations. One core
// of an Intel Xeon with AVX-512, 1e6 clustered items, three levels of 2048 codes, 8 requests of 50 beams: a whole
// search takes 1.3 times a copy of its logits, 1/14.7 of STATIC and 1/8.5 of STATIC compiled; with 64 requests 0.95,
// 1/31 and 1/12. The fused head (D = 256) takes 0.97 of its matrix product alone, and 1/1.47 of head and step one after
// the other (64 requests: 1/1.43); with normalize="children" 1/10. A filter of half of the items adds 10 % to a search
// (64 requests: 5 %), 1,000 changed items 9 % (nothing). `python bench/bench_beam.py B8-M50 B64-M50`.
#include "cpu/beam/beam_cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/beam/beam_request.h"
#include "cpu/shared/isa.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {
namespace {

// The logits of one beam, and what they sum up to.
template <class Stored>
class Row {
 public:
  using Real = Compute<Stored>;

  Row(const Stored* data, int64_t codes, int64_t stride, std::vector<Real>& buffer)
      : data_(data), codes_(codes), stride_(stride), buffer_(buffer) {
    if constexpr (std::is_same_v<Stored, Real>) contiguous_ = stride == 1 ? data : nullptr;
  }

  Real logit(int64_t code) const { return load(data_[code * stride_]); }

  // While those of the `next` beam (null: none) are on their way: rows are visited by score, which no hardware
  // foresees.
  template <bool kFused>
  DGI_ALWAYS_INLINE inline LogSumExp<Real> log_sum_exp(const Stored* next) {
    LogSumExp<Real> sum;
    if (contiguous_ == nullptr) buffer_.resize(static_cast<size_t>(codes_));
    for (int64_t first = 0; first < codes_; first += kChunk) {
      const int64_t count = std::min(kChunk, codes_ - first);
      const Real* ahead = nullptr;
      if constexpr (std::is_same_v<Stored, Real>) ahead = next == nullptr ? nullptr : next + first;
      if (contiguous_ == nullptr) convert(first, count);
      const Real* const values = contiguous_ == nullptr ? buffer_.data() : contiguous_;
      sum.template add<kFused>(log_sum_exp_of(values + first, count, ahead));
    }
    if (contiguous_ == nullptr) contiguous_ = buffer_.data();
    return sum;
  }

  // All logits one behind the other; null where they do not lie so, and had not to be brought together for their sum.
  const Real* contiguous() const { return contiguous_; }

 private:
  DGI_ALWAYS_INLINE inline void convert(int64_t first, int64_t count) {
    const Stored* const data = data_ + first * stride_;
    Real* const out = buffer_.data() + first;
    if (stride_ == 1) {
      for (int64_t k = 0; k < count; ++k) out[k] = load(data[k]);
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = load(data[k * stride_]);
    }
  }

  const Stored* data_;
  int64_t codes_, stride_;
  std::vector<Real>& buffer_;
  const Real* contiguous_ = nullptr;
};

}  // namespace

template <class Stored, class Token>
bool beam_step(const BeamStep<Compute<Stored>, Token>& step, const Logits<Stored>& logits, int64_t first, int64_t last,
               const BeamOutput& out) {
  using Real = Compute<Stored>;
  Request<Real, Token> worker(step);
  std::vector<Real> buffer;
  bool fits = true;
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
    for (int64_t request = first; request < last; ++request) {
      fits = worker.start(request) && fits;
      const int64_t stride = logits.code_stride;
      const auto row_of = [&](const Parent<Real>& parent) {
        return logits.data + request * logits.request_stride + parent.beam * logits.beam_stride;
      };
      const auto& parents = worker.parents();
      for (size_t p = 0; p < parents.size() && !worker.is_done(parents[p]); ++p) {
        Row<Stored> row(row_of(parents[p]), logits.codes, stride, buffer);
        const Stored* const next = p + 1 < parents.size() && stride == 1 ? row_of(parents[p + 1]) : nullptr;
        worker.template extend<decltype(fused)>(
            parents[p], [&row](int32_t token) DGI_ALWAYS_INLINE { return row.logit(token); },
            [&row, next, fused]() DGI_ALWAYS_INLINE { return row.template log_sum_exp<decltype(fused)::value>(next); },
            [&row]() DGI_ALWAYS_INLINE { return row.contiguous(); });
      }
      worker.write(out);
    }
  });
  return fits;
}

#define DGI_INSTANTIATE(Stored, Token)                                                                      \
  template bool beam_step(const BeamStep<Compute<Stored>, Token>&, const Logits<Stored>&, int64_t, int64_t, \
                          const BeamOutput&);
DGI_FOR_STORED_AND_TOKEN(DGI_INSTANTIATE)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
