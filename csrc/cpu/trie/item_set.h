// Sets of items on the CPU, and the starts of leaves as such sets.
#pragma once

#include <cstdint>

#include "dgi/trie.h"

namespace dgi::cpu {

// Makes an ItemSet (dgi/trie.h) of the places whose row is a member. `members` (size) by row; `words` and `ranks` as
// large as such a set must be. False where item_order holds no row.
bool write_item_set(const bool* members, int64_t size, const Offsets& item_order, uint64_t* words, int64_t* ranks);

// Makes RunMarks (dgi/offsets.h) of starts[0] = 0 < starts[1] < ... < starts[runs], the end. `marks` has as many
// elements as they need. False where the starts do not ascend so.
template <class Offset>
bool write_run_marks(const Offset* starts, int64_t runs, uint64_t* marks);

// Makes the ItemSet of the nodes that have a member among their children, which are `blocks` blocks; the children of
// leaves are places. `starts` (parents + 1) of the nodes' children; `words` and `ranks` as large as such a set must be.
void write_parent_set(const ItemSet& children, int64_t blocks, const Offsets& starts, int64_t parents, uint64_t* words,
                      int64_t* ranks);

}  // namespace dgi::cpu
