// The kernels of a beam step, for logits that are given (beam.cu) or made of a head (cosine_beam.cu).
//
//   parents_kernel, a block a beam: its children, and the log-sum-exp of its logits, which it reads once.
//   select_kernel, a block a request: the best num_beams of the children of its beams, by radix select, sorted.
//
// Few requests of many candidates would leave the GPU idle. Then there are three:
//
//   slice_kernel, a block a slice of a request's candidates: keys that hold the slice's best num_beams.
//   merge_kernel, a block a request: the best num_beams of these.
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
constexpr int kPacks = 2;  // the same, in loads of 16 bytes
constexpr int64_t kSharedWidth = 1024, kSharedBeams = 1024;  // wider steps keep keys and starts in global memory
constexpr uint32_t kSharedRoom = 2 * kSharedBeams;
// A slice has as many candidates as threads hold in registers, and blocks are as many as an H200 runs at once. Fewer
// than kLeastSlices do not pay for a third launch. Tests have smaller slices.
#ifndef DGI_SLICE
#define DGI_SLICE 4096
#endif
constexpr int64_t kSlice = DGI_SLICE, kSliceBlocks = 264, kLeastSlices = 4;
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

// The children of one request's beams by number: starts[m] is that of the first child of beam m, starts[width] that of
// all. Those of a parent are numbered by token, those of base and delta merged.
template <class Token, class Starts>
struct Numbering {
  const TrieDepth<Token>& trie;
  const Parent* parents;
  int64_t width;
  Starts starts;

  struct Child {
    int64_t node, token, beam;
  };

  // Which child has the number.
  __device__ Child child(uint32_t number) const {
    const uint32_t beam = run_of(starts, width, number), start = starts[beam];
    const Parent& parent = parents[beam];
    int64_t found = number - start;
    bool in_delta = false;
    if (parent.delta_count > 0) {
      found = place_of(parent, number - start, false);
      in_delta = found < 0;
      if (in_delta) found = place_of(parent, number - start, true);
    }
    found += in_delta ? parent.delta_first : parent.base_first;
    return {trie.child_number(found, in_delta), (in_delta ? trie.delta : trie.base).tokens[found], beam};
  }

  // How many children in the other part come before this one.
  __device__ uint32_t before(const Parent& parent, int32_t token, bool in_delta) const {
    if (parent.delta_count == 0) return 0;
    const Range others = in_delta ? parent.base() : parent.delta();
    return static_cast<uint32_t>(lower_bound((in_delta ? trie.base : trie.delta).tokens, others, token) - others.first);
  }

 private:
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

// The candidates of one request, the launch's number in_launch.
template <class Rows, class Token, class Sets, class Starts>
struct Candidates {
  const Numbering<Token, Starts>& numbering;
  const Rows& logits;
  const Sets& sets;
  const NodeScores<float>& node_scores;
  int64_t request, in_launch;

