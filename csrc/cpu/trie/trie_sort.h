// Stable lexicographic order of the rows of a table of codes, and where each sorted row leaves the one before it: all
// that the level arrays of a trie are derived from.
//
// A row is read as one long binary number: per column the bits of (code - low), column 0 on top. Rows are sorted by
// least-significant-digit radix sort of 64-bit words, which hold as many of the row's bits as fit above its position.
// A usual table (three codebooks of 2048, 1e7 items: 33 + 24 bits) needs one word per row: a pass moves 8 bytes per
// row, the codes are read back from the words, and the first difference is the leading bit of the XOR of two
// neighbours. Wider rows take several words, the lowest first; each sort is stable, so that the next one refines it.
//
// The shares of a pass, one per thread, count their digits; from the counts follows where each share puts which digit.
// The result does not depend on how many there are.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/shared/host.h"
#include "cpu/trie/trie_cpu.h"

namespace dgi::cpu {

// Calls body(share, first, last) for each of `shares` parts of [0, count), on torch's threads.
template <class Body>
void for_shares(int64_t count, int64_t shares, const Body& body) {
  parallel_for(shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share)
      body(share, count * share / shares, count * (share + 1) / shares);
  });
}

// How many shares a pass over so many rows is worth.
inline int64_t share_count(int64_t rows) {
  constexpr int64_t kLeastRows = 1 << 14;
  return std::clamp<int64_t>(rows / kLeastRows, 1, thread_count());
}

// A run of bits of one column; wide columns are cut into several, so that each fits beside any row number.
struct Field {
  static constexpr int kMaxWidth = 24;
  int64_t column, low;
  int shift, width;

  uint64_t of(int64_t code) const {
    return ((static_cast<uint64_t>(code) - static_cast<uint64_t>(low)) >> shift) & ((uint64_t{1} << width) - 1);
  }
};

// The fields of a row, the least significant first. A column of one value has none.
inline std::vector<Field> split_into_fields(const std::vector<CodeRange>& ranges) {
  std::vector<Field> fields;
  for (int64_t c = static_cast<int64_t>(ranges.size()) - 1; c >= 0; --c) {
    const int width = std::bit_width(static_cast<uint64_t>(ranges[c].high) - static_cast<uint64_t>(ranges[c].low));
    for (int shift = 0; shift < width; shift += Field::kMaxWidth) {
      fields.push_back({c, ranges[c].low, shift, std::min(Field::kMaxWidth, width - shift)});
    }
  }
  return fields;
}

// Sorts words by their bits [first_bit, last_bit), stably; `scratch` is of the same size. The result is in `words`.
inline void radix_sort(Buffer<uint64_t>& words, Buffer<uint64_t>& scratch, int64_t count, int first_bit, int last_bit) {
  constexpr int kMaxDigit = 11;  // 2048 counters and write positions: the first-level cache holds them
  using Positions = std::array<int64_t, size_t{1} << kMaxDigit>;
  const int passes = (last_bit - first_bit + kMaxDigit - 1) / kMaxDigit;
  const int64_t shares = share_count(count);
  std::vector<Positions> positions(shares);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = first_bit + (last_bit - first_bit) * pass / passes;  // digits of about equal width
    const int width = first_bit + (last_bit - first_bit) * (pass + 1) / passes - shift;
    const uint64_t mask = (uint64_t{1} << width) - 1;
    for_shares(count, shares, [&](int64_t share, int64_t first, int64_t last) {
      Positions& position = positions[share];
      position.fill(0);
      for (int64_t i = first; i < last; ++i) ++position[(words[i] >> shift) & mask];
    });
    int64_t total = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) {
      for (Positions& position : positions) total += std::exchange(position[digit], total);
    }
    for_shares(count, shares, [&](int64_t share, int64_t first, int64_t last) {
      Positions& position = positions[share];
      for (int64_t i = first; i < last; ++i) scratch[position[(words[i] >> shift) & mask]++] = words[i];
    });
    words.swap(scratch);
  }
}

