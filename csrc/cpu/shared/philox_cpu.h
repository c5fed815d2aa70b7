#pragma once

#include <cstdint>

#include "dgi/philox.h"

namespace dgi::cpu {

// Philox blocks made at a time: words and what is made of them stay in the first-level cache.
constexpr int64_t kNoiseTile = 64;

// Blocks that the widest registers hold; counts of blocks are multiples of it.
constexpr int64_t kPhiloxStep = 16;

// words[4 i + w] = word w of Philox4x32-10 of the counter (block[i], row[i], level, stream), for i < count.
using PhiloxTile = void (*)(PhiloxKey key, const uint32_t* block, const uint32_t* row, int64_t count, uint32_t level,
                            uint32_t stream, uint32_t* words);

// The same of the counters (block + i, row, level, stream): of one row, whose part in the first two rounds is made
// once.
using PhiloxRun = void (*)(PhiloxKey key, uint32_t block, uint32_t row, int64_t count, uint32_t level, uint32_t stream,
                           uint32_t* words);

struct Philox {
  PhiloxTile tile;
  PhiloxRun run;
};

// The fastest for this machine; all give the same words.
extern const Philox philox;

}  // namespace dgi::cpu
