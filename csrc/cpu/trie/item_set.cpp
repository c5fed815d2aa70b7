// Sets of items on the CPU: members as bytes by row, made bits by place.
//
// The members are first packed into bits by row, so that those of ten million rows lie in the second-level cache while
// places ask for them in any order; then every place gathers its bit. Both take eight rows or more at a time.
//
// The members by place become members by leaf word by word: the marks of where leaves begin cut a word into runs, each
// of which comes to one bit; and so on for the nodes above.
#include "cpu/trie/item_set.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/shared/intrinsics.h"
#endif

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kWordBits = ItemSet::kWordBits, kBlockWords = ItemSet::kBlockWords;

// Which row stands at a place: one kind for each way that rows are stored.
template <class Number>
struct Rows {
  const Number* data;

  uint64_t operator[](int64_t place) const { return static_cast<uint64_t>(data[place]); }
};

struct RowsOf24Bits {
  const uint8_t* data;

  uint64_t operator[](int64_t place) const {
    const uint8_t* const bytes = data + 3 * place;
    return uint64_t{bytes[0]} | uint64_t{bytes[1]} << 8 | uint64_t{bytes[2]} << 16;
  }
};

uint64_t pack_word(const bool* members, int64_t count) {
  uint64_t word = 0;
  if (count == kWordBits) {
    for (int64_t byte = 0; byte < 8; ++byte) {  // the product moves bit 8 i to bit 56 + i
      uint64_t eight;
      std::memcpy(&eight, members + 8 * byte, 8);
      word |= ((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << (8 * byte);
    }
  } else {
    for (int64_t bit = 0; bit < count; ++bit) word |= uint64_t{members[bit]} << bit;
  }
  return word;
}

// The bits of places [first, first + count). Sets `known` to false where a row is none; such a place has no member.
template <class Order>
uint64_t gather_word(const uint64_t* of_rows, const Order& order, int64_t first, int64_t count, int64_t rows,
                     bool& known) {
  uint64_t word = 0;
  for (int64_t bit = 0; bit < count; ++bit) {
    uint64_t row = order[first + bit];
    if (row >= static_cast<uint64_t>(rows)) known = false, row = static_cast<uint64_t>(rows);
    word |= (of_rows[row / kWordBits] >> (row % kWordBits) & 1) << bit;
  }
  return word;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define DGI_AVX2 __attribute__((target("avx2")))

DGI_AVX2 inline uint64_t pack_word_avx2(const bool* members) {
  uint64_t word = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(members + 32 * half));
    word |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7)))} << (32 * half);
  }
  return word;
}

DGI_AVX2 inline void pack_words_avx2(const bool* members, int64_t count, uint64_t* words) {
  for (int64_t w = 0; w < count; ++w) words[w] = pack_word_avx2(members + w * kWordBits);
}

DGI_AVX2 inline __m256i eight_rows(const Rows<int32_t>& order, int64_t place) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order.data + place));
}

// Reads four bytes more than the eight rows have.
DGI_AVX2 inline __m256i eight_rows(const RowsOf24Bits& order, int64_t place) {
  const auto four = [&](int64_t from) DGI_AVX2 {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(order.data + 3 * (place + from)));
  };
  const __m256i widen = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                         0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(four(0)), four(4), 1), widen);
}

// As gather_word, of `count` whole words. Rows past the last are looked up as the one behind it, which is no member.
template <class Order>
DGI_AVX2 void gather_words_avx2(const uint64_t* of_rows, const Order& order, int64_t first, int64_t count, int64_t rows,
                                uint64_t* words, bool& known) {
  const __m256i end = _mm256_set1_epi32(static_cast<int>(rows)), low_bits = _mm256_set1_epi32(31);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t w = 0; w < count; ++w) {
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) {
      const __m256i given = eight_rows(order, first + w * kWordBits + 8 * byte);
      largest = _mm256_max_epu32(largest, given);
      const __m256i row = _mm256_min_epu32(given, end);
      const __m256i found = _mm256_i32gather_epi32(reinterpret_cast<const int*>(of_rows), _mm256_srli_epi32(row, 5), 4);
      const __m256i on_top = _mm256_sllv_epi32(found, _mm256_andnot_si256(row, low_bits));  // by 31 - row % 32
      word |= uint64_t{static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(on_top)))} << (8 * byte);
    }
    words[w] = word;
  }
  const __m256i beyond = _mm256_cmpeq_epi32(_mm256_max_epu32(largest, end), largest);  // largest >= rows
  if (_mm256_movemask_epi8(beyond) != 0) known = false;
}

#endif

// Words [first, last) of the members by row.
template <class Isa>
void pack(Isa, const bool* members, int64_t size, int64_t first, int64_t last, uint64_t* words) {
  int64_t w = first;
#ifdef DGI_AVX2
  if constexpr (Isa::kVectorBytes >= 32) {
    const int64_t whole = std::max<int64_t>(0, std::min(last, size / kWordBits) - first);
    pack_words_avx2(members + first * kWordBits, whole, words + first);
    w += whole;
  }
#endif
  for (; w < last; ++w) {
    words[w] = pack_word(members + w * kWordBits, std::clamp<int64_t>(size - w * kWordBits, 0, kWordBits));
  }
}

