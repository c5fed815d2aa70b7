// Trie construction on the CPU, and looking up what was built.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dgi/trie.h"

namespace dgi::cpu {

enum class IntegerType { kInt8, kUInt8, kInt16, kUInt16, kInt32, kUInt32, kInt64 };

struct CodeTable {  // (rows, columns), of any strides
  const void* data;
  IntegerType type;
  int64_t rows, columns, row_stride, column_stride;

  // Calls f with the data as what they are.
  template <class F>
  auto visit(const F& f) const {
    switch (type) {
      case IntegerType::kInt8: return f(static_cast<const int8_t*>(data));
      case IntegerType::kUInt8: return f(static_cast<const uint8_t*>(data));
      case IntegerType::kInt16: return f(static_cast<const int16_t*>(data));
      case IntegerType::kUInt16: return f(static_cast<const uint16_t*>(data));
      case IntegerType::kInt32: return f(static_cast<const int32_t*>(data));
      case IntegerType::kUInt32: return f(static_cast<const uint32_t*>(data));
      default: return f(static_cast<const int64_t*>(data));
    }
  }

  int64_t at(int64_t row, int64_t column) const {
    return visit([=, this](const auto* codes) {
      return static_cast<int64_t>(codes[row * row_stride + column * column_stride]);
    });
  }

  // out[i] = the code of rows[i]
  void gather(const int64_t* of_rows, int64_t count, int64_t column, int64_t* out) const {
    visit([=, this](const auto* codes) {
      codes += column * column_stride;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(codes[of_rows[i] * row_stride]);
    });
  }
};

struct CodeRange {
  int64_t low = 0, high = -1;
};

// The least and the greatest code of each column; 0 and -1 where there is no row.
std::vector<CodeRange> code_ranges(const CodeTable& table);

class SortedRows;

// A trie to be: the rows sorted and the nodes counted, so that whoever has the memory can ask for the arrays.
class TrieBuild {
 public:
  // The codes are -1 (sequences that have ended) or more, and the table outlives this object.
  TrieBuild(const CodeTable& table, const std::vector<CodeRange>& ranges);
  ~TrieBuild();

  int64_t nodes(int64_t depth) const { return depth == 0 ? 1 : nodes_[depth - 1]; }

  // Whether the rows were sorted from the beginning: then place i of the leaf order is row i.
  bool in_order() const { return in_order_; }

  // tokens[t] (nodes(t + 1)), child_start[t] (nodes(t) + 1), item_start (nodes(columns) + 1) and item_order (rows);
  // either of the last two may be null.
  template <class Token, class Offset>
  void write(Token* const* tokens, Offset* const* child_start, Offset* item_start, Offset* item_order) const;

 private:
  const CodeTable& table_;
  std::unique_ptr<SortedRows> sorted_;
  std::vector<std::vector<int64_t>> first_node_;  // of each share, by level: how many nodes begin before it
  std::vector<int64_t> nodes_;
  bool in_order_ = true;
};

// Looks for the child of each of `count` nodes by its code: places[i] is the first child of nodes[i] whose token is not
// less, or the end of its children; found[i] whether it is that of codes[i]. Of a node that does not exist 0 and false.
template <class Token>
void find_children(const TrieLevel<Token>& level, int64_t children, const int64_t* nodes, const int64_t* codes,
                   int64_t count, int64_t* places, bool* found);

// Which codes the children of each node have: bit c % 32 of a node's word c / 32 for code c. Optional.
struct ChildMasks {
  static constexpr int kWordBits = 32;

  const uint32_t* data = nullptr;
  int64_t words = 0;  // of a node

  static constexpr int64_t words_for(int64_t codes) { return (codes + kWordBits - 1) / kWordBits; }

  const uint32_t* of(int64_t node) const { return data == nullptr ? nullptr : data + node * words; }
};

// The words (nodes, words) of ChildMasks; no code is beyond the last word.
template <class Token>
void write_child_masks(const TrieLevel<Token>& level, int64_t words, uint32_t* masks);

}  // namespace dgi::cpu