  // The key of candidate i, kNoKey where it is not allowed. Candidates come base before delta, so that i need not be
  // the child's number where there is a delta.
  __device__ uint64_t key(uint32_t i) const {
    const TrieDepth<Token>& trie = numbering.trie;
    const uint32_t beam = run_of(numbering.starts, numbering.width, i), start = numbering.starts[beam];
    const Parent& parent = numbering.parents[beam];
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
    if (score == kDead || !is_allowed(trie, sets, in_launch, child, in_delta)) return kNoKey;
    return Candidate::of(score, start + place + numbering.before(parent, token, in_delta));
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

// Writes the `count` best of a request, from their keys, and pads them to num_beams.
template <class Token, class Starts, class Buffer>
__device__ void write_best(const StepView<Token>& step, const Numbering<Token, Starts>& numbering, int64_t request,
                           Buffer keys, uint32_t count, const BeamOutput& out) {
  for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(step.num_beams); i += kSelectThreads) {
    const int64_t at = request * step.num_beams + i;
    typename Numbering<Token, Starts>::Child child{-1, -1, -1};
    float score = kDead;
    if (i < count) {
      const uint64_t key = keys[i];
      child = numbering.child(Candidate::slot(key)), score = Candidate::score(key);
    }
    out.nodes[at] = child.node, out.tokens[at] = child.token, out.parents[at] = child.beam, out.scores[at] = score;
  }
}

template <class Rows, class Token, class Sets, class Starts, class Buffer>
__device__ void select_children(const StepView<Token>& step, const Rows& logits, const Sets& sets, Starts starts,
                                Buffer buffer, uint32_t room, const BeamOutput& out) {
  const int64_t in_launch = blockIdx.x, request = step.first + in_launch;
  const Numbering<Token, Starts> numbering{step.trie, step.parents + request * step.width, step.width, starts};
  const Candidates<Rows, Token, Sets, Starts> candidates{numbering, logits, sets, step.node_scores, request, in_launch};
  list_starts(numbering.parents, step.width, starts);
  const uint32_t count = select_keys(
      starts[step.width], [&](uint32_t i) { return candidates.key(i); }, static_cast<uint32_t>(step.num_beams), room,
      buffer);
  write_best(step, numbering, request, buffer, count, out);
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

// Where the slices of a request leave their keys: `room` each, kNoKey behind the last.
struct Slices {
  uint64_t* keys;  // (requests, count, room)
  uint32_t count, room;

  __device__ uint64_t* of(int64_t request) const { return keys + request * count * room; }
};

template <class Rows, class Token, class Sets>
__global__ void __launch_bounds__(kSelectThreads, 2)
    slice_kernel(const __grid_constant__ StepView<Token> step, const __grid_constant__ Rows logits,
                 const __grid_constant__ Sets sets, Slices slices) {
  DGI_SHARED(uint32_t, starts, kSharedWidth + 1);
  const int64_t in_launch = blockIdx.x / slices.count, request = step.first + in_launch;
  const uint32_t slice = blockIdx.x % slices.count;
  using Starts = decltype(starts + 0);
  const Numbering<Token, Starts> numbering{step.trie, step.parents + request * step.width, step.width, starts + 0};
  const Candidates<Rows, Token, Sets, Starts> candidates{numbering, logits, sets, step.node_scores, request, in_launch};
  list_starts(numbering.parents, step.width, starts + 0);
  const uint32_t all = starts[step.width], each = (all + slices.count - 1) / slices.count;
  const uint32_t first = slice * each < all ? slice * each : all;
  const uint32_t count = each < all - first ? each : all - first;
  uint64_t* const kept = slices.of(request) + slice * slices.room;
  const uint32_t taken = collect_keys(
      count, [&](uint32_t i) { return candidates.key(first + i); }, static_cast<uint32_t>(step.num_beams), slices.room,
      kept);
  for (uint32_t i = taken + threadIdx.x; i < slices.room; i += kSelectThreads) kept[i] = kNoKey;
}

template <class Token>
__global__ void __launch_bounds__(kSelectThreads, 1)
    merge_kernel(const __grid_constant__ StepView<Token> step, Slices slices, BeamOutput out, uint32_t room) {
  DGI_SHARED(uint32_t, starts, kSharedWidth + 1);
  DGI_SHARED(uint64_t, buffer, kSharedRoom);
  const int64_t request = step.first + blockIdx.x;
  using Starts = decltype(starts + 0);
  const Numbering<Token, Starts> numbering{step.trie, step.parents + request * step.width, step.width, starts + 0};
  list_starts(numbering.parents, step.width, starts + 0);
  const uint64_t* const kept = slices.of(request);
  const uint32_t count = select_keys<kUnroll>(
      slices.count * slices.room, [&](uint32_t i) { return kept[i]; }, static_cast<uint32_t>(step.num_beams), room,
      buffer + 0);
  write_best(step, numbering, request, buffer + 0, count, out);
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

// At most so many children has a beam: one for each code in each part of the trie, and the end of a sequence.
inline int64_t most_children(int64_t max_degree, int64_t codes) {
  const int64_t most = 2 * (codes + 1);
  return max_degree >= 0 ? std::min(most, max_degree) : most;
}

// Slices of the candidates of all requests, of which there are `most` a beam, if there were no other bound than the
// GPU.
inline int64_t all_slices(int64_t requests, int64_t width, int64_t num_beams, int64_t most) {
  if (is_wide(width, num_beams)) return 0;
  return std::min((width * most + kSlice - 1) / kSlice * requests, kSliceBlocks);
}

// Slices of each request's candidates; 1: none. Shapes alone decide.
inline uint32_t slices_of(int64_t requests, int64_t width, int64_t num_beams, int64_t most) {
  const int64_t each = all_slices(requests, width, num_beams, most) / std::max<int64_t>(1, requests);
  return each < kLeastSlices ? 1 : static_cast<uint32_t>(each);
}

// Keys that a slice leaves: somewhat more than are wanted, so that its select ends earlier.
inline uint32_t slice_room(int64_t num_beams) {
  return static_cast<uint32_t>((num_beams + num_beams / 4 + 39) / 8 * 8);
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
  const int64_t most = most_children(step.max_degree, codes);
  if (step.width > 0 && most >= kMost / step.width) return "more than 2**31 candidates of one request";
  if (step.requests * step.width >= kMost || step.num_beams >= kMost / 4) return "more than 2**31 beams";
  return nullptr;
}

// The launches behind the first, for `count` requests from view.first on of `requests` in all.
template <class Rows, class Token, class Sets>
void launch_select(const StepView<Token>& view, const Rows& rows, const Sets& sets, int64_t count,
                   const BeamStep<Token>& step, const BeamOutput& out, void* stream) {
  const uint32_t room = room_for(view.num_beams);
  const unsigned blocks = static_cast<unsigned>(count);
  uint64_t* const keys = reinterpret_cast<uint64_t*>(view.parents + step.requests * view.width);
  const uint32_t slices = slices_of(step.requests, view.width, view.num_beams,
                                    most_children(step.max_degree, rows.codes));
  if (slices > 1) {
    const Slices kept{keys, slices, slice_room(view.num_beams)};
    launch(slice_kernel<Rows, Token, Sets>, blocks * slices, kSelectThreads, 0, stream, view, rows, sets, kept);
    launch(merge_kernel<Token>, blocks, kSelectThreads, 0, stream, view, kept, out, room);
  } else if (!is_wide(view.width, view.num_beams)) {
    launch(select_kernel<Rows, Token, Sets>, blocks, kSelectThreads, 0, stream, view, rows, sets, out, room);
  } else {
    uint32_t* const starts = reinterpret_cast<uint32_t*>(keys + step.requests * room);
    launch(select_wide_kernel<Rows, Token, Sets>, blocks, kSelectThreads, 0, stream, view, rows, sets, out, room, keys,
           starts);
  }
}

// All launches, for all requests.
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
    launch_select(view, rows, sets, count, step, out, stream);
  });
  return launch_error();
}

}  // namespace dgi::cuda
