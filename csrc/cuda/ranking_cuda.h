#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/search.h"
#include "dgi/ranking.h"
#include "dgi/trie.h"

namespace dgi::cuda {

// The items of one part of a trie, below one depth; the arrays are device memory, the table of levels host memory.
struct ItemLevels {
  int64_t nodes = 0;             // how many the part has at that depth
  LowerLevels below;             // from that depth down to the ranges of items
  Offsets item_order, item_ids;  // place -> row -> id

  DGI_HOST_DEVICE int64_t id(int64_t place) const { return item_ids[item_order[place]]; }
};

// B requests with `width` beams each, and the vectors of all items; a vector's elements are contiguous.
struct Ranking {
  ItemLevels base, delta;  // delta.nodes is 0 where there is none
  Anchors anchors;         // of the delta's nodes
  const AllowedItems* const* allowed;  // (B), host memory: null for a request that may find all; null where all may

  int64_t requests, width, k, dim, rows;
  View<int64_t> nodes;  // any number that is no node: dead
  View<float> scores;
  const void *query, *items;  // (B, dim), (rows, dim), of one dtype
  Float dtype;
  int64_t query_stride, item_stride;
  float eps;
  RankOrder<float> order;
};

// (B, k) each
struct RankingOutput {
  int64_t* items;
  float *scores, *cosines;
};

// What rank_candidates needs of device memory besides its arguments.
size_t ranking_scratch_bytes(int64_t requests, int64_t width, int64_t k);

// Launches the ranking on `stream` (a cudaStream_t); returns why it cannot be done, or null.
const char* rank_candidates(const Ranking& in, const RankingOutput& out, void* scratch, void* stream);

}  // namespace dgi::cuda
