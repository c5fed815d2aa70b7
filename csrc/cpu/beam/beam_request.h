// The search of one request: which of its beams are worth looking at, and the best of their children.
//
// The best num_beams candidates so far give a threshold. A beam whose own score, or an upper bound of its children's,
// lies below it has no child that counts (log-probabilities are at most 0), and neither have those behind it. The
// threshold also becomes a bound on the logit, so that most children cost a load and a comparison; only those that pass
// are scored, looked up in the filter and kept. The first beams of a request have no threshold to go by: one is taken
// from their own children, the num_beams'th of the largest of each of several groups of them.
//
// Where a node has many of the codes between its first and its last (a root, or most nodes of a small codebook), all
// these codes are compared, 32 at a time and without a gather. Which of those few that pass are children, and which, a
// mask of the node's codes says; without one they are looked up among the tokens.
//
// With node scores a child's own number decides too: sums of logits and numbers are compared with the threshold,
// several children at once (scan.h). Without AVX-512, or a threshold, all children of a beam are scored before they are
// compared. The largest of the numbers (the least, for a negative strength) bounds what a beam's children may add.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/beam/beam_cpu.h"
#include "cpu/beam/best.h"
#include "cpu/beam/scan.h"
#include "cpu/shared/isa.h"
#include "dgi/beam.h"
#include "dgi/log_sum_exp.h"

namespace dgi::cpu {

constexpr int64_t kChunk = 2048;  // logits: a chunk is read again from the first-level cache

// Compiled by itself: in the midst of other code the sums do not stay in registers.
template <class Real>
DGI_NEVER_INLINE LogSumExp<Real> log_sum_exp_of(const Real* x, int64_t count, const Real* ahead = nullptr) {
  LogSumExp<Real> sum;
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE { sum.template add<fused.value>(x, count, ahead); });
  return sum;
}

// One request at a time: its parents, its candidates, its result. Knows nothing of where logits come from.
template <class Real, class Token>
class Request {
 public:
  explicit Request(const BeamStep<Real, Token>& step) : step_(step), runs_(step) {}

  // Takes up a request. False where it has more candidates than keys can number.
  bool start(int64_t request) {
    request_ = request;
    allowed_ = step_.allowed == nullptr ? nullptr : step_.allowed[request];
    best_.start(step_.num_beams);
    parents_.clear();
    runs_.clear();
    held_.clear();
    scan_pays_ = true;
    for (int64_t m = 0; m < step_.width; ++m) {
      const int64_t node = step_.nodes.at(request_, m);
      const Real score = finite_or_dead(step_.scores.at(request_, m));
      if (node < 0 || node >= step_.trie.end() || score == kDead) continue;
      const int64_t first_run = runs_.count();
      runs_.add(m, step_.trie.children_of(node));
      if (runs_.count() > first_run) {
        const auto [bonus, largest] = bonus_of(node);
        parents_.push_back({score, score + bonus, -kDead, m, first_run, runs_.count(), -1, bonus, largest});
      }
    }
    sort_by_bound();
    return static_cast<uint64_t>(runs_.slots()) <= std::numeric_limits<typename CandidateKey<Real>::Bits>::max();
  }

  // The live beams, those first whose children may score most, to be extended in this order.
  const std::vector<Parent<Real>>& parents() const { return parents_; }

  // Makes room for the logits of the children of those parents that have at most `most`, none of them the end of a
  // sequence: the caller fills it, and extend_held reads it.
  void hold_children(int64_t most) {
    int64_t held = 0;
    for (Parent<Real>& parent : parents_) {
      const Run &run = runs_[parent.first_run], &last = runs_[parent.end_run - 1];
      const int64_t count = last.slot + (last.end - last.first) - run.slot;
      if (count > most || tokens_of(run)[run.first] == kEndToken) continue;
      parent.held = held;
      held += count;
    }
    held_.resize(static_cast<size_t>(held));
  }

  // Calls f with the token of each child of a parent whose logits are held, and where that logit is.
  template <class F>
  DGI_ALWAYS_INLINE inline void visit_held(const Parent<Real>& parent, const F& f) {
    Real* logit = held_.data() + parent.held;
    for (int64_t r = parent.first_run; r < parent.end_run; ++r) {
      const Token* const tokens = tokens_of(runs_[r]);
      for (int64_t i = runs_[r].first; i < runs_[r].end; ++i) f(int64_t{tokens[i]}, logit++);
    }
  }

