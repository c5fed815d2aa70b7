// Attention with dropout on the CPU for the short sequences that histories and semantic IDs are: all scores of a head
// of a sequence at a time, in the first-level cache. Forward saves nothing; backward makes the probabilities and the
// dropout's words again:
//
//   P = softmax(scale Q K^T)    D = kept factor    out = (P D) V
//   dV = (P D)^T dout           dP = (dout V^T) D  dS = scale P (dP - rowsum(P dP))    dQ = dS K    dK = dS^T Q
//
// Every product multiplies elements of one operand with whole rows of the other (cpu/shared/panel.h). torch has no CPU
// kernel with dropout: it writes scores, probabilities, a mask and their products, each (batch, heads, T, S).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dropout/dropout_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/noise_words.h"
#include "cpu/shared/panel.h"

namespace dgi::cpu {
namespace {

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// One head of one sequence, its rows padded to whole registers. kWidth: floats of a register.
template <bool kFused, int kOut, int kWidth>
class Head {
 public:
  explicit Head(const Attention& in)
      : in_(in), width_(rounded(in.head_dim, kWidth)), lanes_(rounded(in.slots, kWidth)),
        scale_(1 / std::sqrt(static_cast<float>(in.head_dim))), q_(rows(in.queries, width_)),
        dout_(rows(in.queries, width_)), mixed_(rows(std::max(in.queries, in.slots), width_)),
        k_(rows(in.slots, width_)), v_(rows(in.slots, width_)), turned_(rows(in.head_dim, lanes_)),
        p_(rows(in.queries, lanes_)), dropped_(rows(in.queries, lanes_)), dp_(rows(in.queries, lanes_)),
        words_(make_buffer<uint32_t>(room_for_words(in.dropped.shape, in.queries))) {}

  DGI_ALWAYS_INLINE inline void forward(int64_t sequence, int64_t head, float* out) {
    load(sequence, head);
    probabilities(sequence, head);
    multiply(dropped_.get(), lanes_, 1, in_.queries, in_.slots, v_.get(), width_, mixed_.get());
    const int64_t stride = in_.heads * in_.head_dim;
    store(mixed_.get(), in_.queries, out + sequence * in_.queries * stride + head * in_.head_dim, stride);
  }

  DGI_ALWAYS_INLINE inline void backward(int64_t sequence, int64_t head, const float* dout, float* dq, float* dk,
                                         float* dv) {
    load(sequence, head);
    probabilities(sequence, head);
    const int64_t T = in_.queries, S = in_.slots, stride = in_.heads * in_.head_dim, at = head * in_.head_dim;
    pad(dout + sequence * T * stride + at, stride, T, dout_.get());
    multiply(dropped_.get(), 1, lanes_, S, T, dout_.get(), width_, mixed_.get());
    store(mixed_.get(), S, dv + sequence * S * in_.kv_stride + at, in_.kv_stride);
    turn(v_.get());
    multiply(dout_.get(), width_, 1, T, in_.head_dim, turned_.get(), lanes_, dp_.get());
    through_softmax();
    multiply(dp_.get(), lanes_, 1, T, S, k_.get(), width_, mixed_.get());
    store(mixed_.get(), T, dq + sequence * T * in_.q_stride + at, in_.q_stride);
    multiply(dp_.get(), 1, lanes_, S, T, q_.get(), width_, mixed_.get());
    store(mixed_.get(), S, dk + sequence * S * in_.kv_stride + at, in_.kv_stride);
  }

 private:
  static Buffer<float> rows(int64_t count, int64_t width) { return make_buffer<float>(count * width); }

  DGI_ALWAYS_INLINE inline void load(int64_t sequence, int64_t head) {
    const int64_t at = head * in_.head_dim;
    pad(in_.q + sequence * in_.queries * in_.q_stride + at, in_.q_stride, in_.queries, q_.get());
    pad(in_.k + sequence * in_.slots * in_.kv_stride + at, in_.kv_stride, in_.slots, k_.get());
    pad(in_.v + sequence * in_.slots * in_.kv_stride + at, in_.kv_stride, in_.slots, v_.get());
    turn(k_.get());
  }

  // out (count, width_) = rows of head_dim numbers, `stride` apart, and zeros
  DGI_ALWAYS_INLINE inline void pad(const float* from, int64_t stride, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i) {
      std::copy(from + i * stride, from + i * stride + in_.head_dim, out + i * width_);
      std::fill(out + i * width_ + in_.head_dim, out + (i + 1) * width_, 0.0f);
    }
  }

  DGI_ALWAYS_INLINE inline void store(const float* from, int64_t count, float* out, int64_t stride) const {
    for (int64_t i = 0; i < count; ++i)
      std::copy(from + i * width_, from + i * width_ + in_.head_dim, out + i * stride);
  }

  // turned_ (head_dim, lanes_) = transposed (slots, width_), and zeros
  DGI_ALWAYS_INLINE inline void turn(const float* from) {
    for (int64_t d = 0; d < in_.head_dim; ++d) {
      float* const row = turned_.get() + d * lanes_;
      for (int64_t s = 0; s < in_.slots; ++s) row[s] = from[s * width_ + d];
      std::fill(row + in_.slots, row + lanes_, 0.0f);
    }
  }

