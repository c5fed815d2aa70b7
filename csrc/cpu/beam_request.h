// The search of one request: which of its beams are worth looking at, and the best of their children.
//
// The best num_beams candidates so far give a threshold. A beam whose own score, or a lower bound of its children's, lies
// below it has no child that counts (log-probabilities are at most 0), and neither have those behind it. The threshold also becomes a bound on the logit, so
// that most children cost a load and a comparison; only those that pass are scored, looked up in the filter and kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "beam.h"
#include "dgi/beam.h"
#include "dgi/log_sum_exp.h"
#include "isa.h"

namespace dgi::cpu {

// Keeps the best `limit` of the keys that it is given: all of them at first, then what beats the threshold; whenever the
// room is used up, the best are selected and the threshold rises. A linear number of comparisons in all.
template <class Real>
class Best {
 public:
  using Candidate = CandidateKey<Real>;
  using Key = typename Candidate::Key;

  void start(int64_t limit) {
    limit_ = limit;
    room_ = limit + std::max<int64_t>(64, limit / 2);
    keys_.clear();
    full_ = false;
  }

  // Whether `limit` candidates are held, so that others need to beat the threshold.
  bool full() const { return full_; }
  Real threshold() const { return Candidate::score(worst_); }

  // Returns whether the threshold has changed.
  bool add(Real score, int64_t slot) {
    const Key key = Candidate::of(score, static_cast<typename Candidate::Bits>(slot));
    if (full_ && key > worst_) return false;
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) < room_) return false;
    select();
    return true;
  }

  // Raises the threshold where enough candidates have come in since to be worth it.
  void refresh() {
    if (static_cast<int64_t>(keys_.size()) >= (full_ ? limit_ + limit_ / 8 + 1 : limit_)) select();
  }

  // Drops all but the best `limit`, where there are more than that or just so many.
  void select() {
    if (limit_ == 0 || static_cast<int64_t>(keys_.size()) < limit_) return;
    const auto last = keys_.begin() + (limit_ - 1);
    std::nth_element(keys_.begin(), last, keys_.end());
    worst_ = *last;
    keys_.resize(limit_);
    full_ = true;
  }

  const std::vector<Key>& sorted() {
    select();
    std::sort(keys_.begin(), keys_.end());
    return keys_;
  }

 private:
  int64_t limit_ = 0, room_ = 0;
  std::vector<Key> keys_;
  Key worst_ = 0;
  bool full_ = false;
};

// A live beam with children.
template <class Real>
struct Parent {
  Real score, bound;         // no child scores more than the bound, where log-probabilities are normalised here
  int64_t beam, first, end;  // children [first, end)
  int64_t slot;              // of the first child
};

// One request at a time: its parents, its candidates, its result. Knows nothing of where logits come from.
template <class Real>
class Request {
 public:
  explicit Request(const BeamStep<Real>& step) : step_(step) {}

  // Takes up a request. False where it has more candidates than keys can number.
  bool start(int64_t request) {
    request_ = request;
    counts_ = step_.counts == nullptr ? nullptr : step_.counts[request];
    best_.start(step_.num_beams);
    parents_.clear();
    int64_t slots = 0;
    for (int64_t m = 0; m < step_.width; ++m) {
      const int64_t node = step_.nodes.at(request_, m);
      const Real score = finite_or_dead(step_.scores.at(request_, m));
      if (node < 0 || node >= step_.level.nodes || score == kDead) continue;
      const int64_t first = step_.level.child_start[node], end = step_.level.child_start[node + 1];
      parents_.push_back({score, score, m, first, end, slots});
      slots += end - first;
    }
    by_beam_ = parents_;
    sort_by_bound();
    return static_cast<uint64_t>(slots) <= std::numeric_limits<typename CandidateKey<Real>::Bits>::max();
  }

  // The live beams, those first whose children may score most, to be extended in this order.
  const std::vector<Parent<Real>>& parents() const { return parents_; }

  // Lowers the bounds of parents to bound(parent), tokens [first, last) being those of the parent's children.
  template <class Bound>
  DGI_ALWAYS_INLINE inline void lower_bounds(const Bound& bound) {
    for (Parent<Real>& parent : parents_) {
      const int32_t *const first = step_.level.tokens + parent.first, *const last = step_.level.tokens + parent.end;
      if (first == last || *first == kEndToken) continue;  // the end of a sequence costs nothing
      const Real lower = bound(parent, first, last);
      if (lower < parent.bound) parent.bound = lower;
    }
    sort_by_bound();
  }

  // Whether this parent and all behind it are hopeless.
  bool is_done(const Parent<Real>& parent) {
    if (!step_.normalizes()) return false;
    best_.refresh();
    return best_.full() && parent.bound < best_.threshold();
  }

