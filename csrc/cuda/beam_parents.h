// First kernel of a beam step: a block a beam finds its children, and the log-sum-exp of its logits, read once.
//
//   log p(k) = x_k - log sum_j exp x_j,   j over all codes, or over the children that are allowed
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/beam_cuda.h"
#include "cuda/block.h"
#include "cuda/device.h"
#include "dgi/convert.h"

namespace dgi::cuda {

constexpr int kRowThreads = 512;  // at most
constexpr int kUnroll = 8;  // logits that a thread has under way
constexpr int kPacks = 2;  // the same, in loads of 16 bytes
constexpr float kDead = -std::numeric_limits<float>::infinity();

// A beam, as the second kernel wants it: counts are 0 where it is dead.
struct Parent {
  int64_t base_first, delta_first;  // of its children
  uint32_t base_count, delta_count;
  float score;
  Normalizer<float> normalizer;

  DGI_HOST_DEVICE uint32_t count() const { return base_count + delta_count; }
  DGI_HOST_DEVICE Range base() const { return {base_first, base_first + base_count}; }
  DGI_HOST_DEVICE Range delta() const { return {delta_first, delta_first + delta_count}; }
};

// The logits of one beam.
template <class Stored, bool kScaled>
struct LogitRow {
  const Stored* data;
  int64_t codes, stride;
  float factor;
  const float* code_factors;

  // As it is, be it infinite or no number.
  DGI_HOST_DEVICE float raw(int64_t code) const { return scaled(load(data[code * stride]), code); }
  DGI_HOST_DEVICE float scaled(float x, int64_t code) const { return kScaled ? x * factor * code_factors[code] : x; }
  DGI_HOST_DEVICE float at(int64_t code) const { return code < codes ? finite_or_dead(raw(code)) : kDead; }
};

// (requests, width, codes); scaled: those of a head, as raw products with a factor for each row and each code.
template <class Stored, bool kScaled = false>
struct LogitRows {
  const Stored* data;
  int64_t width, codes, request_stride, beam_stride, code_stride;
  const float *row_factors, *code_factors;  // (requests * width), (codes)

  DGI_HOST_DEVICE LogitRow<Stored, kScaled> row(int64_t request, int64_t beam) const {
    return {data + request * request_stride + beam * beam_stride, codes, code_stride,
            kScaled ? row_factors[request * width + beam] : 1, code_factors};
  }
};

// A step as the kernels take it, for the requests from `first` on.
template <class Token>
struct StepView {
  TrieDepth<Token> trie;
  int64_t first, width, num_beams;
  View<int64_t> nodes;
  View<float> scores, log_normalizer;
  Normalize normalize;
  NodeScores<float> node_scores;
  Parent* parents;  // (requests, width), all of them

  // A beam but for its normaliser; without children where it is dead.
  __device__ Parent parent(int64_t request, int64_t beam) const {
    const int64_t node = nodes.at(request, beam);
    const float score = finite_or_dead(scores.at(request, beam));
    if (node < 0 || node >= trie.end() || score == kDead) return {};
    const Children found = trie.children_of(node);
    return {found.base.first,
            found.delta.first,
            static_cast<uint32_t>(found.base.size()),
            static_cast<uint32_t>(found.delta.size()),
            score,
            {}};
  }

  DGI_HOST_DEVICE bool is_given() const { return log_normalizer.data != nullptr; }
  DGI_HOST_DEVICE Normalizer<float> given(int64_t request, int64_t beam) const {
    const float value = log_normalizer.at(request, beam);
    return value - value == 0 ? Normalizer<float>{value, 0} : Normalizer<float>{0, -kDead};  // no child survives
  }
};

// sum exp(x - maximum), the maximum that of the x so far. No branch by logit: fmaxf passes over
// NaN, and saturation, to [0, 1], makes 0 of the exponential of NaN and 1 of that of +inf, which counts as the largest
// number. The fast exponential errs most where the terms are least: 4e-7 of the sum at most.
struct RunningSum {
  float maximum = kDead, sum = 0;

