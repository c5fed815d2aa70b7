// Beam steps and ranking, as torch sees them: schemas, argument checks, calls into the code that knows no torch.
#include <algorithm>
#include <atomic>

#include "cpu/beam/beam_cpu.h"
#include "cpu/ranking/ranking_cpu.h"
#include "register/depth_arguments.h"
#include "register/ranking_arguments.h"
#include "register/tensors.h"
#include "register/trie_arguments.h"

namespace dgi::registration {
namespace {

template <class Real>
constexpr ScalarType kDtype = std::is_same_v<Real, double>  ? ScalarType::Double
                              : std::is_same_v<Real, float> ? ScalarType::Float
                                                            : ScalarType::Long;

// A (B, M) tensor.
template <class Real>
dgi::cpu::View<Real> view_of(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, kBeam, name, " must be (B, M)");
  STD_TORCH_CHECK(x.scalar_type() == kDtype<Real>, kBeam, name, " has the wrong dtype");
  return {data_of<Real>(x), x.stride(0), x.stride(1)};
}

// A node out of range is an error: the caller need not look at the nodes itself.
void check_nodes(const dgi::cpu::View<int64_t>& nodes, int64_t rows, int64_t columns, int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t node = nodes.at(i, j);
      STD_TORCH_CHECK(-1 <= node && node < count, kBeam, "nodes must be in [0, ", count, ") or -1; got ", node);
    }
  }
}

// As child_masks makes them.
dgi::cpu::ChildMasks masks_of(const Tensor& masks, int64_t nodes, int64_t codes) {
  STD_TORCH_CHECK(masks.dim() == 2 && masks.size(0) == nodes && masks.size(1) <= dgi::cpu::ChildMasks::words_for(codes)
                      && masks.is_contiguous() && masks.scalar_type() == ScalarType::Int,
                  kBeam, "child_masks must be contiguous int32 (nodes, words), a bit for each code");
  return {static_cast<const uint32_t*>(masks.const_data_ptr()), masks.size(1)};
}

// What both steps have in common. normalize: 0 full, 1 children, 2 none.
struct BeamArguments {
  const DepthArguments& trie;
  const Allowed& allowed;
  const Tensor &nodes, &scores;
  const std::optional<Tensor>& log_normalizer;
  int64_t num_beams, normalize;
  const NodeScoreArguments& node_scores;

