// One trie of several: the trie of all their items, of equal codes those of earlier tries first, without their codes
// ever being held.
//
// The runs of children of all nodes with one prefix are merged by token; the nodes that are found so, depth first, are
// those of the merged trie in order. A first walk counts them, a second one writes them. Ranges of first codes are
// walked by several threads; from the counts follows where each writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/shared/host.h"
#include "dgi/trie.h"

namespace dgi::cpu {

// One of the tries.
template <class Token>
struct TrieShard {
  std::vector<TrieLevel<Token>> levels;
  std::vector<int64_t> edges;        // out of each depth
  Offsets item_start, item_order;    // of leaves, of places; nothing is the identity
  int64_t items = 0, first_row = 0;  // its row r is row first_row + r of the merged trie
};

template <class Token>
class TrieMerge {
 public:
  explicit TrieMerge(std::vector<TrieShard<Token>> shards, int64_t depth)
      : shards_(std::move(shards)), depth_(depth), nodes_(depth) {
    int64_t low = INT64_MAX, high = INT64_MIN, items = 0;
    for (const TrieShard<Token>& shard : shards_) {
      items += shard.items;
      if (shard.edges[0] == 0) continue;
      low = std::min<int64_t>(low, shard.levels[0].tokens[0]);
      high = std::max<int64_t>(high, shard.levels[0].tokens[shard.edges[0] - 1]);
    }
    constexpr int64_t kLeastItems = 1 << 14, kMostParts = 64;
    const int64_t codes = low > high ? 0 : high - low + 1;
    const int64_t parts = std::clamp<int64_t>(items / kLeastItems, 1, std::clamp<int64_t>(codes, 1, kMostParts));
    for (int64_t part = 0; part <= parts; ++part) bounds_.push_back(low > high ? 0 : low + codes * part / parts);
    first_.resize(parts);
    for_parts([&](int64_t part, const auto& walk) {
      Counter counter{std::vector<int64_t>(depth + 1)};
      walk(counter);
      first_[part] = std::move(counter);
    });
    std::vector<int64_t> total(depth + 1);
    for (Counter& counter : first_) {
      in_order_ = in_order_ && counter.in_order && (counter.counts[depth] == 0 || counter.first_row == total[depth]);
      for (int64_t t = 0; t <= depth; ++t) total[t] += std::exchange(counter.counts[t], total[t]);
    }
    items_ = total[depth];
    total.pop_back();
    nodes_ = std::move(total);
  }

  int64_t nodes(int64_t depth) const { return depth == 0 ? 1 : nodes_[depth - 1]; }
  int64_t items() const { return items_; }
  bool in_order() const { return in_order_; }  // place i of the leaf order is row i

  // As TrieBuild::write.
  template <class Offset>
  void write(Token* const* tokens, Offset* const* child_start, Offset* item_start, Offset* item_order) const {
    child_start[0][0] = 0;
    for (int64_t t = 0; t < depth_; ++t) child_start[t][nodes(t)] = static_cast<Offset>(nodes(t + 1));
    if (item_start != nullptr) item_start[nodes(depth_)] = static_cast<Offset>(items_);
    std::vector<Offset*> starts(child_start + 1, child_start + depth_);
    starts.push_back(item_start);
    for_parts([&](int64_t part, const auto& walk) {
      Writer<Offset> writer{tokens, starts.data(), item_order, first_[part].counts, depth_};
      walk(writer);
    });
  }

 private:
  struct Counter {
    std::vector<int64_t> counts;  // of the nodes of each depth from 1, then of items
    int64_t first_row = 0, next_row = 0;
    bool in_order = true;

    void node(int64_t t, Token) { ++counts[t]; }
    void item(const TrieShard<Token>& shard, int64_t place) {
      if (in_order) {
        const int64_t row = shard.first_row + shard.item_order[place];
        if (counts.back() == 0) first_row = next_row = row;
        in_order = row == next_row++;
      }
      ++counts.back();
    }
  };