  // `logit(token)` is the logit of a code, `log_sum_exp()` that of all codes; either is asked for what is needed only.
  template <bool kFused, class Logit, class Sum>
  DGI_ALWAYS_INLINE inline void extend(const Parent<Real>& parent, const Logit& logit, const Sum& log_sum_exp) {
    int64_t child = parent.first;
    if (child < parent.end && step_.level.tokens[child] == kEndToken) {
      if (is_allowed(counts_, step_.lower, child)) best_.add(parent.score, parent.slot);
      ++child;
    }
    if (child == parent.end) return;
    if (step_.normalize == Normalize::kChildren && step_.normalizes()) {
      extend_by_children<kFused>(parent, child, logit);
      return;
    }
    Normalizer<Real> normalizer;
    if (step_.log_normalizer.data != nullptr) {
      normalizer.offset = step_.log_normalizer.at(request_, parent.beam);
      if (!(std::abs(normalizer.offset) <= std::numeric_limits<Real>::max())) return;
    } else if (step_.normalize == Normalize::kFull) {
      const LogSumExp<Real> sum = log_sum_exp();
      if (sum.empty()) return;
      normalizer = {sum.maximum, sum.log_sum()};
    }
    const int32_t* const tokens = step_.level.tokens;
    add_children(parent, child, normalizer, counts_, [&](int64_t i) DGI_ALWAYS_INLINE { return logit(tokens[i]); });
  }

  // Writes the result of the request.
  void write(const BeamOutput& out) {
    const auto& keys = best_.sorted();
    const int64_t found = static_cast<int64_t>(keys.size()), begin = request_ * step_.num_beams;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t slot = static_cast<int64_t>(CandidateKey<Real>::slot(keys[i]));
      const auto behind = std::upper_bound(by_beam_.begin(), by_beam_.end(), slot,
                                           [](int64_t s, const Parent<Real>& parent) { return s < parent.slot; });
      const Parent<Real>& parent = *(behind - 1);
      const int64_t child = parent.first + (slot - parent.slot);
      out.nodes[begin + i] = child;
      out.tokens[begin + i] = step_.level.tokens[child];
      out.parents[begin + i] = parent.beam;
      out.scores[begin + i] = static_cast<float>(CandidateKey<Real>::score(keys[i]));
    }
    std::fill(out.nodes + begin + found, out.nodes + begin + step_.num_beams, -1);
    std::fill(out.tokens + begin + found, out.tokens + begin + step_.num_beams, -1);
    std::fill(out.parents + begin + found, out.parents + begin + step_.num_beams, -1);
    std::fill(out.scores + begin + found, out.scores + begin + step_.num_beams, -std::numeric_limits<float>::infinity());
  }

 private:
  void sort_by_bound() {
    const auto better = [](const Parent<Real>& a, const Parent<Real>& b) { return a.bound > b.bound; };
    if (!std::is_sorted(parents_.begin(), parents_.end(), better)) {
      std::stable_sort(parents_.begin(), parents_.end(), better);
    }
  }

  static constexpr int64_t kChunk = 1024;
  static constexpr Real kDead = -std::numeric_limits<Real>::infinity();

  // Normalises over the allowed children only, so that the filter is asked for all of them.
  template <bool kFused, class Logit>
  DGI_ALWAYS_INLINE inline void extend_by_children(const Parent<Real>& parent, int64_t child, const Logit& logit) {
    values_.resize(parent.end - child);
    for (int64_t i = child; i < parent.end; ++i) {
      values_[i - child] = is_allowed(counts_, step_.lower, i) ? Real{logit(step_.level.tokens[i])} : kDead;
    }
    LogSumExp<Real> sum;
    for (int64_t i = 0; i < parent.end - child; i += kChunk) {
      sum.template add<kFused>(values_.data() + i, std::min(kChunk, parent.end - child - i));
    }
    if (sum.empty()) return;
    const Real* const values = values_.data();
    add_children(parent, child, {sum.maximum, sum.log_sum()}, nullptr,
                 [=](int64_t i) DGI_ALWAYS_INLINE { return values[i - child]; });
  }

  // `logit(i)` is that of child i, from `child` on; `counts` is the filter that has not been asked yet.
  template <class Logit>
  DGI_ALWAYS_INLINE inline void add_children(const Parent<Real>& parent, int64_t child, const Normalizer<Real>& normalizer,
                                             const int64_t* counts, const Logit& logit) {
    const auto current_cut = [&] {
      return best_.full() ? normalizer.cut(parent.score, best_.threshold()) : std::numeric_limits<Real>::lowest();
    };
    Real cut = current_cut();
    for (int64_t i = child; i < parent.end; ++i) {
      const Real x = logit(i);
      if (!(x >= cut)) continue;
      const Real score = normalizer.score(parent.score, x);
      if (score == kDead || !is_allowed(counts, step_.lower, i)) continue;
      if (best_.add(score, parent.slot + (i - parent.first))) cut = current_cut();
    }
  }

  const BeamStep<Real>& step_;
  int64_t request_ = 0;
  const int64_t* counts_ = nullptr;
  std::vector<Parent<Real>> parents_, by_beam_;
  std::vector<Real> values_;
  Best<Real> best_;
};

}  // namespace dgi::cpu
