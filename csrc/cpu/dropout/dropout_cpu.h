// Dropout whose mask is a function of seed and place: element (n, k) is kept where its uniform word is at least
// `threshold`, and then multiplied by `factor`.
#pragma once

#include <cstdint>

#include "dgi/noise.h"

namespace dgi::cpu {

constexpr uint32_t kStreamDropout = 3, kStreamAttention = 4;  // of the noise, as dgi_kernels/noise.py has them

struct Dropped {
  NoiseShape shape;
  int64_t seed;
  uint32_t threshold;
  float factor;
};

// out = x where kept, times the factor, + residual where there is one; all (rows, codes).
void dropout(const Dropped& mask, const float* x, const float* residual, float* out);

// softmax(scale Q K^T), with dropout, times V, for each head of each of `batch` sequences. Rows of a sequence are
// `..._stride` apart, those of sequences follow each other. Element s of query t of head h of sequence b is element s
// of the mask's row (b heads + h) queries + t.
struct Attention {
  int64_t batch, heads, queries, slots, head_dim;
  const float *q, *k, *v;
  int64_t q_stride, kv_stride;
  const bool* mask;  // (batch, slots), false where a slot is padding; or null
  bool causal;  // query t sees the slots up to t
  Dropped dropped;
};

void attention(const Attention& in, float* out);

// dq, dk and dv have the strides of q, k and v.
void attention_backward(const Attention& in, const float* dout, float* dq, float* dk, float* dv);

}  // namespace dgi::cpu
