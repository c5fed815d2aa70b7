#pragma once

#include <cstdint>

#include "dgi/beam.h"
#include "dgi/convert.h"

namespace dgi::cpu {

// A (rows, columns) view of numbers.
template <class Real>
struct View {
  const Real* data;
  int64_t row_stride, column_stride;

  const Real& at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};

// B requests of `width` beams each, and logits over `codes` codes for every beam.
template <class Stored>
struct BeamStep {
  TrieLevel level;
  LowerLevels lower;
  const int64_t* const* counts;  // (B): of each request's filter, null for none; null where there are no filters

  int64_t width, codes, num_beams;
  View<int64_t> nodes;            // -1, or any number that is no node: dead
  View<Compute<Stored>> scores;
  const Stored* logits;
  int64_t request_stride, beam_stride, code_stride;  // of logits
  View<Compute<Stored>> log_normalizer;              // data null where not given
  Normalize normalize;
};

// (B, num_beams) each
struct BeamOutput {
  int64_t *nodes, *tokens, *parents;
  float* scores;
};

// Does the step for the requests [first, last). Requests are independent. False where one has more candidates than a key
// can number (2^32, float32 only).
template <class Stored>
bool beam_step(const BeamStep<Stored>& step, int64_t first, int64_t last, const BeamOutput& out);

}  // namespace dgi::cpu
