// log_normalizer, as torch sees it.
#include "cpu/normalizer/log_normalizer_cpu.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

Tensor log_normalizer_cpu(const Tensor& logits) {
  const int64_t leading = logits.dim() - 1;
  STD_TORCH_CHECK(leading >= 0, "dgi_kernels, log_normalizer: logits must be (..., V)");
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < leading; ++d) {
    sizes.push_back(logits.size(d));
    strides.push_back(logits.stride(d));
  }
  Tensor out = torch::stable::empty(sizes, compute_dtype(logits));
  for_dtype(logits, [&](auto stored) {
    using Stored = decltype(stored);
    dgi::cpu::log_normalizer<Stored>({data_of<Stored>(logits), sizes, strides, logits.size(leading),
                                      logits.stride(leading)},
                                     static_cast<dgi::Compute<Stored>*>(out.mutable_data_ptr()));
    return 0;
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) { m.def("log_normalizer(Tensor logits) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) { m.impl("log_normalizer", TORCH_BOX(&log_normalizer_cpu)); }

}  // namespace dgi::registration
