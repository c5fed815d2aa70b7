// Beam steps on the CPU, given logits or the head that would make them: for each live beam, best first, the log-sum-exp
// of its logits, then its real children and no others; beams that are hopeless by then are not looked at
// (beam_request.h).
//
// Given logits are read once, chunk by chunk, and never copied but for a chunk that must be converted or gathered. Of a
// head, a tile of raw products is made, of the best beams of several requests at a time, and used up while it is in the
// cache; where only children count, and are few, only their products are made.
//
// Bytes read: those of the logits, once, and 4 per child for its token; per logit 13 vector operations. One core of an AMD
// EPYC with AVX-512, 1e6 clustered items, three levels of 2048 codes, 8 requests of 50 beams, interleaved medians: a whole
// search takes 1.4 ms, 0.42 of what torch.logsumexp takes on the same logits and 1/18 of STATIC. The fused head (D = 256)
// takes 1.16 of its matrix product alone, and 0.9 of head and step one after the other; with normalize="children" 0.08
// and 0.06. Measured again by bench/bench_beam.py.
#include "beam.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "beam_request.h"
#include "dgi/log_sum_exp.h"
#include "dgi/vector.h"
#include "host.h"
#include "isa.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // logits: a chunk is read again from the first-level cache

// The log-sum-exp of `codes` logits; `read(first, count, buffer)` returns a pointer to some of them.
template <bool kFused, class Real, class Read>
DGI_ALWAYS_INLINE inline LogSumExp<Real> log_sum_exp(int64_t codes, const Read& read) {
  alignas(64) Real buffer[kChunk];
  LogSumExp<Real> sum;
  for (int64_t first = 0; first < codes; first += kChunk) {
    const int64_t count = std::min(kChunk, codes - first);
    sum.template add<kFused>(read(first, count, buffer), count);
  }
  return sum;
}

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

// scale h^ of one beam.
template <bool kFused, class Stored>
DGI_ALWAYS_INLINE inline void scaled_row(const CosineLogits<Stored>& in, const Stored* h, Compute<Stored>* out) {
  const Compute<Stored> factor = in.scale, rnorm = reciprocal_norm<kFused>(h, in.dim, in.eps);
#pragma omp simd
  for (int64_t d = 0; d < in.dim; ++d) out[d] = factor * (rnorm * load(h[d]));
}

// Each child's product by itself.
template <class Stored>
bool step_by_children(const BeamStep<Compute<Stored>>& step, const CosineLogits<Stored>& in, const BeamOutput& out,
                      int64_t children) {
  using Real = Compute<Stored>;
  std::atomic<bool> fits{true};
  parallel_for(step.requests, grain(children * in.dim / std::max<int64_t>(1, step.requests)),
               [&](int64_t first, int64_t last) {
    Request<Real> worker(step);
    const Buffer<Real> x = make_buffer<Real>(in.dim);
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t request = first; request < last; ++request) {
        if (!worker.start(request)) fits = false;
        for (const Parent<Real>& parent : worker.parents()) {
          if (worker.is_done(parent)) break;
          scaled_row<fused.value>(in, in.h + (request * step.width + parent.beam) * in.dim, x.get());
          worker.template extend<fused.value>(
              parent,
              [&](int32_t token) DGI_ALWAYS_INLINE {
                const Stored* const code = in.codebook + token * in.dim;
                return dot<fused.value>(code, x.get(), in.dim) * reciprocal_norm<fused.value>(code, in.dim, in.eps);
              },
              [] { return LogSumExp<Real>{}; });
        }
        worker.write(out);
      }
    });
  });
  return fits;
}

// The codebook in the compute dtype and the reciprocal norms of its rows.
template <class Stored>
struct Codes {
  using Real = Compute<Stored>;
  Buffer<Real> rnorm, converted;
  Matrix<Real> matrix;

  explicit Codes(const CosineLogits<Stored>& in) : rnorm(make_buffer<Real>(in.codes)), matrix(nullptr, in.codes, in.dim) {
    if constexpr (std::is_same_v<Stored, Real>) {
      matrix.data = const_cast<Real*>(in.codebook);
    } else {
      converted = make_buffer<Real>(in.codes * in.dim);
      matrix.data = converted.get();
    }
    parallel_for(in.codes, grain(in.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          const Stored* const code = in.codebook + k * in.dim;
          rnorm[k] = reciprocal_norm<fused.value>(code, in.dim, in.eps);
          if constexpr (!std::is_same_v<Stored, Real>) {
            for (int64_t d = 0; d < in.dim; ++d) converted[k * in.dim + d] = load(code[d]);
          }
        }
      });
    });
  }
};

// A request of the group that a tile is made for, and which of its parents have rows in the tile.
template <class Real>
struct Turn {
  Request<Real> worker;
  size_t next = 0, end = 0;  // its parents [next, end)
  int64_t row = 0;           // of the tile, that of `next`
};

