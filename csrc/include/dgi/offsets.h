// The numbers that a trie's arrays refer to each other by, in the fewest bytes that can be read at random.
#pragma once

#include <bit>
#include <cstdint>

#include "dgi/macros.h"

namespace dgi {

struct Range {  // [first, end)
  int64_t first = 0, end = 0;

  DGI_HOST_DEVICE int64_t size() const { return end - first; }
};

DGI_HOST_DEVICE int count_ones(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return std::popcount(word);
#endif
}

DGI_HOST_DEVICE int trailing_zeros(uint64_t word) {  // of a word that is not 0
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return std::countr_zero(word);
#endif
}

// The place of the bit of a word that `before` ones are below.
DGI_HOST_DEVICE int place_of_one(uint64_t word, int before) {
  constexpr uint64_t kEach = 0x0101010101010101;  // a byte each
  uint64_t sums = word - (word >> 1 & 0x5555555555555555);
  sums = (sums & 0x3333333333333333) + (sums >> 2 & 0x3333333333333333);
  sums = ((sums + (sums >> 4)) & 0x0F0F0F0F0F0F0F0F) * kEach;  // of all bytes up to each
  const uint64_t short_of = ((static_cast<uint64_t>(before) * kEach | 0x80 * kEach) - sums) & 0x80 * kEach;
  const int shift = 8 * count_ones(short_of);  // the bytes that do not reach so far
  before -= static_cast<int>(sums << 8 >> shift & 0xFF);
  uint64_t rest = word >> shift;
  for (; before > 0; --before) rest &= rest - 1;
  return shift + trailing_zeros(rest);
}

// Where runs begin that cover the places 0 to n - 1, none of them empty: a bit for each place and the end, 1 where a
// run begins and at the end, with the number of ones before each block of 512, and for every 256th run its block. One
// array:
//   [0]: b, the number of blocks;  b numbers of ones;  8 b words;  blocks of the runs 0, 256, 512, ... and of the end
struct RunMarks {
  static constexpr int kWordBits = 64, kBlockWords = 8, kSampled = 256;

  const uint64_t* data;

  DGI_HOST_DEVICE int64_t blocks() const { return static_cast<int64_t>(data[0]); }

  // How many runs there are.
  DGI_HOST_DEVICE int64_t size() const {
    int64_t ones = static_cast<int64_t>(data[blocks()]);
    for (int64_t w = 0; w < kBlockWords; ++w) ones += count_ones(data[1 + blocks() + kBlockWords * (blocks() - 1) + w]);
    return ones - 1;
  }

  static int64_t blocks_of(int64_t places) { return (places + 1) / (kWordBits * kBlockWords) + 1; }
  static int64_t elements(int64_t runs, int64_t blocks) { return 1 + (1 + kBlockWords) * blocks + runs / kSampled + 2; }

  // Whether an array of so many elements is what the numbers in it say.
  bool fill(int64_t count) const {
    return count > 1 && 1 <= blocks() && blocks() <= count / (1 + kBlockWords) && size() >= 0
           && count == elements(size(), blocks());
  }

  // Where run i begins; of as many as there are, the end.
  DGI_HOST_DEVICE int64_t operator[](int64_t i) const {
    const int64_t blocks = this->blocks();
    const uint64_t *const ranks = data + 1, *const words = ranks + blocks,
                          *const samples = words + kBlockWords * blocks;
    int64_t block = static_cast<int64_t>(samples[i / kSampled]);
    for (int64_t last = static_cast<int64_t>(samples[i / kSampled + 1]); block < last;) {
      const int64_t middle = block + (last - block + 1) / 2;
      if (static_cast<int64_t>(ranks[middle]) <= i) {
        block = middle;
      } else {
        last = middle - 1;
      }
    }
    int before = static_cast<int>(i - static_cast<int64_t>(ranks[block]));
    int64_t word = block * kBlockWords;
    for (const int64_t last = word + kBlockWords - 1; word < last; ++word) {
      const int ones = count_ones(words[word]);
      if (before < ones) break;
      before -= ones;
    }
    return word * kWordBits + place_of_one(words[word], before);
  }

  // The places of run i: the end is mostly a bit or two further on.
  DGI_HOST_DEVICE Range run(int64_t i) const {
    const int64_t first = (*this)[i], word = first / kWordBits;
    const uint64_t behind = data[1 + data[0] + static_cast<uint64_t>(word)] >> (first % kWordBits) >> 1;
    return {first, behind != 0 ? first + 1 + trailing_zeros(behind) : (*this)[i + 1]};
  }
};

// Ascending starts of runs, or rows: numbers read one at a time. Without data the identity, i -> i.
struct Offsets {
  enum class Stored : int32_t { kInt32, kInt64, kUInt24, kRunMarks };  // kUInt24: three bytes each, the lowest first

  const void* data = nullptr;
  Stored stored = Stored::kInt32;

  DGI_HOST_DEVICE int64_t operator[](int64_t i) const {
    if (data == nullptr) return i;
    switch (stored) {
      case Stored::kInt32: return int64_t{static_cast<const int32_t*>(data)[i]};
      case Stored::kInt64: return static_cast<const int64_t*>(data)[i];
      case Stored::kUInt24: {
        const uint8_t* const bytes = static_cast<const uint8_t*>(data) + 3 * i;
        return int64_t{bytes[0]} | int64_t{bytes[1]} << 8 | int64_t{bytes[2]} << 16;
      }
      default: return RunMarks{static_cast<const uint64_t*>(data)}[i];
    }
  }

  // The same of an array of int32 or int64, which searches read most.
  DGI_HOST_DEVICE int64_t plain(int64_t i) const {
    return stored == Stored::kInt64 ? static_cast<const int64_t*>(data)[i]
                                    : int64_t{static_cast<const int32_t*>(data)[i]};
  }

  // Run i, from its start to that of the next.
  DGI_HOST_DEVICE Range run(int64_t i) const {
    if (data != nullptr && stored == Stored::kRunMarks) return RunMarks{static_cast<const uint64_t*>(data)}.run(i);
    return {(*this)[i], (*this)[i + 1]};
  }
};

}  // namespace dgi
