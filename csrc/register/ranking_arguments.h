// The arguments of rank_candidates, checked and unpacked alike for every device.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "register/tensors.h"
#include "register/trie_arguments.h"

namespace dgi::registration {

constexpr const char* kRank = "dgi_kernels, rank_candidates: ";

// num_nodes: of the base at the beams' depth. below: from there down to items. delta_anchors: of the delta's nodes
// there.
class RankingArguments {
 public:
  RankingArguments(const Tensor& query, const Tensor& item_vectors, int64_t num_nodes, const std::vector<Tensor>& below,
                   const std::optional<Tensor>& item_order, const std::optional<Tensor>& item_ids,
                   const std::vector<Tensor>& delta_below, const std::optional<Tensor>& delta_order,
                   const std::optional<Tensor>& delta_ids, const std::optional<Tensor>& delta_anchors,
                   const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of, const Tensor& nodes, int64_t k)
      : query_(query), item_vectors_(item_vectors), num_nodes_(num_nodes), item_order_(item_order), item_ids_(item_ids),
        delta_order_(delta_order), delta_ids_(delta_ids), delta_anchors_(delta_anchors), k_(k) {
    STD_TORCH_CHECK(query.dim() == 2 && item_vectors.dim() == 2 && query.size(1) == item_vectors.size(1)
                        && query.scalar_type() == item_vectors.scalar_type(),
                    kRank, "query must be (B, D) and item_vectors (rows, D), of one dtype");
    for (const Tensor* vectors : {&query, &item_vectors}) {
      STD_TORCH_CHECK(vectors->numel() == 0 || vectors->size(1) == 1 || vectors->stride(1) == 1, kRank,
                      "vectors must be contiguous");
    }
    STD_TORCH_CHECK(nodes.dim() == 2 && nodes.size(0) == query.size(0), kRank, "nodes must be (B, M)");
    STD_TORCH_CHECK(k >= 1 && num_nodes >= 0, kRank, "k must be at least 1, num_nodes at least 0");
    requests = query.size(0), width = nodes.size(1);
    below_.emplace(below), delta_below_.emplace(delta_below), allowed_.emplace(sets, set_of, requests, 0, 0);
  }

  int64_t requests, width;

  // dgi::cpu::RankingInput or dgi::cuda::Ranking, but for the views of the beams. It points into this.
  template <class Input>
  Input input(double eps, bool by_sum, double cosine_weight, bool share) const {
    Input in{};
    in.order = {by_sum, share, static_cast<decltype(in.eps)>(cosine_weight)};
    in.base = {num_nodes_, below_->levels(), rows_of("item_order", item_order_), offsets_of("item_ids", item_ids_)};
    if (delta_anchors_) {
      in.anchors = anchors_of(*delta_anchors_);
      in.delta = {in.anchors.count, delta_below_->levels(), rows_of("delta_order", delta_order_),
                  offsets_of("delta_ids", delta_ids_)};
    }
    in.allowed = allowed_->of_requests();
    in.width = width, in.k = k_, in.dim = query_.size(1), in.rows = item_vectors_.size(0);
    in.query = static_cast<decltype(in.query)>(query_.const_data_ptr());
    in.items = static_cast<decltype(in.items)>(item_vectors_.const_data_ptr());
    in.query_stride = query_.stride(0), in.item_stride = item_vectors_.stride(0);
    in.eps = static_cast<decltype(in.eps)>(eps);
    return in;
  }

 private:
  const Tensor &query_, &item_vectors_;
  int64_t num_nodes_;
  const std::optional<Tensor>&item_order_, &item_ids_, &delta_order_, &delta_ids_, &delta_anchors_;
  int64_t k_;
  std::optional<Below> below_, delta_below_;  // made once the arguments are checked
  std::optional<Allowed> allowed_;
};

}  // namespace dgi::registration
