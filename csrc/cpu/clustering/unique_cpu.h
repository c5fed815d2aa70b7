#pragma once

#include <cstdint>
#include <vector>

#include "cpu/quantize/quantize_cpu.h"

namespace dgi::cpu {

// z (rows, dim); codebooks (sum of sizes, dim), level after level; codes (rows, levels), each inside its codebook
template <class Real>
struct SharedCodes {
  const Real *z, *codebooks;
  std::vector<int64_t> sizes;
  int64_t rows, dim;
  Metric metric;
  double eps;
  const int64_t* codes;

  int64_t levels() const { return static_cast<int64_t>(sizes.size()); }
};

// out (rows, levels): codes of which no two rows share all. The product of the sizes must be at least `rows`.
template <class Real>
void unique_codes(const SharedCodes<Real>& in, int64_t* out);

}  // namespace dgi::cpu
