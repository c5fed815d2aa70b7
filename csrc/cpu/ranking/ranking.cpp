// Lexicographic ranking on the CPU: beams by score, and of beams with equal scores all items by cosine.
//
// Beams are taken in order of their scores and no item is looked at once k are found, so that the cost is that of about
// k vectors, whatever the number of beams. By a sum, all items below the beams count until a beam's score, with the
// largest cosine, lies below the k-th sum.
#include "cpu/ranking/ranking_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/shared/isa.h"
#include "dgi/vector.h"

namespace dgi::cpu {
namespace {

struct Beam {
  int64_t node;
  float score;
};

template <class Real>
struct Candidate {
  int64_t item;
  Real cosine;
  Real sum = 0;  // 0 where items are not ranked by one

  // Whether it comes before another of the same beam score.
  bool operator<(const Candidate& other) const {
    if (sum != other.sum) return sum > other.sum;
    return cosine != other.cosine ? cosine > other.cosine : item < other.item;
  }
};

// The live beams by score, a node that occurs twice only with its better score.
void list_beams(const View<int64_t>& nodes, const View<float>& scores, int64_t request, int64_t width,
                std::vector<Beam>& beams) {
  beams.clear();
  for (int64_t m = 0; m < width; ++m) {
    const int64_t node = nodes.at(request, m);
    const float score = scores.at(request, m);
    if (node >= 0 && score > -std::numeric_limits<float>::infinity()) beams.push_back({node, score});
  }
  std::sort(beams.begin(), beams.end(),
            [](const Beam& a, const Beam& b) { return a.node != b.node ? a.node < b.node : a.score > b.score; });
  beams.erase(std::unique(beams.begin(), beams.end(), [](const Beam& a, const Beam& b) { return a.node == b.node; }),
              beams.end());
  std::sort(beams.begin(), beams.end(), [](const Beam& a, const Beam& b) { return a.score > b.score; });
}

}  // namespace

template <class Stored>
bool rank_candidates(const RankingInput<Stored>& in, int64_t first_request, int64_t last_request,
                     const RankingOutput<Compute<Stored>>& out) {
  using Real = Compute<Stored>;
  std::vector<Beam> beams;
  std::vector<Candidate<Real>> group;
  std::vector<Real> query(in.dim);
  bool known = true;
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
    for (int64_t request = first_request; request < last_request; ++request) {
      list_beams(in.nodes, in.scores, request, in.width, beams);
      const Stored* const q = in.query + request * in.query_stride;
      const Real factor = reciprocal_norm<fused.value>(q, in.dim, in.eps);
      for (int64_t d = 0; d < in.dim; ++d) query[d] = factor * load(q[d]);
      const AllowedItems all, *const given = in.allowed == nullptr ? nullptr : in.allowed[request];
      const AllowedItems& allowed = given == nullptr ? all : *given;
      const auto add = [&](const ItemLevels& part, const ItemSet& members, int64_t node) DGI_ALWAYS_INLINE {
        const Range places = part.below.items(node);
        for (int64_t place = places.first; place < places.end; ++place) {
          if (!members.contains(place)) continue;
          const int64_t item = part.id(place);
          if (item < 0 || item >= in.rows) {
            known = false;
            continue;
          }
          const Stored* const vector = in.items + item * in.item_stride;
          const Real cosine = dot<fused.value>(vector, query.data(), in.dim)
                              * reciprocal_norm<fused.value>(vector, in.dim, in.eps);
          group.push_back({item, cosine == cosine ? cosine : Real{-1}});
        }
      };

      const auto add_both = [&](int64_t node) DGI_ALWAYS_INLINE {
        if (node < in.base.nodes) add(in.base, allowed.base, node);
        const int64_t in_delta = node < in.base.nodes ? in.anchors.twin_of(node) : node - in.base.nodes;
        if (in_delta >= 0) add(in.delta, allowed.delta, in_delta);
      };

      int64_t found = 0;
      const int64_t begin = request * in.k;
      if (in.order.by_sum) {
        const Real largest = std::abs(in.order.weight) * Real{1.0001};  // rounding included
        group.clear();
        size_t kept = 0;
        for (const Beam& beam : beams) {
          if (static_cast<int64_t>(kept) == in.k && beam.score + largest < group.front().sum) break;
          add_both(beam.node);
          const int64_t count = static_cast<int64_t>(group.size() - kept);
          const Real logs = in.order.shares && count > 0 ? std::log(static_cast<Real>(count)) : Real{0};
          for (size_t i = kept; i < group.size(); ++i) group[i].sum = in.order.sum(beam.score, group[i].cosine, logs);
          while (kept < group.size()) {  // the best k, as a heap with the worst of them in front
            if (static_cast<int64_t>(kept) < in.k) {
              std::push_heap(group.begin(), group.begin() + ++kept);
              continue;
            }
            if (group.back() < group.front()) {
              std::pop_heap(group.begin(), group.begin() + kept);
              std::swap(group[kept - 1], group.back());
              std::push_heap(group.begin(), group.begin() + kept);
            }
            group.pop_back();
          }
        }
        std::sort(group.begin(), group.end());
        for (const Candidate<Real>& item : group) {
          out.items[begin + found] = item.item;
          out.scores[begin + found] = static_cast<float>(item.sum);
          out.cosines[begin + found] = item.cosine;
          ++found;
        }
        beams.clear();
      }
      for (size_t b = 0; b < beams.size() && found < in.k;) {
        const float score = beams[b].score;
        group.clear();
        for (; b < beams.size() && beams[b].score == score; ++b) {
          add_both(beams[b].node);
        }
        const int64_t take = std::min<int64_t>(in.k - found, static_cast<int64_t>(group.size()));
        std::partial_sort(group.begin(), group.begin() + take, group.end());
        for (int64_t i = 0; i < take; ++i, ++found) {
          out.items[begin + found] = group[i].item;
          out.scores[begin + found] = score;
          out.cosines[begin + found] = group[i].cosine;
        }
      }
      std::fill(out.items + begin + found, out.items + begin + in.k, -1);
      std::fill(out.scores + begin + found, out.scores + begin + in.k, -std::numeric_limits<float>::infinity());
      std::fill(out.cosines + begin + found, out.cosines + begin + in.k, Real{-1});
    }
  });
  return known;
}

template bool rank_candidates(const RankingInput<float>&, int64_t, int64_t, const RankingOutput<float>&);
template bool rank_candidates(const RankingInput<double>&, int64_t, int64_t, const RankingOutput<double>&);
template bool rank_candidates(const RankingInput<BFloat16>&, int64_t, int64_t, const RankingOutput<float>&);
template bool rank_candidates(const RankingInput<Float16>&, int64_t, int64_t, const RankingOutput<float>&);

}  // namespace dgi::cpu
