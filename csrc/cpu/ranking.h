#pragma once

#include <cstdint>

#include "beam.h"
#include "dgi/beam.h"
#include "dgi/convert.h"

namespace dgi::cpu {

// B requests with `width` beams each, and the vectors of all items; a vector's elements are contiguous.
template <class Stored>
struct RankingInput {
  LowerLevels lower;  // from the beams' depth down to the ranges of items
  const int64_t *item_order, *item_ids;
  const bool* const* allowed;  // (B): of each request's filter, by leaf order, null for none; null without filters

  int64_t width, k, dim, rows;
  View<int64_t> nodes;  // -1: dead
  View<float> scores;
  const Stored *query, *items;  // (B, dim), (rows, dim)
  int64_t query_stride, item_stride;
  Compute<Stored> eps;
};

// (B, k) each
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
