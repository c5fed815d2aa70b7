// Beam steps and ranking on CUDA, as torch sees them. No value is read on the host: a node out of range is dead.
#include "cuda/beam_cuda.h"

#include <algorithm>
#include <array>

#include "cuda/ranking_cuda.h"
#include "register/cuda/cuda_stream.h"
#include "register/depth_arguments.h"
#include "register/ranking_arguments.h"
#include "register/trie_arguments.h"

namespace dgi::registration {
namespace {

constexpr const char* kStep = "beam_step";

// Products of a head that are made at a time: 32 MB of float32, so that the kernels behind find them in the
// second-level cache. Tests make fewer.
#ifndef DGI_PRODUCTS
#define DGI_PRODUCTS (1 << 23)
#endif
constexpr int64_t kProducts = DGI_PRODUCTS;

void check_device(const char* op, const Tensor& like, const Tensor& x) {
  STD_TORCH_CHECK(x.device() == like.device(), "dgi_kernels, ", op, ": all tensors must be on one device");
}
void check_device(const char* op, const Tensor& like, const std::optional<Tensor>& x) {
  if (x) check_device(op, like, *x);
}
void check_device(const char* op, const Tensor& like, const std::vector<Tensor>& tensors) {
  for (const Tensor& x : tensors) check_device(op, like, x);
}
template <class... Tensors>
void check_devices(const char* op, const Tensor& like, const Tensors&... tensors) {
  (check_device(op, like, tensors), ...);
}

dgi::cuda::Float float_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return dgi::cuda::Float::kFloat32;
    case ScalarType::BFloat16: return dgi::cuda::Float::kBFloat16;
    case ScalarType::Half: return dgi::cuda::Float::kFloat16;
    default: STD_TORCH_CHECK(false, "dgi_kernels: inputs must be float32, bfloat16 or float16 on CUDA");
  }
}

Tensor new_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// A (B, M) tensor.
template <class Element>
dgi::cuda::View<Element> view_of(const char* op, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  constexpr ScalarType kDtype = std::is_same_v<Element, float> ? ScalarType::Float : ScalarType::Long;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.scalar_type() == kDtype, op, name,
                  " must be (B, M), of the right dtype");
  return {data_of<Element>(x), x.stride(0), x.stride(1)};
}

// What both steps have in common. normalize: 0 full, 1 children, 2 none. max_degree: at least as many as any node of
// the depth has children; less than 0 where nobody knows.
struct StepArguments {
  const DepthArguments& trie;
  const Allowed& allowed;
  const Tensor &nodes, &scores;
  const std::optional<Tensor>& log_normalizer;
  int64_t num_beams, normalize, max_degree;
  const NodeScoreArguments& node_scores;

  template <class Token>
  dgi::cuda::BeamStep<Token> step(int64_t requests, int64_t width) const {
    STD_TORCH_CHECK(num_beams >= 1, kBeam, "num_beams must be at least 1; got ", num_beams);
    STD_TORCH_CHECK(0 <= normalize && normalize <= 2, kBeam, "normalize must be 0, 1 or 2; got ", normalize);
    dgi::cuda::BeamStep<Token> step{};
    step.trie = trie.depth<Token>();
    step.allowed = allowed.of_requests();
    step.requests = requests, step.width = width, step.num_beams = num_beams, step.max_degree = max_degree;
    step.nodes = view_of<int64_t>(kBeam, "nodes", nodes, requests, width);
    step.scores = view_of<float>(kBeam, "scores", scores, requests, width);
    if (log_normalizer) {
      step.log_normalizer = view_of<float>(kBeam, "log_normalizer", *log_normalizer, requests, width);
    }
    step.normalize = static_cast<dgi::Normalize>(normalize);
    step.node_scores = node_scores.of<float>(step.trie, requests);
    return step;
  }
};

