#include "trie.h"

namespace dgi::cpu {

std::vector<CodeRange> code_ranges(const CodeTable& table) {
  return dgi::code_ranges(table);
}

void trie_sort(const CodeTable& table, const std::vector<CodeRange>& ranges, int64_t* order, int64_t* first_diff) {
  dgi::trie_sort(table, ranges, order, first_diff);
}

}  // namespace dgi::cpu
