// A semantic ID for each item alone: of the rows that share one the nearest keeps it, the others move.
//
// Rows that share an ID are found by sorting, N log N. Only those that must leave it are compared with codes, K D
// operations each; nothing of size N x K is kept: a row remembers its kCandidates nearest free codes, and looks again
// once all of them are taken. Rows move within their prefix first, each prefix apart from the others and in parallel:
// of all pairs of a row and a free code the nearest comes next (a heap). Rows of a prefix without a free code are few;
// they move in the last two levels, then three, one after the other.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>
#include <unordered_map>

#include "cpu/clustering/unique_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/macros.h"

namespace dgi::cpu {
namespace {

constexpr size_t kCandidates = 8;

struct Candidate {
  double cost;
  int64_t code;

  bool operator<(const Candidate& other) const { return std::tie(cost, code) < std::tie(other.cost, other.code); }
};

template <class Real>
class Costs {
 public:
  explicit Costs(const SharedCodes<Real>& in) : in_(in), first_(in.levels() + 1, 0) {
    std::partial_sum(in.sizes.begin(), in.sizes.end(), first_.begin() + 1);
    norm_.resize(first_.back());
    for (int64_t k = 0; k < first_.back(); ++k) norm_[k] = norm(in.codebooks + k * in.dim);
  }

  // What the levels before `level` leave of a row, by its codes.
  void residual(int64_t row, const int64_t* codes, int64_t level, Real* r) const {
    std::copy_n(in_.z + row * in_.dim, in_.dim, r);
    for (int64_t j = 0; j < level; ++j) subtract(j, codes[j], r);
  }

  void subtract(int64_t level, int64_t code, Real* r) const {
    const Real* const e = in_.codebooks + (first_[level] + code) * in_.dim;
    for (int64_t d = 0; d < in_.dim; ++d) r[d] -= e[d];
  }

  double cost(const Real* r, int64_t level, int64_t code) const {
    double found = 0;
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE { found = cost_here(r, norm(r), first_[level] + code); });
    return found;
  }

  // The kCandidates codes of a level with the lowest costs, of those for which has_room(code), ascending.
  template <class HasRoom>
  std::vector<Candidate> nearest(const Real* r, int64_t level, const HasRoom& has_room) const {
    std::vector<Candidate> open;
    for (int64_t code = 0; code < in_.sizes[level]; ++code) {
      if (has_room(code)) open.push_back({0, code});
    }
    // No calls in here: one of another instruction set, with full registers, takes longer than the cost of a code.
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
      const double length = in_.metric == Metric::kCosine ? norm(r) : 1;
      for (Candidate& candidate : open) candidate.cost = cost_here(r, length, first_[level] + candidate.code);
    });
    const size_t kept = std::min(kCandidates, open.size());
    std::partial_sort(open.begin(), open.begin() + kept, open.end());
    open.resize(kept);
    return open;
  }

 private:
  double norm(const Real* x) const {
    double square = 0;
    for (int64_t d = 0; d < in_.dim; ++d) square += static_cast<double>(x[d]) * static_cast<double>(x[d]);
    return std::max(std::sqrt(square), in_.eps);
  }

  DGI_HOST_DEVICE double cost_here(const Real* r, double length, int64_t k) const {
    const Real* const e = in_.codebooks + k * in_.dim;
    double sum = 0;
    if (in_.metric == Metric::kEuclidean) {
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < in_.dim; ++d) {
        const double difference = static_cast<double>(r[d]) - static_cast<double>(e[d]);
        sum += difference * difference;
      }
      return sum;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < in_.dim; ++d) sum += static_cast<double>(r[d]) * static_cast<double>(e[d]);
    return in_.metric == Metric::kDot ? -sum : -sum / (length * norm_[k]);
  }

  const SharedCodes<Real>& in_;
  std::vector<int64_t> first_;  // of each level's codes
  std::vector<double> norm_;
};

