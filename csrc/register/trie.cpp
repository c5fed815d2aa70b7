// Trie construction and sets of items, as torch sees them: schemas, argument checks, calls into the code that knows no
// torch.
#include <algorithm>

#include "cpu/trie/item_set.h"
#include "cpu/trie/trie_cpu.h"
#include "cpu/trie/trie_merge.h"
#include "register/tensors.h"
#include "register/trie_arguments.h"

namespace dgi::registration {
namespace {

dgi::cpu::CodeTable table_of(const Tensor& codes) {
  using dgi::cpu::IntegerType;
  const auto type = [&] {
    switch (codes.scalar_type()) {
      case ScalarType::Char: return IntegerType::kInt8;
      case ScalarType::Byte: return IntegerType::kUInt8;
      case ScalarType::Short: return IntegerType::kInt16;
      case ScalarType::UInt16: return IntegerType::kUInt16;
      case ScalarType::Int: return IntegerType::kInt32;
      case ScalarType::UInt32: return IntegerType::kUInt32;
      case ScalarType::Long: return IntegerType::kInt64;
      default: STD_TORCH_CHECK(false, "dgi_kernels: codes must be integers of at most 64 bits");
    }
  }();
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) >= 1, "dgi_kernels: codes must have shape (N, L), L at least 1");
  return {codes.const_data_ptr(), type, codes.size(0), codes.size(1), codes.stride(0), codes.stride(1)};
}

Tensor code_ranges_cpu(const Tensor& codes) {
  const dgi::cpu::CodeTable table = table_of(codes);
  const auto ranges = dgi::cpu::code_ranges(table);
  Tensor bounds = torch::stable::empty({2, table.columns}, ScalarType::Long);
  int64_t* const out = bounds.mutable_data_ptr<int64_t>();
  for (int64_t c = 0; c < table.columns; ++c) {
    out[c] = ranges[c].low;
    out[table.columns + c] = ranges[c].high;
  }
  return bounds;
}

// Places for the arrays of one level or the items.
template <class Element>
Element* add_array(std::vector<Tensor>& arrays, int64_t size) {
  constexpr ScalarType dtype = sizeof(Element) == 2   ? ScalarType::Short
                               : sizeof(Element) == 4 ? ScalarType::Int
                                                      : ScalarType::Long;
  arrays.push_back(torch::stable::empty({size}, dtype));
  return static_cast<Element*>(arrays.back().mutable_data_ptr());
}

template <class Token, class Offset, class Build>
std::vector<Tensor> write_arrays(const Build& build, int64_t depth, int64_t rows) {
  std::vector<Tensor> arrays;
  std::vector<Token*> tokens;
  std::vector<Offset*> child_start;
  for (int64_t t = 0; t < depth; ++t) tokens.push_back(add_array<Token>(arrays, build.nodes(t + 1)));
  for (int64_t t = 0; t < depth; ++t) child_start.push_back(add_array<Offset>(arrays, build.nodes(t) + 1));
  const bool one_each = build.nodes(depth) == rows;
  Offset* const item_start = add_array<Offset>(arrays, one_each ? 0 : build.nodes(depth) + 1);
  Offset* const item_order = add_array<Offset>(arrays, build.in_order() ? 0 : rows);
  build.write(tokens.data(), child_start.data(), one_each ? nullptr : item_start,
              build.in_order() ? nullptr : item_order);
  return arrays;
}

// tokens of each level, child_start of each level, item_start, item_order; the last two empty where they are 0, 1, 2, …
std::vector<Tensor> trie_arrays_cpu(const Tensor& codes, bool narrow_tokens, bool narrow_offsets) {
  const dgi::cpu::CodeTable table = table_of(codes);
  const auto ranges = dgi::cpu::code_ranges(table);
  STD_TORCH_CHECK(!narrow_offsets || table.rows < int64_t{1} << 31,
                  "trie_arrays: offsets of 32 bits need less than 2^31 rows");
  const int64_t limit = narrow_tokens ? int64_t{1} << 15 : int64_t{1} << 31;
  for (const dgi::cpu::CodeRange& range : ranges) {
    STD_TORCH_CHECK(table.rows == 0 || (range.low >= dgi::kEndToken && range.high < limit),
                    "trie_arrays: codes must be from -1 to ", limit - 1, "; got ", range.low, " to ", range.high);
  }
  const dgi::cpu::TrieBuild build(table, ranges);
  if (narrow_tokens) {
    return narrow_offsets ? write_arrays<int16_t, int32_t>(build, table.columns, table.rows)
                          : write_arrays<int16_t, int64_t>(build, table.columns, table.rows);
  }
  return narrow_offsets ? write_arrays<int32_t, int32_t>(build, table.columns, table.rows)
                        : write_arrays<int32_t, int64_t>(build, table.columns, table.rows);
}

