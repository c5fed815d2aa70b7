// Beam steps on the CPU from hidden states, without the logits of the whole batch: a tile of logits of the best beams of
// several requests at a time, used up while it is in the cache (head_tile.h); beams that are hopeless by then are not
// multiplied at all. Where only children count, and are few, only their products are made.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "beam.h"
#include "beam_request.h"
#include "dgi/log_sum_exp.h"
#include "dgi/vector.h"
#include "head_tile.h"
#include "host.h"
#include "isa.h"

namespace dgi::cpu {
namespace {

// scale h^ of one beam.
template <bool kFused, class Stored>
DGI_ALWAYS_INLINE inline void scaled_row(const CosineLogits<Stored>& in, const Stored* h, Compute<Stored>* out) {
  const Compute<Stored> factor = in.scale, rnorm = reciprocal_norm<kFused>(h, in.dim, in.eps);
#pragma omp simd
  for (int64_t d = 0; d < in.dim; ++d) out[d] = factor * (rnorm * load(h[d]));
}

// Each child's product by itself.
template <class Stored, class Token>
bool step_by_children(const BeamStep<Compute<Stored>, Token>& step, const CosineLogits<Stored>& in, const BeamOutput& out,
                      int64_t children) {
  using Real = Compute<Stored>;
  std::atomic<bool> fits{true};
  parallel_for(step.requests, grain(children * in.dim / std::max<int64_t>(1, step.requests)),
               [&](int64_t first, int64_t last) {
    Request<Real, Token> worker(step);
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
              [] { return LogSumExp<Real>{}; }, [] { return static_cast<const Real*>(nullptr); });
        }
        worker.write(out);
      }
    });
  });
  return fits;
}

// What no child of a beam can score more than, without the log-sum-exp over all codes: exp is convex, so that
//   log sum_k exp(logit_k) >= log K + mean_k logit_k,   mean_k logit_k = scale h^ . mean_k e^_k
// and a child's log-probability is at most the largest logit of the children, less that.
template <class Stored>
class ChildBounds {
 public:
  using Real = Compute<Stored>;

  ChildBounds(const CosineLogits<Stored>& in, const HeadTile<Stored>& tile)
      : in_(in), tile_(tile), log_codes_(std::log(static_cast<Real>(in.codes))),
        margin_(kEpsilon * std::abs(in.scale)
                * static_cast<Real>(4 * in.dim + in.codes / HeadTile<Stored>::kBlock + HeadTile<Stored>::kBlock + 64)) {}

  // Lowers the bounds of a request's parents, but where so many children would have to be multiplied that it is no gain.
  template <class Token>
  void apply(Request<Real, Token>& worker, const Stored* h, Real* x) const {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      worker.lower_bounds([&](const Parent<Real>& parent, int64_t count, const auto& visit_children) DGI_ALWAYS_INLINE {
        if (count * kFewer > in_.codes) return parent.bound;
        scaled_row<fused.value>(in_, h + parent.beam * in_.dim, x);
        Real best = -std::numeric_limits<Real>::infinity();
        visit_children([&](int64_t token) DGI_ALWAYS_INLINE {
          const Real logit = tile_.rnorm()[token] * dot<fused.value>(tile_.codebook() + token * in_.dim, x, in_.dim);
          best = logit > best ? logit : best;
        });
        const Real mean = dot<fused.value>(tile_.mean(), x, in_.dim);
        return parent.score + (best - (log_codes_ + mean)) + margin_ + 16 * kEpsilon * std::abs(parent.score);
      });
    });
  }

 private:
  static constexpr int64_t kFewer = 32;  // products by themselves are worth it for one code in so many
  static constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();

  const CosineLogits<Stored>& in_;
  const HeadTile<Stored>& tile_;
  Real log_codes_;
  Real margin_;  // what rounding may add to either dot product
};

// A request of the group that a tile is made for, and which of its parents have rows in the tile.
template <class Real, class Token>
struct Turn {
  Request<Real, Token> worker;
  size_t next = 0, end = 0;  // its parents [next, end)
  int64_t row = 0;           // of the tile, that of `next`
};

