// Which word of Philox belongs to (row n, code k) of a level: word k % 4 of the block with counter
// (k / 4, n, level, stream) and key (seed & 0xffffffff, seed >> 32).
#pragma once

#include <cstdint>

#include "dgi/macros.h"
#include "dgi/philox.h"

namespace dgi {

constexpr uint32_t kStreamResidualQuantize = 0, kStreamGumbelSoftmax = 1;  // as dgi_kernels/noise.py has them

struct NoiseShape {
  uint32_t level, stream;
  int64_t row_offset, rows, codes;

  // Blocks of four codes in a row; the last one may be partly used.
  DGI_HOST_DEVICE int64_t blocks_per_row() const { return (codes + 3) / 4; }
  DGI_HOST_DEVICE int64_t blocks() const { return rows * blocks_per_row(); }

  DGI_HOST_DEVICE PhiloxBlock counter(int64_t row, int64_t block) const {
    return {{static_cast<uint32_t>(block), static_cast<uint32_t>(row_offset + row), level, stream}};
  }
};

}  // namespace dgi