// The trie of several tries' items, as trie_arrays. By trie: `tokens` and `child_start` of each depth; item_start and
// item_order, empty where they are 0, 1, 2, …; how many items there are.
std::vector<Tensor> trie_merge_cpu(const std::vector<Tensor>& tokens, const std::vector<Tensor>& child_start,
                                   const std::vector<Tensor>& item_start, const std::vector<Tensor>& item_order,
                                   const std::vector<int64_t>& items, bool narrow_offsets) {
  const size_t count = items.size();
  STD_TORCH_CHECK(count >= 1 && tokens.size() >= count && tokens.size() % count == 0
                      && child_start.size() == tokens.size() && item_start.size() == count
                      && item_order.size() == count,
                  "trie_merge: the arrays must be those of whole tries of one depth");
  const size_t depth = tokens.size() / count;
  const auto merge = [&](auto token) {
    using Token = decltype(token);
    std::vector<dgi::cpu::TrieShard<Token>> shards(count);
    int64_t rows = 0;
    for (size_t s = 0; s < count; ++s) {
      dgi::cpu::TrieShard<Token>& shard = shards[s];
      for (size_t t = s * depth, nodes = 1; t < (s + 1) * depth; nodes = static_cast<size_t>(tokens[t++].numel())) {
        shard.levels.push_back(level_of<Token>(tokens[t], child_start[t]));
        shard.edges.push_back(tokens[t].numel());
        STD_TORCH_CHECK(shard.levels.back().nodes == static_cast<int64_t>(nodes),
                        "trie_merge: child_start must have an element more than there are nodes");
      }
      const bool one_each = item_start[s].numel() == 0, ordered = item_order[s].numel() == 0;
      if (!one_each) shard.item_start = starts_of("item_start", item_start[s]);
      if (!ordered) shard.item_order = rows_of("item_order", item_order[s]);
      const int64_t leaves = shard.edges.back();
      const bool marks = shard.item_start.stored == dgi::Offsets::Stored::kRunMarks;
      const int64_t starts = one_each ? items[s] : item_start[s].numel() - 1;
      const bool fits = marks ? dgi::RunMarks{data_of<uint64_t>(item_start[s])}.fill(item_start[s].numel())
                                    && dgi::RunMarks{data_of<uint64_t>(item_start[s])}.size() == leaves
                              : starts == leaves;
      const int64_t elements = shard.item_order.stored == dgi::Offsets::Stored::kUInt24 ? 3 : 1;
      STD_TORCH_CHECK(fits && (ordered || item_order[s].numel() == elements * items[s]),
                      "trie_merge: item_start and item_order must fit the leaves and items of their trie");
      shard.items = items[s];
      shard.first_row = rows;
      rows += items[s];
    }
    STD_TORCH_CHECK(!narrow_offsets || rows < int64_t{1} << 31,
                    "trie_merge: offsets of 32 bits need less than 2^31 rows");
    const dgi::cpu::TrieMerge<Token> merged(std::move(shards), static_cast<int64_t>(depth));
    STD_TORCH_CHECK(merged.items() == rows, "trie_merge: the arrays of a trie lead to other items than it has");
    return narrow_offsets ? write_arrays<Token, int32_t>(merged, static_cast<int64_t>(depth), rows)
                          : write_arrays<Token, int64_t>(merged, static_cast<int64_t>(depth), rows);
  };
  return tokens[0].scalar_type() == ScalarType::Short ? merge(int16_t{}) : merge(int32_t{});
}

