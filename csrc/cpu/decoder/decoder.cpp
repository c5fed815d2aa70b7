// A decoder's step on the CPU, all layers for a few beams at a time, so that between two maps nothing leaves the cache.
//
//   x += A_o attention(A_i norm(x); prefix)     x += C_o attention(C_q norm(x); memory)     x += F_o gelu(F_i norm(x))
//
// Beams stand side by side in a panel, one to a lane (cpu/shared/transformer_panel.h): weights and memory are read
// where they are, and the memory is never repeated for each beam. Keys and values are kept by beams; a prefix is read
// from where the beam's ancestor left it, so that nothing is moved when beams are reordered.
//
// With D the dimension, a beam costs 4 D^2 (self-attention) + 2 D^2 (cross-attention) + 8 D^2 multiply-adds for each
// layer and the memory's 2 S D. A beam's bits do not depend on which beams share its panel, nor on the threads.
#include "cpu/decoder/decoder_cpu.h"

#include <algorithm>
#include <cmath>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/transformer_panel.h"

namespace dgi::cpu {
namespace {

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
      const Attended memory{layer.memory, step_.mask, step_.beams, step_.slots, dim_, step_.heads};
      attend<Isa, kOut, kWidth, kLanes>(memory, first_, count_, wide, scratch_.scores.get(), scratch_.ancestor.get(),
                                        normed);
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
