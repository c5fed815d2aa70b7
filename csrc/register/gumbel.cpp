// Gumbel-Softmax, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include "cpu/gumbel/gumbel_cpu.h"
#include "cpu/shared/pages.h"
#include "register/noise_arguments.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

constexpr const char* kGumbel = "dgi_kernels, gumbel: ";

template <class Stored>
dgi::cpu::GumbelSoftmax<Stored> softmax_inputs(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) <= kWords && logits.size(1) > 0,
                  kGumbel, "logits must be contiguous (N, K) with K > 0");
  STD_TORCH_CHECK(tau.numel() == 1 && tau.scalar_type() == compute_dtype(logits), kGumbel,
                  "tau must hold one element of the compute dtype");
  return {data_of<Stored>(logits),
          logits.size(0),
          logits.size(1),
          *data_of<dgi::Compute<Stored>>(tau),
          seed_value(kGumbel, seed),
          hard};
}

Tensor gumbel_softmax_cpu(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  return for_dtype(logits, [&](auto stored) {
    using Stored = decltype(stored);
    const auto inputs = softmax_inputs<Stored>(logits, tau, seed, hard);
    Tensor out = torch::stable::empty_like(logits);
    dgi::cpu::ask_for_huge_pages(out.mutable_data_ptr(), logits.numel() * static_cast<int64_t>(sizeof(Stored)));
    dgi::cpu::gumbel_softmax(inputs, static_cast<Stored*>(out.mutable_data_ptr()));
    return out;
  });
}

std::tuple<Tensor, Tensor> gumbel_softmax_backward_cpu(const Tensor& dout, const Tensor& logits, const Tensor& tau,
                                                       const Tensor& seed, bool wants_tau) {
  return for_dtype(logits, [&](auto stored) -> std::tuple<Tensor, Tensor> {
    using Stored = decltype(stored);
    const auto inputs = softmax_inputs<Stored>(logits, tau, seed, false);
    STD_TORCH_CHECK(dout.is_contiguous() && dout.scalar_type() == logits.scalar_type() && dout.dim() == 2
                        && dout.size(0) == inputs.rows && dout.size(1) == inputs.codes,
                    kGumbel, "dout must be contiguous (N, K) of the dtype of logits");
    Tensor dlogits = torch::stable::empty_like(logits);
    dgi::cpu::ask_for_huge_pages(dlogits.mutable_data_ptr(), logits.numel() * static_cast<int64_t>(sizeof(Stored)));
    Tensor dtau = wants_tau ? torch::stable::empty_like(tau) : torch::stable::empty({0}, compute_dtype(logits));
    dgi::cpu::gumbel_softmax_backward(inputs, data_of<Stored>(dout), static_cast<Stored*>(dlogits.mutable_data_ptr()),
                                      wants_tau ? static_cast<dgi::Compute<Stored>*>(dtau.mutable_data_ptr())
                                                : nullptr);
    return {dlogits, dtau};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor dout, Tensor logits, Tensor tau, Tensor seed, bool wants_tau) -> "
        "(Tensor dlogits, Tensor dtau)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax_cpu));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&gumbel_softmax_backward_cpu));
}

}  // namespace dgi::registration
