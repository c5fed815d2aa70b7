#pragma once

#include <cstdint>
#include <vector>

#include "dgi/trie_sort.h"

namespace dgi::cpu {

std::vector<CodeRange> code_ranges(const CodeTable& table);

void trie_sort(const CodeTable& table, const std::vector<CodeRange>& ranges, int64_t* order, int64_t* first_diff);

}  // namespace dgi::cpu
