// One step of a pre-norm transformer decoder for the beams of a search, given what the positions before have left.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/shared/transformer.h"

namespace dgi::cpu {

struct DecoderLayer {
  LayerNorm self_norm;
  LinearMap self_in, self_out;  // to queries, keys and values one after the other; and back
  LayerNorm cross_norm;
  LinearMap query, cross_out;
  LayerNorm feed_norm;
  LinearMap feed_in, feed_out;
  const float* memory;  // (requests, slots, 2 dim): the keys and the values of a slot
};

// A position before this one: what its beams have left, and which of them each beam of today descends from.
struct DecoderPosition {
  const float* keys_values;  // (layers, requests, beams, 2 dim)
  int64_t beams;
  const int64_t* ancestors;  // (requests, beams of this step), each in [0, beams)
};

struct DecoderStep {
  int64_t requests, beams, dim, heads, slots;
  float eps;  // of the norms
  const float* states;  // (requests, beams, dim)
  const bool* mask;  // (requests, slots): false where a slot is padding
  std::vector<DecoderLayer> layers;
  std::vector<DecoderPosition> past;
};

// `states` as the last layer leaves them, (requests, beams, dim), and (layers, requests, beams, 2 dim) keys and values
// for the steps after this one.
void decoder_step(const DecoderStep& step, float* out, float* keys_values);

}  // namespace dgi::cpu
