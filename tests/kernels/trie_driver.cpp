// Random tables of codes through trie construction in C++, against a sort of their rows, and sets of items against
// their definition; built with sanitizers by test_trie_native.py. Every array has exactly its size, so that a read or a
// write beyond it is seen.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/trie/item_set.h"
#include "cpu/trie/trie_cpu.h"
#include "cpu/trie/trie_merge.h"
#include "driver.h"

namespace {

using driver::below;
using driver::Random;

template <class Code, class Token, class Offset>
bool build_case(Random& random, dgi::cpu::IntegerType type) {
  const int64_t most = below(random, 40) == 0 ? 60000 : 60;
  const int64_t rows = below(random, most), columns = 1 + below(random, below(random, 4) == 0 ? 40 : 4);
  const int64_t limit = std::min<int64_t>(std::numeric_limits<Code>::max(), sizeof(Token) == 2 ? 32767 : 2147483647);
  std::vector<Code> codes(rows * columns);
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t size = 1 + below(random, below(random, 3) == 0 ? limit : 5);
    for (int64_t i = 0; i < rows; ++i) {
      const bool ended = std::is_signed_v<Code> && below(random, 6) == 0;
      codes[i * columns + c] = static_cast<Code>(ended ? -1 : below(random, size));
    }
  }
  const auto code = [&](int64_t row, int64_t column) { return static_cast<int64_t>(codes[row * columns + column]); };
  const dgi::cpu::CodeTable table{codes.data(), type, rows, columns, columns, 1};
  const auto ranges = dgi::cpu::code_ranges(table);
  const dgi::cpu::TrieBuild build(table, ranges);

  std::vector<int64_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    for (int64_t c = 0; c < columns; ++c) {
      if (code(a, c) != code(b, c)) return code(a, c) < code(b, c);
    }
    return false;
  });
  if (build.in_order() != std::is_sorted(order.begin(), order.end())) return false;
  std::vector<std::vector<int64_t>> tokens(columns);
  for (int64_t i = 0; i < rows; ++i) {
    bool differs = i == 0;
    for (int64_t c = 0; c < columns; ++c) {
      differs = differs || code(order[i], c) != code(order[i - 1], c);
      if (differs) tokens[c].push_back(code(order[i], c));
    }
  }
  std::vector<std::vector<Token>> got_tokens(columns);
  std::vector<std::vector<Offset>> got_starts(columns);
  std::vector<Token*> token_pointers;
  std::vector<Offset*> start_pointers;
  for (int64_t c = 0; c < columns; ++c) {
    if (build.nodes(c + 1) != static_cast<int64_t>(tokens[c].size())) return false;
    got_tokens[c].resize(build.nodes(c + 1));
    got_starts[c].resize(build.nodes(c) + 1);
    token_pointers.push_back(got_tokens[c].data());
    start_pointers.push_back(got_starts[c].data());
  }
  std::vector<Offset> item_start(build.nodes(columns) + 1), item_order(rows);
  const bool with_items = below(random, 2) == 0;
  build.write(token_pointers.data(), start_pointers.data(), with_items ? item_start.data() : nullptr,
              with_items ? item_order.data() : nullptr);
  for (int64_t c = 0; c < columns; ++c) {
    if (!std::equal(tokens[c].begin(), tokens[c].end(), got_tokens[c].begin())) return false;
    if (got_starts[c].front() != 0 || got_starts[c].back() != static_cast<Offset>(build.nodes(c + 1))) return false;
  }
  if (!with_items) return true;
  if (item_start.front() != 0 || item_start.back() != static_cast<Offset>(rows)) return false;
  if (!std::equal(order.begin(), order.end(), item_order.begin())) return false;
  // Walking down to every leaf gives back every row.
  for (int64_t leaf = 0; leaf < build.nodes(columns); ++leaf) {
    int64_t node = leaf;
    for (int64_t c = columns; c-- > 0;) {
      if (got_tokens[c][node] != code(order[item_start[leaf]], c)) return false;
      node = std::upper_bound(got_starts[c].begin(), got_starts[c].end(), static_cast<Offset>(node))
             - got_starts[c].begin() - 1;
    }
    if (node != 0) return false;
  }
  return true;
}

// The arrays of a build or a merge, each exactly as large as it must be.
template <class Token, class Offset>
struct Arrays {
  std::vector<std::vector<Token>> tokens;
  std::vector<std::vector<Offset>> starts;
  std::vector<Offset> item_start, item_order;

