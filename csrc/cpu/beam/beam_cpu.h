#pragma once

#include <cstdint>

#include "cpu/trie/trie_cpu.h"
#include "dgi/beam.h"
#include "dgi/convert.h"
#include "dgi/trie.h"

namespace dgi::cpu {

// A (rows, columns) view of numbers.
template <class Real>
struct View {
  const Real* data;
  int64_t row_stride, column_stride;

  const Real& at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};

// B requests of `width` beams each.
template <class Real, class Token>
struct BeamStep {
  TrieDepth<Token> trie;
  const AllowedItems* const* allowed;  // (B): null for a request that may find all; null where all may
  ChildMasks masks;                    // of the base's nodes

  int64_t requests, width, num_beams;
  View<int64_t> nodes;  // -1, or any number that is no node: dead
  View<Real> scores;
  View<Real> log_normalizer;  // data null where not given
  Normalize normalize;
  NodeScores<Real> node_scores;

  // Whether log-probabilities are normalised here, and so at most 0.
  bool normalizes() const { return normalize != Normalize::kNone && log_normalizer.data == nullptr; }
};

// (B, width, codes)
template <class Stored>
struct Logits {
  const Stored* data;
  int64_t codes, request_stride, beam_stride, code_stride;
};

// h (B, width, dim) and codebook (codes, dim), row-major without gaps: logits = scale h^ . e^, x^ = x / max(||x||,
// eps).
template <class Stored>
struct CosineLogits {
  const Stored *h, *codebook;
  int64_t codes, dim;
  Compute<Stored> scale, eps;
};

// (B, num_beams) each
struct BeamOutput {
  int64_t *nodes, *tokens, *parents;
  float* scores;
};

// Does the step for the requests [first, last). Requests are independent. False where one has more candidates than a
// key can number (2^32, float32 only).
template <class Stored, class Token>
bool beam_step(const BeamStep<Compute<Stored>, Token>& step, const Logits<Stored>& logits, int64_t first, int64_t last,
               const BeamOutput& out);

// Does the step for all requests, on torch's threads.
template <class Stored, class Token>
bool cosine_beam_step(const BeamStep<Compute<Stored>, Token>& step, const CosineLogits<Stored>& logits,
                      const BeamOutput& out);

}  // namespace dgi::cpu

// All dtypes of logits with all types of tokens; a test compiles fewer.
#ifndef DGI_FOR_STORED_AND_TOKEN
#define DGI_FOR_STORED_AND_TOKEN(F) \
  F(float, int16_t)                 \
  F(double, int16_t)                \
  F(BFloat16, int16_t) F(Float16, int16_t) F(float, int32_t) F(double, int32_t) F(BFloat16, int32_t) F(Float16, int32_t)
#endif
