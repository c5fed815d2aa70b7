// What layers of a transformer are made of on the CPU, for a panel of rows that stand side by side, one to a lane.
//
// An element of a weight, or of a key, is multiplied with all rows of the panel at once, norms and softmaxes run over a
// panel's rows, and nothing is summed across lanes. So weights are read where they are, and a row's bits do not depend
// on which rows share its panel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/panel.h"
#include "cpu/shared/transformer.h"
#include "dgi/exp.h"

namespace dgi::cpu {

struct Strided {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

constexpr float kNone = -std::numeric_limits<float>::infinity();

// products(), by the instructions that are `Isa`. Compiled by itself: in the midst of other code the sums do not stay
// in registers.
template <class Isa, Emit kEmit, int kOut, int kLanes>
DGI_NEVER_INLINE void multiply(const Strided& matrix, const float* bias, const float* panel, int64_t panel_stride,
                               float* out, int64_t out_stride) {
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
    if constexpr (std::is_same_v<decltype(fused), Isa>) {
      products<Isa::value, kEmit, kOut, kLanes>(matrix.data, matrix.row_stride, matrix.column_stride, bias, matrix.rows,
                                                matrix.columns, panel, panel_stride, out, out_stride);
    }
  });
}

template <class Isa, Emit kEmit, int kOut, int kLanes>
DGI_ALWAYS_INLINE inline void apply(const LinearMap& map, const float* panel, float* out) {
  multiply<Isa, kEmit, kOut, kLanes>({map.weight, map.out, map.in, map.in, 1}, map.bias, panel, kLanes, out, kLanes);
}

template <bool kFused, int kLanes>
DGI_ALWAYS_INLINE inline void normalise(const LayerNorm& norm, float eps, int64_t dim, const float* x, float* out) {
  float mean[kLanes] = {}, square[kLanes] = {}, factor[kLanes];
  const float share = 1.0f / static_cast<float>(dim);
  for (int64_t d = 0; d < dim; ++d) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) mean[lane] += x[d * kLanes + lane];
  }
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) mean[lane] *= share;
  for (int64_t d = 0; d < dim; ++d) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float centred = x[d * kLanes + lane] - mean[lane];
      square[lane] = multiply_add<kFused>(centred, centred, square[lane]);
    }
  }
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane)
    factor[lane] = 1 / std::sqrt(multiply_add<kFused>(square[lane], share, eps));
  for (int64_t d = 0; d < dim; ++d) {
    const float weight = norm.weight[d], bias = norm.bias[d];
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      out[d * kLanes + lane] = multiply_add<kFused>((x[d * kLanes + lane] - mean[lane]) * factor[lane], weight, bias);
    }
  }
}

// `scores` (count, kLanes) become their softmax over `count`; 0 where all are -inf.
template <bool kFused, int kLanes>
DGI_ALWAYS_INLINE inline void softmax(float* scores, int64_t count) {
  float largest[kLanes], sum[kLanes] = {};
  std::fill(largest, largest + kLanes, kNone);
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) largest[lane] = std::max(largest[lane], scores[i * kLanes + lane]);
  }
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) largest[lane] = largest[lane] == kNone ? 0 : largest[lane];
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float e = exponential_or_zero<kFused>(scores[i * kLanes + lane] - largest[lane]);
      scores[i * kLanes + lane] = e;
      sum[lane] += e;
    }
  }
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = sum[lane] == 0 ? 0 : 1 / sum[lane];
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) scores[i * kLanes + lane] *= sum[lane];
  }
}

typedef float Four __attribute__((vector_size(16), aligned(4)));

