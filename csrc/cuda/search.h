// What the searches on CUDA share: views of tensors, and which items each request may find.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/types.h"
#include "dgi/trie.h"

namespace dgi::cuda {

// A (rows, columns) view of numbers in device memory.
template <class Element>
struct View {
  const Element* data;
  int64_t row_stride, column_stride;

  DGI_HOST_DEVICE Element at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};

// What the requests of one launch may find. A kernel takes this by value (5 KB, of the 32 that CUDA allows), so that
// nothing is copied to the device, and what a CUDA graph has captured stays as it is.
struct RequestSets {
  static constexpr int kSets = 96, kRequests = 1024;

  AllowedItems sets[kSets];
  int16_t set_of[kRequests];  // of the launch's requests; -1: all

  DGI_HOST_DEVICE const AllowedItems* of(int64_t request) const {
    return set_of[request] < 0 ? nullptr : &sets[set_of[request]];
  }
};

// Where every request may find all.
struct NoSets {
  DGI_HOST_DEVICE const AllowedItems* of(int64_t) const { return nullptr; }
};

// Calls launch(sets, first, count) for all `requests`: once, or once for as many at a time as fit with their sets.
// `allowed` (requests) is host memory, null for a request that may find all; null where all may. `sets` is or has in it
// RequestSets.
template <class Sets, class Launch>
void for_requests_with(Sets& sets, const AllowedItems* const* allowed, int64_t requests, const Launch& launch) {
  for (int64_t first = 0, end; first < requests; first = end) {
    const AllowedItems* known[RequestSets::kSets];
    int16_t count = 0;
    for (end = first; end < requests && end - first < RequestSets::kRequests; ++end) {
      int16_t& set = sets.set_of[end - first];
      set = -1;
      if (allowed == nullptr || allowed[end] == nullptr) continue;
      const int16_t found = static_cast<int16_t>(std::find(known, known + count, allowed[end]) - known);
      if (found == count) {
        if (count == RequestSets::kSets) break;
        sets.sets[count] = *allowed[end];
        known[count++] = allowed[end];
      }
      set = found;
    }
    launch(sets, first, end - first);
  }
}

// The same, but that NoSets says so where no request has a set.
template <class Launch>
void for_requests(const AllowedItems* const* allowed, int64_t requests, const Launch& launch) {
  if (allowed == nullptr) {
    launch(NoSets{}, int64_t{0}, requests);
  } else {
    RequestSets sets;
    for_requests_with(sets, allowed, requests, launch);
  }
}

}  // namespace dgi::cuda
