// Beam steps on the CPU from hidden states, without the logits of the whole batch: a tile of logits for the best beams
// of several requests at a time, used while it is in the cache (head_tile.h). Beams that can no longer be among the
// best are not multiplied, or their products are abandoned half-way. If only the children count and they are few, only
// their products are computed.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/beam/beam_cpu.h"
#include "cpu/beam/beam_request.h"
#include "cpu/beam/head_tile.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/scale.h"
#include "dgi/log_sum_exp.h"
#include "dgi/vector.h"

namespace dgi::cpu {
namespace {

// scale h^ of one beam, without the scale's gain.
template <bool kFused, class Stored>
DGI_ALWAYS_INLINE inline void scaled_row(const CosineLogits<Stored>& in, const Stored* h, Compute<Stored>* out) {
  const Compute<Stored> factor = SplitScale<Compute<Stored>>(in.scale).scale,
                        rnorm = reciprocal_norm<kFused>(h, in.dim, in.eps);
#pragma omp simd
  for (int64_t d = 0; d < in.dim; ++d) out[d] = factor * (rnorm * load(h[d]));
}

// Each child's product by itself.
template <class Stored, class Token>
bool step_by_children(const BeamStep<Compute<Stored>, Token>& step, const CosineLogits<Stored>& in,
                      const BeamOutput& out, int64_t children) {
  using Real = Compute<Stored>;
  std::atomic<bool> fits{true};
  const Real gain = static_cast<Real>(SplitScale<Real>(in.scale).gain);
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
                       worker.template extend<decltype(fused)>(
                           parent,
                           [&](int32_t token) DGI_ALWAYS_INLINE {
                             const Stored* const code = in.codebook + token * in.dim;
                             const Real factor = gain * reciprocal_norm<fused.value>(code, in.dim, in.eps);
                             return dot<fused.value>(code, x.get(), in.dim) * factor;
                           },
                           [] { return LogSumExp<Real>{}; }, [] { return static_cast<const Real*>(nullptr); });
                     }
                     worker.write(out);
                   }
                 });
               });
  return fits;
}

// What no child of a beam can score more than, without the log-sum-exp over all codes: exp is convex, so that for the n
// codes that are not summed yet
//   log sum_k exp(logit_k) >= log n + mean_k logit_k,   mean_k logit_k = scale h^ . mean_k e^_k
// and a child's log-probability is at most the largest logit of the children, less the sum of this and what is summed.
template <class Stored>
class ChildBounds {
 public:
  using Real = Compute<Stored>;

  ChildBounds(const CosineLogits<Stored>& in, const HeadTile<Stored>& tile)
      : in_(in), tile_(tile), margin_(kEpsilon
                                      * (16 * (1 + std::log(static_cast<Real>(in.codes)))
                                         + std::abs(in.scale)
                                               * static_cast<Real>(4 * in.dim + in.codes / HeadTile<Stored>::kBlock
                                                                   + HeadTile<Stored>::kBlock + 64))) {}

  // Lowers the bounds of a request's parents whose children's logits are held; `x` has room for a row.
  template <class Token>
  void apply(Request<Real, Token>& worker, const Stored* h, Real* x) const {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      worker.lower_bounds([&](const Parent<Real>& parent) DGI_ALWAYS_INLINE {
        scaled_row<fused.value>(in_, h + parent.beam * in_.dim, x);
        Real best = -std::numeric_limits<Real>::infinity();
        worker.visit_held(parent, [&](int64_t token, Real*) DGI_ALWAYS_INLINE {
          const Real product = dot<fused.value>(tile_.codebook() + token * in_.dim, x, in_.dim);
          const Real logit = tile_.terms().template score<fused.value, false>(product, token);
          best = logit > best ? logit : best;
        });
        const Real peak = parent.score + parent.bonus + best + margin_
                          + 16 * kEpsilon * (std::abs(parent.score) + std::abs(parent.bonus));
        return std::pair{peak, least_from<fused.value>(0, x)};
      });
    });
  }

  // The least log-sum-exp of a row of the tile whose first stages are made.
  Real least_sum(int64_t row, int stage, const Stored* h, Real* x) const {
    Real least{};
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      scaled_row<fused.value>(in_, h, x);
      LogSumExp<Real> sum = tile_.template log_sum_exp<fused.value>(row, stage);
      sum.template add<fused.value>(LogSumExp<Real>{least_from<fused.value>(stage, x), 1});
      least = sum.maximum + sum.log_sum();
    });
    return least;
  }

 private:
  static constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();

  template <bool kFused>
  DGI_ALWAYS_INLINE inline Real least_from(int stage, const Real* x) const {
    return std::log(static_cast<Real>(tile_.codes_from(stage))) + dot<kFused>(tile_.mean_from(stage), x, in_.dim);
  }

  const CosineLogits<Stored>& in_;
  const HeadTile<Stored>& tile_;
  Real margin_;  // what rounding may add to either dot product, and to the logarithm of a sum
};