  template <class Offset>
  struct Writer {
    Token* const* tokens;
    Offset* const* starts;  // of the nodes of each depth from 1
    Offset* item_order;
    std::vector<int64_t> next;
    int64_t depth;

    void node(int64_t t, Token token) {
      const int64_t node = next[t]++;
      tokens[t][node] = token;
      if (starts[t] != nullptr) starts[t][node] = static_cast<Offset>(next[t + 1]);
    }
    void item(const TrieShard<Token>& shard, int64_t place) {
      const int64_t at = next[depth]++;
      if (item_order != nullptr) item_order[at] = static_cast<Offset>(shard.first_row + shard.item_order[place]);
    }
  };

  struct Child {
    const TrieShard<Token>* shard;
    int64_t node;
  };
  struct Run {
    const TrieShard<Token>* shard;
    const Token* tokens;
    int64_t node, end;
  };

  // The nodes below a range of first codes, given to a sink.
  template <class Sink>
  class Walk {
   public:
    Walk(const TrieMerge& merge, Sink& sink)
        : depth_(merge.depth_), runs_(merge.depth_), children_(merge.depth_), sink_(sink) {}

    void below(const std::vector<TrieShard<Token>>& shards, int64_t low, int64_t high) {
      for (const TrieShard<Token>& shard : shards) {
        const Token* const tokens = shard.levels[0].tokens;
        const Range run{0, shard.edges[0]};
        add(0, shard, {lower_bound(tokens, run, low), lower_bound(tokens, run, high)});
      }
      merge(0);
    }

   private:
    void add(int64_t t, const TrieShard<Token>& shard, const Range& run) {
      if (run.first < 0 || run.first >= run.end || run.end > shard.edges[t]) return;
      runs_[t].push_back({&shard, shard.levels[t].tokens, run.first, run.end});
    }

    // Runs out the runs of a depth, which are those of one prefix.
    void merge(int64_t t) {
      std::vector<Run>& runs = runs_[t];
      std::vector<Child>& children = children_[t];
      while (!runs.empty()) {
        Token least = runs[0].tokens[runs[0].node];
        for (const Run& run : runs) least = std::min(least, run.tokens[run.node]);
        children.clear();
        size_t kept = 0;
        for (Run run : runs) {
          if (run.tokens[run.node] == least) children.push_back({run.shard, run.node++});
          if (run.node < run.end) runs[kept++] = run;
        }
        runs.resize(kept);
        sink_.node(t, least);
        for (const Child& child : children) {
          if (t + 1 < depth_) {
            add(t + 1, *child.shard, child.shard->levels[t + 1].children(child.node));
          } else {
            items(child);
          }
        }
        if (t + 1 < depth_) merge(t + 1);
      }
    }

    void items(const Child& leaf) {
      const Range places = leaf.shard->item_start.run(leaf.node);
      for (int64_t place = places.first; place < places.end && place < leaf.shard->items; ++place)
        sink_.item(*leaf.shard, place);
    }

    int64_t depth_;
    std::vector<std::vector<Run>> runs_;
    std::vector<std::vector<Child>> children_;
    Sink& sink_;
  };

  // Calls body(part, walk) for each range of first codes, on torch's threads; walk(sink) gives the sink its nodes.
  template <class Body>
  void for_parts(const Body& body) const {
    parallel_for(static_cast<int64_t>(first_.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        body(part, [&](auto& sink) {
          Walk<std::remove_reference_t<decltype(sink)>>(*this, sink).below(shards_, bounds_[part], bounds_[part + 1]);
        });
      }
    });
  }

  std::vector<TrieShard<Token>> shards_;
  int64_t depth_;
  std::vector<int64_t> bounds_;  // of the ranges of first codes
  std::vector<Counter> first_;   // of each range: what comes before it
  std::vector<int64_t> nodes_;
  int64_t items_ = 0;
  bool in_order_ = true;
};

}  // namespace dgi::cpu
