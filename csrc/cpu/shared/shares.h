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

// Two threads wait for each other less if each takes half of the rows from end to end, with sums of its own, than if they
// share every product: from `rows_worth_a_share` on. With more threads there would be too many sums as large as the codebooks.
inline int64_t shares_of(int64_t rows, int64_t rows_worth_a_share) {
  return thread_count() <= 2 && rows >= rows_worth_a_share ? 2 : 1;
}

}  // namespace dgi::cpu
