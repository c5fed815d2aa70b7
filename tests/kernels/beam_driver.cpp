// Random tries, beams and filters through the beam step in C++, against a search that looks at all children; built with
// sanitizers by test_beam_native.py. Every array has exactly its size, so that a read beyond it is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/beam/beam_cpu.h"
#include "driver.h"

namespace dgi::cpu {

// What torch provides otherwise, beside threads.
template <class Real>
void product(const Matrix<Real>& a, const Matrix<Real>& b, const Matrix<Real>& out) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      Real sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) {
        sum += a.data[i * a.row_stride + k * a.column_stride] * b.data[k * b.row_stride + j * b.column_stride];
      }
      out.data[i * out.row_stride + j * out.column_stride] = sum;
    }
  }
}

void matrix_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into) {
  product(a, b, out);
}
void matrix_product(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out, Into) {
  product(a, b, out);
}

}  // namespace dgi::cpu

namespace {

using driver::below;
using driver::Random;

// Some codes of each of several nodes, by ascending token; some nodes end, some have no child.
struct Prefixes {
  std::vector<std::vector<int64_t>> of_node;

  Prefixes(Random& random, int64_t nodes, int64_t codes, int64_t share) : of_node(nodes) {
    for (auto& tokens : of_node) {
      if (below(random, 4) == 0) tokens.push_back(dgi::kEndToken);
      const int64_t keep = below(random, share);
      for (int64_t code = 0; code < codes; ++code) {
        if (below(random, 4) < keep) tokens.push_back(code);
      }
    }
  }
};

// Numbers of either width, each in memory of exactly its size.
class Numbers {
 public:
  Numbers(const std::vector<int64_t>& numbers, bool is_wide)
      : wide_(is_wide ? numbers : std::vector<int64_t>{}),
        narrow_(numbers.begin(), is_wide ? numbers.begin() : numbers.end()) {}
  Numbers(const Numbers&) = delete;

  dgi::Offsets offsets() const {
    using Stored = dgi::Offsets::Stored;
    return wide_.empty() ? dgi::Offsets{narrow_.data(), Stored::kInt32} : dgi::Offsets{wide_.data(), Stored::kInt64};
  }

 private:
  std::vector<int64_t> wide_;
  std::vector<int32_t> narrow_;
};

// A set of places, all bits behind the last place 0.
struct Bits {
  std::vector<uint64_t> words;
  std::vector<int64_t> ranks;

  explicit Bits(const std::vector<bool>& members) : words((members.size() / 512 + 1) * 8) {
    int64_t count = 0;
    for (size_t i = 0; i < words.size() * 64; ++i) {
      if (i % 512 == 0) ranks.push_back(count);
      if (i < members.size() && members[i]) words[i / 64] |= uint64_t{1} << i % 64, ++count;
    }
    words.shrink_to_fit();
    ranks.shrink_to_fit();
  }

  dgi::ItemSet set() const { return {words.data(), ranks.data()}; }
};

// One depth of one part of a trie: its nodes' children.
template <class Token>
struct Part {
  std::vector<Token> tokens;
  std::vector<int64_t> child_start{0};
  std::unique_ptr<Numbers> starts;

  Part(Random& random, const Prefixes& prefixes) {
    for (const auto& of_node : prefixes.of_node) {
      for (int64_t token : of_node) tokens.push_back(static_cast<Token>(token));
      child_start.push_back(static_cast<int64_t>(tokens.size()));
    }
    tokens.shrink_to_fit();
    starts = std::make_unique<Numbers>(child_start, below(random, 2) == 0);
  }

  dgi::TrieLevel<Token> level() const {
    return {tokens.data(), starts->offsets(), static_cast<int64_t>(child_start.size()) - 1};
  }
};

struct Set {  // of the children, of one request
  std::vector<bool> base, delta;
  std::unique_ptr<Bits> base_bits, delta_bits;
  dgi::AllowedItems items;

