// What the steps of a search take and leave on every device: one depth of a trie, hidden states, beams.
#pragma once

#include "dgi/beam.h"
#include "register/tensors.h"
#include "register/trie_arguments.h"

namespace dgi::registration {

constexpr const char* kBeam = "dgi_kernels, beam_step: ";

// delta: tokens and child_start; anchors: of the delta's nodes at this depth and the next. Both are empty where there
// is no delta.
class DepthArguments {
 public:
  DepthArguments(const Tensor& tokens, const Tensor& child_start, const std::vector<Tensor>& delta,
                 const std::vector<Tensor>& anchors)
      : tokens_(tokens), child_start_(child_start), delta_(delta), anchors_(anchors) {
    STD_TORCH_CHECK(delta.empty() ? anchors.empty() : delta.size() == 2 && anchors.size() == 2, kBeam,
                    "delta and anchors do not fit each other");
    if (delta.empty()) return;
    STD_TORCH_CHECK(anchors[0].numel() == delta[1].numel() - 1 && anchors[1].numel() == delta[0].numel(), kBeam,
                    "anchors must have one entry for each node of the delta");
  }

  // The nodes of the next depth that each request may find.
  Allowed allowed(const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of, int64_t requests) const {
    return {sets, set_of, requests, tokens_.numel(), delta_.empty() ? 0 : delta_[0].numel()};
  }

  // Calls f with a number of the tokens' type.
  template <class F>
  auto for_token(const F& f) const {
    STD_TORCH_CHECK(tokens_.scalar_type() == ScalarType::Short || tokens_.scalar_type() == ScalarType::Int, kBeam,
                    "tokens must be int16 or int32");
    return tokens_.scalar_type() == ScalarType::Short ? f(int16_t{}) : f(int32_t{});
  }

  template <class Token>
  dgi::TrieDepth<Token> depth() const {
    dgi::TrieDepth<Token> depth;
    depth.base = level_of<Token>(tokens_, child_start_);
    depth.base_children = tokens_.numel();
    if (delta_.empty()) return depth;
    depth.delta = level_of<Token>(delta_[0], delta_[1]);
    depth.nodes = anchors_of(anchors_[0]);
    depth.children = anchors_of(anchors_[1]);
    return depth;
  }

 private:
  const Tensor &tokens_, &child_start_;
  const std::vector<Tensor>&delta_, &anchors_;
};

// What the children of the nodes of a depth add to their scores, in tensors: float32 for each part that there is, as
// dgi/beam.h says, and a strength for each request (B,), of the step's dtype, or one for all.
struct NodeScoreArguments {
  const std::optional<Tensor>&base, &delta, &strengths;
  double strength;

  template <class Real, class Token>
  dgi::NodeScores<Real> of(const dgi::TrieDepth<Token>& depth, int64_t requests) const {
    if (!base || depth.end() == 0) return {};
    STD_TORCH_CHECK(depth.delta.nodes == 0 || delta, kBeam, "node scores of a part of the trie are missing");
    dgi::NodeScores<Real> scores{array("base_scores", *base, depth.base_children + 2 * depth.base.nodes)};
    if (depth.delta.nodes > 0)
      scores.delta = array("delta_scores", *delta, depth.children.count + 2 * depth.delta.nodes);
    scores.strength = static_cast<Real>(strength);
    if (!strengths) return scores;
    constexpr ScalarType kStrength = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(strengths->dim() == 1 && strengths->size(0) == requests && strengths->scalar_type() == kStrength,
                    kBeam, "strengths must be (B,), of the compute dtype");
    scores.strengths = data_of<Real>(*strengths), scores.stride = strengths->stride(0);
    return scores;
  }

 private:
  static const float* array(const char* name, const Tensor& x, int64_t numbers) {
    check_array(name, x, ScalarType::Float);
    STD_TORCH_CHECK(x.numel() == numbers, kBeam, name, " must have a number for each child, and two for each node");
    return data_of<float>(x);
  }
};

// The hidden states and the codebook of a step that makes its own logits.
inline void check_head(const Tensor& h, const Tensor& codebook) {
  STD_TORCH_CHECK(h.dim() == 3 && h.is_contiguous(), kBeam, "h must be contiguous (B, M, D)");
  STD_TORCH_CHECK(codebook.dim() == 2 && codebook.is_contiguous() && codebook.size(1) == h.size(2)
                      && codebook.scalar_type() == h.scalar_type(),
                  kBeam, "codebook must be contiguous (K, D), of the dtype of h");
}

// The beams that a step leaves, on the device of its inputs.
struct NewBeams {
  Tensor nodes, tokens, parents, scores;

  NewBeams(const Tensor& like, int64_t requests, int64_t num_beams)
      : nodes(empty(like, requests, num_beams, ScalarType::Long)),
        tokens(empty(like, requests, num_beams, ScalarType::Long)),
        parents(empty(like, requests, num_beams, ScalarType::Long)),
        scores(empty(like, requests, num_beams, ScalarType::Float)) {}

  // As dgi::cpu::BeamOutput or dgi::cuda::BeamOutput.
  template <class Output>
  Output pointers() {
    return {nodes.mutable_data_ptr<int64_t>(), tokens.mutable_data_ptr<int64_t>(), parents.mutable_data_ptr<int64_t>(),
            scores.mutable_data_ptr<float>()};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {nodes, tokens, parents, scores}; }

 private:
  static Tensor empty(const Tensor& like, int64_t requests, int64_t num_beams, ScalarType dtype) {
    return torch::stable::empty({requests, num_beams}, dtype, std::nullopt, like.device());
  }
};

}  // namespace dgi::registration