  // out (rows, lanes) = matrix (rows, in) panel (in, lanes)
  DGI_ALWAYS_INLINE inline void multiply(const float* matrix, int64_t row_stride, int64_t column_stride, int64_t rows,
                                         int64_t in, const float* panel, int64_t lanes, float* out) const {
    int64_t lane = 0;
    for (; lane + 2 * kWidth <= lanes; lane += 2 * kWidth) {
      products<kFused, Emit::kStore, kOut, 2 * kWidth>(matrix, row_stride, column_stride, nullptr, rows, in,
                                                       panel + lane, lanes, out + lane, lanes);
    }
    for (; lane < lanes; lane += kWidth) {
      products<kFused, Emit::kStore, 2 * kOut, kWidth>(matrix, row_stride, column_stride, nullptr, rows, in,
                                                       panel + lane, lanes, out + lane, lanes);
    }
  }

  // p_ and dropped_ (queries, lanes_); 0 in a row that sees nothing.
  DGI_ALWAYS_INLINE inline void probabilities(int64_t sequence, int64_t head) {
    const int64_t T = in_.queries, first = (sequence * in_.heads + head) * T;
    multiply(q_.get(), width_, 1, T, in_.head_dim, turned_.get(), lanes_, p_.get());
    const NoiseShape& shape = in_.dropped.shape;
    fill_words(shape, philox_key(in_.dropped.seed), first, T, words_.get());
    const bool* const mask = in_.mask == nullptr ? nullptr : in_.mask + sequence * in_.slots;
    for (int64_t t = 0; t < T; ++t) {
      float *const p = p_.get() + t * lanes_, *const dropped = dropped_.get() + t * lanes_;
      const int64_t seen = in_.causal ? std::min(t + 1, in_.slots) : in_.slots;
      constexpr float kNone = -std::numeric_limits<float>::infinity();
      for (int64_t s = 0; s < seen; ++s) p[s] = mask == nullptr || mask[s] ? p[s] * scale_ : kNone;
      std::fill(p + seen, p + lanes_, kNone);
      float largest = kNone, sum = 0;
      for (int64_t s = 0; s < seen; ++s) largest = p[s] > largest ? p[s] : largest;
      if (largest == kNone) largest = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t s = 0; s < lanes_; ++s) {
        p[s] = exponential_or_zero<kFused>(p[s] - largest);
        sum += p[s];
      }
      const float share = sum == 0 ? 0 : 1 / sum, factor = in_.dropped.factor;
      const uint32_t* const words = words_.get() + t * words_per_row(shape);
      const uint32_t threshold = in_.dropped.threshold;
#pragma omp simd
      for (int64_t s = 0; s < in_.slots; ++s) {
        p[s] *= share;
        dropped[s] = words[s] >= threshold ? factor * p[s] : 0.0f;
      }
      std::fill(dropped + in_.slots, dropped + lanes_, 0.0f);
    }
  }

  // dp_ = scale P (dP - rowsum(P dP)), dP = dp_ where kept, times the factor
  DGI_ALWAYS_INLINE inline void through_softmax() {
    for (int64_t t = 0; t < in_.queries; ++t) {
      const float *const p = p_.get() + t * lanes_, *const dropped = dropped_.get() + t * lanes_;
      float *const dp = dp_.get() + t * lanes_, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t s = 0; s < lanes_; ++s) sum += dropped[s] * dp[s];  // P D (dout V^T)
#pragma omp simd
      for (int64_t s = 0; s < lanes_; ++s) dp[s] = scale_ * (dropped[s] * dp[s] - p[s] * sum);
    }
  }

  const Attention& in_;
  const int64_t width_, lanes_;
  const float scale_;
  Buffer<float> q_, dout_, mixed_, k_, v_, turned_, p_, dropped_, dp_;
  Buffer<uint32_t> words_;
};

// Calls body(head of one sequence's worker, sequence, head) for all of them.
template <class Body>
void for_each_head(const Attention& in, const Body& body) {
  parallel_for(in.batch, grain(in.heads * in.queries * in.slots), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      constexpr int kWidth = fused.kVectorBytes / static_cast<int>(sizeof(float));
      Head<fused.value, fused.kVectorRegisters / 4, kWidth> worker(in);
      for (int64_t sequence = first; sequence < last; ++sequence) {
        for (int64_t head = 0; head < in.heads; ++head) body(worker, sequence, head);
      }
    });
  });
}

}  // namespace

void attention(const Attention& in, float* out) {
  for_each_head(in, [&](auto& worker, int64_t sequence, int64_t head)
                        DGI_ALWAYS_INLINE { worker.forward(sequence, head, out); });
}

void attention_backward(const Attention& in, const float* dout, float* dq, float* dk, float* dv) {
  for_each_head(in, [&](auto& worker, int64_t sequence, int64_t head)
                        DGI_ALWAYS_INLINE { worker.backward(sequence, head, dout, dq, dk, dv); });
}

}  // namespace dgi::cpu
