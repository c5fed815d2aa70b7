// The uniform words of consecutive rows of a NoiseShape, for what keeps or drops elements by them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/shared/philox_cpu.h"
#include "dgi/noise.h"

namespace dgi::cpu {

// Words from one row to the next, and what `rows` rows need: blocks are made a register's width at a time.
inline int64_t words_per_row(const NoiseShape& shape) { return 4 * shape.blocks_per_row(); }
inline int64_t room_for_words(const NoiseShape& shape, int64_t rows) {
  return rows * words_per_row(shape) + 4 * kPhiloxStep;
}

// words (count, words_per_row), of the rows [first, first + count); `words` has room_for_words.
inline void fill_words(const NoiseShape& shape, PhiloxKey key, int64_t first, int64_t count, uint32_t* words) {
  const int64_t per_row = shape.blocks_per_row(), blocks = count * per_row;
  if (per_row % kPhiloxStep == 0) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t row = static_cast<uint32_t>(shape.row_offset + first + i);
      philox.run(key, 0, row, per_row, shape.level, shape.stream, words + 4 * i * per_row);
    }
    return;
  }
  uint32_t block_of[kNoiseTile] = {}, row_of[kNoiseTile] = {};
  int64_t row = shape.row_offset + first, block = 0;
  for (int64_t at = 0; at < blocks; at += kNoiseTile) {
    const int64_t some = std::min(kNoiseTile, blocks - at);
    for (int64_t i = 0; i < some; ++i) {
      block_of[i] = static_cast<uint32_t>(block), row_of[i] = static_cast<uint32_t>(row);
      if (++block == per_row) block = 0, ++row;
    }
    const int64_t whole = (some + kPhiloxStep - 1) / kPhiloxStep * kPhiloxStep;
    philox.tile(key, block_of, row_of, whole, shape.level, shape.stream, words + 4 * at);
  }
}

}  // namespace dgi::cpu
