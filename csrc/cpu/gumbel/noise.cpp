// Gumbel noise on the CPU, tile by tile: words of Philox first (philox.cpp), then words to noise in a loop that the
// compiler vectorises for AVX-512, AVX2 or what the machine has.
//
// Nothing is read, 4 bytes per element are written; per element a quarter of Philox (5 products of 32 x 32 bits) and
// two polynomial logarithms, about 13 instructions with AVX2. These are two loops: the chain of both, about 140 cycles
// long, would leave the core waiting, for its reorder buffer holds no more than three such chains. Two cores of an AMD
// EPYC with AVX2, two threads: 0.8 to 1.1 ns per element where torch's exponential_, which has no thread but its own,
// takes 21 (one run of `python bench/bench_gumbel.py --rounds 3`).
#include "cpu/gumbel/noise_cpu.h"

#include <algorithm>
#include <cstring>

#include "cpu/shared/isa.h"
#include "dgi/gumbel.h"

namespace dgi::cpu {
namespace {

// Calls f(first block of the tile, row, block in row, length) for each stretch of a tile that lies in one row.
template <class F>
DGI_HOST_DEVICE void for_each_row(const NoiseShape& shape, int64_t tile, const F& f) {
  const int64_t per_row = shape.blocks_per_row();
  const int64_t begin = tile * kNoiseTile, end = std::min(begin + kNoiseTile, shape.blocks());
  int64_t row = begin / per_row, block = begin % per_row;
  for (int64_t at = begin; at < end;) {
    const int64_t length = std::min(end - at, per_row - block);
    f(at - begin, row, block, length);
    at += length;
    ++row;
    block = 0;
  }
}

template <bool kFused>
DGI_HOST_DEVICE void fill(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out) {
  const PhiloxKey key = philox_key(seed);
  uint32_t block_of[kNoiseTile] = {}, row_of[kNoiseTile] = {};
  uint32_t words[4 * kNoiseTile];
  float noise[4 * kNoiseTile];
  for (int64_t tile = first; tile < last; ++tile) {
    bool is_one_row = false;
    for_each_row(shape, tile, [&](int64_t at, int64_t row, int64_t block, int64_t length) {
      const uint32_t first_block = static_cast<uint32_t>(block);
      const uint32_t row_word = static_cast<uint32_t>(shape.row_offset + row);
      is_one_row = length == kNoiseTile;
      if (is_one_row) return philox.run(key, first_block, row_word, kNoiseTile, shape.level, shape.stream, words);
      for (int64_t i = 0; i < length; ++i) {
        block_of[at + i] = first_block + static_cast<uint32_t>(i);
        row_of[at + i] = row_word;
      }
    });
    if (!is_one_row) philox.tile(key, block_of, row_of, kNoiseTile, shape.level, shape.stream, words);
    for (int64_t i = 0; i < 4 * kNoiseTile; ++i) noise[i] = exponential_from_word<kFused>(words[i]);
    for (int64_t i = 0; i < 4 * kNoiseTile; ++i) noise[i] = gumbel_from_exponential<kFused>(noise[i]);
    for_each_row(shape, tile, [&](int64_t at, int64_t row, int64_t block, int64_t length) {
      const int64_t codes = std::min(4 * length, shape.codes - 4 * block);
      std::memcpy(out + row * shape.codes + 4 * block, noise + 4 * at, codes * sizeof(float));
    });
  }
}

}  // namespace

void gumbel_noise(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out) {
  with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE { fill<fused.value>(shape, seed, first, last, out); });
}

}  // namespace dgi::cpu
