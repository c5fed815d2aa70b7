// What a request's search keeps: its live beams, their children as runs of the trie, and the best candidates so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/beam/beam_cpu.h"
#include "cpu/shared/isa.h"
#include "dgi/beam.h"

namespace dgi::cpu {

// Keeps the best `limit` of the keys that it is given: all of them at first, then what beats the threshold; whenever
// the room is used up, the best are selected and the threshold rises. A linear number of comparisons in all.
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

// Children of one beam that follow each other in one part of the trie, and by token in the whole of it.
struct Run {
  int64_t first, end;
  int64_t slot;  // of the first child
  int64_t beam;
  bool in_delta;
};

// A live beam with children: the runs [first_run, end_run).
template <class Real>
struct Parent {
  Real score, bound;  // no child scores more than the bound, where log-probabilities are normalised here,
  Real peak;  // nor, with a log-sum-exp yet to be taken off, more than this
  int64_t beam, first_run, end_run;
  int64_t held = -1;  // where the logits of its children are held, if they are
  Real bonus = 0, largest = 0;  // no child adds more to its score by its node score, nor a number larger than this
};

// The children of a request's live beams, by slot.
template <class Real, class Token>
class Runs {
 public:
  explicit Runs(const BeamStep<Real, Token>& step) : trie_(step.trie), scores_(step.node_scores) {}

  void clear() { runs_.clear(), slots_ = 0; }
  int64_t count() const { return static_cast<int64_t>(runs_.size()); }
  int64_t slots() const { return slots_; }
  const Run& operator[](int64_t i) const { return runs_[i]; }
  const Token* tokens_of(const Run& run) const { return (run.in_delta ? trie_.delta : trie_.base).tokens; }

  // What the children of the run's part add to their scores, by their places in it; null where nothing is added.
  const float* own_scores(const Run& run) const { return run.in_delta ? scores_.delta : scores_.base; }

  const Run& of_slot(int64_t slot) const {
    const auto behind = std::upper_bound(runs_.begin(), runs_.end(), slot,
                                         [](int64_t s, const Run& run) { return s < run.slot; });
    return *(behind - 1);
  }

  // Adds the children of a node in the order of their tokens: the base's run, cut where children of the delta come in
  // between.
  void add(int64_t beam, const Children& found) {
    int64_t base = found.base.first;
    for (int64_t i = found.delta.first; i < found.delta.end; ++i) {
      if (trie_.children.has_twin(i)) continue;
      const int64_t cut = lower_bound(trie_.base.tokens, Range{base, found.base.end}, trie_.delta.tokens[i]);
      add_run(beam, {base, cut}, false);
      add_run(beam, {i, i + 1}, true);
      base = cut;
    }
    add_run(beam, {base, found.base.end}, false);
  }

 private:
  void add_run(int64_t beam, const Range& range, bool in_delta) {
    if (range.size() == 0) return;
    runs_.push_back({range.first, range.end, slots_, beam, in_delta});
    slots_ += range.size();
    prefetch_line(tokens_of(runs_.back()) + range.first);
    if (scores_.are_given()) prefetch_line(own_scores(runs_.back()) + range.first);
  }

  const TrieDepth<Token>& trie_;
  const NodeScores<Real>& scores_;
  std::vector<Run> runs_;
  int64_t slots_ = 0;
};

// A logit that `wanted` of `count` children reach, and few more than that: the largest but `wanted` - 1 of the largest
// of each of several groups of children. `largest` is room for these.
template <class Real, class Logit>
DGI_ALWAYS_INLINE inline Real enough_children(int64_t count, int64_t wanted, const Logit& logit,
                                              std::vector<Real>& largest) {
  const int64_t groups = std::min(count, 4 * wanted);
  largest.assign(static_cast<size_t>(groups), -std::numeric_limits<Real>::infinity());
  for (int64_t first = 0; first < count; first += groups) {
    for (int64_t i = 0; i < std::min(groups, count - first); ++i) {
      const Real x = logit(first + i);
      largest[i] = x > largest[i] ? x : largest[i];
    }
  }
  const auto last = largest.begin() + (wanted - 1);
  std::nth_element(largest.begin(), last, largest.end(), std::greater<Real>());
  return *last;
}

}  // namespace dgi::cpu