// Tiles of products of all codes with the best beams left of each of a group of requests.
template <class Stored, class Token>
bool step_by_tiles(const BeamStep<Compute<Stored>, Token>& step, const CosineLogits<Stored>& in, const BeamOutput& out) {
  using Real = Compute<Stored>;
  constexpr int64_t kTileElements = int64_t{1} << 19, kBeamsAtOnce = 32, kFewRows = 128;
  const int64_t rows = std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, in.codes), 64, 256);
  // In one round where few rows are to be multiplied at all. Else the threshold that most beams of a request leave rules out
  // many of the others, more than that of half of them would.
  const bool one_round = step.requests * step.width <= kFewRows;
  const int64_t at_once = one_round ? std::max<int64_t>(1, step.width)
                                    : std::clamp<int64_t>((5 * step.width + 7) / 8, 1, kBeamsAtOnce);
  const int64_t group = std::min(step.requests, std::max<int64_t>(1, rows / at_once));
  const bool wants_sums = step.normalizes() && step.normalize == Normalize::kFull;
  const bool wants_bounds = wants_sums && !one_round;
  HeadTile<Stored> tile(in, group * at_once, wants_bounds);
  std::optional<ChildBounds<Stored>> bounds;
  if (wants_bounds) bounds.emplace(in, tile);
  std::vector<Turn<Real, Token>> turns(group, Turn<Real, Token>{Request<Real, Token>(step)});

  for (int64_t begin = 0; begin < step.requests; begin += group) {
    const int64_t count = std::min(group, step.requests - begin);
    for (int64_t i = 0; i < count; ++i) {
      turns[i].next = turns[i].end = 0;
      if (!turns[i].worker.start(begin + i)) return false;
    }
    if (bounds) {
      parallel_for(count, grain(4 * step.width * in.dim), [&](int64_t first, int64_t last) {
        const Buffer<Real> x = make_buffer<Real>(in.dim);
        for (int64_t i = first; i < last; ++i) {
          bounds->apply(turns[i].worker, in.h + (begin + i) * step.width * in.dim, x.get());
        }
      });
    }
    while (true) {
      int64_t used = 0;
      for (int64_t i = 0; i < count; ++i) {
        Turn<Real, Token>& turn = turns[i];
        const auto& parents = turn.worker.parents();
        const size_t most = std::min(parents.size(), turn.end + static_cast<size_t>(at_once));
        turn.row = used;
        for (turn.next = turn.end; turn.end < most && !turn.worker.is_done(parents[turn.end]);) ++turn.end, ++used;
      }
      if (used == 0) break;
      tile.start(used);
      parallel_for(count, grain(at_once * in.dim), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const Turn<Real, Token>& turn = turns[i];
          for (size_t p = turn.next; p < turn.end; ++p) {
            const int64_t beam = (begin + i) * step.width + turn.worker.parents()[p].beam;
            tile.set(turn.row + static_cast<int64_t>(p - turn.next), in.h + beam * in.dim);
          }
        }
      });
      tile.compute(wants_sums);
      parallel_for(count, grain(at_once * in.codes / 16), [&](int64_t first, int64_t last) {
        with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
          for (int64_t i = first; i < last; ++i) {
            Turn<Real, Token>& turn = turns[i];
            for (size_t p = turn.next; p < turn.end; ++p) {
              const Parent<Real>& parent = turn.worker.parents()[p];
              if (turn.worker.is_done(parent)) break;
              const int64_t row = turn.row + static_cast<int64_t>(p - turn.next), stride = tile.stride(row);
              const Real* const logits = tile.logits(row);
              turn.worker.template extend<fused.value>(
                  parent, [=](int32_t token) DGI_ALWAYS_INLINE { return logits[token * stride]; },
                  [&]() DGI_ALWAYS_INLINE { return tile.template log_sum_exp<fused.value>(row); },
                  [] { return static_cast<const Real*>(nullptr); });
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

template <class Stored, class Token>
bool cosine_beam_step(const BeamStep<Compute<Stored>, Token>& step, const CosineLogits<Stored>& logits,
                      const BeamOutput& out) {
  constexpr int64_t kDotCost = 4;  // a product by itself takes about four times as long as one in a matrix product
  if (step.normalize != Normalize::kFull || !step.normalizes()) {
    int64_t children = 0, rows = 0;
    for (int64_t b = 0; b < step.requests; ++b) {
      for (int64_t m = 0; m < step.width; ++m) {
        const int64_t node = step.nodes.at(b, m);
        if (node < 0 || node >= step.trie.end()) continue;
        const Children found = step.trie.children_of(node);
        children += found.base.size() + found.delta.size();
        ++rows;
      }
    }
    if (children * kDotCost <= rows * logits.codes) return step_by_children(step, logits, out, children);
  }
  return step_by_tiles(step, logits, out);
}

#define DGI_INSTANTIATE(Stored, Token)                                                                                    \
  template bool cosine_beam_step(const BeamStep<Compute<Stored>, Token>&, const CosineLogits<Stored>&, const BeamOutput&);
DGI_FOR_STORED_AND_TOKEN(DGI_INSTANTIATE)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
