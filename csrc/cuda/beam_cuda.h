#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/search.h"
#include "dgi/beam.h"
#include "dgi/trie.h"

namespace dgi::cuda {

// B requests of `width` beams each. The arrays of the trie and of the sets are device memory, the table that names the
// latter (`allowed`) host memory.
template <class Token>
struct BeamStep {
  TrieDepth<Token> trie;
  const AllowedItems* const* allowed;  // (B): null for a request that may find all; null where all may

  int64_t requests, width, num_beams;
  int64_t max_degree;  // at least as many as any node of the depth has children; < 0: not known
  View<int64_t> nodes;  // any number that is no node: dead
  View<float> scores;
  View<float> log_normalizer;  // data null where not given
  Normalize normalize;
  NodeScores<float> node_scores;

  // That of `count` requests from `first` on.
  BeamStep part(int64_t first, int64_t count) const {
    BeamStep step = *this;
    step.requests = count;
    step.nodes.data += first * nodes.row_stride, step.scores.data += first * scores.row_stride;
    if (log_normalizer.data != nullptr) step.log_normalizer.data += first * log_normalizer.row_stride;
    if (allowed != nullptr) step.allowed += first;
    if (node_scores.strengths != nullptr) step.node_scores.strengths += first * node_scores.stride;
    return step;
  }
};

// (B, width, codes) of `dtype`
struct Logits {
  const void* data;
  Float dtype;
  int64_t codes, request_stride, beam_stride, code_stride;
};

// h (B, width, dim) and codebook (codes, dim), row-major without gaps: logits = scale h^ . e^, x^ = x / max(||x||,
// eps).
struct CosineHead {
  const void *h, *codebook;
  Float dtype;
  int64_t codes, dim;
  const float* scale;  // device memory
  float eps;
};

// (B, num_beams) each
struct BeamOutput {
  int64_t *nodes, *tokens, *parents;
  float* scores;

  BeamOutput part(int64_t first, int64_t num_beams) const {
    const int64_t at = first * num_beams;
    return {nodes + at, tokens + at, parents + at, scores + at};
  }
};

// What beam_step needs of device memory besides its arguments, for at most so many requests.
size_t beam_scratch_bytes(int64_t requests, int64_t width, int64_t num_beams, int64_t max_degree, int64_t codes);

// Launches the step on `stream` (a cudaStream_t); returns why it cannot be done, or null.
template <class Token>
const char* beam_step(const BeamStep<Token>& step, const Logits& logits, const BeamOutput& out, void* scratch,
                      void* stream);

// Writes the factors of a head's products: the codes' 1 / ||e|| first (codes), then the rows' scale / ||h|| (rows).
const char* cosine_factors(const CosineHead& head, int64_t rows, float* factors, void* stream);

// Does the step for the raw products h . e (B, width, codes), given their factors.
template <class Token>
const char* product_beam_step(const BeamStep<Token>& step, const float* products, int64_t codes,
                              const float* row_factors, const float* code_factors, const BeamOutput& out, void* scratch,
                              void* stream);

// Does the step for a head whose log-sum-exp nobody asks for: only the children's logits are computed. They are left in
// `logits` (B, width, codes), of which nothing else is touched.
template <class Token>
const char* children_beam_step(const BeamStep<Token>& step, const CosineHead& head, float* logits,
                               const BeamOutput& out, void* scratch, void* stream);

}  // namespace dgi::cuda