  Set(Random& random, int64_t base_children, int64_t delta_children) : base(base_children), delta(delta_children) {
    const int64_t share = below(random, 5);
    for (size_t i = 0; i < base.size(); ++i) base[i] = below(random, 4) < share;
    for (size_t i = 0; i < delta.size(); ++i) delta[i] = below(random, 4) < share;
    base_bits = std::make_unique<Bits>(base), delta_bits = std::make_unique<Bits>(delta);
    items.base = base_bits->set();
    if (below(random, 3) == 0) {
      delta.assign(delta.size(), true);  // as with a trie whose filter is that of all items
    } else {
      items.delta = delta_bits->set();
    }
  }
};

// What children add to their scores: small whole numbers, and behind them the least and the largest of each node.
std::vector<float> node_scores(Random& random, const std::vector<int64_t>& child_start) {
  const size_t nodes = child_start.size() - 1, children = static_cast<size_t>(child_start.back());
  std::vector<float> scores(children + 2 * nodes);
  for (size_t i = 0; i < children; ++i) scores[i] = -static_cast<float>(below(random, 6));
  for (size_t node = 0; node < nodes; ++node) {
    const auto first = scores.begin() + child_start[node], end = scores.begin() + child_start[node + 1];
    if (first == end) continue;
    scores[children + node] = *std::min_element(first, end);
    scores[children + nodes + node] = *std::max_element(first, end);
  }
  return scores;
}

template <class Real>
Real number(Random& random) {
  switch (below(random, 10)) {
    case 0: return std::numeric_limits<Real>::quiet_NaN();
    case 1: return -std::numeric_limits<Real>::infinity();
    default: return static_cast<Real>(below(random, 9)) - 4;
  }
}

struct Expected {
  double score;
  int64_t parent, child, token;
};

struct Child {
  int64_t token, number;
  bool allowed;
};

// With "none" and small integers every sum is exact, so that ties are told.
// With `head` the logits are those of random hidden states and codes.
template <class Real, class Token>
bool one_case(Random& random, dgi::Normalize normalize, bool head) {
  const bool large = head && below(random, 8) == 0;  // enough beams and codes for bounds on their children
  const int64_t requests = below(random, large ? 6 : 3), width = below(random, large ? 60 : 6);
  const int64_t codes = 1 + below(random, large ? 300 : below(random, 4) == 0 ? 130 : 40);
  const int64_t num_beams = 1 + below(random, 90);
  // Nodes in the order of their prefixes: in the base, in the delta, or twins in both.
  const bool updated = below(random, 2) == 0;
  std::vector<int64_t> node_anchors;
  int64_t base_nodes = 0;
  for (int64_t i = 1 + below(random, 7); i > 0; --i) {
    const int64_t kind = updated ? below(random, 3) : 0;
    if (kind != 0) node_anchors.push_back(2 * base_nodes + (kind == 2));
    base_nodes += kind != 1;
  }
  const int64_t delta_nodes = static_cast<int64_t>(node_anchors.size()), nodes = base_nodes + delta_nodes;
  const Prefixes of_base(random, base_nodes, codes, 5), of_delta(random, delta_nodes, codes, 3);
  const Part<Token> base(random, of_base), delta(random, of_delta);
  std::vector<int64_t> child_anchors;
  const int64_t base_children = base.child_start.back();
  std::vector<std::unique_ptr<Set>> sets;
  for (int64_t b = 0; b < requests; ++b) {
    sets.push_back(below(random, 2) ? std::make_unique<Set>(random, base_children, delta.child_start.back()) : nullptr);
  }
  for (int64_t node = 0; node < delta_nodes; ++node) {
    const int64_t of = node_anchors[node] / 2;
    const bool is_twin = node_anchors[node] % 2 == 1;
    for (int64_t i = delta.child_start[node]; i < delta.child_start[node + 1]; ++i) {
      int64_t at = base.child_start[of];
      while (is_twin && at < base.child_start[of + 1] && base.tokens[at] < delta.tokens[i]) ++at;
      const bool found = is_twin && at < base.child_start[of + 1] && base.tokens[at] == delta.tokens[i];
      child_anchors.push_back(2 * at + found);
    }
  }
  child_anchors.shrink_to_fit();
  node_anchors.shrink_to_fit();
  const auto children_of = [&](int64_t node, const Set* set) {
    std::vector<Child> list;
    int64_t in_base = node < base_nodes ? node : -1, in_delta = node < base_nodes ? -1 : node - base_nodes;
    for (int64_t i = 0; in_base >= 0 && i < delta_nodes; ++i) {
      if (node_anchors[i] == 2 * in_base + 1) in_delta = i;
    }
    for (int64_t i = in_base < 0 ? 0 : base.child_start[in_base]; in_base >= 0 && i < base.child_start[in_base + 1];
         ++i) {
      list.push_back({base.tokens[i], i, set == nullptr || set->base[i]});
    }
    for (int64_t i = in_delta < 0 ? 0 : delta.child_start[in_delta];
         in_delta >= 0 && i < delta.child_start[in_delta + 1]; ++i) {
      const bool allowed = set == nullptr || set->delta[i];
      const auto twin = std::find_if(list.begin(), list.end(),
                                     [&](const Child& c) { return c.token == delta.tokens[i]; });
      if (twin == list.end()) {
        list.push_back({delta.tokens[i], base_children + i, allowed});
      } else {
        twin->allowed = twin->allowed || allowed;
      }
    }
    std::sort(list.begin(), list.end(), [](const Child& a, const Child& b) { return a.token < b.token; });
    return list;
  };

  const int64_t stride = head ? 1 : 1 + below(random, 2), dim = 1 + below(random, 20);
  std::vector<Real> logits(requests * width * codes * stride), scores(requests * width);
  std::vector<int64_t> beams(requests * width);
  for (auto& x : logits) x = number<Real>(random);
  std::vector<Real> h(requests * width * dim), codebook(codes * dim);
  if (head) {
    for (auto& x : h) x = static_cast<Real>(below(random, 9)) - 4;
    for (auto& x : codebook) x = static_cast<Real>(below(random, 9)) - 4;
    for (int64_t i = 0; i < requests * width; ++i) {
      for (int64_t k = 0; k < codes; ++k) {
        double dot = 0, a = 0, b = 0;
        for (int64_t d = 0; d < dim; ++d) {
          dot += static_cast<double>(h[i * dim + d]) * codebook[k * dim + d];
          a += static_cast<double>(h[i * dim + d]) * h[i * dim + d];
          b += static_cast<double>(codebook[k * dim + d]) * codebook[k * dim + d];
        }
        logits[i * codes + k] = static_cast<Real>(a > 0 && b > 0 ? 5 * dot / std::sqrt(a * b) : 0);
      }
    }
  }
  for (auto& x : scores) x = number<Real>(random);
  for (auto& x : beams) {
    x = below(random, nodes + 1) - 1;
    if (x >= base_nodes && node_anchors[x - base_nodes] % 2 == 1)
      x = node_anchors[x - base_nodes] / 2;  // a twin's number
  }

  std::vector<int64_t> out_nodes(requests * num_beams), out_tokens(requests * num_beams),
      out_parents(requests * num_beams);
  std::vector<float> out_scores(requests * num_beams);
  std::vector<const dgi::AllowedItems*> allowed_of;
  for (const auto& set : sets) allowed_of.push_back(set == nullptr ? nullptr : &set->items);
  dgi::cpu::BeamStep<Real, Token> step{};
  step.trie.base = base.level(), step.trie.base_children = base_children;
  if (updated) {
    step.trie.delta = delta.level();
    step.trie.nodes = {node_anchors.data(), delta_nodes};
    step.trie.children = {child_anchors.data(), static_cast<int64_t>(child_anchors.size())};
  }
  step.allowed = allowed_of.data();
  step.requests = requests, step.width = width, step.num_beams = num_beams;
  step.nodes = {beams.data(), width, 1};
  step.scores = {scores.data(), width, 1};
  step.normalize = normalize;
  std::vector<uint32_t> masks;
  if (below(random, 2) == 0) {
    const int64_t words = (codes + 31) / 32;
    masks.resize(static_cast<size_t>(base_nodes * words));
    for (int64_t node = 0; node < base_nodes; ++node) {
      for (int64_t i = base.child_start[node]; i < base.child_start[node + 1]; ++i) {
        const int64_t code = base.tokens[i];
        if (code >= 0) masks[node * words + code / 32] |= uint32_t{1} << code % 32;
      }
    }
    step.masks = {masks.data(), words};
  }
  const bool scored = below(random, 2) == 0;
  const std::vector<float> own = node_scores(random, base.child_start), added = node_scores(random, delta.child_start);
  std::vector<Real> strengths(requests);
  for (auto& x : strengths) x = static_cast<Real>(below(random, 5)) - 2;
  if (scored) {
    step.node_scores = {own.data(), updated ? added.data() : nullptr, strengths.data(), 1, 0};
  }
  const dgi::cpu::BeamOutput out{out_nodes.data(), out_tokens.data(), out_parents.data(), out_scores.data()};
  if (head) {
    const dgi::cpu::CosineLogits<Real> source{h.data(), codebook.data(), codes, dim, Real{5}, static_cast<Real>(1e-12)};
    if (!dgi::cpu::cosine_beam_step(step, source, out)) return false;
  } else {
    const dgi::cpu::Logits<Real> source{logits.data(), codes, width * codes * stride, codes * stride, stride};
    if (!dgi::cpu::beam_step(step, source, 0, requests, out)) return false;
  }

  for (int64_t b = 0; b < requests; ++b) {
    std::vector<Expected> expected;
    for (int64_t m = 0; m < width; ++m) {
      const int64_t node = beams[b * width + m];
      const Real score = dgi::finite_or_dead(scores[b * width + m]);
      if (node < 0 || score == -std::numeric_limits<Real>::infinity()) continue;
      const auto logit = [&](int64_t code) {
        return dgi::finite_or_dead(logits[((b * width + m) * codes + code) * stride]);
      };
      const std::vector<Child> list = children_of(node, sets[b].get());
      double largest = -INFINITY, sum = 0;
      std::vector<double> in_sum;
      if (normalize == dgi::Normalize::kFull) {
        for (int64_t k = 0; k < codes; ++k) in_sum.push_back(logit(k));
      } else if (normalize == dgi::Normalize::kChildren) {
        for (const Child& child : list) {
          if (child.token >= 0 && child.allowed) in_sum.push_back(logit(child.token));
        }
      }
      for (double x : in_sum) largest = std::max(largest, x);
      for (double x : in_sum) sum += std::exp(x - largest);
      for (const Child& child : list) {
        if (!child.allowed) continue;
        double logp = 0;
        if (child.token >= 0) {
          logp = normalize == dgi::Normalize::kNone ? logit(child.token) : logit(child.token) - largest - std::log(sum);
        }
        if (scored) {
          const int64_t in_delta = child.number - base_children;
          logp += strengths[b] * (in_delta < 0 ? own[child.number] : added[in_delta]);
        }
        const double total = std::min<double>(score + logp, std::numeric_limits<Real>::max());
        if (total > -std::numeric_limits<Real>::max()) expected.push_back({total, m, child.number, child.token});
      }
    }
    std::stable_sort(expected.begin(), expected.end(),
                     [](const Expected& x, const Expected& y) { return x.score > y.score; });
    for (int64_t i = 0; i < num_beams; ++i) {
      const int64_t at = b * num_beams + i;
      if (i >= static_cast<int64_t>(expected.size())) {
        if (out_nodes[at] != -1 || out_tokens[at] != -1 || out_parents[at] != -1 || !(out_scores[at] < -1e38f))
          return false;
        continue;
      }
      const Expected& want = expected[i];
      if (out_scores[at] != static_cast<float>(want.score)
          && !(std::fabs(out_scores[at] - want.score) <= 1e-4 * (1 + std::fabs(want.score))))
        return false;
      if (normalize == dgi::Normalize::kNone && !head
          && (out_nodes[at] != want.child || out_parents[at] != want.parent))
        return false;
      if (normalize == dgi::Normalize::kNone && !head && out_tokens[at] != want.token) return false;
      const int64_t number = out_nodes[at];
      if (number < 0 || number >= base_children + delta.child_start.back()) return false;
      if (out_tokens[at] != (number < base_children ? base.tokens[number] : delta.tokens[number - base_children]))
        return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return driver::run(argc, argv, [](Random& random) {
    for (const auto normalize : {dgi::Normalize::kFull, dgi::Normalize::kChildren, dgi::Normalize::kNone}) {
      for (const bool head : {false, true}) {
        if (one_case<float, int16_t>(random, normalize, head) && one_case<double, int32_t>(random, normalize, head))
          continue;
        std::printf("normalize %d, head %d: ", static_cast<int>(normalize), head);
        return false;
      }
    }
    return true;
  });
}
