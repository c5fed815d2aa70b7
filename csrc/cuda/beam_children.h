// Kernels of a beam step that choose among the children of all beams of a request, by radix select, and sort them.
//
// Candidates are numbered through by parent: thread t takes numbers t, t + 512, ..., so that work is balanced whatever
// the degrees, and only real children are visited. Score and number make one key of 64 bits (dgi/beam.h), the lower the
// better. A thread holds its first eight keys in registers; those beyond 4096 candidates are made again a pass.
#pragma once

#include "cuda/beam_parents.h"
#include "cuda/select.h"

namespace dgi::cuda {

constexpr int64_t kSharedWidth = 1024, kSharedBeams = 1024;  // wider steps keep keys and starts in global memory
constexpr uint32_t kSharedRoom = 2 * kSharedBeams;

using Candidate = CandidateKey<float>;

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

}  // namespace dgi::cuda