  template <class Build>
  Arrays(const Build& build, int64_t columns, int64_t rows) : item_start(build.nodes(columns) + 1), item_order(rows) {
    std::vector<Token*> token_pointers;
    std::vector<Offset*> start_pointers;
    for (int64_t c = 0; c < columns; ++c) {
      tokens.emplace_back(build.nodes(c + 1));
      starts.emplace_back(build.nodes(c) + 1);
    }
    for (int64_t c = 0; c < columns; ++c) {
      token_pointers.push_back(tokens[c].data());
      start_pointers.push_back(starts[c].data());
    }
    build.write(token_pointers.data(), start_pointers.data(), item_start.data(), item_order.data());
  }

  bool operator==(const Arrays&) const = default;
};

// Tries of the parts of a table, merged, against the trie of the table.
template <class Token, class Offset>
bool merge_case(Random& random) {
  const int64_t rows = below(random, below(random, 20) == 0 ? 70000 : 80), columns = 1 + below(random, 4);
  const int64_t size = 1 + below(random, below(random, 2) == 0 ? 3 : 300);
  std::vector<int32_t> codes(rows * columns);
  for (int32_t& code : codes) code = static_cast<int32_t>(below(random, size));
  const auto table_of = [&](int64_t first, int64_t count) {
    return dgi::cpu::CodeTable{
        codes.data() + first * columns, dgi::cpu::IntegerType::kInt32, count, columns, columns, 1};
  };
  std::vector<Arrays<Token, Offset>> parts;
  std::vector<int64_t> counts;
  for (int64_t first = 0, count; first < rows || counts.empty() || below(random, 4) == 0; first += count) {
    count = std::min(rows - first, below(random, rows + 1));
    const dgi::cpu::CodeTable table = table_of(first, count);
    const dgi::cpu::TrieBuild build(table, dgi::cpu::code_ranges(table));
    parts.emplace_back(build, columns, count);
    counts.push_back(count);
  }
  constexpr auto kStored = sizeof(Offset) == 8 ? dgi::Offsets::Stored::kInt64 : dgi::Offsets::Stored::kInt32;
  std::vector<dgi::cpu::TrieShard<Token>> shards(parts.size());
  int64_t first_row = 0;
  for (size_t i = 0; i < parts.size(); first_row += counts[i++]) {
    for (int64_t c = 0; c < columns; ++c) {
      const auto& starts = parts[i].starts[c];
      shards[i].levels.push_back(
          {parts[i].tokens[c].data(), {starts.data(), kStored}, static_cast<int64_t>(starts.size()) - 1});
      shards[i].edges.push_back(static_cast<int64_t>(parts[i].tokens[c].size()));
    }
    shards[i].item_start = {parts[i].item_start.data(), kStored};
    shards[i].item_order = {parts[i].item_order.data(), kStored};
    shards[i].items = counts[i];
    shards[i].first_row = first_row;
  }
  const dgi::cpu::TrieMerge<Token> merge(shards, columns);
  const dgi::cpu::CodeTable table = table_of(0, rows);
  const dgi::cpu::TrieBuild whole(table, dgi::cpu::code_ranges(table));
  if (merge.items() != rows || merge.in_order() != whole.in_order()) return false;
  for (int64_t t = 0; t <= columns; ++t) {
    if (merge.nodes(t) != whole.nodes(t)) return false;
  }
  return Arrays<Token, Offset>(merge, columns, rows) == Arrays<Token, Offset>(whole, columns, rows);
}