DGI_ALWAYS_INLINE inline void transpose(const Four (&in)[4], Four (&out)[4]) {
  const Four low0 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  const Four low2 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const Four high0 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const Four high2 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(low0, low2, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(low0, low2, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(high0, high2, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(high0, high2, 2, 3, 6, 7);
}

// panel (dim, kLanes) = one row of `dim` numbers for each lane
template <int kLanes>
DGI_ALWAYS_INLINE inline void read_rows(const float* const (&rows)[kLanes], int64_t dim, float* panel) {
  for (int lane = 0; lane < kLanes; lane += 4) {
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) {
      Four in[4], out[4];
      for (int i = 0; i < 4; ++i) in[i] = *reinterpret_cast<const Four*>(rows[lane + i] + d);
      transpose(in, out);
      for (int i = 0; i < 4; ++i) *reinterpret_cast<Four*>(panel + (d + i) * kLanes + lane) = out[i];
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < 4; ++i) panel[d * kLanes + lane + i] = rows[lane + i][d];
    }
  }
}

// The first `count` lanes of a panel (dim, kLanes) to as many rows, `stride` apart.
template <int kLanes>
DGI_ALWAYS_INLINE inline void write_rows(const float* panel, int64_t dim, int64_t count, float* rows, int64_t stride) {
  int64_t lane = 0;
  for (; lane + 4 <= count; lane += 4) {
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) {
      Four in[4], out[4];
      for (int i = 0; i < 4; ++i) in[i] = *reinterpret_cast<const Four*>(panel + (d + i) * kLanes + lane);
      transpose(in, out);
      for (int i = 0; i < 4; ++i) *reinterpret_cast<Four*>(rows + (lane + i) * stride + d) = out[i];
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < 4; ++i) rows[(lane + i) * stride + d] = panel[d * kLanes + lane + i];
    }
  }
  for (; lane < count; ++lane) {
    for (int64_t d = 0; d < dim; ++d) rows[lane * stride + d] = panel[d * kLanes + lane];
  }
}

// What the rows of a request attend to: `slots` keys and values, those of a slot one after the other.
struct Attended {
  const float* keys_values;  // (requests, slots, 2 dim)
  const bool* mask;  // (requests, slots): false where a slot is padding
  int64_t rows, slots, dim, heads;  // `rows` of each request
};

// queries (dim, kLanes) of the rows [first, first + count) of all requests -> out (dim, kLanes), 0 in lanes without a
// row and where a request has no slot; a register's width of rows of one request at a time. `scores` (slots, kWidth)
// and `mixed` (dim / heads, kWidth) are scratch.
template <class Isa, int kOut, int kWidth, int kLanes>
DGI_ALWAYS_INLINE inline void attend(const Attended& to, int64_t first, int64_t count, const float* queries,
                                     float* scores, float* mixed, float* out) {
  const int64_t head_dim = to.dim / to.heads;
  const float factor = 1 / std::sqrt(static_cast<float>(head_dim));
  for (int64_t begin = 0; begin < count;) {
    const int64_t request = (first + begin) / to.rows;
    const int64_t end = std::min(count, (request + 1) * to.rows - first);
    const float* const keys = to.keys_values + request * to.slots * 2 * to.dim;
    const bool* const mask = to.mask + request * to.slots;
    for (int64_t group = begin / kWidth * kWidth; group < end; group += kWidth) {
      const int64_t from = std::max(begin, group) - group, until = std::min(end, group + kWidth) - group;
      for (int64_t h = 0; h < to.heads; ++h) {
        const int64_t offset = h * head_dim;
        multiply<Isa, Emit::kStore, kOut, kWidth>({keys + offset, to.slots, head_dim, 2 * to.dim, 1}, nullptr,
                                                  queries + offset * kLanes + group, kLanes, scores, kWidth);
        for (int64_t s = 0; s < to.slots; ++s) {
#pragma omp simd
          for (int lane = 0; lane < kWidth; ++lane) {
            scores[s * kWidth + lane] = mask[s] ? factor * scores[s * kWidth + lane] : kNone;
          }
        }
        softmax<Isa::value, kWidth>(scores, to.slots);
        multiply<Isa, Emit::kStore, kOut, kWidth>({keys + to.dim + offset, head_dim, to.slots, 1, 2 * to.dim}, nullptr,
                                                  scores, kWidth, mixed, kWidth);
        for (int64_t d = 0; d < head_dim; ++d) {
          float* const row = out + (offset + d) * kLanes + group;
          std::copy(mixed + d * kWidth + from, mixed + d * kWidth + until, row + from);
        }
      }
    }
    begin = end;
  }
  for (int64_t d = 0; d < to.dim; ++d) {  // lanes without a row must be numbers too
    for (int64_t lane = count; lane < kLanes; ++lane) out[d * kLanes + lane] = 0;
  }
}

}  // namespace dgi::cpu