// Words [first, last) of the members by place.
template <class Isa, class Order>
void gather(Isa, const uint64_t* of_rows, const Order& order, int64_t size, int64_t first, int64_t last,
            uint64_t* words, bool& known) {
  int64_t w = first;
#ifdef DGI_AVX2
  if constexpr (Isa::kVectorBytes >= 32 && !std::is_same_v<Order, Rows<int64_t>>) {
    constexpr int64_t kMore = std::is_same_v<Order, RowsOf24Bits> ? 2 : 0;  // rows that are read beyond
    const int64_t whole = std::max<int64_t>(0, std::min(last, (size - kMore) / kWordBits) - first);
    gather_words_avx2(of_rows, order, first * kWordBits, whole, size, words + first, known);
    w += whole;
  }
#endif
  for (; w < last; ++w) {
    const int64_t place = w * kWordBits;
    words[w] = gather_word(of_rows, order, place, std::clamp<int64_t>(size - place, 0, kWordBits), size, known);
  }
}

// Calls f with a lookup of rows by place.
template <class F>
void with_rows(const Offsets& order, const F& f) {
  switch (order.stored) {
    case Offsets::Stored::kInt64: return f(Rows<int64_t>{static_cast<const int64_t*>(order.data)});
    case Offsets::Stored::kUInt24: return f(RowsOf24Bits{static_cast<const uint8_t*>(order.data)});
    default: return f(Rows<int32_t>{static_cast<const int32_t*>(order.data)});
  }
}

// Calls body(instructions, first, last) for ranges of the words of so many blocks, on all threads.
template <class Body>
void for_words(int64_t blocks, const Body& body) {
  parallel_for(blocks, grain(kWordBits * kBlockWords / 4), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto instructions)
                               DGI_ALWAYS_INLINE { body(instructions, first * kBlockWords, last * kBlockWords); });
  });
}

// The number of ones before each block.
void write_ranks(const uint64_t* words, int64_t blocks, int64_t* ranks) {
  for_words(blocks, [&](auto, int64_t first, int64_t last) DGI_ALWAYS_INLINE {
    for (int64_t block = first / kBlockWords; block < last / kBlockWords; ++block) {
      ranks[block] = 0;
      for (int64_t w = 0; w < kBlockWords; ++w) ranks[block] += count_ones(words[block * kBlockWords + w]);
    }
  });
  int64_t total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += std::exchange(ranks[block], total);
}

#ifdef DGI_AVX2
__attribute__((target("bmi2"))) inline uint64_t compressed_bmi2(uint64_t word, uint64_t mask) {
  return _pext_u64(word, mask);
}
#endif

// Moves the bits of `word` that `mask` selects to the lowest places, in order: one instruction where it is fast, as it
// is on all that have AVX-512; else by H. Warren, Hacker's Delight, 7-4, without a branch, so that several words go at
// once.
template <class Isa>
DGI_ALWAYS_INLINE inline uint64_t compressed(Isa, uint64_t word, uint64_t mask) {
#ifdef DGI_AVX2
  if constexpr (Isa::kVectorBytes == 64) return compressed_bmi2(word, mask);
#endif
  word &= mask;
  uint64_t zeros = ~mask << 1;  // to the right of each bit
  for (int shift = 1; shift < kWordBits; shift *= 2) {
    uint64_t parity = zeros;
    for (int by = 1; by < kWordBits; by *= 2) parity ^= parity << by;
    const uint64_t moved = parity & mask;
    mask = (mask ^ moved) | (moved >> shift);
    const uint64_t bits = word & moved;
    word = (word ^ bits) | (bits >> shift);
    zeros &= ~parity;
  }
  return word;
}

