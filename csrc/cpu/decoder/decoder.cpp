// A decoder's step on the CPU, all layers for a few beams at a time, so that between two maps nothing leaves the cache.
//
//   x += A_o attention(A_i norm(x); prefix)     x += C_o attention(C_q norm(x); memory)     x += F_o gelu(F_i norm(x))
//
// Beams stand side by side in a panel, one to a lane: an element of a weight, or of a memory's key, is multiplied with
// all beams of the panel at once, norms and softmaxes run over a panel's rows, and nothing is summed across lanes. So
// weights and memory are read where they are, and the memory is never repeated for each beam. Keys and values are kept
// by beams; a prefix is read from where the beam's ancestor left it, so that nothing is moved when beams are reordered.
//
// With D the dimension, a beam costs 4 D^2 (self-attention) + 2 D^2 (cross-attention) + 8 D^2 multiply-adds for each
// layer and the memory's 2 S D. A beam's bits do not depend on which beams share its panel, nor on the threads.
#include "cpu/decoder/decoder_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/panel.h"
#include "dgi/exp.h"

namespace dgi::cpu {
namespace {

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

// What a thread needs for a panel at a time.
struct Scratch {
  Buffer<float> x, normed, wide, ancestor, scores;

  Scratch(const DecoderStep& step, int64_t lanes)
      : x(make_buffer<float>(step.dim * lanes)), normed(make_buffer<float>(step.dim * lanes)),
        wide(make_buffer<float>(widest(step) * lanes)), ancestor(make_buffer<float>(step.dim * lanes)),
        scores(make_buffer<float>(std::max(step.slots, (static_cast<int64_t>(step.past.size()) + 1) * step.heads)
                                  * lanes)) {}

  static int64_t widest(const DecoderStep& step) {
    int64_t most = 3 * step.dim;
    for (const DecoderLayer& layer : step.layers) most = std::max(most, layer.feed_in.out);
    return most;
  }
};

// The rows [first, first + count) of all beams of all requests, through all layers.
template <class Isa, int kOut, int kWidth, int kLanes>
class Panel {
  static constexpr bool kFused = Isa::value;

 public:
  Panel(const DecoderStep& step, int64_t first, int64_t count, Scratch& scratch)
      : step_(step), first_(first), count_(count), dim_(step.dim), head_dim_(step.dim / step.heads),
        factor_(1 / std::sqrt(static_cast<float>(head_dim_))), scratch_(scratch) {}

  DGI_ALWAYS_INLINE inline void run(float* out, float* keys_values) {
    float *const x = scratch_.x.get(), *const normed = scratch_.normed.get(), *const wide = scratch_.wide.get();
    const float* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = step_.states + row(lane) * dim_;
    read_rows<kLanes>(rows, dim_, x);
    const int64_t all = step_.requests * step_.beams;
    for (size_t l = 0; l < step_.layers.size(); ++l) {
      const DecoderLayer& layer = step_.layers[l];
      normalise<kFused, kLanes>(layer.self_norm, step_.eps, dim_, x, normed);
      apply<Isa, Emit::kStore, kOut, kLanes>(layer.self_in, normed, wide);
      write_rows<kLanes>(wide + dim_ * kLanes, 2 * dim_, count_,
                         keys_values + (static_cast<int64_t>(l) * all + first_) * 2 * dim_, 2 * dim_);
      attend_to_prefix(static_cast<int64_t>(l), wide, normed);
      apply<Isa, Emit::kAdd, kOut, kLanes>(layer.self_out, normed, x);
      normalise<kFused, kLanes>(layer.cross_norm, step_.eps, dim_, x, normed);
      apply<Isa, Emit::kStore, kOut, kLanes>(layer.query, normed, wide);
      attend_to_memory(layer.memory, wide, normed);
      apply<Isa, Emit::kAdd, kOut, kLanes>(layer.cross_out, normed, x);
      normalise<kFused, kLanes>(layer.feed_norm, step_.eps, dim_, x, normed);
      apply<Isa, Emit::kGelu, kOut, kLanes>(layer.feed_in, normed, wide);
      apply<Isa, Emit::kAdd, kOut, kLanes>(layer.feed_out, wide, x);
    }
    write_rows<kLanes>(x, dim_, count_, out + first_ * dim_, dim_);
  }

 private:
  // A lane without a beam repeats the last one's.
  DGI_ALWAYS_INLINE inline int64_t row(int lane) const { return first_ + std::min<int64_t>(lane, count_ - 1); }

