// A pre-norm transformer encoder over the padded sequences of some requests.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/shared/transformer.h"

namespace dgi::cpu {

struct EncoderLayer {
  LayerNorm self_norm;
  LinearMap query, key_value, self_out;
  LayerNorm feed_norm;
  LinearMap feed_in, feed_out;
};

struct Sequences {
  int64_t requests, length, dim, heads;
  float eps;  // of the norms
  const float* states;  // (requests, length, dim)
  const bool* mask;  // (requests, length): false where a place is padding
};

// `states` as the last layer leaves them, (requests, length, dim).
void encoder_layers(const Sequences& sequences, const std::vector<EncoderLayer>& layers, float* out);

}  // namespace dgi::cpu