std::tuple<Tensor, Tensor> item_set_cpu(const Tensor& members, const std::optional<Tensor>& item_order) {
  check_array("members", members, ScalarType::Bool);
  const int64_t size = members.numel(), blocks = size / (dgi::ItemSet::kWordBits * dgi::ItemSet::kBlockWords) + 1;
  const dgi::Offsets order = rows_of("item_order", item_order);
  const int64_t elements = order.stored == dgi::Offsets::Stored::kUInt24 ? 3 : 1;
  STD_TORCH_CHECK(!item_order || item_order->numel() == elements * size,
                  "item_set: item_order must have an element for each member");
  STD_TORCH_CHECK(!item_order || order.stored == dgi::Offsets::Stored::kInt64 || size < int64_t{1} << 31,
                  "item_set: 2^31 rows need an item_order of int64");
  Tensor words = torch::stable::empty({blocks * dgi::ItemSet::kBlockWords}, ScalarType::Long);
  Tensor ranks = torch::stable::empty({blocks}, ScalarType::Long);
  const bool known = dgi::cpu::write_item_set(data_of<bool>(members), size, order,
                                              static_cast<uint64_t*>(words.mutable_data_ptr()),
                                              ranks.mutable_data_ptr<int64_t>());
  STD_TORCH_CHECK(known, "item_set: item_order holds a row that does not exist");
  return {words, ranks};
}

std::tuple<Tensor, Tensor> find_children_cpu(const Tensor& tokens, const Tensor& child_start, const Tensor& nodes,
                                             const Tensor& codes) {
  check_array("nodes", nodes, ScalarType::Long);
  check_array("codes", codes, ScalarType::Long);
  STD_TORCH_CHECK(nodes.numel() == codes.numel(), "find_children: nodes and codes must be of one size");
  Tensor places = torch::stable::empty({nodes.numel()}, ScalarType::Long);
  Tensor found = torch::stable::empty({nodes.numel()}, ScalarType::Bool);
  const auto find = [&](auto token) {
    dgi::cpu::find_children(level_of<decltype(token)>(tokens, child_start), tokens.numel(), data_of<int64_t>(nodes),
                            data_of<int64_t>(codes), nodes.numel(), places.mutable_data_ptr<int64_t>(),
                            static_cast<bool*>(found.mutable_data_ptr()));
  };
  tokens.scalar_type() == ScalarType::Short ? find(int16_t{}) : find(int32_t{});
  return {places, found};
}

// dgi::cpu::ChildMasks (nodes, words) for a codebook of `codes` codes, as int32.
Tensor child_masks_cpu(const Tensor& tokens, const Tensor& child_start, int64_t codes) {
  STD_TORCH_CHECK(codes >= 1, "child_masks: codes must be at least 1; got ", codes);
  const auto make = [&](auto token) {
    const auto level = level_of<decltype(token)>(tokens, child_start);
    STD_TORCH_CHECK(std::all_of(level.tokens, level.tokens + tokens.numel(),
                                [&](int64_t code) { return code < codes; }),
                    "child_masks: a token is beyond the last code");
    const int64_t words = dgi::cpu::ChildMasks::words_for(codes);
    Tensor masks = torch::stable::empty({level.nodes, words}, ScalarType::Int);
    dgi::cpu::write_child_masks(level, words, static_cast<uint32_t*>(masks.mutable_data_ptr()));
    return masks;
  };
  return tokens.scalar_type() == ScalarType::Short ? make(int16_t{}) : make(int32_t{});
}

// The set of the nodes that have a member of a set among their children, or leaves among their places; starts as
// dgi::RunMarks or plain.
std::tuple<Tensor, Tensor> parent_set_cpu(const Tensor& words, const Tensor& ranks, const Tensor& starts,
                                          int64_t parents) {
  constexpr int64_t kBlockWords = dgi::ItemSet::kBlockWords;
  check_array("words", words, ScalarType::Long);
  check_array("ranks", ranks, ScalarType::Long);
  STD_TORCH_CHECK(words.numel() == kBlockWords * ranks.numel(), "parent_set: a set has ", kBlockWords,
                  " words to a rank");
  const dgi::Offsets offsets = starts_of("starts", starts);
  if (offsets.stored == dgi::Offsets::Stored::kRunMarks) {
    const dgi::RunMarks marks{data_of<uint64_t>(starts)};
    STD_TORCH_CHECK(marks.fill(starts.numel()) && marks.size() == parents && marks.blocks() >= ranks.numel()
                        && marks.blocks() <= ranks.numel() + 1,
                    "parent_set: starts do not fit parents and children");
  } else {
    STD_TORCH_CHECK(starts.numel() == parents + 1,
                    "parent_set: starts must have an element more than there are parents");
  }
  const int64_t blocks = parents / (dgi::ItemSet::kWordBits * kBlockWords) + 1;
  Tensor parent_words = torch::stable::empty({blocks * kBlockWords}, ScalarType::Long);
  Tensor parent_ranks = torch::stable::empty({blocks}, ScalarType::Long);
  dgi::cpu::write_parent_set({static_cast<const uint64_t*>(words.const_data_ptr()), data_of<int64_t>(ranks)},
                             ranks.numel(), offsets, parents, static_cast<uint64_t*>(parent_words.mutable_data_ptr()),
                             parent_ranks.mutable_data_ptr<int64_t>());
  return {parent_words, parent_ranks};
}

