#pragma once

#include <cstdint>

#include "cpu/beam/beam_cpu.h"
#include "dgi/beam.h"
#include "dgi/convert.h"
#include "dgi/ranking.h"
#include "dgi/trie.h"

namespace dgi::cpu {

// The items of one part of a trie, below one depth.
struct ItemLevels {
  int64_t nodes = 0;             // how many the part has at that depth
  LowerLevels below;             // from that depth down to the ranges of items
  Offsets item_order, item_ids;  // place -> row -> id

  int64_t id(int64_t place) const { return item_ids[item_order[place]]; }
};

// B requests with `width` beams each, and the vectors of all items; a vector's elements are contiguous.
template <class Stored>
struct RankingInput {
  ItemLevels base, delta;  // delta.nodes is 0 where there is none
  Anchors anchors;         // of the delta's nodes
  const AllowedItems* const* allowed;  // (B): null for a request that may find all; null where all may

  int64_t width, k, dim, rows;
  View<int64_t> nodes;  // -1: dead
  View<float> scores;
  const Stored *query, *items;  // (B, dim), (rows, dim)
  int64_t query_stride, item_stride;
  Compute<Stored> eps;
  RankOrder<Compute<Stored>> order;
};

// (B, k) each; the scores of beams, or the sums
template <class Real>
struct RankingOutput {
  int64_t* items;
  float* scores;
  Real* cosines;
};

// Ranks the requests [first, last). False where an item id is no row.
template <class Stored>
bool rank_candidates(const RankingInput<Stored>& in, int64_t first, int64_t last,
                     const RankingOutput<Compute<Stored>>& out);

}  // namespace dgi::cpu
