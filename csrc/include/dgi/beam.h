// A step of a trie-constrained beam search, but for how the work is shared out: what a child scores, and in which order
// candidates stand. Which children there are says trie.h.
//
//   score(m, k) = scores[m] + logp[m, k],   logp = (logit - offset) - log_sum,   0 for the end of a sequence
//
// With node scores, scores[m] + (logp[m, k] + strength node_score[k]).
//
// The candidates of a request are numbered by parent, then by token (their slot), so that the order (score descending,
// slot ascending) settles ties as docs/method.md says. Score and slot make one unsigned key, less is better.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "dgi/macros.h"

namespace dgi {

enum class Normalize { kFull, kChildren, kNone };

// NaN counts as -inf, and +inf as the largest number, so that no sum or difference makes a NaN of it.
template <class Real>
DGI_HOST_DEVICE Real finite_or_dead(Real x) {
  if (x != x) return -std::numeric_limits<Real>::infinity();
  return x > std::numeric_limits<Real>::max() ? std::numeric_limits<Real>::max() : x;
}

// log P = (logit - offset) - log_sum, in this order: with logits beyond 1e8 it matters.
template <class Real>
struct Normalizer {
  Real offset = 0, log_sum = 0;

  DGI_HOST_DEVICE Real log_probability(Real logit) const { return (finite_or_dead(logit) - offset) - log_sum; }
  DGI_HOST_DEVICE Real score(Real parent, Real logit) const { return finite_or_dead(parent + log_probability(logit)); }

  // A logit less than this scores less than `score`: the exact bound less a margin for the rounding of either, and of
  // what else is added, no more than `added`. At least the lowest finite number, so that NaN and -inf always fail the
  // test `logit >= cut`.
  DGI_HOST_DEVICE Real cut(Real parent, Real score, Real added = 0) const {
    constexpr Real kLowest = std::numeric_limits<Real>::lowest();
    const auto magnitude = [](double x) { return x < 0 ? -x : x; };
    const double exact = static_cast<double>(score) - parent + offset + log_sum;
    const double margin = 8.0 * std::numeric_limits<Real>::epsilon()
                          * (magnitude(score) + magnitude(parent) + magnitude(offset) + magnitude(log_sum)
                             + 2.0 * magnitude(added));
    const double bound = exact - margin;
    return bound > kLowest && bound < std::numeric_limits<Real>::max() ? static_cast<Real>(bound) : kLowest;
  }
};

// What children add to their scores: a number of each, by its place in its part of the trie, times the strength of the
// request.
template <class Real>
struct NodeScores {
  // (children), then of each node the least and the largest number of its children, (nodes) each; null: nothing
  const float *base = nullptr, *delta = nullptr;
  const Real* strengths = nullptr;  // (requests); null: one for all
  int64_t stride = 0;
  Real strength = 0;

  DGI_HOST_DEVICE bool are_given() const { return base != nullptr || delta != nullptr; }  // a part may have no node
  DGI_HOST_DEVICE Real strength_of(int64_t request) const {
    return strengths == nullptr ? strength : strengths[request * stride];
  }
  DGI_HOST_DEVICE Real of(int64_t request, int64_t child, bool in_delta) const {
    return are_given() ? strength_of(request) * (in_delta ? delta : base)[child] : Real{0};
  }
};

template <class Real>
struct CandidateKey {
  using Bits = std::conditional_t<std::is_same_v<Real, float>, uint32_t, uint64_t>;
  using Key = std::conditional_t<std::is_same_v<Real, float>, uint64_t, unsigned __int128>;
  static constexpr int kWidth = 8 * sizeof(Bits);
  static constexpr Bits kSign = Bits{1} << (kWidth - 1);

  DGI_HOST_DEVICE static Key of(Real score, Bits slot) {
    const Bits bits = std::bit_cast<Bits>(score + Real{0});  // -0 becomes 0: they tie
    const Bits descending = bits & kSign ? bits : ~(bits | kSign);
    return static_cast<Key>(descending) << kWidth | slot;
  }

  DGI_HOST_DEVICE static Real score(Key key) {
    const Bits descending = static_cast<Bits>(key >> kWidth);
    return std::bit_cast<Real>(descending & kSign ? descending : static_cast<Bits>(~descending & ~kSign));
  }

  DGI_HOST_DEVICE static Bits slot(Key key) { return static_cast<Bits>(key); }
};

}  // namespace dgi
