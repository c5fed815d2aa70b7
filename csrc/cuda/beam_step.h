// The kernels of a beam step, for logits that are given (beam.cu) or made of a head (cosine_beam.cu).
//
//   parents_kernel, a block a beam: its children, and the log-sum-exp of its logits, which it reads once.
//   select_kernel, a block a request: the best num_beams of the children of its beams, by radix select, sorted.
//
// Candidates are numbered through by parent: thread t takes numbers t, t + 512, ..., so that work is balanced whatever
// the degrees, and only real children are visited. Score and number make one key of 64 bits (dgi/beam.h), the lower the
// better. A thread holds its first eight keys in registers; those beyond 4096 candidates are made again a pass.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/beam_cuda.h"
#include "cuda/block.h"
#include "cuda/device.h"
#include "cuda/select.h"
#include "dgi/convert.h"

namespace dgi::cuda {

constexpr int kRowThreads = 512;  // at most
constexpr int kUnroll = 8;  // logits that a thread has under way
constexpr int64_t kSharedWidth = 1024, kSharedBeams = 1024;  // wider steps keep keys and starts in global memory
constexpr uint32_t kSharedRoom = 2 * kSharedBeams;
constexpr float kDead = -std::numeric_limits<float>::infinity();

using Candidate = CandidateKey<float>;

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
  DGI_HOST_DEVICE float raw(int64_t code) const {
    const float x = load(data[code * stride]);
    return kScaled ? x * factor * code_factors[code] : x;
  }
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

// The thread's share of the log-sum-exp over all codes.
template <class Row>
__device__ RunningSum sum_of_codes(const Row& row) {
  RunningSum own;
  const int64_t threads = blockDim.x;
  int64_t code = threadIdx.x;
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

// The last place of the ascending starts (count + 1) that is not beyond i; starts[0] <= i < starts[count].
template <class Starts>
__device__ uint32_t run_of(Starts starts, int64_t count, uint32_t i) {
  uint32_t low = 0, high = static_cast<uint32_t>(count);
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const uint32_t start = starts[middle];
    if (start <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The candidates of one request: starts[m] is the number of the first child of beam m, starts[width] that of all.
template <class Rows, class Token, class Sets, class Starts>
struct Candidates {
  const TrieDepth<Token>& trie;
  const Rows& logits;
  const Sets& sets;
  const NodeScores<float>& node_scores;
  const Parent* parents;
  int64_t request, width;
  Starts starts;

  // The key of candidate i, kNoKey where it is not allowed. Its slot counts the children of a parent by token, those of
  // base and delta merged; it need not be i where there is a delta.
  __device__ uint64_t key(uint32_t i) const {
    const uint32_t beam = run_of(starts, width, i), start = starts[beam];
    const Parent& parent = parents[beam];
    uint32_t place = i - start;
    const bool in_delta = place >= parent.base_count;
    if (in_delta) place -= parent.base_count;
    const int64_t child = (in_delta ? parent.delta_first : parent.base_first) + place;
    if (in_delta && trie.children.has_twin(child)) return kNoKey;
    const int32_t token = (in_delta ? trie.delta : trie.base).tokens[child];
    float added = node_scores.of(request, child, in_delta);
    if (token != kEndToken) {
      const float logit = logits.row(request, beam).at(token);
      if (logit == kDead) return kNoKey;
      added = parent.normalizer.log_probability(logit) + added;
    }
    const float score = finite_or_dead(parent.score + added);
    if (score == kDead || !is_allowed(trie, sets, blockIdx.x, child, in_delta)) return kNoKey;
    return Candidate::of(score, start + place + before(parent, token, in_delta));
  }

  struct Child {
    int64_t node, token, beam;
  };

  // Which child has the slot.
  __device__ Child child(uint32_t slot) const {
    const uint32_t beam = run_of(starts, width, slot), start = starts[beam];
    const Parent& parent = parents[beam];
    int64_t found = place_of(parent, slot - start, false);
    const bool in_delta = found < 0;
    if (in_delta) found = place_of(parent, slot - start, true);
    found += in_delta ? parent.delta_first : parent.base_first;
    return {trie.child_number(found, in_delta), (in_delta ? trie.delta : trie.base).tokens[found], beam};
  }

 private:
  // How many children in the other part come before this one.
  __device__ uint32_t before(const Parent& parent, int32_t token, bool in_delta) const {
    if (parent.delta_count == 0) return 0;
    const Range others = in_delta ? parent.base() : parent.delta();
    return static_cast<uint32_t>(lower_bound((in_delta ? trie.base : trie.delta).tokens, others, token) - others.first);
  }

  // The place in one part's run that has this place in the merged one, -1 where there is none.
  __device__ int64_t place_of(const Parent& parent, uint32_t merged, bool in_delta) const {
    const Range run = in_delta ? parent.delta() : parent.base();
    const Token* const tokens = (in_delta ? trie.delta : trie.base).tokens;
    int64_t low = 0, high = run.size();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (middle + before(parent, tokens[run.first + middle], in_delta) < merged) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == run.size() || low + before(parent, tokens[run.first + low], in_delta) != merged) return -1;
    return low;
  }
};

// The counts of the children of all beams, summed up.
template <class Starts>
__device__ void list_starts(const Parent* parents, int64_t width, Starts starts) {
  uint32_t sum = 0;
  for (int64_t first = 0; first < width; first += blockDim.x) {
    const int64_t beam = first + threadIdx.x;
    const Scan scan = scan_block(beam < width ? parents[beam].count() : 0);
    if (beam < width) starts[beam] = sum + scan.before;
    sum += scan.whole;
  }
  if (threadIdx.x == 0) starts[width] = sum;
  __syncthreads();
}

template <class Rows, class Token, class Sets, class Starts, class Buffer>
__device__ void select_children(const StepView<Token>& step, const Rows& logits, const Sets& sets, Starts starts,
                                Buffer buffer, uint32_t room, const BeamOutput& out) {
  const int64_t request = step.first + blockIdx.x;
  using Children = Candidates<Rows, Token, Sets, Starts>;
  const Children candidates{step.trie, logits,     sets,  step.node_scores, step.parents + request * step.width,
                            request,   step.width, starts};
  list_starts(candidates.parents, step.width, starts);
  const uint32_t wanted = static_cast<uint32_t>(step.num_beams);
  const uint32_t count = select_keys(
      starts[step.width], [&](uint32_t i) { return candidates.key(i); }, wanted, room, buffer);
  for (uint32_t i = threadIdx.x; i < wanted; i += kSelectThreads) {
    const int64_t at = request * step.num_beams + i;
    typename Children::Child child{-1, -1, -1};
    float score = kDead;
    if (i < count) {
      const uint64_t key = buffer[i];
      child = candidates.child(Candidate::slot(key)), score = Candidate::score(key);
    }
    out.nodes[at] = child.node, out.tokens[at] = child.token, out.parents[at] = child.beam, out.scores[at] = score;
  }
}

template <class Rows, class Token, class Sets>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_kernel(const __grid_constant__ StepView<Token> step, const __grid_constant__ Rows logits,
                  const __grid_constant__ Sets sets, BeamOutput out, uint32_t room) {
  DGI_SHARED(uint32_t, starts, kSharedWidth + 1);
  DGI_SHARED(uint64_t, buffer, kSharedRoom);
  select_children(step, logits, sets, starts, buffer, room, out);
}

// The same with keys and starts in global memory, for steps that are wider.
template <class Rows, class Token, class Sets>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_wide_kernel(const __grid_constant__ StepView<Token> step, const __grid_constant__ Rows logits,
                       const __grid_constant__ Sets sets, BeamOutput out, uint32_t room, uint64_t* keys,
                       uint32_t* all_starts) {
  const int64_t request = step.first + blockIdx.x;
  select_children(step, logits, sets, all_starts + request * (step.width + 1), keys + request * room, room, out);
}

inline bool is_wide(int64_t width, int64_t num_beams) { return width > kSharedWidth || num_beams > kSharedBeams; }

// How many keys may be sorted: twice those wanted, so that the select ends after a round or two, and a power of two,
// up to which the sort fills the buffer.
inline uint32_t room_for(int64_t num_beams) {
  return std::max<uint32_t>(256, std::bit_ceil(static_cast<uint32_t>(2 * num_beams)));
}

inline unsigned row_threads(Normalize normalize, bool is_given, int64_t codes) {
  if (normalize == Normalize::kNone || is_given) return kWarp;
  const int64_t enough = std::clamp<int64_t>(codes / (2 * kUnroll), kWarp, kRowThreads);
  return static_cast<unsigned>(std::bit_floor(static_cast<uint64_t>(enough)));
}

template <class Token>
StepView<Token> view_of(const BeamStep<Token>& step, void* scratch) {
  return {step.trie,           0,
          step.width,          step.num_beams,
          step.nodes,          step.scores,
          step.log_normalizer, step.normalize,
          step.node_scores,    static_cast<Parent*>(scratch)};
}

// Why a step cannot be done; null where it can.
template <class Token>
const char* why_not(const BeamStep<Token>& step, int64_t codes) {
  constexpr int64_t kMost = int64_t{1} << 31;
  // At most one child a code in each part of the trie, and the end of a sequence.
  int64_t most = 2 * (codes + 1);
  if (step.max_degree >= 0) most = std::min(most, step.max_degree);
  if (step.width > 0 && most >= kMost / step.width) return "more than 2**31 candidates of one request";
  if (step.requests * step.width >= kMost || step.num_beams >= kMost / 4) return "more than 2**31 beams";
  return nullptr;
}

// The second launch, for `count` requests from view.first on of `requests` in all.
template <class Rows, class Token, class Sets>
void launch_select(const StepView<Token>& view, const Rows& rows, const Sets& sets, int64_t count, int64_t requests,
                   const BeamOutput& out, void* stream) {
  const uint32_t room = room_for(view.num_beams);
  if (!is_wide(view.width, view.num_beams)) {
    launch(select_kernel<Rows, Token, Sets>, static_cast<unsigned>(count), kSelectThreads, 0, stream, view, rows, sets,
           out, room);
    return;
  }
  uint64_t* const keys = reinterpret_cast<uint64_t*>(view.parents + requests * view.width);
  uint32_t* const starts = reinterpret_cast<uint32_t*>(keys + requests * room);
  launch(select_wide_kernel<Rows, Token, Sets>, static_cast<unsigned>(count), kSelectThreads, 0, stream, view, rows,
         sets, out, room, keys, starts);
}

// Both launches, for all requests.
template <class Rows, class Token>
const char* launch_step(const BeamStep<Token>& step, const Rows& rows, const BeamOutput& out, void* scratch,
                        void* stream) {
  StepView<Token> view = view_of(step, scratch);
  const unsigned threads = row_threads(step.normalize, view.is_given(), rows.codes);
  for_requests(step.allowed, step.requests, [&](const auto& sets, int64_t first, int64_t count) {
    using Sets = std::decay_t<decltype(sets)>;
    view.first = first;
    if (step.width > 0) {
      launch(parents_kernel<Rows, Token, Sets>, static_cast<unsigned>(count * step.width), threads, 0, stream, view,
             rows, sets);
    }
    launch_select(view, rows, sets, count, step.requests, out, stream);
  });
  return launch_error();
}

}  // namespace dgi::cuda
