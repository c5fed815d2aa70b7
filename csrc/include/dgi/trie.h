// A trie as searches see it: arrays by depth, and what changes after it was built laid over them.
//
// The nodes of a depth are numbered in the order of their prefixes, so that the children of a node are a run of the
// next depth, sorted by token, and the items below it a range of places in the order of leaves. A child is allowed
// while an allowed item lies below it: while the rank of a bitset over places rises over that range, or, as searches
// ask it, while it is in a bitset over the nodes of its depth.
//
// An updated trie has two parts: the `base`, some of whose items may be gone, and a `delta`, a trie of the items that
// came since. They are searched as one. Node n of the whole, at a depth where the base has b nodes, is the base's node
// n if n < b, else the delta's node n - b. A prefix that both parts hold goes by the base's number; the two nodes are
// *twins*. The children of a node are the run of the base's node and the run of the delta's, the delta's twins left
// out.
//
// Nothing here knows torch, and all of it runs on host and device.
#pragma once

#include <cstdint>

#include "dgi/macros.h"
#include "dgi/offsets.h"

namespace dgi {

constexpr int32_t kEndToken = -1;  // the sequence has ended; sorts before every code

// A set of places, or of the nodes of a depth: bit p % 64 of word p / 64, and the number of members before each block
// of 512 places. The words cover whole blocks, and at least one place more than there are; the bits behind the last
// place are 0. Without words the set holds every place.
struct ItemSet {
  static constexpr int kWordBits = 64, kBlockWords = 8;

  const uint64_t* words = nullptr;
  const int64_t* ranks = nullptr;

  DGI_HOST_DEVICE bool contains(int64_t place) const {
    return words == nullptr || (words[place / kWordBits] >> (place % kWordBits) & 1) != 0;
  }

  // The number of members before `place`, which may be the end.
  DGI_HOST_DEVICE int64_t rank(int64_t place) const {
    const int64_t word = place / kWordBits;
    int64_t count = ranks[word / kBlockWords];
    for (int64_t w = word / kBlockWords * kBlockWords; w < word; ++w) count += count_ones(words[w]);
    return count + count_ones(words[word] & ~(~uint64_t{0} << (place % kWordBits)));
  }

  // Whether the set holds a place of the range: rank(end) > rank(first), looked up in one word where that will do.
  DGI_HOST_DEVICE bool any(const Range& range) const {
    if (range.first >= range.end) return false;
    if (words == nullptr) return true;
    const int64_t word = range.first / kWordBits;
    const uint64_t head = words[word] >> (range.first % kWordBits);
    if (range.end <= (word + 1) * kWordBits) return (head << (kWordBits - range.size())) != 0;
    return head != 0 || rank(range.end) > rank(range.first);
  }
};

// The edges out of one depth. Node i has the children child_start[i] to child_start[i + 1] - 1, by ascending token.
template <class Token>
struct TrieLevel {
  const Token* tokens = nullptr;  // (children): int16_t or int32_t
  Offsets child_start;            // (nodes + 1)
  int64_t nodes = 0;

  DGI_HOST_DEVICE Range children(int64_t node) const { return {child_start.plain(node), child_start.plain(node + 1)}; }
};

// The levels below some depth, down to the items of the leaves.
struct LowerLevels {
  const Offsets* starts = nullptr;
  int64_t count = 0;

  // The places of the items below a node.
  DGI_HOST_DEVICE Range items(int64_t node) const {
    Range range{node, node + 1};
    for (int64_t level = 0; level < count; ++level) {
      range = range.size() == 1 ? starts[level].run(range.first)
                                : Range{starts[level][range.first], starts[level][range.end]};
    }
    return range;
  }
};

// The first place of a sorted range whose element is not less than `value`, or its end.
template <class Element, class Value>
DGI_HOST_DEVICE int64_t lower_bound(const Element* sorted, Range range, Value value) {
  while (range.first < range.end) {
    const int64_t middle = range.first + range.size() / 2;
    if (sorted[middle] < value) {
      range.first = middle + 1;
    } else {
      range.end = middle;
    }
  }
  return range.first;
}

// Where the delta's nodes of one depth stand among the base's: 2 a + 1 for the twin of the base's node a, 2 a for a
// node without a twin that has a of the base's nodes before it. They ascend, and those of twins differ.
struct Anchors {
  const int64_t* data = nullptr;
  int64_t count = 0;  // 0 where there is no delta

  DGI_HOST_DEVICE bool has_twin(int64_t delta_node) const { return (data[delta_node] & 1) != 0; }

  // The delta's node that is the twin of the base's, -1 where there is none.
  DGI_HOST_DEVICE int64_t twin_of(int64_t base_node) const {
    const int64_t at = lower_bound(data, Range{0, count}, 2 * base_node + 1);
    return at < count && data[at] == 2 * base_node + 1 ? at : -1;
  }
};

// What one request may find, in base and delta: the places of items, or the nodes of one depth that lead to such. Items
// that are gone are in no such set.
struct AllowedItems {
  ItemSet base, delta;
};

// The children of a node: base.first to base.end - 1 of the base, and those of the delta that have no twin.
struct Children {
  Range base, delta;
};

// A trie at one depth.
template <class Token>
struct TrieDepth {
  TrieLevel<Token> base, delta;  // delta.nodes is 0 where there is none
  Anchors nodes, children;       // of the delta's nodes at this depth and the next
  int64_t base_children = 0;     // how many nodes the base has at the next depth

  // Numbers of nodes at this depth are less than this.
  DGI_HOST_DEVICE int64_t end() const { return base.nodes + delta.nodes; }

  DGI_HOST_DEVICE Children children_of(int64_t node) const {
    Children found;
    int64_t delta_node = node - base.nodes;
    if (delta_node < 0) {
      found.base = base.children(node);
      delta_node = nodes.twin_of(node);
    }
    if (delta_node >= 0) found.delta = delta.children(delta_node);
    return found;
  }

  // Whether a child, given by its place in the run of its part, is one of the nodes of its depth that are allowed; null
  // allows all. The delta's children that have a twin are asked for by the twin.
  DGI_HOST_DEVICE bool is_allowed(const AllowedItems* allowed, int64_t child, bool in_delta) const {
    if (allowed == nullptr) return true;
    if (in_delta) return allowed->delta.contains(child);
    if (allowed->base.contains(child)) return true;
    if (children.count == 0) return false;
    const int64_t twin = children.twin_of(child);
    return twin >= 0 && allowed->delta.contains(twin);
  }

  DGI_HOST_DEVICE int64_t child_number(int64_t child, bool in_delta) const {
    return in_delta ? base_children + child : child;
  }
};

}  // namespace dgi
