// Stable lexicographic order of the rows of a table of codes, and where each sorted row leaves the one before it: all
// that the level arrays of a trie are derived from.
//
// A row is read as one long binary number: per column the bits of (code - low), column 0 on top. Rows are sorted by
// least-significant-digit radix sort of 64-bit words, which hold as many of the row's bits as fit above its position.
// A usual table (three codebooks of 2048, 1e7 items: 33 + 24 bits) needs one word per row: a pass moves 8 bytes per
// row, and first_diff is the leading bit of the XOR of two neighbours. Wider rows take several words, the lowest
// first; each sort is stable, so that the next one refines it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace dgi {

struct CodeTable {  // (rows, columns), row-major
  const int64_t* codes;
  int64_t rows, columns;

  int64_t at(int64_t row, int64_t column) const { return codes[row * columns + column]; }
};

struct CodeRange {
  int64_t low = 0, high = 0;
};

// The least and the greatest code of each column.
inline std::vector<CodeRange> code_ranges(const CodeTable& table) {
  std::vector<CodeRange> ranges(table.columns);
  if (table.rows == 0) return ranges;
  for (int64_t c = 0; c < table.columns; ++c) ranges[c] = {table.at(0, c), table.at(0, c)};
  for (int64_t row = 1; row < table.rows; ++row) {
    for (int64_t c = 0; c < table.columns; ++c) {
      const int64_t code = table.at(row, c);
      ranges[c].low = std::min(ranges[c].low, code);
      ranges[c].high = std::max(ranges[c].high, code);
    }
  }
  return ranges;
}

// A run of bits of one column; wide columns are cut into several, so that each fits beside any row number.
struct Field {
  static constexpr int kMaxWidth = 24;
  int64_t column, low;
  int shift, width;

  uint64_t of(const CodeTable& table, int64_t row) const {
    const uint64_t code = static_cast<uint64_t>(table.at(row, column)) - static_cast<uint64_t>(low);
    return (code >> shift) & ((uint64_t{1} << width) - 1);
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
inline void radix_sort(std::unique_ptr<uint64_t[]>& words, std::unique_ptr<uint64_t[]>& scratch, int64_t count,
                       int first_bit, int last_bit) {
  constexpr int kMaxDigit = 11;  // 2048 counters and write positions: the first-level cache holds them
  const int passes = (last_bit - first_bit + kMaxDigit - 1) / kMaxDigit;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = first_bit + (last_bit - first_bit) * pass / passes;  // digits of about equal width
    const int width = first_bit + (last_bit - first_bit) * (pass + 1) / passes - shift;
    const uint64_t mask = (uint64_t{1} << width) - 1;
    std::array<int64_t, size_t{1} << kMaxDigit> position{};
    for (int64_t i = 0; i < count; ++i) ++position[(words[i] >> shift) & mask];
    int64_t total = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) total += std::exchange(position[digit], total);
    for (int64_t i = 0; i < count; ++i) scratch[position[(words[i] >> shift) & mask]++] = words[i];
    words.swap(scratch);
  }
}

inline int64_t first_difference(const CodeTable& table, int64_t row, int64_t other) {
  int64_t column = 0;
  while (column < table.columns && table.at(row, column) == table.at(other, column)) ++column;
  return column;
}

// The same from the words of two rows, where all fields lie in one word, above `position_bits`.
struct WordDifference {
  std::array<int64_t, 65> column_of_width;  // bit width of the XOR of two keys -> first column that differs

  WordDifference(const std::vector<Field>& fields, int64_t columns) {
    column_of_width.fill(columns);
    int width = 0;
    for (const Field& field : fields) {
      for (int bit = 0; bit < field.width; ++bit) column_of_width[++width] = field.column;
    }
  }

  int64_t operator()(uint64_t key, uint64_t other) const { return column_of_width[std::bit_width(key ^ other)]; }
};

// order (rows,): the rows in stable lexicographic order. first_diff (rows,): the first column in which sorted row i
// differs from sorted row i - 1, `columns` where they are equal, 0 for i = 0.
inline void trie_sort(const CodeTable& table, const std::vector<CodeRange>& ranges, int64_t* order,
                      int64_t* first_diff) {
  const int64_t rows = table.rows;
  if (rows == 0) return;
  const int position_bits = std::bit_width(static_cast<uint64_t>(rows - 1));
  const uint64_t position_mask = (uint64_t{1} << position_bits) - 1;
  const std::vector<Field> fields = split_into_fields(ranges);
  std::unique_ptr<uint64_t[]> words(new uint64_t[rows]), scratch(new uint64_t[rows]);
  for (int64_t i = 0; i < rows; ++i) order[i] = i;

  size_t begin = 0, end = 0;
  while (end < fields.size()) {
    int bits = position_bits;
    for (begin = end; end < fields.size() && bits + fields[end].width <= 64; ++end) bits += fields[end].width;
    for (int64_t i = 0; i < rows; ++i) {
      uint64_t key = 0;
      for (size_t f = end; f-- > begin;) key = key << fields[f].width | fields[f].of(table, order[i]);
      words[i] = key << position_bits | static_cast<uint64_t>(order[i]);
    }
    radix_sort(words, scratch, rows, position_bits, bits);
    for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int64_t>(words[i] & position_mask);
  }

  first_diff[0] = 0;
  const bool one_word = begin == 0;
  if (one_word && !fields.empty()) {
    const WordDifference difference(fields, table.columns);
    for (int64_t i = 1; i < rows; ++i) {
      first_diff[i] = difference(words[i] >> position_bits, words[i - 1] >> position_bits);
    }
  } else {
    for (int64_t i = 1; i < rows; ++i) first_diff[i] = first_difference(table, order[i], order[i - 1]);
  }
}

}  // namespace dgi