  // queries_keys_values (3 dim, kLanes) -> out (dim, kLanes)
  DGI_ALWAYS_INLINE inline void attend_to_prefix(int64_t layer, const float* queries_keys_values, float* out) {
    const int64_t past = static_cast<int64_t>(step_.past.size()), heads = step_.heads;
    float *const ancestor = scratch_.ancestor.get(), *const scores =
                                                         scratch_.scores.get();  // (heads, past + 1, kLanes)
    for (int64_t p = 0; p <= past; ++p) {
      const float* keys = queries_keys_values + dim_ * kLanes;
      if (p < past) read_ancestors(step_.past[p], layer, 0, ancestor), keys = ancestor;
      for (int64_t h = 0; h < heads; ++h) {
        float sum[kLanes] = {};
        for (int64_t d = h * head_dim_; d < (h + 1) * head_dim_; ++d) {
#pragma omp simd
          for (int lane = 0; lane < kLanes; ++lane) {
            sum[lane] = multiply_add<kFused>(queries_keys_values[d * kLanes + lane], keys[d * kLanes + lane],
                                             sum[lane]);
          }
        }
        float* const score = scores + (h * (past + 1) + p) * kLanes;
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) score[lane] = factor_ * sum[lane];
      }
    }
    for (int64_t h = 0; h < heads; ++h) softmax<kFused, kLanes>(scores + h * (past + 1) * kLanes, past + 1);
    for (int64_t p = 0; p <= past; ++p) {
      const float* values = queries_keys_values + 2 * dim_ * kLanes;
      if (p < past) read_ancestors(step_.past[p], layer, dim_, ancestor), values = ancestor;
      for (int64_t d = 0; d < dim_; ++d) {
        const float* const weight = scores + (d / head_dim_ * (past + 1) + p) * kLanes;
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
          const float before = p == 0 ? 0 : out[d * kLanes + lane];
          out[d * kLanes + lane] = multiply_add<kFused>(weight[lane], values[d * kLanes + lane], before);
        }
      }
    }
  }

  DGI_ALWAYS_INLINE inline void read_ancestors(const DecoderPosition& position, int64_t layer, int64_t offset,
                                               float* panel) const {
    const float* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t request = row(lane) / step_.beams;
      const int64_t at = (layer * step_.requests + request) * position.beams + position.ancestors[row(lane)];
      rows[lane] = position.keys_values + at * 2 * dim_ + offset;
    }
    read_rows<kLanes>(rows, dim_, panel);
  }

  // queries (dim, kLanes) -> out (dim, kLanes): a register's width of beams of one request at a time
  DGI_ALWAYS_INLINE inline void attend_to_memory(const float* memory, const float* queries, float* out) {
    const int64_t slots = step_.slots;
    float* const scores = scratch_.scores.get();  // (slots, kWidth)
    float* const mixed = scratch_.ancestor.get();  // (head_dim, kWidth)
    for (int64_t begin = 0; begin < count_;) {
      const int64_t request = (first_ + begin) / step_.beams;
      const int64_t end = std::min(count_, (request + 1) * step_.beams - first_);
      const float* const keys = memory + request * slots * 2 * dim_;
      const bool* const mask = step_.mask + request * slots;
      for (int64_t group = begin / kWidth * kWidth; group < end; group += kWidth) {
        const int64_t from = std::max(begin, group) - group, to = std::min(end, group + kWidth) - group;
        for (int64_t h = 0; h < step_.heads; ++h) {
          const int64_t offset = h * head_dim_;
          multiply<Isa, Emit::kStore, kOut, kWidth>({keys + offset, slots, head_dim_, 2 * dim_, 1}, nullptr,
                                                    queries + offset * kLanes + group, kLanes, scores, kWidth);
          for (int64_t s = 0; s < slots; ++s) {
#pragma omp simd
            for (int lane = 0; lane < kWidth; ++lane) {
              scores[s * kWidth + lane] = mask[s] ? factor_ * scores[s * kWidth + lane] : kNone;
            }
          }
          softmax<kFused, kWidth>(scores, slots);
          multiply<Isa, Emit::kStore, kOut, kWidth>({keys + dim_ + offset, head_dim_, slots, 1, 2 * dim_}, nullptr,
                                                    scores, kWidth, mixed, kWidth);
          for (int64_t d = 0; d < head_dim_; ++d) {
            float* const row = out + (offset + d) * kLanes + group;
            std::copy(mixed + d * kWidth + from, mixed + d * kWidth + to, row + from);
          }
        }
      }
      begin = end;
    }
    for (int64_t d = 0; d < dim_; ++d) {  // lanes without a beam must be numbers too
      for (int64_t lane = count_; lane < kLanes; ++lane) out[d * kLanes + lane] = 0;
    }
  }

  const DecoderStep& step_;
  const int64_t first_, count_, dim_, head_dim_;
  const float factor_;
  Scratch& scratch_;
};

}  // namespace

void decoder_step(const DecoderStep& step, float* out, float* keys_values) {
  int64_t lanes = 0;
  with_best_instructions([&](auto fused)
                             DGI_ALWAYS_INLINE { lanes = 2 * fused.kVectorBytes / static_cast<int>(sizeof(float)); });
  const int64_t rows = step.requests * step.beams;
  parallel_for((rows + lanes - 1) / lanes, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(step, lanes);
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      constexpr int kWidth = fused.kVectorBytes / static_cast<int>(sizeof(float));
      constexpr int kOut = fused.kVectorRegisters / 4;  // sums of two registers each: half of all
      for (int64_t begin = first * lanes; begin < std::min(rows, last * lanes); begin += lanes) {
        const int64_t count = std::min(lanes, rows - begin);
        if (count <= kWidth) {
          Panel<decltype(fused), 2 * kOut, kWidth, kWidth>(step, begin, count, scratch).run(out, keys_values);
        } else {
          Panel<decltype(fused), kOut, kWidth, 2 * kWidth>(step, begin, count, scratch).run(out, keys_values);
        }
      }
    });
  });
}

}  // namespace dgi::cpu
