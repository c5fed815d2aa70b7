// The launches of a beam step, for logits that are given (beam.cu) or made of a head (cosine_beam.cu).
//
//   parents_kernel (beam_parents.h), a block a beam: its children, and the log-sum-exp of its logits.
//   select_kernel (beam_children.h), a block a request: the best num_beams of the children of its beams.
//
// Few requests of many candidates would leave the GPU idle. Then there are three:
//
//   slice_kernel, a block a slice of a request's candidates: keys that hold the slice's best num_beams.
//   merge_kernel, a block a request: the best num_beams of these.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "cuda/beam_children.h"

namespace dgi::cuda {

// A slice has as many candidates as threads hold in registers, and blocks are as many as an H200 runs at once. Fewer
// than kLeastSlices do not pay for a third launch. Tests have smaller slices.
#ifndef DGI_SLICE
#define DGI_SLICE 4096
#endif
constexpr int64_t kSlice = DGI_SLICE, kSliceBlocks = 264, kLeastSlices = 4;

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