// Tiles of products of all codes with the best beams left of each of a group of requests.
template <class Stored>
bool step_by_tiles(const BeamStep<Compute<Stored>>& step, const CosineLogits<Stored>& in, const BeamOutput& out) {
  using Real = Compute<Stored>;
  constexpr int64_t kTileElements = int64_t{1} << 19, kBeamsAtOnce = 32;
  const int64_t rows = std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, in.codes), 64, 256);
  const int64_t at_once = std::clamp<int64_t>(step.width, 1, kBeamsAtOnce);
  const int64_t group = std::min(step.requests, std::max<int64_t>(1, rows / at_once));
  const Codes<Stored> codes(in);
  const Buffer<Real> x = make_buffer<Real>(group * at_once * in.dim), tile = make_buffer<Real>(group * at_once * in.codes);
  std::vector<Turn<Real>> turns(group, Turn<Real>{Request<Real>(step)});

  for (int64_t begin = 0; begin < step.requests; begin += group) {
    const int64_t count = std::min(group, step.requests - begin);
    for (int64_t i = 0; i < count; ++i) {
      turns[i].next = turns[i].end = 0;
      if (!turns[i].worker.start(begin + i)) return false;
    }
    while (true) {
      int64_t used = 0;
      for (int64_t i = 0; i < count; ++i) {
        Turn<Real>& turn = turns[i];
        const auto& parents = turn.worker.parents();
        turn.row = used;
        for (turn.next = turn.end; turn.end < parents.size() && turn.end - turn.next < static_cast<size_t>(at_once);
             ++turn.end, ++used) {
          if (turn.worker.is_done(parents[turn.end])) break;
          const Stored* const h = in.h + ((begin + i) * step.width + parents[turn.end].beam) * in.dim;
          with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
            scaled_row<fused.value>(in, h, x.get() + used * in.dim);
          });
        }
      }
      if (used == 0) break;
      matrix_product({x.get(), used, in.dim}, codes.matrix.transposed(), {tile.get(), used, in.codes}, Into::kOverwrite);
      parallel_for(count, grain(at_once * in.codes), [&](int64_t first, int64_t last) {
        with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
          for (int64_t i = first; i < last; ++i) {
            Turn<Real>& turn = turns[i];
            for (size_t p = turn.next; p < turn.end; ++p) {
              const Parent<Real>& parent = turn.worker.parents()[p];
              if (turn.worker.is_done(parent)) break;
              const Real* const products = tile.get() + (turn.row + static_cast<int64_t>(p - turn.next)) * in.codes;
              const Real* const rnorm = codes.rnorm.get();
              turn.worker.template extend<fused.value>(
                  parent, [=](int32_t token) DGI_ALWAYS_INLINE { return products[token] * rnorm[token]; },
                  [&]() DGI_ALWAYS_INLINE {
                    return log_sum_exp<fused.value, Real>(in.codes, [=](int64_t from, int64_t n, Real* buffer) DGI_ALWAYS_INLINE {
                      for (int64_t k = 0; k < n; ++k) buffer[k] = products[from + k] * rnorm[from + k];
                      return static_cast<const Real*>(buffer);
                    });
                  });
            }
          }
        });
      });
    }
    for (int64_t i = 0; i < count; ++i) turns[i].worker.write(out);
  }
  return true;
}

}  // namespace

template <class Stored>
bool beam_step(const BeamStep<Compute<Stored>>& step, const Logits<Stored>& logits, int64_t first, int64_t last,
               const BeamOutput& out) {
  using Real = Compute<Stored>;
  Request<Real> worker(step);
  bool fits = true;
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
    for (int64_t request = first; request < last; ++request) {
      fits = worker.start(request) && fits;
      for (const Parent<Real>& parent : worker.parents()) {
        if (worker.is_done(parent)) break;
        const Stored* const row = logits.data + request * logits.request_stride + parent.beam * logits.beam_stride;
        const int64_t stride = logits.code_stride;
        worker.template extend<fused.value>(
            parent, [=](int32_t token) DGI_ALWAYS_INLINE { return load(row[token * stride]); },
            [&]() DGI_ALWAYS_INLINE {
              return log_sum_exp<fused.value, Real>(logits.codes, [=](int64_t from, int64_t n, Real* buffer) DGI_ALWAYS_INLINE {
                return read_logits(row + from * stride, stride, n, buffer);
              });
            });
      }
      worker.write(out);
    }
  });
  return fits;
}

template <class Stored>
bool cosine_beam_step(const BeamStep<Compute<Stored>>& step, const CosineLogits<Stored>& logits, const BeamOutput& out) {
  constexpr int64_t kDotCost = 4;  // a product by itself takes about four times as long as one in a matrix product
  if (step.normalize != Normalize::kFull || !step.normalizes()) {
    int64_t children = 0, rows = 0;
    for (int64_t b = 0; b < step.requests; ++b) {
      for (int64_t m = 0; m < step.width; ++m) {
        const int64_t node = step.nodes.at(b, m);
        if (node < 0 || node >= step.level.nodes) continue;
        children += step.level.child_start[node + 1] - step.level.child_start[node];
        ++rows;
      }
    }
    if (children * kDotCost <= rows * logits.codes) return step_by_children(step, logits, out, children);
  }
  return step_by_tiles(step, logits, out);
}

template bool beam_step(const BeamStep<float>&, const Logits<float>&, int64_t, int64_t, const BeamOutput&);
template bool beam_step(const BeamStep<double>&, const Logits<double>&, int64_t, int64_t, const BeamOutput&);
template bool beam_step(const BeamStep<float>&, const Logits<BFloat16>&, int64_t, int64_t, const BeamOutput&);
template bool beam_step(const BeamStep<float>&, const Logits<Float16>&, int64_t, int64_t, const BeamOutput&);
template bool cosine_beam_step(const BeamStep<float>&, const CosineLogits<float>&, const BeamOutput&);
template bool cosine_beam_step(const BeamStep<double>&, const CosineLogits<double>&, const BeamOutput&);
template bool cosine_beam_step(const BeamStep<float>&, const CosineLogits<BFloat16>&, const BeamOutput&);
template bool cosine_beam_step(const BeamStep<float>&, const CosineLogits<Float16>&, const BeamOutput&);

}  // namespace dgi::cpu
