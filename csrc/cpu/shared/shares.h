// How ops that take the softmax of rows divide their work: lists in place of sparse rows, and shares of the rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/shared/host.h"

namespace dgi::cpu {

// With more entries than this a list saves nothing over its row of a matrix product. float64 has no lists.
template <class Real>
int64_t list_limit(int64_t codes) {
  return std::is_same_v<Real, float> ? std::min<int64_t>(codes / 8, 1024) : 0;
}

// How much of what two threads work on at once is right for all: as much for each, but at most four times as much in
// all, since the caches that threads share do not grow with them.
inline int64_t thread_pairs() { return std::clamp<int64_t>(thread_count() / 2, 1, 4); }

// Threads wait for each other less if each takes a share of the rows from end to end, with sums of its own, than if
// they share every product. Two do (and one, for the same bits) from `rows_worth_two` rows on; more where each has a
// quarter of these, and where the copies of the sums, of `bytes_of_sums` each, are not too large.
inline int64_t shares_of(int64_t rows, int64_t rows_worth_two, int64_t bytes_of_sums) {
  constexpr int64_t kMostCopies = int64_t{32} << 20;
  const int64_t threads = thread_count();
  if (threads <= 2) return rows >= rows_worth_two ? 2 : 1;
  return (threads - 1) * bytes_of_sums <= kMostCopies && rows >= threads * rows_worth_two / 4 ? threads : 1;
}

}  // namespace dgi::cpu