Tensor scratch_for(const Tensor& like, int64_t requests, int64_t width, int64_t num_beams, int64_t max_degree,
                   int64_t codes) {
  const size_t bytes = dgi::cuda::beam_scratch_bytes(requests, width, num_beams, max_degree, codes);
  return new_on(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_step_cuda(
    const Tensor& tokens, const Tensor& child_start, const std::vector<Tensor>& delta,
    const std::vector<Tensor>& anchors, const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of,
    const Tensor& logits, const Tensor& nodes, const Tensor& scores, const std::optional<Tensor>& log_normalizer,
    int64_t num_beams, int64_t normalize, const std::optional<Tensor>& /*child_masks*/,  // no gain: real children only
    int64_t max_degree, const std::optional<Tensor>& base_scores, const std::optional<Tensor>& delta_scores,
    const std::optional<Tensor>& strengths, double strength) {
  STD_TORCH_CHECK(logits.dim() == 3, kBeam, "logits must be (B, M, K)");
  check_devices(kStep, logits, tokens, child_start, delta, anchors, sets, nodes, scores, log_normalizer, base_scores,
                delta_scores, strengths);
  const int64_t requests = logits.size(0), width = logits.size(1);
  const DepthArguments depth(tokens, child_start, delta, anchors);
  const Allowed allowed = depth.allowed(sets, set_of, requests);
  const NodeScoreArguments node_scores{base_scores, delta_scores, strengths, strength};
  const StepArguments arguments{depth,     allowed,   nodes,      scores,     log_normalizer,
                                num_beams, normalize, max_degree, node_scores};
  const dgi::cuda::Logits view{logits.const_data_ptr(), float_of(logits), logits.size(2),
                               logits.stride(0),        logits.stride(1), logits.stride(2)};
  const DeviceGuard guard(logits.get_device_index());
  return depth.for_token([&](auto token) {
    const auto step = arguments.step<decltype(token)>(requests, width);
    NewBeams beams(logits, requests, num_beams);
    Tensor scratch = scratch_for(logits, requests, width, num_beams, max_degree, view.codes);
    check_launch(kStep, dgi::cuda::beam_step(step, view, beams.pointers<dgi::cuda::BeamOutput>(),
                                             scratch.mutable_data_ptr(), current_stream(logits)));
    return beams.all();
  });
}

// products = h codebook^T in float32, whatever the dtype of the factors; torch's setting says whether in TF32.
void product(const Tensor& h, const Tensor& codebook_t, Tensor& products) {
  using torch::stable::detail::from;
  if (h.scalar_type() == ScalarType::Float) {
    std::array<StableIValue, 3> stack{from(h), from(codebook_t), from(products)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // what the op returns is ours to release
  } else {
    std::array<StableIValue, 4> stack{from(h), from(codebook_t), from(ScalarType::Float), from(products)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

// Calls f(first, count) for all requests, as many at a time as have kProducts products.
template <class F>
void in_parts(int64_t requests, int64_t of_one, const F& f) {
  const int64_t at_once = std::max<int64_t>(1, kProducts / std::max<int64_t>(1, of_one));
  for (int64_t first = 0; first < requests; first += at_once) f(first, std::min(at_once, requests - first));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_beam_step_cuda(
    const Tensor& tokens, const Tensor& child_start, const std::vector<Tensor>& delta,
    const std::vector<Tensor>& anchors, const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of,
    const Tensor& h, const Tensor& codebook, const Tensor& scale, double eps, const Tensor& nodes, const Tensor& scores,
    const std::optional<Tensor>& log_normalizer, int64_t num_beams, int64_t normalize, int64_t max_degree,
    const std::optional<Tensor>& base_scores, const std::optional<Tensor>& delta_scores,
    const std::optional<Tensor>& strengths, double strength) {
  check_head(h, codebook);
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, kBeam, "scale must hold one float32");
  check_devices(kStep, h, tokens, child_start, delta, anchors, sets, codebook, scale, nodes, scores, log_normalizer,
                base_scores, delta_scores, strengths);
  const int64_t requests = h.size(0), width = h.size(1), codes = codebook.size(0), dim = h.size(2);
  const DepthArguments depth(tokens, child_start, delta, anchors);
  const Allowed allowed = depth.allowed(sets, set_of, requests);
  const NodeScoreArguments node_scores{base_scores, delta_scores, strengths, strength};
  const StepArguments arguments{depth,     allowed,   nodes,      scores,     log_normalizer,
                                num_beams, normalize, max_degree, node_scores};
  const DeviceGuard guard(h.get_device_index());
  return depth.for_token([&](auto token) {
    const auto step = arguments.step<decltype(token)>(requests, width);
    void* const stream = current_stream(h);
    dgi::cuda::CosineHead head{
        h.const_data_ptr(),     codebook.const_data_ptr(), float_of(h), codes, dim, scale.const_data_ptr<float>(),
        static_cast<float>(eps)};
    NewBeams beams(h, requests, num_beams);
    const int64_t most = std::min(requests, std::max<int64_t>(1, kProducts / std::max<int64_t>(1, width * codes)));
    Tensor scratch = scratch_for(h, most, width, num_beams, max_degree, codes);
    Tensor products = new_on(h, {most * width, codes}, ScalarType::Float);
    const bool wants_all = step.normalize == dgi::Normalize::kFull && !log_normalizer;
    Tensor factors = new_on(h, {wants_all ? codes + requests * width : 0}, ScalarType::Float);
    float* const code_factors = factors.mutable_data_ptr<float>();
    if (wants_all) check_launch(kStep, dgi::cuda::cosine_factors(head, requests * width, code_factors, stream));
    const Tensor rows = torch::stable::view(h, {requests * width, dim});
    const Tensor codebook_t = torch::stable::transpose(codebook, 0, 1);
    in_parts(requests, width * codes, [&](int64_t first, int64_t count) {
      const auto part = step.part(first, count);
      const dgi::cuda::BeamOutput out = beams.pointers<dgi::cuda::BeamOutput>().part(first, num_beams);
      float* const target = products.mutable_data_ptr<float>();
      if (wants_all) {
        Tensor made = torch::stable::narrow(products, 0, 0, count * width);
        if (made.numel() > 0) {
          product(torch::stable::narrow(const_cast<Tensor&>(rows), 0, first * width, count * width), codebook_t, made);
        }
        check_launch(kStep, dgi::cuda::product_beam_step(part, target, codes, code_factors + codes + first * width,
                                                         code_factors, out, scratch.mutable_data_ptr(), stream));
      } else {
        const Tensor own = torch::stable::narrow(const_cast<Tensor&>(rows), 0, first * width, count * width);
        head.h = own.const_data_ptr();
        check_launch(kStep, dgi::cuda::children_beam_step(part, head, target, out, scratch.mutable_data_ptr(), stream));
      }
    });
    return beams.all();
  });
}

std::tuple<Tensor, Tensor, Tensor> rank_candidates_cuda(
    const Tensor& query, const Tensor& item_vectors, int64_t num_nodes, const std::vector<Tensor>& below,
    const std::optional<Tensor>& item_order, const std::optional<Tensor>& item_ids,
    const std::vector<Tensor>& delta_below, const std::optional<Tensor>& delta_order,
    const std::optional<Tensor>& delta_ids, const std::optional<Tensor>& delta_anchors, const std::vector<Tensor>& sets,
    const std::vector<int64_t>& set_of, const Tensor& nodes, const Tensor& scores, int64_t k, double eps, bool by_sum,
    double cosine_weight, bool share) {
  const RankingArguments arguments(query, item_vectors, num_nodes, below, item_order, item_ids, delta_below,
                                   delta_order, delta_ids, delta_anchors, sets, set_of, nodes, k);
  check_devices("rank_candidates", query, item_vectors, below, item_order, item_ids, delta_below, delta_order,
                delta_ids, delta_anchors, sets, nodes, scores);
  const int64_t requests = arguments.requests, width = arguments.width;
  auto in = arguments.input<dgi::cuda::Ranking>(eps, by_sum, cosine_weight, share);
  in.requests = requests, in.dtype = float_of(query);
  in.nodes = view_of<int64_t>(kRank, "nodes", nodes, requests, width);
  in.scores = view_of<float>(kRank, "scores", scores, requests, width);
  const DeviceGuard guard(query.get_device_index());
  Tensor items = new_on(query, {requests, k}, ScalarType::Long);
  Tensor beam_scores = new_on(query, {requests, k}, ScalarType::Float);
  Tensor cosines = new_on(query, {requests, k}, ScalarType::Float);
  const dgi::cuda::RankingOutput out{items.mutable_data_ptr<int64_t>(), beam_scores.mutable_data_ptr<float>(),
                                     cosines.mutable_data_ptr<float>()};
  const size_t bytes = dgi::cuda::ranking_scratch_bytes(requests, width, k);
  Tensor scratch = new_on(query, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check_launch("rank_candidates",
               dgi::cuda::rank_candidates(in, out, scratch.mutable_data_ptr(), current_stream(query)));
  return {items, beam_scores, cosines};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CUDA, m) {
  m.impl("beam_step", TORCH_BOX(&beam_step_cuda));
  m.impl("cosine_beam_step", TORCH_BOX(&cosine_beam_step_cuda));
  m.impl("rank_candidates", TORCH_BOX(&rank_candidates_cuda));
}

}  // namespace dgi::registration
