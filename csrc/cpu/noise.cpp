// Gumbel noise on the CPU, tile by tile: words of Philox in one loop, words to noise in the next, both vectorised by
// the compiler for AVX-512, AVX2 or what the machine has.
//
// Nothing is read, 4 bytes per element are written; per element a quarter of Philox (5 products of 32 x 32 bits) and
// two polynomial logarithms, each about half of the time. Two cores of an AMD EPYC with AVX-512 at 2.6 GHz, (2048, 256):
// 3.4 ns per element on one, 1.7 on two, where torch's exponential_, which has no thread but its own, takes 29 to 40.
// Larger results also pay for the page faults of fresh memory. `make bench` (bench/bench_gumbel.py) measures it again.
#include "noise.h"

#include <algorithm>
#include <cstring>

#include "dgi/gumbel.h"
#include "dgi/philox.h"

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

DGI_HOST_DEVICE void fill(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out) {
  const PhiloxKey key = philox_key(seed);
  uint32_t block_of[kNoiseTile] = {}, row_of[kNoiseTile] = {};
  uint32_t words[4 * kNoiseTile];
  float noise[4 * kNoiseTile];
  for (int64_t tile = first; tile < last; ++tile) {
    for_each_row(shape, tile, [&](int64_t at, int64_t row, int64_t block, int64_t length) {
      for (int64_t i = 0; i < length; ++i) {
        block_of[at + i] = static_cast<uint32_t>(block + i);
        row_of[at + i] = static_cast<uint32_t>(shape.row_offset + row);
      }
    });
    for (int64_t i = 0; i < kNoiseTile; ++i) {
      const PhiloxBlock random = philox4x32_10({{block_of[i], row_of[i], shape.level, shape.stream}}, key);
      for (int w = 0; w < 4; ++w) words[4 * i + w] = random.word[w];
    }
    for (int64_t i = 0; i < 4 * kNoiseTile; ++i) noise[i] = gumbel_from_word(words[i]);
    for_each_row(shape, tile, [&](int64_t at, int64_t row, int64_t block, int64_t length) {
      const int64_t codes = std::min(4 * length, shape.codes - 4 * block);
      std::memcpy(out + row * shape.codes + 4 * block, noise + 4 * at, codes * sizeof(float));
    });
  }
}

}  // namespace

// The same code for each instruction set, chosen when it runs: the binary must not need more than the machine has. Not
// `target_clones`, whose ifuncs some C libraries lack.
#if defined(__x86_64__) && defined(__GNUC__)

__attribute__((target("avx512f,avx512dq"))) static void fill_avx512(const NoiseShape& shape, int64_t seed,
                                                                    int64_t first, int64_t last, float* out) {
  fill(shape, seed, first, last, out);
}

__attribute__((target("avx2"))) static void fill_avx2(const NoiseShape& shape, int64_t seed, int64_t first,
                                                      int64_t last, float* out) {
  fill(shape, seed, first, last, out);
}

void gumbel_noise(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out) {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    fill_avx512(shape, seed, first, last, out);
  } else if (__builtin_cpu_supports("avx2")) {
    fill_avx2(shape, seed, first, last, out);
  } else {
    fill(shape, seed, first, last, out);
  }
}

#else

void gumbel_noise(const NoiseShape& shape, int64_t seed, int64_t first, int64_t last, float* out) {
  fill(shape, seed, first, last, out);
}

#endif

}  // namespace dgi::cpu
