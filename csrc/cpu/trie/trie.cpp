// Trie construction on the CPU: one sort (trie_sort.h), one pass that counts nodes, one that writes them.
//
// A node of depth t + 1 begins at every sorted row whose first difference from the row before lies in the first t + 1
// columns. Shares of the rows, one per thread, count the nodes that begin in them; from the counts follows where each
// share writes.
#include "cpu/trie/trie_cpu.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/shared/host.h"
#include "cpu/trie/trie_sort.h"

namespace dgi::cpu {

std::vector<CodeRange> code_ranges(const CodeTable& table) {
  std::vector<CodeRange> ranges(table.columns);
  if (table.rows == 0) return ranges;
  const int64_t shares = share_count(table.rows);
  std::vector<CodeRange> found(shares * table.columns);
  table.visit([&](const auto* codes) {
    using Code = std::remove_const_t<std::remove_pointer_t<decltype(codes)>>;
    for_shares(table.rows, shares, [&](int64_t share, int64_t first, int64_t last) {
      std::vector<Code> low(table.columns), high(table.columns);
      for (int64_t c = 0; c < table.columns; ++c)
        low[c] = high[c] = codes[first * table.row_stride + c * table.column_stride];
      for (int64_t row = first; row < last; ++row) {
        const Code* const of_row = codes + row * table.row_stride;
        for (int64_t c = 0; c < table.columns; ++c) {
          const Code code = of_row[c * table.column_stride];
          low[c] = std::min(low[c], code);
          high[c] = std::max(high[c], code);
        }
      }
      for (int64_t c = 0; c < table.columns; ++c) {
        found[share * table.columns + c] = {static_cast<int64_t>(low[c]), static_cast<int64_t>(high[c])};
      }
    });
  });
  for (int64_t c = 0; c < table.columns; ++c) {
    ranges[c] = found[c];
    for (int64_t share = 1; share < shares; ++share) {
      const CodeRange& other = found[share * table.columns + c];
      ranges[c] = {std::min(ranges[c].low, other.low), std::max(ranges[c].high, other.high)};
    }
  }
  return ranges;
}

TrieBuild::TrieBuild(const CodeTable& table, const std::vector<CodeRange>& ranges)
    : table_(table), sorted_(std::make_unique<SortedRows>(table, ranges)), nodes_(table.columns) {
  const int64_t columns = table.columns, shares = share_count(table.rows);
  first_node_.assign(shares, std::vector<int64_t>(columns + 1));
  std::atomic<bool> in_order{true};
  for_shares(table.rows, shares, [&](int64_t share, int64_t first, int64_t last) {
    std::vector<int64_t> differing(columns + 1);
    bool in_place = true;
    for (int64_t i = first; i < last; ++i) {
      ++differing[sorted_->first_difference(i)];
      in_place = in_place && sorted_->row(i) == i;
    }
    int64_t begin = 0;
    for (int64_t t = 0; t < columns; ++t) first_node_[share][t] = begin += differing[t];
    if (!in_place) in_order = false;
  });
  for (int64_t t = 0; t < columns; ++t) {
    for (auto& of_share : first_node_) nodes_[t] += std::exchange(of_share[t], nodes_[t]);
  }
  in_order_ = in_order;
}

TrieBuild::~TrieBuild() = default;

template <class Token, class Offset>
void TrieBuild::write(Token* const* tokens, Offset* const* child_start, Offset* item_start, Offset* item_order) const {
  const int64_t columns = table_.columns, rows = table_.rows, shares = static_cast<int64_t>(first_node_.size());
  child_start[0][0] = 0;
  for (int64_t t = 0; t < columns; ++t) child_start[t][nodes(t)] = static_cast<Offset>(nodes(t + 1));
  if (item_start != nullptr) item_start[nodes(columns)] = static_cast<Offset>(rows);
  for_shares(rows, shares, [&](int64_t share, int64_t first, int64_t last) {
    std::vector<int64_t> next = first_node_[share];  // of each level; of the last, the item's place
    next[columns] = first;
    std::vector<Offset*> starts(child_start + 1, child_start + columns);
    starts.push_back(item_start);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t t = sorted_->first_difference(i); t < columns; ++t) {
        const int64_t node = next[t]++;
        tokens[t][node] = static_cast<Token>(sorted_->code(i, t));
        if (starts[t] != nullptr) starts[t][node] = static_cast<Offset>(next[t + 1]);
      }
      next[columns] = i + 1;
      if (item_order != nullptr) item_order[i] = static_cast<Offset>(sorted_->row(i));
    }
  });
}

template void TrieBuild::write(int16_t* const*, int32_t* const*, int32_t*, int32_t*) const;
template void TrieBuild::write(int16_t* const*, int64_t* const*, int64_t*, int64_t*) const;
template void TrieBuild::write(int32_t* const*, int32_t* const*, int32_t*, int32_t*) const;
template void TrieBuild::write(int32_t* const*, int64_t* const*, int64_t*, int64_t*) const;

template <class Token>
void find_children(const TrieLevel<Token>& level, int64_t children, const int64_t* nodes, const int64_t* codes,
                   int64_t count, int64_t* places, bool* found) {
  parallel_for(count, grain(64), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      places[i] = 0, found[i] = false;
      if (nodes[i] < 0 || nodes[i] >= level.nodes) continue;
      const Range run = level.children(nodes[i]);
      if (run.first < 0 || run.end > children) continue;
      places[i] = lower_bound(level.tokens, run, codes[i]);
      found[i] = places[i] < run.end && level.tokens[places[i]] == codes[i];
    }
  });
}

template void find_children(const TrieLevel<int16_t>&, int64_t, const int64_t*, const int64_t*, int64_t, int64_t*,
                            bool*);
template void find_children(const TrieLevel<int32_t>&, int64_t, const int64_t*, const int64_t*, int64_t, int64_t*,
                            bool*);

template <class Token>
void write_child_masks(const TrieLevel<Token>& level, int64_t words, uint32_t* masks) {
  constexpr int kWordBits = ChildMasks::kWordBits;
  parallel_for(level.nodes, grain(8 * words), [&](int64_t first, int64_t last) {
    std::fill(masks + first * words, masks + last * words, 0);
    for (int64_t node = first; node < last; ++node) {
      const Range run = level.children(node);
      for (int64_t i = run.first; i < run.end; ++i) {
        const Token code = level.tokens[i];
        if (code != kEndToken) masks[node * words + code / kWordBits] |= uint32_t{1} << code % kWordBits;
      }
    }
  });
}

template void write_child_masks(const TrieLevel<int16_t>&, int64_t, uint32_t*);
template void write_child_masks(const TrieLevel<int32_t>&, int64_t, uint32_t*);

}  // namespace dgi::cpu