// A step by tiles of products of all codes with the best beams left of each of a group of requests.
template <class Stored, class Token>
class TiledStep {
 public:
  using Real = Compute<Stored>;

  TiledStep(const BeamStep<Real, Token>& step, const CosineLogits<Stored>& in)
      : step_(step), in_(in), one_round_(step.requests * step.width <= kFewRows),
        at_once_(one_round_ ? std::max<int64_t>(1, step.width)
                            : std::clamp<int64_t>((5 * step.width + 7) / 8, 1, kBeamsAtOnce)),
        group_(std::min(step.requests, std::max<int64_t>(1, rows_at_once() / at_once_))),
        wants_sums_(step.normalizes() && step.normalize == Normalize::kFull), wants_bounds_(wants_sums_ && !one_round_),
        tile_(in, group_ * at_once_, wants_bounds_), turns_(group_, Turn{Request<Real, Token>(step)}) {
    if (wants_bounds_) bounds_.emplace(in, tile_);
  }

  // False where a request has more candidates than keys can number.
  bool run(const BeamOutput& out) {
    for (begin_ = 0; begin_ < step_.requests; begin_ += group_) {
      count_ = std::min(group_, step_.requests - begin_);
      if (!start()) return false;
      for (bool first = true; choose_rows(); first = false) {
        fill_tile();
        compute_tile(first);
        extend();
      }
      for (int64_t i = 0; i < count_; ++i) turns_[i].worker.write(out);
    }
    return true;
  }

 private:
  // In one round where few rows are to be multiplied at all. Else the threshold that most beams of a request leave
  // rules out many of the others, more than that of half of them would.
  static constexpr int64_t kFewRows = 128, kBeamsAtOnce = 32;
  static constexpr int64_t kTileElements = int64_t{1} << 19;
  static constexpr int64_t kFewer = 32;  // logits of children are held where they are one in so many codes, or less

  // A request of the group, and which of its parents have rows in the tile.
  struct Turn {
    Request<Real, Token> worker;
    size_t next = 0, end = 0;  // its parents [next, end)
    std::vector<int64_t> rows = {};  // theirs

    const Parent<Real>& parent(size_t p) const { return worker.parents()[p]; }
  };

  struct Row {
    int64_t turn;
    size_t parent;
    Real room;  // above the threshold
  };

