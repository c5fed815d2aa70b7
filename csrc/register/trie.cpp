// Trie construction, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include "tensors.h"
#include "cpu/trie.h"

namespace dgi::registration {
namespace {

std::tuple<Tensor, Tensor> trie_sort_cpu(const Tensor& codes) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Long && codes.dim() == 2 && codes.is_contiguous(),
                  "trie_sort: codes must be a contiguous int64 tensor of shape (N, L)");
  const dgi::CodeTable table{codes.const_data_ptr<int64_t>(), codes.size(0), codes.size(1)};
  const auto ranges = dgi::cpu::code_ranges(table);
  for (const dgi::CodeRange& range : ranges) {
    STD_TORCH_CHECK(range.low >= -1, "trie_sort: codes must be at least -1; got ", range.low);
  }
  Tensor order = torch::stable::empty({table.rows}, ScalarType::Long);
  Tensor first_diff = torch::stable::empty({table.rows}, ScalarType::Long);
  dgi::cpu::trie_sort(table, ranges, order.mutable_data_ptr<int64_t>(), first_diff.mutable_data_ptr<int64_t>());
  return {order, first_diff};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("trie_sort(Tensor codes) -> (Tensor order, Tensor first_diff)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("trie_sort", TORCH_BOX(&trie_sort_cpu));
}

}  // namespace dgi::registration
