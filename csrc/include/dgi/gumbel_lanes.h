// One row of a Gumbel-Softmax, shared by `lanes` threads: what one of them does, in C++ or CUDA.
//
//   y_k = (x_k + g_k) / tau,   p = softmax(y),   dL/dx_k = p_k (u_k - sum_i p_i u_i) / tau
//
// A lane takes every lanes-th Philox block, which is four neighbouring codes, and makes their noise again in each pass
// rather than store it. Between passes the lanes' parts are merged: that alone is the caller's, since threads differ in
// how they meet. y and what is known of it are in base 2, so that exponentials and logarithms are one instruction each.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "dgi/convert.h"
#include "dgi/gumbel_log2.h"
#include "dgi/macros.h"
#include "dgi/noise.h"
#include "dgi/philox.h"

namespace dgi {

// What some lanes know of y: its maximum, where it is first reached, and sum_k 2^(y_k - top), NaN where y has one.
struct SoftmaxPart {
  float top = -std::numeric_limits<float>::infinity();
  float total = 0;
  int64_t index = 0;
};

DGI_HOST_DEVICE float exp2_above(float y, float top) {  // a row of -inf alone has no maximum to subtract
  return std::exp2(y - (top == -std::numeric_limits<float>::infinity() ? 0.0f : top));
}

DGI_HOST_DEVICE SoftmaxPart merge(const SoftmaxPart& a, const SoftmaxPart& b) {
  const bool second = b.top > a.top || (b.top == a.top && b.index < a.index);
  const float top = second ? b.top : a.top;
  return {top, a.total * exp2_above(a.top, top) + b.total * exp2_above(b.top, top), second ? b.index : a.index};
}

template <class Stored>
struct GumbelRow {
  const Stored* logits;  // (codes,), of this row
  NoiseShape shape;
  int64_t row;
  PhiloxKey key;
  float inv_tau;

  // Calls visit(k, y_k) for the lane's codes.
  template <class Visit>
  DGI_HOST_DEVICE void walk(int64_t lane, int64_t lanes, const Visit& visit) const {
    for (int64_t block = lane; block < shape.blocks_per_row(); block += lanes) {
      const PhiloxBlock random = philox4x32_10(shape.counter(row, block), key);
      for (int w = 0; w < 4; ++w) {
        const int64_t k = 4 * block + w;
        if (k < shape.codes) visit(k, (load(logits[k]) * kLog2E + gumbel_in_base_2(random.word[w])) * inv_tau);
      }
    }
  }

  DGI_HOST_DEVICE SoftmaxPart part(int64_t lane, int64_t lanes) const {
    SoftmaxPart own;
    walk(lane, lanes, [&](int64_t k, float y) {
      if (y > own.top) own = {y, own.total * exp2_above(own.top, y), k};
      own.total += exp2_above(y, own.top);
    });
    return own;
  }

  // The sample: p, or the one-hot of its maximum; NaN where the row has no softmax.
  DGI_HOST_DEVICE void emit(int64_t lane, int64_t lanes, const SoftmaxPart& whole, bool hard, Stored* out) const {
    const float scale = 1 / whole.total;
    walk(lane, lanes, [&](int64_t k, float y) {
      const float p = exp2_above(y, whole.top) * scale;
      store(hard ? (k == whole.index ? 1.0f : 0.0f) + (scale - scale) : p, out[k]);
    });
  }

  // The lane's part of sum_k p_k u_k.
  DGI_HOST_DEVICE float mean(int64_t lane, int64_t lanes, const SoftmaxPart& whole, const Stored* upstream) const {
    float sum = 0;
    walk(lane, lanes, [&](int64_t k, float y) { sum += exp2_above(y, whole.top) * load(upstream[k]); });
    return sum / whole.total;
  }

  // Writes dL/dx; returns the lane's part of dL/dtau = -sum_k dL/dx_k log p_k.
  DGI_HOST_DEVICE float gradient(int64_t lane, int64_t lanes, const SoftmaxPart& whole, const Stored* upstream,
                                 float mean, Stored* out) const {
    const float log_total = std::log2(whole.total), scale = 1 / whole.total;
    float dtau = 0;
    walk(lane, lanes, [&](int64_t k, float y) {
      const float p = exp2_above(y, whole.top) * scale;
      const float dx = p * (load(upstream[k]) - mean) * inv_tau;
      store(dx, out[k]);
      if (p != 0) dtau -= dx * (y - whole.top - log_total);
    });
    return dtau * kLogE2;
  }
};

}  // namespace dgi