// Moves rows of one prefix to codes of `level`, at most `room` of them: of all pairs of a row and a code with room the
// nearest next, the lower row and then the lower code of equal ones. take(row, residual, code) says that it is taken.
// Returns the rows that are left.
template <class Real, class HasRoom, class Take>
std::vector<int64_t> move_rows(const Costs<Real>& costs, const std::vector<int64_t>& rows, int64_t dim, int64_t level,
                               int64_t room, const int64_t* codes, int64_t levels, const HasRoom& has_room,
                               const Take& take) {
  struct Row {
    std::vector<Candidate> nearest;
    size_t next = 0;
  };
  using Pair = std::tuple<double, int64_t, int64_t, size_t>;  // cost, row, code, place among the rows
  std::priority_queue<Pair, std::vector<Pair>, std::greater<>> pairs;
  std::vector<Row> state(rows.size());
  std::vector<Real> r(dim);
  const auto look = [&](size_t i) {
    costs.residual(rows[i], codes + rows[i] * levels, level, r.data());
    state[i] = {costs.nearest(r.data(), level, has_room), 0};
  };
  const auto offer = [&](size_t i) {
    Row& row = state[i];
    while (row.next < row.nearest.size() && !has_room(row.nearest[row.next].code)) ++row.next;
    if (row.next == row.nearest.size()) look(i);
    if (row.next < row.nearest.size()) {
      const Candidate& candidate = row.nearest[row.next];
      pairs.emplace(candidate.cost, rows[i], candidate.code, i);
    }
  };
  std::vector<char> is_left(rows.size(), 1);
  for (size_t i = 0; room > 0 && i < rows.size(); ++i) offer(i);
  while (room > 0 && !pairs.empty()) {
    const auto [cost, row, code, i] = pairs.top();
    pairs.pop();
    if (!has_room(code)) {
      offer(i);
      continue;
    }
    costs.residual(row, codes + row * levels, level, r.data());
    take(row, r.data(), code);
    is_left[i] = 0;
    --room;
  }
  std::vector<int64_t> left;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (is_left[i]) left.push_back(rows[i]);
  }
  return left;
}

// How many rows have each prefix.
class PrefixCounts {
 public:
  explicit PrefixCounts(const std::vector<int64_t>& sizes) : capacity_(sizes.size() + 1, 1), nodes_{{0}} {
    for (size_t depth = sizes.size(); depth-- > 0;) {
      const bool overflows = capacity_[depth + 1] > std::numeric_limits<int64_t>::max() / sizes[depth];
      capacity_[depth] = overflows ? std::numeric_limits<int64_t>::max() : capacity_[depth + 1] * sizes[depth];
    }
  }

  // The prefix of so many codes; a prefix that no row has is made.
  int64_t find(const int64_t* codes, int64_t depth) {
    int64_t node = 0;
    for (int64_t j = 0; j < depth; ++j) node = child(node, codes[j]);
    return node;
  }

  int64_t child(int64_t node, int64_t code) {
    const auto [place, is_new] = children_.try_emplace({node, code}, static_cast<int64_t>(nodes_.size()));
    if (is_new) nodes_.push_back({0});
    return place->second;
  }

  void add(const int64_t* codes, int64_t levels) {
    int64_t node = 0;
    ++nodes_[node].count;
    for (int64_t j = 0; j < levels; ++j) ++nodes_[node = child(node, codes[j])].count;
  }

  int64_t room(int64_t node, int64_t depth) const { return capacity_[depth] - nodes_[node].count; }

  bool child_has_room(int64_t node, int64_t depth, int64_t code) const {
    const auto found = children_.find({node, code});
    return found == children_.end() || room(found->second, depth + 1) > 0;
  }

 private:
  struct Node {
    int64_t count;
  };
  struct Hash {
    size_t operator()(const std::pair<int64_t, int64_t>& key) const {
      return static_cast<size_t>(
          (static_cast<uint64_t>(key.first) << 24 ^ static_cast<uint64_t>(key.second)) * 0x9E3779B97F4A7C15u >> 8);
    }
  };

  std::vector<int64_t> capacity_;  // of a prefix, by its length
  std::vector<Node> nodes_;
  std::unordered_map<std::pair<int64_t, int64_t>, int64_t, Hash> children_;
};