// The rows of a table in lexicographic order.
class SortedRows {
 public:
  SortedRows(const CodeTable& table, const std::vector<CodeRange>& ranges)
      : table_(table), fields_(table.rows == 0 ? std::vector<Field>{} : split_into_fields(ranges)), low_(table.columns),
        shift_(table.columns), mask_(table.columns),
        position_bits_(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(1, table.rows) - 1))),
        words_(make_buffer<uint64_t>(table.rows)) {
    int bits = position_bits_;
    for (const Field& field : fields_) bits += field.width;
    in_one_word_ = bits <= 64;
    sort();
    if (!in_one_word_) return;
    bits = 0;
    column_of_width_.fill(table.columns);
    for (int64_t c = table.columns - 1; c >= 0; --c) {
      low_[c] = ranges[c].low;
      shift_[c] = bits;
      for (const Field& field : fields_) {
        if (field.column != c) continue;
        for (int bit = 0; bit < field.width; ++bit) column_of_width_[++bits] = c;
      }
      mask_[c] = (uint64_t{1} << (bits - shift_[c])) - 1;
    }
  }

  // Which row of the table sorted row i is.
  int64_t row(int64_t i) const { return static_cast<int64_t>(words_[i] & position_mask()); }

  int64_t code(int64_t i, int64_t column) const {
    if (!in_one_word_) return table_.at(row(i), column);
    return low_[column] + static_cast<int64_t>(words_[i] >> position_bits_ >> shift_[column] & mask_[column]);
  }

  // The first column in which sorted row i differs from sorted row i - 1; as many as there are where they are equal, 0
  // for i = 0.
  int64_t first_difference(int64_t i) const {
    if (i == 0) return 0;
    if (in_one_word_) return column_of_width_[std::bit_width((words_[i] ^ words_[i - 1]) >> position_bits_)];
    const int64_t a = row(i), b = row(i - 1);
    int64_t column = 0;
    while (column < table_.columns && table_.at(a, column) == table_.at(b, column)) ++column;
    return column;
  }

 private:
  uint64_t position_mask() const { return (uint64_t{1} << position_bits_) - 1; }

  void sort() {
    const int64_t rows = table_.rows, shares = share_count(rows);
    Buffer<uint64_t> scratch = make_buffer<uint64_t>(rows);
    for_shares(rows, shares, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) words_[i] = static_cast<uint64_t>(i);
    });
    for (size_t begin = 0, end = 0; end < fields_.size(); begin = end) {
      int bits = position_bits_;
      for (; end < fields_.size() && bits + fields_[end].width <= 64; ++end) bits += fields_[end].width;
      for_shares(rows, shares, [&](int64_t, int64_t first, int64_t last) { pack(first, last, begin, end); });
      radix_sort(words_, scratch, rows, position_bits_, bits);
    }
  }

  // Puts fields [begin, end) of the rows that the words [first, last) stand for above their positions.
  void pack(int64_t first, int64_t last, size_t begin, size_t end) {
    constexpr int64_t kBlock = 512;
    std::array<int64_t, kBlock> rows, codes;
    std::array<uint64_t, kBlock> keys;
    for (int64_t from = first; from < last; from += kBlock) {
      const int64_t count = std::min(kBlock, last - from);
      for (int64_t i = 0; i < count; ++i) rows[i] = row(from + i), keys[i] = 0;
      for (size_t f = end; f-- > begin;) {
        const Field& field = fields_[f];
        if (f + 1 == end || fields_[f + 1].column != field.column)
          table_.gather(rows.data(), count, field.column, codes.data());
        for (int64_t i = 0; i < count; ++i) keys[i] = keys[i] << field.width | field.of(codes[i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        words_[from + i] = keys[i] << position_bits_ | static_cast<uint64_t>(rows[i]);
      }
    }
  }

  const CodeTable& table_;
  std::vector<Field> fields_;
  std::vector<int64_t> low_;
  std::vector<int> shift_;
  std::vector<uint64_t> mask_;
  std::array<int64_t, 65> column_of_width_{};  // bit width of the XOR of two keys -> first column that differs
  int position_bits_;
  bool in_one_word_ = false;
  Buffer<uint64_t> words_;
};

}  // namespace dgi::cpu