// Blocks [first, last) of the `blocks` of places into the leaves, whose words are 0 yet. Other threads take the blocks
// about them, and share the first and the last word with this one.
template <class Isa>
DGI_ALWAYS_INLINE inline void join_runs(Isa instructions, const ItemSet& places, const RunMarks& marks, int64_t first,
                                        int64_t last, int64_t blocks, uint64_t* leaf_words, int64_t count) {
  const uint64_t *const ranks = marks.data + 1, *const starts = ranks + marks.blocks();
  int64_t leaf = static_cast<int64_t>(ranks[first]);  // the next to begin
  const int64_t first_word = (leaf - 1) / kWordBits, last_word = last < blocks
                                                                     ? static_cast<int64_t>(ranks[last]) / kWordBits
                                                                     : std::numeric_limits<int64_t>::max();
  const auto add = [&](int64_t word, uint64_t bits) {
    if (bits == 0 || static_cast<uint64_t>(word) >= static_cast<uint64_t>(count)) return;  // the latter: no true marks
    if (word <= first_word || word >= last_word) {
      std::atomic_ref<uint64_t>(leaf_words[word]).fetch_or(bits, std::memory_order_relaxed);
    } else {
      leaf_words[word] |= bits;
    }
  };
  for (int64_t block = first; block < last; ++block) {
    const uint64_t *const begins = starts + block * kBlockWords, *const members = places.words + block * kBlockWords;
    uint64_t joined[kBlockWords];  // of each word, a bit for each of its runs
    for (int64_t w = 0; w < kBlockWords; ++w) {
      // A carry from the lowest bit of a run comes out at its highest if and only if all bits on the way are 1.
      const uint64_t none = ~members[w], ends = begins[w] >> 1 | uint64_t{1} << 63;
      const uint64_t empty = none & ((none & ~ends) + (begins[w] | 1)) & ends;
      joined[w] = compressed(instructions, ends & ~empty, ends);
    }
    for (int64_t w = 0; w < kBlockWords; ++w) {
      const int64_t at = leaf - ((begins[w] & 1) == 0);  // a run that goes on from the word before is the last leaf's
      add(at / kWordBits, joined[w] << (at % kWordBits));
      if (at % kWordBits != 0) add(at / kWordBits + 1, joined[w] >> (kWordBits - at % kWordBits));
      leaf += count_ones(begins[w]);
    }
  }
}

}  // namespace

bool write_item_set(const bool* members, int64_t size, const Offsets& item_order, uint64_t* words, int64_t* ranks) {
  const int64_t blocks = size / (kWordBits * kBlockWords) + 1;
  const bool in_order = item_order.data == nullptr;
  const Buffer<uint64_t> by_row = make_buffer<uint64_t>(in_order ? 0 : blocks * kBlockWords);
  uint64_t* const of_rows = in_order ? words : by_row.get();
  for_words(blocks, [&](auto instructions, int64_t first, int64_t last) {
    pack(instructions, members, size, first, last, of_rows);
  });
  std::atomic<bool> all_known{true};
  if (!in_order) {
    with_rows(item_order, [&](const auto& order) {
      for_words(blocks, [&](auto instructions, int64_t first, int64_t last) {
        bool known = true;
        gather(instructions, of_rows, order, size, first, last, words, known);
        if (!known) all_known = false;
      });
    });
  }
  write_ranks(words, blocks, ranks);
  return all_known;
}

template <class Offset>
bool write_run_marks(const Offset* starts, int64_t runs, uint64_t* marks) {
  constexpr int64_t kBlockBits = kWordBits * kBlockWords;
  const int64_t end = starts[runs], blocks = RunMarks::blocks_of(end);
  if (starts[0] != 0) return false;
  uint64_t *const words = marks + 1 + blocks, *samples = words + kBlockWords * blocks;
  marks[0] = static_cast<uint64_t>(blocks);
  std::fill_n(words, kBlockWords * blocks, uint64_t{0});
  for (int64_t i = 0; i <= runs; ++i) {
    const int64_t start = starts[i];
    if (start > end || (i > 0 && start <= starts[i - 1])) return false;
    words[start / kWordBits] |= uint64_t{1} << (start % kWordBits);
    if (i % RunMarks::kSampled == 0) *samples++ = static_cast<uint64_t>(start / kBlockBits);
  }
  *samples = static_cast<uint64_t>(end / kBlockBits);
  write_ranks(words, blocks, reinterpret_cast<int64_t*>(marks + 1));
  return true;
}

template bool write_run_marks(const int32_t*, int64_t, uint64_t*);
template bool write_run_marks(const int64_t*, int64_t, uint64_t*);

void write_parent_set(const ItemSet& children, int64_t blocks, const Offsets& starts, int64_t parents, uint64_t* words,
                      int64_t* ranks) {
  const int64_t parent_blocks = parents / (kWordBits * kBlockWords) + 1;
  std::fill_n(words, parent_blocks * kBlockWords, uint64_t{0});
  if (starts.stored == Offsets::Stored::kRunMarks) {
    const RunMarks marks{static_cast<const uint64_t*>(starts.data)};
    for_words(blocks, [&](auto instructions, int64_t first, int64_t last) DGI_ALWAYS_INLINE {
      join_runs(instructions, children, marks, first / kBlockWords, last / kBlockWords, blocks, words,
                parent_blocks * kBlockWords);
    });
  } else {  // long runs, or few parents
    for_words(parent_blocks, [&](auto, int64_t first, int64_t last) {
      for (int64_t parent = first * kWordBits; parent < std::min(parents, last * kWordBits); ++parent) {
        words[parent / kWordBits] |= uint64_t{children.any(starts.run(parent))} << (parent % kWordBits);
      }
    });
  }
  write_ranks(words, parent_blocks, ranks);
}

}  // namespace dgi::cpu