  template <int kCount>
  __device__ void add(const float (&x)[kCount]) {
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    largest = fminf(largest, std::numeric_limits<float>::max());
    if (largest > maximum) {
      sum *= fast_exp(maximum - largest);
      maximum = largest;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += __saturatef(fast_exp(x[i] - maximum));
  }

  __device__ Normalizer<float> normalizer() const {
    if (maximum == kDead) return {0, -kDead};  // no code has a probability
    return {maximum, logf(sum)};
  }
};

__device__ inline RunningSum merge(const RunningSum& a, const RunningSum& b) {
  if (a.maximum == kDead) return b;
  if (b.maximum == kDead) return a;
  const float maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
  return {maximum, a.sum * fast_exp(a.maximum - maximum) + b.sum * fast_exp(b.maximum - maximum)};
}

// Whether an allowed item lies below a child, for one of the launch's requests.
template <class Token, class Sets>
__device__ __forceinline__ bool is_allowed(const TrieDepth<Token>& trie, const Sets& sets, int64_t request,
                                           int64_t child, bool in_delta) {
  return trie.is_allowed(sets.of(request), child, in_delta);
}

// 16 bytes of a row's logits.
template <class Stored>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(Stored);

  Stored values[kCount];
};

// The thread's share of the log-sum-exp over all codes.
template <class Row>
__device__ RunningSum sum_of_codes(const Row& row) {
  using Packed = Pack<std::remove_const_t<std::remove_pointer_t<decltype(row.data)>>>;
  constexpr int kCount = Packed::kCount;
  RunningSum own;
  const int64_t threads = blockDim.x;
  int64_t code = threadIdx.x;
  if (row.stride == 1 && reinterpret_cast<uintptr_t>(row.data) % sizeof(Packed) == 0) {
    const Packed* const packs = reinterpret_cast<const Packed*>(row.data);
    const int64_t count = row.codes / (kPacks * kCount);
    for (int64_t i = threadIdx.x; i < count; i += threads) {
      Packed read[kPacks];
#pragma unroll
      for (int j = 0; j < kPacks; ++j) read[j] = packs[i + j * count];
      float x[kPacks * kCount];
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          x[j * kCount + k] = row.scaled(load(read[j].values[k]), (i + j * count) * kCount + k);
        }
      }
      own.add(x);
    }
    code += count * kPacks * kCount;
  }
  for (; code + (kUnroll - 1) * threads < row.codes; code += kUnroll * threads) {
    float x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) x[i] = row.raw(code + i * threads);
    own.add(x);
  }
#pragma unroll 1
  for (; code < row.codes; code += threads) {
    const float x[1] = {row.raw(code)};
    own.add(x);
  }
  return own;
}

// Calls use(token) for those of the children number `first`, `first + stride`, ... that are allowed and continue by a
// code. Twins are the base's.
template <class Token, class Sets, class Use>
__device__ void for_children(const TrieDepth<Token>& trie, const Parent& parent, const Sets& sets, int64_t request,
                             uint32_t first, uint32_t stride, const Use& use) {
  for (uint32_t i = first; i < parent.count(); i += stride) {
    const bool in_delta = i >= parent.base_count;
    const int64_t child = in_delta ? parent.delta_first + (i - parent.base_count) : parent.base_first + i;
    if (in_delta && trie.children.has_twin(child)) continue;
    const int32_t token = (in_delta ? trie.delta : trie.base).tokens[child];
    if (token != kEndToken && is_allowed(trie, sets, request, child, in_delta)) use(token);
  }
}

__device__ inline Normalizer<float> normalizer_of(const RunningSum& own) {
  return combine_block(own, [](const RunningSum& a, const RunningSum& b) { return merge(a, b); }).normalizer();
}

template <class Rows, class Token, class Sets>
__global__ void __launch_bounds__(kRowThreads, 1)
    parents_kernel(const __grid_constant__ StepView<Token> step, const __grid_constant__ Rows logits,
                   const __grid_constant__ Sets sets) {
  const int64_t in_launch = blockIdx.x / step.width, request = step.first + in_launch, beam = blockIdx.x % step.width;
  Parent parent = step.parent(request, beam);
  if (parent.count() > 0) {  // one decision for the block
    if (step.is_given()) {
      parent.normalizer = step.given(request, beam);
    } else if (step.normalize == Normalize::kFull) {
      parent.normalizer = normalizer_of(sum_of_codes(logits.row(request, beam)));
    } else if (step.normalize == Normalize::kChildren) {
      const auto row = logits.row(request, beam);
      RunningSum own;
      for_children(step.trie, parent, sets, in_launch, threadIdx.x, blockDim.x, [&](int32_t token) {
        const float x[1] = {row.at(token)};
        own.add(x);
      });
      parent.normalizer = normalizer_of(own);
    }
  }
  if (threadIdx.x == 0) step.parents[request * step.width + beam] = parent;
}

}  // namespace dgi::cuda