  template <class Real, class Token>
  dgi::cpu::BeamStep<Real, Token> step(int64_t requests, int64_t width) const {
    STD_TORCH_CHECK(num_beams >= 1, kBeam, "num_beams must be at least 1; got ", num_beams);
    STD_TORCH_CHECK(0 <= normalize && normalize <= 2, kBeam, "normalize must be 0, 1 or 2; got ", normalize);
    dgi::cpu::BeamStep<Real, Token> step{};
    step.trie = trie.depth<Token>();
    step.allowed = allowed.of_requests();
    step.requests = requests, step.width = width, step.num_beams = num_beams;
    step.nodes = view_of<int64_t>("nodes", nodes, requests, width);
    step.scores = view_of<Real>("scores", scores, requests, width);
    if (log_normalizer) step.log_normalizer = view_of<Real>("log_normalizer", *log_normalizer, requests, width);
    step.normalize = static_cast<dgi::Normalize>(normalize);
    step.node_scores = node_scores.of<Real>(step.trie, requests);
    check_nodes(step.nodes, requests, width, step.trie.end());
    return step;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> finished(const NewBeams& beams, bool fits) {
  STD_TORCH_CHECK(fits, kBeam, "more than 2**32 candidates of one request need float64 logits");
  return beams.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_step_cpu(
    const Tensor& tokens, const Tensor& child_start, const std::vector<Tensor>& delta,
    const std::vector<Tensor>& anchors, const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of,
    const Tensor& logits, const Tensor& nodes, const Tensor& scores, const std::optional<Tensor>& log_normalizer,
    int64_t num_beams, int64_t normalize, const std::optional<Tensor>& child_masks, int64_t /*max_degree*/,
    const std::optional<Tensor>& base_scores, const std::optional<Tensor>& delta_scores,
    const std::optional<Tensor>& strengths, double strength) {
  STD_TORCH_CHECK(logits.dim() == 3, kBeam, "logits must be (B, M, K)");
  const int64_t requests = logits.size(0), width = logits.size(1), codes = logits.size(2);
  const DepthArguments depth(tokens, child_start, delta, anchors);
  const Allowed allowed = depth.allowed(sets, set_of, requests);
  const NodeScoreArguments node_scores{base_scores, delta_scores, strengths, strength};
  const BeamArguments arguments{depth, allowed, nodes, scores, log_normalizer, num_beams, normalize, node_scores};
  return depth.for_token([&](auto token) {
    return for_dtype(logits, [&](auto stored) {
      using Stored = decltype(stored);
      auto step = arguments.step<dgi::Compute<Stored>, decltype(token)>(requests, width);
      if (child_masks) step.masks = masks_of(*child_masks, step.trie.base.nodes, codes);
      const dgi::cpu::Logits<Stored> view{data_of<Stored>(logits), codes, logits.stride(0), logits.stride(1),
                                          logits.stride(2)};
      NewBeams beams(logits, requests, num_beams);
      const auto out = beams.pointers<dgi::cpu::BeamOutput>();
      std::atomic<bool> fits{true};
      const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width * codes));  // about 0.05 ms
      torch::stable::parallel_for(0, requests, grain, [&](int64_t first, int64_t last) {
        if (!dgi::cpu::beam_step(step, view, first, last, out)) fits = false;
      });
      return finished(beams, fits);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_beam_step_cpu(
    const Tensor& tokens, const Tensor& child_start, const std::vector<Tensor>& delta,
    const std::vector<Tensor>& anchors, const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of,
    const Tensor& h, const Tensor& codebook, const Tensor& scale, double eps, const Tensor& nodes, const Tensor& scores,
    const std::optional<Tensor>& log_normalizer, int64_t num_beams, int64_t normalize, int64_t /*max_degree*/,
    const std::optional<Tensor>& base_scores, const std::optional<Tensor>& delta_scores,
    const std::optional<Tensor>& strengths, double strength) {
  check_head(h, codebook);
  const int64_t requests = h.size(0), width = h.size(1);
  const DepthArguments depth(tokens, child_start, delta, anchors);
  const Allowed allowed = depth.allowed(sets, set_of, requests);
  const NodeScoreArguments node_scores{base_scores, delta_scores, strengths, strength};
  const BeamArguments arguments{depth, allowed, nodes, scores, log_normalizer, num_beams, normalize, node_scores};
  return depth.for_token([&](auto token) {
    return for_dtype(h, [&](auto stored) {
      using Stored = decltype(stored);
      using Real = dgi::Compute<Stored>;
      STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == kDtype<Real>, kBeam,
                      "scale must hold one element of the compute dtype");
      const auto step = arguments.step<Real, decltype(token)>(requests, width);
      const dgi::cpu::CosineLogits<Stored> head{data_of<Stored>(h), data_of<Stored>(codebook), codebook.size(0),
                                                h.size(2),          *data_of<Real>(scale),     static_cast<Real>(eps)};
      NewBeams beams(h, requests, num_beams);
      return finished(beams, dgi::cpu::cosine_beam_step(step, head, beams.pointers<dgi::cpu::BeamOutput>()));
    });
  });
}

// tokens, parents: (B, M_t) of every step; the codes (B, M, L) of the last beams, each one's parents followed back. -1
// where dead.
Tensor beam_codes_cpu(const std::vector<Tensor>& tokens, const std::vector<Tensor>& parents) {
  constexpr const char* kCodes = "dgi_kernels, beam_codes: ";
  STD_TORCH_CHECK(!tokens.empty() && tokens.size() == parents.size() && tokens.back().dim() == 2, kCodes,
                  "tokens and parents must have one (B, M) tensor per step");
  const int64_t depth = static_cast<int64_t>(tokens.size()), requests = tokens.back().size(0),
                beams = tokens.back().size(1);
  std::vector<dgi::cpu::View<int64_t>> token, parent;
  std::vector<int64_t> width;
  for (int64_t t = 0; t < depth; ++t) {
    width.push_back(tokens[t].dim() == 2 ? tokens[t].size(1) : 0);
    token.push_back(view_of<int64_t>("tokens", tokens[t], requests, width[t]));
    parent.push_back(view_of<int64_t>("parents", parents[t], requests, width[t]));
  }
  Tensor codes = torch::stable::empty({requests, beams, depth}, ScalarType::Long);
  int64_t* out = codes.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < requests; ++b) {
    for (int64_t m = 0; m < beams; ++m, out += depth) {
      int64_t beam = parent[depth - 1].at(b, m) < 0 ? -1 : m;  // a dead beam has no parent
      for (int64_t t = depth - 1; t >= 0; --t) {
        out[t] = beam < 0 ? -1 : token[t].at(b, beam);
        if (t > 0 && beam >= 0) {
          beam = parent[t].at(b, beam);
          STD_TORCH_CHECK(beam < width[t - 1], kCodes, "there is no beam ", beam, " before step ", t);
        }
      }
    }
  }
  return codes;
}

std::tuple<Tensor, Tensor, Tensor> rank_candidates_cpu(
    const Tensor& query, const Tensor& item_vectors, int64_t num_nodes, const std::vector<Tensor>& below,
    const std::optional<Tensor>& item_order, const std::optional<Tensor>& item_ids,
    const std::vector<Tensor>& delta_below, const std::optional<Tensor>& delta_order,
    const std::optional<Tensor>& delta_ids, const std::optional<Tensor>& delta_anchors, const std::vector<Tensor>& sets,
    const std::vector<int64_t>& set_of, const Tensor& nodes, const Tensor& scores, int64_t k, double eps, bool by_sum,
    double cosine_weight, bool share) {
  const RankingArguments arguments(query, item_vectors, num_nodes, below, item_order, item_ids, delta_below,
                                   delta_order, delta_ids, delta_anchors, sets, set_of, nodes, k);
  const int64_t requests = arguments.requests, width = arguments.width;
  return for_dtype(query, [&](auto stored) -> std::tuple<Tensor, Tensor, Tensor> {
    using Stored = decltype(stored);
    using Real = dgi::Compute<Stored>;
    auto in = arguments.input<dgi::cpu::RankingInput<Stored>>(eps, by_sum, cosine_weight, share);
    in.nodes = view_of<int64_t>("nodes", nodes, requests, width);
    in.scores = view_of<float>("scores", scores, requests, width);
    check_nodes(in.nodes, requests, width, in.base.nodes + in.delta.nodes);
    Tensor items = torch::stable::empty({requests, k}, ScalarType::Long);
    Tensor beam_scores = torch::stable::empty({requests, k}, ScalarType::Float);
    Tensor cosines = torch::stable::empty({requests, k}, kDtype<Real>);
    const dgi::cpu::RankingOutput<Real> out{items.mutable_data_ptr<int64_t>(), beam_scores.mutable_data_ptr<float>(),
                                            cosines.mutable_data_ptr<Real>()};
    std::atomic<bool> known{true};
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k * in.dim));
    torch::stable::parallel_for(0, requests, grain, [&](int64_t first, int64_t last) {
      if (!dgi::cpu::rank_candidates(in, first, last, out)) known = false;
    });
    STD_TORCH_CHECK(known, kRank, "an item id is no row of item_vectors");
    return {items, beam_scores, cosines};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("beam_step(Tensor tokens, Tensor child_start, Tensor[] delta, Tensor[] anchors, Tensor[] sets, int[] set_of, "
        "Tensor logits, Tensor nodes, Tensor scores, Tensor? log_normalizer, int num_beams, int normalize, "
        "Tensor? child_masks=None, int max_degree=-1, Tensor? base_scores=None, Tensor? delta_scores=None, "
        "Tensor? strengths=None, float strength=1.0) -> (Tensor nodes, Tensor tokens, Tensor parents, Tensor scores)");
  m.def("cosine_beam_step(Tensor tokens, Tensor child_start, Tensor[] delta, Tensor[] anchors, Tensor[] sets, "
        "int[] set_of, Tensor h, Tensor codebook, Tensor scale, float eps, Tensor nodes, Tensor scores, "
        "Tensor? log_normalizer, int num_beams, int normalize, int max_degree=-1, Tensor? base_scores=None, "
        "Tensor? delta_scores=None, Tensor? strengths=None, float strength=1.0) -> (Tensor nodes, Tensor tokens, "
        "Tensor parents, "
        "Tensor scores)");
  m.def("beam_codes(Tensor[] tokens, Tensor[] parents) -> Tensor");
  m.def("rank_candidates(Tensor query, Tensor item_vectors, int num_nodes, Tensor[] below, Tensor? item_order, "
        "Tensor? item_ids, Tensor[] delta_below, Tensor? delta_order, Tensor? delta_ids, Tensor? delta_anchors, "
        "Tensor[] sets, int[] set_of, Tensor nodes, Tensor scores, int k, float eps, bool by_sum=False, "
        "float cosine_weight=1.0, bool share=False) -> (Tensor items, Tensor scores, Tensor cosines)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&beam_step_cpu));
  m.impl("cosine_beam_step", TORCH_BOX(&cosine_beam_step_cpu));
  m.impl("beam_codes", TORCH_BOX(&beam_codes_cpu));
  m.impl("rank_candidates", TORCH_BOX(&rank_candidates_cpu));
}

}  // namespace dgi::registration
