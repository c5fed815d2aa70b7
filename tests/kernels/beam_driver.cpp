// Random tries, beams and filters through the beam step in C++, against a search that looks at all children; built with
// sanitizers by test_native_beam.py. Every array has exactly its size, so that a read beyond it is seen.
//   usage: driver SEED CASES
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "beam.h"
#include "host.h"

namespace dgi::cpu {

// What torch provides otherwise.
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

void matrix_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into) { product(a, b, out); }
void matrix_product(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out, Into) {
  product(a, b, out);
}

void parallel_ranges(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count > 0) body(0, count, context);
}

}  // namespace dgi::cpu

namespace {

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

// One level with `nodes` nodes over `codes` codes; some nodes end, some have no child, and of a thin one all have few.
struct Level {
  std::vector<int32_t> tokens;
  std::vector<int64_t> child_start{0};

  Level(Random& random, int64_t nodes, int64_t codes, bool thin) {
    for (int64_t node = 0; node < nodes; ++node) {
      if (below(random, 4) == 0) tokens.push_back(dgi::kEndToken);
      const int64_t keep = below(random, 5);
      for (int64_t code = 0; code < codes; ++code) {
        if (below(random, thin ? 4 * codes / 3 : 4) < keep) tokens.push_back(static_cast<int32_t>(code));
      }
      child_start.push_back(static_cast<int64_t>(tokens.size()));
    }
    tokens.shrink_to_fit();
    child_start.shrink_to_fit();
  }
};

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
  int64_t parent, child;
};

// With "none" and small integers every sum is exact, so that ties are told.
// With `head` the logits are those of random hidden states and codes.
template <class Real>
bool one_case(Random& random, dgi::Normalize normalize, bool head) {
  const bool large = head && below(random, 8) == 0;  // enough beams and codes for bounds on their children
  const int64_t requests = below(random, 3), width = below(random, large ? 60 : 6);
  const int64_t codes = 1 + below(random, large ? 300 : 40);
  const int64_t nodes = 1 + below(random, 5), num_beams = 1 + below(random, 90);
  const Level level(random, nodes, codes, large);
  const int64_t children = static_cast<int64_t>(level.tokens.size());
  std::vector<int64_t> items{0};
  for (int64_t i = 0; i < children; ++i) items.push_back(items.back() + 1 + below(random, 3));
  std::vector<int64_t> counts{0};
  for (int64_t i = 0; i < items.back(); ++i) counts.push_back(counts.back() + below(random, 2));
  const int64_t* starts = items.data();
  std::vector<const int64_t*> counts_of(requests);
  for (auto& entry : counts_of) entry = below(random, 2) ? counts.data() : nullptr;

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
  for (auto& x : beams) x = below(random, nodes + 1) - 1;

  std::vector<int64_t> out_nodes(requests * num_beams), out_tokens(requests * num_beams), out_parents(requests * num_beams);
  std::vector<float> out_scores(requests * num_beams);
  dgi::cpu::BeamStep<Real> step{};
  step.level = {level.tokens.data(), level.child_start.data(), nodes};
  step.lower = {&starts, 1};
  step.counts = counts_of.data();
  step.requests = requests, step.width = width, step.num_beams = num_beams;
  step.nodes = {beams.data(), width, 1};
  step.scores = {scores.data(), width, 1};
  step.normalize = normalize;
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
      const auto allowed = [&](int64_t i) {
        return counts_of[b] == nullptr || counts[items[i + 1]] > counts[items[i]];
      };
      const int64_t first = level.child_start[node], end = level.child_start[node + 1];
      double largest = -INFINITY, sum = 0;
      std::vector<double> in_sum;
      if (normalize == dgi::Normalize::kFull) {
        for (int64_t k = 0; k < codes; ++k) in_sum.push_back(logit(k));
      } else if (normalize == dgi::Normalize::kChildren) {
        for (int64_t i = first; i < end; ++i) {
          if (level.tokens[i] >= 0 && allowed(i)) in_sum.push_back(logit(level.tokens[i]));
        }
      }
      for (double x : in_sum) largest = std::max(largest, x);
      for (double x : in_sum) sum += std::exp(x - largest);
      for (int64_t i = first; i < end; ++i) {
        if (!allowed(i)) continue;
        double logp = 0;
        if (level.tokens[i] >= 0) {
          logp = normalize == dgi::Normalize::kNone ? logit(level.tokens[i])
                                                    : logit(level.tokens[i]) - largest - std::log(sum);
        }
        const double total = std::min<double>(score + logp, std::numeric_limits<Real>::max());
        if (total > -std::numeric_limits<Real>::max()) expected.push_back({total, m, i});
      }
    }
    std::stable_sort(expected.begin(), expected.end(), [](const Expected& x, const Expected& y) { return x.score > y.score; });
    for (int64_t i = 0; i < num_beams; ++i) {
      const int64_t at = b * num_beams + i;
      if (i >= static_cast<int64_t>(expected.size())) {
        if (out_nodes[at] != -1 || out_tokens[at] != -1 || out_parents[at] != -1 || !(out_scores[at] < -1e38f)) return false;
        continue;
      }
      const Expected& want = expected[i];
      if (out_scores[at] != static_cast<float>(want.score)
          && !(std::fabs(out_scores[at] - want.score) <= 1e-4 * (1 + std::fabs(want.score)))) return false;
      if (normalize == dgi::Normalize::kNone && !head && (out_nodes[at] != want.child || out_parents[at] != want.parent)) return false;
      if (out_tokens[at] != level.tokens[out_nodes[at]]) return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Random random(std::strtoull(argv[1], nullptr, 10));
  const int64_t cases = std::atoll(argv[2]);
  for (int64_t i = 0; i < cases; ++i) {
    for (const auto normalize : {dgi::Normalize::kFull, dgi::Normalize::kChildren, dgi::Normalize::kNone}) {
      for (const bool head : {false, true}) {
        if (one_case<float>(random, normalize, head) && one_case<double>(random, normalize, head)) continue;
        std::printf("case %lld, normalize %d, head %d, differs\n", static_cast<long long>(i),
                    static_cast<int>(normalize), head);
        return 1;
      }
    }
  }
  return 0;
}
