// Beam steps on the CPU, given logits or the head that would make them: for each live beam, best first, the log-sum-exp
// of its logits, then its real children and no others; beams that are hopeless by then are not looked at
// (beam_request.h).
//
// Given logits are read once, chunk by chunk, and never copied but for a chunk that must be converted or gathered. Of a
// head, a tile of raw products is made, of the best beams of several requests at a time, and used up while it is in the
// cache; where only children count, and are few, only their products are made.
//
// Bytes read: those of the logits, once, and 2 or 4 per child for its token; per logit 16 vector operations. One core of
// an AMD EPYC with AVX2, 1e6 clustered items, three levels of 2048 codes, 8 requests of 50 beams: a whole search takes 3.2
// of a copy of its logits, 1/11 of STATIC and 1/5.7 of STATIC compiled; with 64 requests 1/25 and 1/7.8. The fused head
// (D = 256) takes 0.96 of its matrix product alone, and 1/1.4 of head and step one after the other; with
// normalize="children" 1/12. `python bench/bench_beam.py B8-M50 B64-M50`.
#include "beam.h"

#include <algorithm>
#include <type_traits>

#include "beam_request.h"
#include "dgi/log_sum_exp.h"
#include "isa.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // logits: a chunk is read again from the first-level cache

// `count` logits from `data` on, as contiguous numbers of the compute dtype.
template <class Stored>
DGI_ALWAYS_INLINE inline const Compute<Stored>* read_logits(const Stored* data, int64_t stride, int64_t count,
                                                            Compute<Stored>* buffer) {
  if constexpr (std::is_same_v<Stored, Compute<Stored>>) {
    if (stride == 1) return data;
  }
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) buffer[k] = load(data[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) buffer[k] = load(data[k * stride]);
  }
  return buffer;
}

// Starts to load `bytes` from `data` on into the second-level cache.
inline void prefetch(const void* data, int64_t bytes) {
#ifdef __GNUC__
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
#endif
}

// The log-sum-exp of the logits of one beam, while those of the `next` (null: none) are on their way: rows are visited by
// score, which no hardware foresees.
template <bool kFused, class Stored>
DGI_ALWAYS_INLINE inline LogSumExp<Compute<Stored>> log_sum_exp(const Stored* row, const Stored* next, int64_t codes,
                                                                int64_t stride) {
  using Real = Compute<Stored>;
  alignas(64) Real buffer[kChunk];
  LogSumExp<Real> sum;
  for (int64_t first = 0; first < codes; first += kChunk) {
    const int64_t count = std::min(kChunk, codes - first);
    if (next != nullptr) prefetch(next + first, count * static_cast<int64_t>(sizeof(Stored)));
    sum.template add<kFused>(read_logits(row + first * stride, stride, count, buffer), count);
  }
  return sum;
}

}  // namespace

template <class Stored, class Token>
bool beam_step(const BeamStep<Compute<Stored>, Token>& step, const Logits<Stored>& logits, int64_t first, int64_t last,
               const BeamOutput& out) {
  using Real = Compute<Stored>;
  Request<Real, Token> worker(step);
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
        const Stored* const row = row_of(parents[p]);
        const Stored* const next = p + 1 < parents.size() && stride == 1 ? row_of(parents[p + 1]) : nullptr;
        worker.template extend<fused.value>(
            parents[p], [=](int32_t token) DGI_ALWAYS_INLINE { return load(row[token * stride]); },
            [=, &logits]() DGI_ALWAYS_INLINE { return log_sum_exp<fused.value>(row, next, logits.codes, stride); });
      }
      worker.write(out);
    }
  });
  return fits;
}

#define DGI_INSTANTIATE(Stored, Token)                                                                                    \
  template bool beam_step(const BeamStep<Compute<Stored>, Token>&, const Logits<Stored>&, int64_t, int64_t, const BeamOutput&);
DGI_FOR_STORED_AND_TOKEN(DGI_INSTANTIATE)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