  // Sets the peaks of those parents, and lowers their bounds: limits(parent) is the peak, and what is the least to be
  // taken off it.
  template <class Limits>
  DGI_ALWAYS_INLINE inline void lower_bounds(const Limits& limits) {
    for (Parent<Real>& parent : parents_) {
      if (parent.held < 0) continue;
      const auto [peak, least_sum] = limits(parent);
      parent.peak = peak;
      const Real lower = peak - least_sum;
      if (lower < parent.bound) parent.bound = lower;
    }
    sort_by_bound();
  }

  // Whether neither this parent nor any behind it can have a child among the best.
  bool is_done(const Parent<Real>& parent) {
    if (!step_.normalizes()) return false;
    best_.refresh();
    return room_above(parent.bound) < 0;
  }

  // How far a bound lies above the threshold that there is.
  Real room_above(Real bound) const {
    return best_.full() ? bound - best_.threshold() : std::numeric_limits<Real>::infinity();
  }

  // `logit(token)` is the logit of a code, `log_sum_exp()` that of all codes; either is asked for what is needed only.
  // Where the logits of all codes lie one behind the other, `row()`, asked for last, says where; else it is null.
  template <class Instructions, class Logit, class Sum, class Row>
  DGI_ALWAYS_INLINE inline void extend(const Parent<Real>& parent, const Logit& logit, const Sum& log_sum_exp,
                                       const Row& row) {
    const bool ends = add_end(parent);
    const Run& last = runs_[parent.end_run - 1];
    if (ends && parent.end_run - parent.first_run == 1 && last.end - last.first == 1) return;  // no other child
    if (step_.normalize == Normalize::kChildren && step_.normalizes()) {
      extend_by_children<Instructions::value>(parent, ends, logit);
      return;
    }
    Normalizer<Real> normalizer;
    if (!find_normalizer(parent, log_sum_exp, normalizer)) return;
    const bool scored = step_.node_scores.are_given();
    for (int64_t r = parent.first_run; r < parent.end_run; ++r) {
      const Run& run = runs_[r];
      const Token* const tokens = tokens_of(run);
      const int64_t first = first_code(run, ends);
      const bool whole = parent.end_run - parent.first_run == 1 && !run.in_delta;  // all children of a node of the base
      const uint32_t* const mask = whole ? step_.masks.of(step_.nodes.at(request_, parent.beam)) : nullptr;
      if (scored) {
        add_scored<Instructions>({first, run.end}, run, parent, normalizer, row(), mask, logit);
      } else {
        add_children({first, run.end}, run, parent.score, normalizer, allowed_, row(), tokens + first, mask,
                     [=](int64_t i) DGI_ALWAYS_INLINE { return logit(tokens[i]); });
      }
    }
  }

  // The same for a parent whose logits are held.
  template <class Sum>
  DGI_ALWAYS_INLINE inline void extend_held(const Parent<Real>& parent, const Sum& log_sum_exp) {
    Normalizer<Real> normalizer;
    if (!find_normalizer(parent, log_sum_exp, normalizer)) return;
    Real* values = held_.data() + parent.held;
    for (int64_t r = parent.first_run; r < parent.end_run; ++r) {
      const Run& run = runs_[r];
      add_normalized({run.first, run.end}, run, parent.score, normalizer, allowed_, values);
      values += run.end - run.first;
    }
  }