// dgi::RunMarks of starts 0 < ... < end.
Tensor run_marks_cpu(const Tensor& starts) {
  const auto make = [&](auto offset) {
    using Offset = decltype(offset);
    check_array("starts", starts, sizeof(Offset) == 8 ? ScalarType::Long : ScalarType::Int);
    const int64_t runs = starts.numel() - 1;
    STD_TORCH_CHECK(runs >= 0, "run_marks: starts must have an element more than there are runs");
    const Offset* const data = data_of<Offset>(starts);
    STD_TORCH_CHECK(data[runs] >= runs, "run_marks: starts must ascend from 0");
    Tensor marks = torch::stable::empty({dgi::RunMarks::elements(runs, dgi::RunMarks::blocks_of(data[runs]))},
                                        ScalarType::UInt64);
    STD_TORCH_CHECK(dgi::cpu::write_run_marks(data, runs, static_cast<uint64_t*>(marks.mutable_data_ptr())),
                    "run_marks: starts must ascend from 0");
    return marks;
  };
  return starts.scalar_type() == ScalarType::Long ? make(int64_t{}) : make(int32_t{});
}

// starts[i] for each i of the array `runs`; starts as dgi::RunMarks.
Tensor run_starts_cpu(const Tensor& starts, const Tensor& runs) {
  check_array("starts", starts, ScalarType::UInt64);
  check_array("runs", runs, ScalarType::Long);
  const dgi::RunMarks marks{data_of<uint64_t>(starts)};
  STD_TORCH_CHECK(marks.fill(starts.numel()), "run_starts: starts are not of the size that they say");
  const int64_t count = marks.size();
  Tensor places = torch::stable::empty({runs.numel()}, ScalarType::Long);
  const int64_t* const wanted = data_of<int64_t>(runs);
  int64_t* const out = places.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < runs.numel(); ++i) {
    STD_TORCH_CHECK(0 <= wanted[i] && wanted[i] <= count, "run_starts: there is no run ", wanted[i]);
    out[i] = marks[wanted[i]];
  }
  return places;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("code_ranges(Tensor codes) -> Tensor");
  m.def("trie_arrays(Tensor codes, bool narrow_tokens, bool narrow_offsets) -> Tensor[]");
  m.def("trie_merge(Tensor[] tokens, Tensor[] child_start, Tensor[] item_start, Tensor[] item_order, int[] items, "
        "bool narrow_offsets) -> Tensor[]");
  m.def(
      "find_children(Tensor tokens, Tensor child_start, Tensor nodes, Tensor codes) -> (Tensor places, Tensor found)");
  m.def("child_masks(Tensor tokens, Tensor child_start, int codes) -> Tensor");
  m.def("item_set(Tensor members, Tensor? item_order) -> (Tensor words, Tensor ranks)");
  m.def("parent_set(Tensor words, Tensor ranks, Tensor starts, int parents) -> (Tensor words, Tensor ranks)");
  m.def("run_marks(Tensor starts) -> Tensor");
  m.def("run_starts(Tensor starts, Tensor runs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("code_ranges", TORCH_BOX(&code_ranges_cpu));
  m.impl("trie_arrays", TORCH_BOX(&trie_arrays_cpu));
  m.impl("trie_merge", TORCH_BOX(&trie_merge_cpu));
  m.impl("find_children", TORCH_BOX(&find_children_cpu));
  m.impl("child_masks", TORCH_BOX(&child_masks_cpu));
  m.impl("item_set", TORCH_BOX(&item_set_cpu));
  m.impl("parent_set", TORCH_BOX(&parent_set_cpu));
  m.impl("run_marks", TORCH_BOX(&run_marks_cpu));
  m.impl("run_starts", TORCH_BOX(&run_starts_cpu));
}

}  // namespace dgi::registration