bool set_case(Random& random) {
  const int64_t size = below(random, below(random, 10) == 0 ? 20000 : 1200), blocks = size / 512 + 1;
  const std::unique_ptr<bool[]> members(new bool[size]);
  for (int64_t i = 0; i < size; ++i) members[i] = below(random, 3) == 0;
  std::vector<int32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const bool ordered = below(random, 2) == 0;
  const bool broken = ordered && size > 0 && below(random, 5) == 0;
  if (broken) order[below(random, size)] = below(random, 2) ? (1 << 24) - 1 : static_cast<int32_t>(size);
  const bool packed = below(random, 2) == 0;
  std::vector<uint8_t> bytes;
  for (int32_t row : order) {
    for (int shift : {0, 8, 16}) bytes.push_back(static_cast<uint8_t>(row >> shift));
  }
  bytes.shrink_to_fit();
  using Stored = dgi::Offsets::Stored;
  dgi::Offsets rows{order.data(), Stored::kInt32};
  if (packed) rows = {bytes.data(), Stored::kUInt24};
  std::vector<uint64_t> words(blocks * 8);
  std::vector<int64_t> ranks(blocks);
  const bool known = dgi::cpu::write_item_set(members.get(), size, ordered ? rows : dgi::Offsets{}, words.data(),
                                              ranks.data());
  if (known == broken) return false;
  if (broken) return true;
  const dgi::ItemSet set{words.data(), ranks.data()};
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (rows[i] != order[i] || set.rank(i) != count || set.contains(i) != members[ordered ? order[i] : i]) return false;
    count += set.contains(i);
  }
  if (set.rank(size) != count) return false;
  for (int64_t i = 0; i < 50 && size > 0; ++i) {
    const int64_t first = below(random, size), end = first + below(random, size - first + 1);
    if (set.any({first, end}) != (set.rank(end) > set.rank(first))) return false;
  }
  return true;
}

template <class Offset>
bool marks_case(Random& random) {
  const int64_t runs = below(random, below(random, 10) == 0 ? 5000 : 600);
  std::vector<Offset> starts{0};
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t size = 1 + below(random, below(random, 50) == 0 ? 3000 : 4);
    starts.push_back(static_cast<Offset>(starts.back() + size));
  }
  std::vector<uint64_t> marks(dgi::RunMarks::elements(runs, dgi::RunMarks::blocks_of(starts.back())));
  if (!dgi::cpu::write_run_marks(starts.data(), runs, marks.data())) return false;
  const dgi::RunMarks made{marks.data()};
  const dgi::Offsets offsets{marks.data(), dgi::Offsets::Stored::kRunMarks};
  if (!made.fill(static_cast<int64_t>(marks.size())) || made.size() != runs) return false;
  for (int64_t i = 0; i < runs; ++i) {
    const dgi::Range run = offsets.run(i);
    if (offsets[i] != starts[i] || run.first != starts[i] || run.end != starts[i + 1]) return false;
  }
  if (offsets[runs] != starts[runs]) return false;
  if (runs == 0) return true;

  const int64_t items = starts.back(), blocks = items / 512 + 1, leaf_blocks = runs / 512 + 1;
  const std::unique_ptr<bool[]> members(new bool[items]);
  const int64_t share = below(random, 5);
  for (int64_t i = 0; i < items; ++i) members[i] = below(random, 4) < share && below(random, 4) < share;
  std::vector<uint64_t> words(blocks * 8), leaf_words(leaf_blocks * 8);
  std::vector<int64_t> ranks(blocks), leaf_ranks(leaf_blocks);
  dgi::cpu::write_item_set(members.get(), items, {}, words.data(), ranks.data());
  const dgi::ItemSet places{words.data(), ranks.data()}, leaves{leaf_words.data(), leaf_ranks.data()};
  dgi::cpu::write_parent_set(places, blocks, offsets, runs, leaf_words.data(), leaf_ranks.data());
  int64_t count = 0;
  for (int64_t i = 0; i < runs; ++i) {
    if (leaves.rank(i) != count || leaves.contains(i) != places.any({starts[i], starts[i + 1]})) return false;
    count += leaves.contains(i);
  }
  if (leaves.rank(runs) != count) return false;
  starts[below(random, runs)] = starts[runs];
  return !dgi::cpu::write_run_marks(starts.data(), runs, marks.data());
}

}  // namespace

int main(int argc, char** argv) {
  using dgi::cpu::IntegerType;
  return driver::run(argc, argv, [](Random& random) {
    return build_case<int64_t, int32_t, int64_t>(random, IntegerType::kInt64)
           && build_case<int32_t, int32_t, int32_t>(random, IntegerType::kInt32)
           && build_case<int16_t, int16_t, int32_t>(random, IntegerType::kInt16)
           && build_case<uint16_t, int32_t, int32_t>(random, IntegerType::kUInt16)
           && build_case<uint8_t, int16_t, int64_t>(random, IntegerType::kUInt8) && set_case(random)
           && marks_case<int32_t>(random) && marks_case<int64_t>(random) && merge_case<int16_t, int32_t>(random)
           && merge_case<int32_t, int64_t>(random);
  });
}
