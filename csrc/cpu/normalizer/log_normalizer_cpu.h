#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dgi/convert.h"

namespace dgi::cpu {

// Rows of logits, by the dimensions that lead to them: (sizes[0], ..., codes), of any strides.
template <class Stored>
struct LogitTable {
  const Stored* data;
  std::vector<int64_t> sizes, strides;
  int64_t codes, code_stride;

  int64_t rows() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }

  const Stored* row(int64_t i) const {
    const Stored* start = data;
    for (std::size_t d = sizes.size(); d-- > 0; i /= sizes[d]) start += i % sizes[d] * strides[d];
    return start;
  }
};

// out[i] = log sum_k exp(logits[i, k]), -inf where there is nothing to sum up. On torch's threads.
template <class Stored>
void log_normalizer(const LogitTable<Stored>& logits, Compute<Stored>* out);

}  // namespace dgi::cpu