  // Writes the result of the request.
  void write(const BeamOutput& out) {
    const auto& keys = best_.sorted();
    const int64_t found = static_cast<int64_t>(keys.size()), begin = request_ * step_.num_beams;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t slot = static_cast<int64_t>(CandidateKey<Real>::slot(keys[i]));
      const Run& run = runs_.of_slot(slot);
      const int64_t child = run.first + (slot - run.slot);
      out.nodes[begin + i] = step_.trie.child_number(child, run.in_delta);
      out.tokens[begin + i] = tokens_of(run)[child];
      out.parents[begin + i] = run.beam;
      out.scores[begin + i] = static_cast<float>(CandidateKey<Real>::score(keys[i]));
    }
    std::fill(out.nodes + begin + found, out.nodes + begin + step_.num_beams, -1);
    std::fill(out.tokens + begin + found, out.tokens + begin + step_.num_beams, -1);
    std::fill(out.parents + begin + found, out.parents + begin + step_.num_beams, -1);
    std::fill(out.scores + begin + found, out.scores + begin + step_.num_beams,
              -std::numeric_limits<float>::infinity());
  }

 private:
  // False where no child of the parent can be found.
  template <class Sum>
  DGI_ALWAYS_INLINE inline bool find_normalizer(const Parent<Real>& parent, const Sum& log_sum_exp,
                                                Normalizer<Real>& normalizer) const {
    if (step_.log_normalizer.data != nullptr) {
      normalizer.offset = step_.log_normalizer.at(request_, parent.beam);
      return std::abs(normalizer.offset) <= std::numeric_limits<Real>::max();
    }
    if (step_.normalize == Normalize::kFull) {
      const LogSumExp<Real> sum = log_sum_exp();
      if (sum.empty()) return false;
      normalizer = {sum.maximum, sum.log_sum()};
    }
    return true;
  }

  void sort_by_bound() {
    const auto better = [](const Parent<Real>& a, const Parent<Real>& b) {
      return a.bound > b.bound || (a.bound == b.bound && a.beam < b.beam);
    };
    if (!std::is_sorted(parents_.begin(), parents_.end(), better)) std::sort(parents_.begin(), parents_.end(), better);
  }

  static constexpr Real kDead = -std::numeric_limits<Real>::infinity();

  // No child of a node adds more to its score than the first, nor a number of larger magnitude than the second.
  std::pair<Real, Real> bonus_of(int64_t node) const {
    const NodeScores<Real>& scores = step_.node_scores;
    if (!scores.are_given()) return {0, 0};
    const TrieDepth<Token>& trie = step_.trie;
    const Real strength = scores.strength_of(request_);
    Real most = kDead, largest = 0;
    const auto take = [&](const float* bounds, int64_t nodes, int64_t i) {
      const Real least = strength * bounds[i], greatest = strength * bounds[nodes + i];
      most = std::max(most, std::max(least, greatest));
      largest = std::max(largest, std::max(std::abs(least), std::abs(greatest)));
    };
    int64_t in_delta = node - trie.base.nodes;
    if (in_delta < 0) {
      take(scores.base + trie.base_children, trie.base.nodes, node);
      in_delta = trie.nodes.twin_of(node);
    }
    if (in_delta >= 0) take(scores.delta + trie.children.count, trie.delta.nodes, in_delta);
    return {most, largest};
  }

  const Token* tokens_of(const Run& run) const { return runs_.tokens_of(run); }

  // The end of a sequence, which comes first if at all; whether there is one.
  bool add_end(const Parent<Real>& parent) {
    const Run& run = runs_[parent.first_run];
    if (tokens_of(run)[run.first] != kEndToken) return false;
    const Real score = finite_or_dead(parent.score + step_.node_scores.of(request_, run.first, run.in_delta));
    if (step_.trie.is_allowed(allowed_, run.first, run.in_delta)) best_.add(score, run.slot);
    return true;
  }

  // Where the codes of a run begin; its parent's first run may begin with the end of a sequence.
  int64_t first_code(const Run& run, bool ends) const {
    return ends && tokens_of(run)[run.first] == kEndToken ? run.first + 1 : run.first;
  }

  // Normalises over the allowed children only, so that the filter is asked for all of them.
  template <bool kFused, class Logit>
  DGI_ALWAYS_INLINE inline void extend_by_children(const Parent<Real>& parent, bool ends, const Logit& logit) {
    values_.clear();
    for (int64_t r = parent.first_run; r < parent.end_run; ++r) {
      const Run& run = runs_[r];
      const Token* const tokens = tokens_of(run);
      for (int64_t i = first_code(run, ends); i < run.end; ++i) {
        values_.push_back(step_.trie.is_allowed(allowed_, i, run.in_delta) ? Real{logit(tokens[i])} : kDead);
      }
    }
    const int64_t count = static_cast<int64_t>(values_.size());
    LogSumExp<Real> sum;
    for (int64_t i = 0; i < count; i += kChunk) {
      sum.template add<kFused>(log_sum_exp_of(values_.data() + i, std::min(kChunk, count - i)));
    }
    if (sum.empty()) return;
    Real* values = values_.data();
    for (int64_t r = parent.first_run; r < parent.end_run; ++r) {
      const Run& run = runs_[r];
      const int64_t first = first_code(run, ends);
      add_normalized({first, run.end}, run, parent.score, {sum.maximum, sum.log_sum()}, nullptr, values);
      values += run.end - first;
    }
  }

  // Adds the children of a run by their logits and node scores; `row` and `mask` as for add_children.
  //
  // Once there is a threshold, and where whole rows are compared with it, only those are scored that pass: by what they
  // add themselves where that is as quick, else by the most that any child adds. Where too many do, or else, all are
  // scored before a comparison.
  template <class Instructions, class Logit>
  DGI_ALWAYS_INLINE inline void add_scored(const Range& children, const Run& run, const Parent<Real>& parent,
                                           const Normalizer<Real>& normalizer, const Real* row, const uint32_t* mask,
                                           const Logit& logit) {
    if (children.size() <= 0) return;
    if constexpr (kScansScored<Instructions, Real>) {
      if (row != nullptr && best_.full()) {
        add_reaching(children, run, parent, normalizer, row, mask);
        return;
      }
    }
    const Token* const tokens = tokens_of(run) + children.first;
    int64_t done = 0;
    if (row != nullptr && mask != nullptr && best_.full() && scan_pays_) {
      done = scan_scored(children, run, parent, normalizer, row, tokens[children.size() - 1] + 1, mask);
    }
    const int64_t count = children.size() - done;
    if (count <= 0) return;
    values_.resize(static_cast<size_t>(count));
    Real* const values = values_.data();
    if (row == nullptr) {
      for (int64_t i = 0; i < count; ++i) values[i] = logit(tokens[done + i]);
    } else if (tokens[done + count - 1] - tokens[done] == count - 1) {
      std::copy_n(row + tokens[done], count, values);
    } else {
      const Token* const of_values = tokens + done;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) values[i] = row[of_values[i]];
    }
    add_normalized({children.first + done, children.end}, run, parent.score, normalizer, allowed_, values);
  }

  // Adds those children that reach the threshold by the sum of their logits and of what they add: by code where a mask
  // tells the children of a dense node, else by their tokens, whose logits are gathered.
  DGI_ALWAYS_INLINE inline void add_reaching(const Range& children, const Run& run, const Parent<Real>& parent,
                                             const Normalizer<Real>& normalizer, const Real* row,
                                             const uint32_t* mask) {
    constexpr int64_t kDense = 3;  // a gathered logit costs as much as so many codes
    const Token* const tokens = tokens_of(run) + children.first;
    const float* const own = runs_.own_scores(run) + children.first;
    const Real strength = step_.node_scores.strength_of(request_);
    const int64_t count = children.size(), span = tokens[count - 1] + 1;
    const auto current_cut = [&] { return normalizer.cut(parent.score, best_.threshold(), parent.largest); };
    Real cut = current_cut();
    const auto consider = [&](int64_t i, Real x) DGI_ALWAYS_INLINE {
      const Real score = finite_or_dead(parent.score + (normalizer.log_probability(x) + strength * own[i]));
      if (score >= best_.threshold() && add_child(run, children.first + i, score, allowed_)) cut = current_cut();
    };
    if (mask != nullptr && span <= kDense * count) {
      for (int64_t k = 0, before = 0; k < span; k += kScanned) {
        const uint32_t exist = mask[k / kScanned];
        uint32_t passes = scored_codes(row + k, own + before, exist, strength, cut);
        for (; passes != 0; passes &= passes - 1) {
          const uint32_t below = exist & ((passes & -passes) - 1);
          consider(before + std::popcount(below), row[k + std::countr_zero(passes)]);
        }
        before += std::popcount(exist);
      }
      return;
    }
    passes_.resize(static_cast<size_t>((count + kScanned - 1) / kScanned));
    scored_children(row, own, tokens, count, strength, cut, passes_.data());
    for (size_t word = 0; word < passes_.size(); ++word) {
      for (uint32_t passes = passes_[word]; passes != 0; passes &= passes - 1) {
        const int64_t i = static_cast<int64_t>(word) * kScanned + std::countr_zero(passes);
        consider(i, row[tokens[i]]);
      }
    }
  }

  // Scans the codes up to `span` of a node whose children `mask` tells; returns how many children are done with.
  DGI_ALWAYS_INLINE inline int64_t scan_scored(const Range& children, const Run& run, const Parent<Real>& parent,
                                               const Normalizer<Real>& normalizer, const Real* row, int64_t span,
                                               const uint32_t* mask) {
    constexpr int64_t kLeast = 16, kMost = 32;  // so many, and one in so many of the children, may be scored
    const int64_t count = children.size();
    if (span > kSparseMasked * count) return 0;
    const float* const own = runs_.own_scores(run) + children.first;
    const Real strength = step_.node_scores.strength_of(request_), upper = parent.score + parent.bonus;
    const auto current_cut = [&] { return normalizer.cut(upper, best_.threshold()); };
    Real cut = current_cut();
    int64_t word = 0, before = 0, scored = 0, done = 0;
    const bool through = scan_row(row, span, cut, mask, [&](int64_t k) DGI_ALWAYS_INLINE {
      for (; word < k / ChildMasks::kWordBits; ++word) before += std::popcount(mask[word]);
      const uint32_t below = mask[word] & ((uint32_t{1} << k % ChildMasks::kWordBits) - 1);
      done = before + std::popcount(below);
      if (kMost * ++scored > count + kMost * kLeast) return false;
      const Real score = finite_or_dead(parent.score + (normalizer.log_probability(row[k]) + strength * own[done]));
      if (score >= best_.threshold() && add_child(run, children.first + done, score, allowed_)) cut = current_cut();
      return true;
    });
    scan_pays_ = through;
    return through ? count : done;
  }

  // Adds the children of a run whose logits are `values`; with node scores these are overwritten.
  DGI_ALWAYS_INLINE inline void add_normalized(const Range& children, const Run& run, Real parent,
                                               const Normalizer<Real>& normalizer, const AllowedItems* allowed,
                                               Real* values) {
    const NodeScores<Real> scores = step_.node_scores;
    if (!scores.are_given()) {
      add_values(children, run, parent, normalizer, allowed, values);
      return;
    }
    const float* const own = runs_.own_scores(run) + children.first;
    const Real strength = scores.strength_of(request_);
    const int64_t count = children.size();
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = log_probability(normalizer, values[i]) + strength * own[i];
    add_values(children, run, parent, Normalizer<Real>{}, allowed, values);
  }

  // By value, or it is not vectorised.
  DGI_ALWAYS_INLINE static inline Real log_probability(Normalizer<Real> normalizer, Real logit) {
    return normalizer.log_probability(logit);
  }

  // Adds the children of a run whose logits are `values`.
  DGI_ALWAYS_INLINE inline void add_values(const Range& children, const Run& run, Real parent,
                                           const Normalizer<Real>& normalizer, const AllowedItems* allowed,
                                           const Real* values) {
    add_children(children, run, parent, normalizer, allowed, values, static_cast<const Token*>(nullptr), nullptr,
                 [&](int64_t i) DGI_ALWAYS_INLINE { return values[i - children.first]; });
  }

  // Adds the children of a run. `logit(i)` is that of child i; `allowed` is the filter that has not been asked yet.
  // `row` has the logits of all codes, of which `tokens` are the children's and `mask` tells so, or without tokens
  // those of the children; it may be null, and so may the mask.
  template <class Logit>
  DGI_ALWAYS_INLINE inline void add_children(const Range& children, const Run& run, Real parent,
                                             const Normalizer<Real>& normalizer, const AllowedItems* allowed,
                                             const Real* row, const Token* tokens, const uint32_t* mask,
                                             const Logit& logit) {
    constexpr Real kLowest = std::numeric_limits<Real>::lowest();
    const int64_t count = children.size();
    if (count <= 0) return;
    const int64_t least = tokens == nullptr || mask != nullptr ? 0 : tokens[0];
    const int64_t span = tokens == nullptr ? count : tokens[count - 1] - least + 1;
    if (row != nullptr) row += least;
    if (span != count && span > (mask != nullptr ? kSparseMasked : kSparse) * count) row = nullptr;

    // Of the logits that are looked at: no child below the floor scores as much as `reached`.
    Real reached = kDead, floor = kLowest, ceiling = std::numeric_limits<Real>::quiet_NaN();
    if (!best_.full() && count >= 2 * step_.num_beams) {
      const Real enough = enough_children(
          count, step_.num_beams, [&](int64_t i) DGI_ALWAYS_INLINE { return logit(children.first + i); }, largest_);
      if (enough > kLowest) {
        reached = normalizer.score(parent, enough);
        floor = normalizer.cut(parent, reached);
      }
    }
    while (true) {
      const auto current_cut = [&] {
        return best_.full() ? std::max(floor, normalizer.cut(parent, best_.threshold())) : floor;
      };
      Real cut = current_cut();
      const auto consider = [&](int64_t i, Real x) DGI_ALWAYS_INLINE {
        if (x >= cut && !(x >= ceiling) && add_child(run, i, normalizer.score(parent, x), allowed)) cut = current_cut();
      };
      bool through = false;
      int64_t done = 0, passed = 0;  // children, and the codes up to the last of them
      if (row != nullptr && (span == count || cut > kLowest)) {
        if (span == count) {
          through = scan_row(row, span, cut, nullptr, [&](int64_t k) DGI_ALWAYS_INLINE {
            consider(children.first + k, row[k]);
            return true;
          });
        } else if (mask != nullptr) {
          int64_t word = 0, before = 0;  // children by the codes of the words before it
          through = scan_row(row, span, cut, mask, [&](int64_t k) DGI_ALWAYS_INLINE {
            for (; word < k / ChildMasks::kWordBits; ++word) before += std::popcount(mask[word]);
            const uint32_t below = mask[word] & ((uint32_t{1} << k % ChildMasks::kWordBits) - 1);
            consider(children.first + before + std::popcount(below), row[k]);
            return true;
          });
        } else {
          int64_t strangers = 0;  // codes that pass, but are no child's
          through = scan_row(row, span, cut, nullptr, [&](int64_t k) DGI_ALWAYS_INLINE {
            done = lower_bound(tokens, Range{done, std::min(count, done + k - passed)}, least + k);
            passed = k;
            if (tokens[done] != least + k) return ++strangers * kSearch < count;
            consider(children.first + done, row[k]);
            ++done, ++passed;
            return true;
          });
        }
      }
      for (int64_t i = through ? children.end : children.first + done; i < children.end; ++i) {
        for (; i + kCompared <= children.end; i += kCompared) {
          bool passes = false;
          for (int64_t j = 0; j < kCompared; ++j) passes |= logit(i + j) >= cut;
          if (passes) break;
        }
        if (i < children.end) consider(i, logit(i));
      }
      if (allowed == nullptr || floor == kLowest) return;
      best_.select();
      if (best_.full() && best_.threshold() >= reached) return;
      ceiling = floor, floor = kLowest;  // the filter has left too few of those above
    }
  }

  // Whether the threshold has changed. Not inlined: few children come so far.
  DGI_NEVER_INLINE bool add_child(const Run& run, int64_t child, Real score, const AllowedItems* allowed) {
    if (score == kDead || !step_.trie.is_allowed(allowed, child, run.in_delta)) return false;
    return best_.add(score, run.slot + (child - run.first));
  }

  static constexpr int64_t kCompared = 8;  // children that are compared at once: hardly any passes
  static constexpr int64_t kSparse = 4;  // a comparison of all codes costs less than one of a child in so many,
  static constexpr int64_t kSparseMasked = 16;  // or in so many, where a mask says which child passes
  static constexpr int64_t kSearch = 16;  // children that are compared in the time that it takes to look one up

  const BeamStep<Real, Token>& step_;
  int64_t request_ = 0;
  bool scan_pays_ = true;  // comparing whole rows with a threshold, for all that node scores may add
  const AllowedItems* allowed_ = nullptr;
  Runs<Real, Token> runs_;
  std::vector<Parent<Real>> parents_;
  std::vector<Real> held_, values_, largest_;
  std::vector<uint32_t> passes_;
  Best<Real> best_;
};

}  // namespace dgi::cpu