template <class Real>
class Unique {
 public:
  Unique(const SharedCodes<Real>& in, int64_t* out)
      : in_(in), out_(out), costs_(in), levels_(in.levels()), order_(in.rows) {
    std::copy_n(in.codes, in.rows * levels_, out);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      const int shared = compare(a, b, levels_);
      return shared != 0 ? shared < 0 : a < b;
    });
  }

  void run() {
    std::vector<int64_t> left = within_prefixes();
    if (left.empty()) return;
    PrefixCounts counts(in_.sizes);
    std::vector<char> is_left(in_.rows, 0);
    for (int64_t row : left) is_left[row] = 1;
    for (int64_t row = 0; row < in_.rows; ++row) {
      if (!is_left[row]) counts.add(out_ + row * levels_, levels_);
    }
    for (int64_t depth = levels_ - 2; depth >= 0 && !left.empty(); --depth) left = below(depth, left, counts);
  }

 private:
  int compare(int64_t a, int64_t b, int64_t depth) const {
    const int64_t *const x = in_.codes + a * levels_, *const y = in_.codes + b * levels_;
    for (int64_t j = 0; j < depth; ++j) {
      if (x[j] != y[j]) return x[j] < y[j] ? -1 : 1;
    }
    return 0;
  }

  // Where runs of rows with `depth` codes in common begin, and the end; of places of order_.
  std::vector<int64_t> runs(int64_t depth) const {
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < in_.rows; ++i) {
      if (i == 0 || compare(order_[i - 1], order_[i], depth) != 0) starts.push_back(i);
    }
    starts.push_back(in_.rows);
    return starts;
  }

  // Moves rows to free codes of the last level; returns those whose prefix has none.
  std::vector<int64_t> within_prefixes() {
    const std::vector<int64_t> starts = runs(levels_ - 1);
    const int64_t groups = static_cast<int64_t>(starts.size()) - 1;
    std::vector<std::vector<int64_t>> left(groups);
    parallel_for(groups, 16, [&](int64_t first, int64_t last) {
      std::vector<char> used(in_.sizes.back(), 0);
      for (int64_t group = first; group < last; ++group) {
        left[group] = within_prefix(starts[group], starts[group + 1], used);
      }
    });
    std::vector<int64_t> all;
    for (const auto& rows : left) all.insert(all.end(), rows.begin(), rows.end());
    return all;
  }

  // `used` is all 0, before and after.
  std::vector<int64_t> within_prefix(int64_t begin, int64_t end, std::vector<char>& used) {
    const int64_t level = levels_ - 1;
    std::vector<int64_t> movers;
    std::vector<Real> r(in_.dim);
    int64_t free = in_.sizes.back();
    for (int64_t i = begin; i < end;) {
      int64_t stop = i + 1;
      const int64_t code = last_code(order_[i]);
      while (stop < end && last_code(order_[stop]) == code) ++stop;
      used[code] = 1;
      --free;
      if (stop - i > 1) {
        int64_t keeper = -1;
        double lowest = std::numeric_limits<double>::infinity();
        for (int64_t j = i; j < stop; ++j) {
          costs_.residual(order_[j], in_.codes + order_[j] * levels_, level, r.data());
          const double cost = costs_.cost(r.data(), level, code);
          if (keeper < 0 || cost < lowest) keeper = order_[j], lowest = cost;
        }
        for (int64_t j = i; j < stop; ++j) {
          if (order_[j] != keeper) movers.push_back(order_[j]);
        }
      }
      i = stop;
    }
    std::vector<int64_t> left;
    if (!movers.empty()) {
      std::sort(movers.begin(), movers.end());
      left = move_rows(
          costs_, movers, in_.dim, level, free, in_.codes, levels_, [&](int64_t code) { return used[code] == 0; },
          [&](int64_t row, const Real*, int64_t code) { used[code] = 1, out_[row * levels_ + level] = code; });
      std::fill(used.begin(), used.end(), 0);
    } else {
      for (int64_t i = begin; i < end; ++i) used[last_code(order_[i])] = 0;
    }
    return left;
  }

  int64_t last_code(int64_t row) const { return in_.codes[row * levels_ + levels_ - 1]; }

  // Moves rows to free IDs that begin with their first `depth` codes; returns those that find none.
  std::vector<int64_t> below(int64_t depth, std::vector<int64_t> rows, PrefixCounts& counts) {
    std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) {
      const int shared = compare(a, b, depth);
      return shared != 0 ? shared < 0 : a < b;
    });
    std::vector<int64_t> left;
    for (size_t i = 0; i < rows.size();) {
      size_t stop = i + 1;
      while (stop < rows.size() && compare(rows[i], rows[stop], depth) == 0) ++stop;
      const int64_t node = counts.find(in_.codes + rows[i] * levels_, depth);
      const auto take = [&](int64_t row, Real* r, int64_t code) {
        int64_t* const to = out_ + row * levels_;
        int64_t at = node;
        for (int64_t level = depth; level < levels_; ++level) {
          if (level > depth) {
            code = costs_.nearest(r, level, [&](int64_t k) { return counts.child_has_room(at, level, k); })[0].code;
          }
          to[level] = code;
          costs_.subtract(level, code, r);
          at = counts.child(at, code);
        }
        counts.add(to, levels_);
      };
      const std::vector<int64_t> stay = move_rows(
          costs_, std::vector<int64_t>(rows.begin() + i, rows.begin() + stop), in_.dim, depth, counts.room(node, depth),
          in_.codes, levels_, [&](int64_t code) { return counts.child_has_room(node, depth, code); }, take);
      left.insert(left.end(), stay.begin(), stay.end());
      i = stop;
    }
    return left;
  }

  const SharedCodes<Real>& in_;
  int64_t* const out_;
  const Costs<Real> costs_;
  const int64_t levels_;
  std::vector<int64_t> order_;  // of the rows by their codes
};

}  // namespace

template <class Real>
void unique_codes(const SharedCodes<Real>& in, int64_t* out) {
  Unique<Real>(in, out).run();
}

template void unique_codes(const SharedCodes<float>&, int64_t*);
template void unique_codes(const SharedCodes<double>&, int64_t*);

}  // namespace dgi::cpu