  int64_t rows_at_once() const { return std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, in_.codes), 64, 256); }

  const Stored* hidden(const Row& row) const {
    return in_.h + ((begin_ + row.turn) * step_.width + turns_[row.turn].parent(row.parent).beam) * in_.dim;
  }

  bool start() {
    for (int64_t i = 0; i < count_; ++i) {
      Turn& turn = turns_[i];
      turn.next = turn.end = 0;
      if (!turn.worker.start(begin_ + i)) return false;
      if (wants_sums_) turn.worker.hold_children(in_.codes / kFewer);
    }
    if (!bounds_) return true;
    parallel_for(count_, grain(4 * step_.width * in_.dim), [&](int64_t first, int64_t last) {
      const Buffer<Real> x = make_buffer<Real>(in_.dim);
      for (int64_t i = first; i < last; ++i) {
        bounds_->apply(turns_[i].worker, in_.h + (begin_ + i) * step_.width * in_.dim, x.get());
      }
    });
    return true;
  }

  // The next parents of each request that are not hopeless; those that all but are come last. False where none is left.
  bool choose_rows() {
    rows_.clear();
    for (int64_t i = 0; i < count_; ++i) {
      Turn& turn = turns_[i];
      const size_t most = std::min(turn.worker.parents().size(), turn.end + static_cast<size_t>(at_once_));
      for (turn.next = turn.end; turn.end < most && !turn.worker.is_done(turn.parent(turn.end)); ++turn.end) {
        rows_.push_back({i, turn.end, turn.worker.room_above(turn.parent(turn.end).bound)});
      }
      turn.rows.assign(turn.end - turn.next, 0);
    }
    if (bounds_) {
      std::stable_sort(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) { return a.room > b.room; });
    }
    return !rows_.empty();
  }

  void fill_tile() {
    const int64_t rows = static_cast<int64_t>(rows_.size());
    tile_.start(rows);
    for (int64_t r = 0; r < rows; ++r) {
      Turn& turn = turns_[rows_[r].turn];
      turn.rows[rows_[r].parent - turn.next] = r;
      const Parent<Real>& parent = turn.parent(rows_[r].parent);
      if (parent.held < 0) {
        tile_.keep(r);
      } else {
        turn.worker.visit_held(parent, [&](int64_t token, Real* logit) { tile_.want(r, token, logit); });
      }
    }
    constexpr int64_t kAtOnce = HeadTile<Stored>::kRowsAtOnce;
    parallel_for((rows + kAtOnce - 1) / kAtOnce, grain(kAtOnce * in_.dim), [&](int64_t first, int64_t last) {
      const Stored* h[kAtOnce];
      for (int64_t r = kAtOnce * first; r < std::min(rows, kAtOnce * last); r += kAtOnce) {
        const int64_t count = std::min(kAtOnce, rows - r);
        for (int64_t i = 0; i < count; ++i) h[i] = hidden(rows_[r + i]);
        tile_.set(r, h, count);
      }
    });
  }

  // In stages where there is a threshold: panels that turn out to be hopeless are dropped.
  void compute_tile(bool first_round) {
    constexpr int kStages = HeadTile<Stored>::kStages;
    if (!bounds_ || first_round) return tile_.compute(0, kStages, wants_sums_);
    const Buffer<Real> x = make_buffer<Real>(in_.dim);
    for (int stage = 0; stage < kStages && tile_.panels_left() > 0; ++stage) {
      tile_.compute(stage, stage + 1, wants_sums_);
      if (stage + 1 == kStages) break;
      while (tile_.panels_left() > 0 && is_hopeless(tile_.panels_left() - 1, stage + 1, x.get())) tile_.drop_last();
    }
  }

  bool is_hopeless(int64_t panel, int stage, Real* x) const {
    const int64_t first = panel * tile_.lanes(), last = std::min<int64_t>(rows_.size(), first + tile_.lanes());
    for (int64_t r = first; r < last; ++r) {
      const Turn& turn = turns_[rows_[r].turn];
      const Parent<Real>& parent = turn.parent(rows_[r].parent);
      if (parent.held < 0) return false;
      const Real bound = parent.peak - bounds_->least_sum(r, stage, hidden(rows_[r]), x);
      if (!(turn.worker.room_above(bound) < 0)) return false;
    }
    return true;
  }

  void extend() {
    const int64_t made = tile_.panels_left() * tile_.lanes();  // rows
    parallel_for(count_, grain(at_once_ * in_.codes / 16), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          Turn& turn = turns_[i];
          for (size_t p = turn.next; p < turn.end; ++p) {
            const Parent<Real>& parent = turn.parent(p);
            if (turn.worker.is_done(parent)) break;
            const int64_t row = turn.rows[p - turn.next], stride = tile_.stride(row);
            if (row >= made) continue;
            const auto log_sum_exp = [&]() DGI_ALWAYS_INLINE { return tile_.template log_sum_exp<fused.value>(row); };
            if (parent.held >= 0) {
              turn.worker.extend_held(parent, log_sum_exp);
              continue;
            }
            const Real* const logits = tile_.logits(row);
            turn.worker.template extend<decltype(fused)>(
                parent, [=](int32_t token) DGI_ALWAYS_INLINE { return logits[token * stride]; }, log_sum_exp,
                [] { return static_cast<const Real*>(nullptr); });
          }
        }
      });
    });
  }

  const BeamStep<Real, Token>& step_;
  const CosineLogits<Stored>& in_;
  bool one_round_;
  int64_t at_once_, group_;
  bool wants_sums_, wants_bounds_;
  HeadTile<Stored> tile_;
  std::optional<ChildBounds<Stored>> bounds_;
  std::vector<Turn> turns_;
  int64_t begin_ = 0, count_ = 0;  // the group's requests
  std::vector<Row> rows_;
};

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
  return TiledStep<Stored, Token>(step, logits).run(out);
}

#define DGI_INSTANTIATE(Stored, Token)                                                                 \
  template bool cosine_beam_step(const BeamStep<Compute<Stored>, Token>&, const CosineLogits<Stored>&, \
                                 const BeamOutput&);
DGI_FOR_STORED_AND_TOKEN(DGI_INSTANTIATE)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
