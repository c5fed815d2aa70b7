// Cosine logits and their cross-entropy, as torch sees them: schemas, argument checks, calls into the code that knows
// no torch.
#include <array>
#include <cmath>

#include "cpu/cosine/cosine_cpu.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

constexpr const char* kCosine = "dgi_kernels, cosine: ";

// One number for each row of h or of weight, or nothing.
void check_vector(const char* name, const std::optional<Tensor>& x, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(!x || (x->dim() == 1 && x->size(0) == count && x->is_contiguous() && x->scalar_type() == dtype),
                  kCosine, name, " must be contiguous, of the right length and dtype");
}

template <class Stored>
const Stored* data_or_null(const std::optional<Tensor>& x) {
  return x ? data_of<Stored>(*x) : nullptr;
}

template <class Stored>
dgi::cpu::Cosine<Stored> cosine_inputs(const Tensor& h, const Tensor& weight, const Tensor& scale, double eps,
                                       const std::optional<Tensor>& bias = std::nullopt) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2 && h.size(1) == weight.size(1), kCosine,
                  "h must be (N, D) and weight (K, D)");
  STD_TORCH_CHECK(h.is_contiguous() && weight.is_contiguous() && weight.scalar_type() == h.scalar_type(), kCosine,
                  "h and weight must be contiguous and of one dtype");
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == compute_dtype(h), kCosine,
                  "scale must hold one element of the compute dtype");
  STD_TORCH_CHECK(weight.size(0) <= INT32_MAX, kCosine, "weight must have less than 2**31 rows");
  using Real = dgi::Compute<Stored>;
  check_vector("bias", bias, weight.size(0), compute_dtype(h));
  return {data_of<Stored>(h),     data_of<Stored>(weight), h.size(0), weight.size(0), h.size(1), *data_of<Real>(scale),
          static_cast<Real>(eps), data_or_null<Real>(bias)};
}

// Tensors for the gradients that are wanted; an empty one where one is not.
struct GradientTensors {
  std::optional<Tensor> dh, dweight, dscale, dbias;

  GradientTensors(const Tensor& h, const Tensor& weight, const Tensor& scale, const std::array<bool, 4>& wanted) {
    if (wanted[0]) dh = torch::stable::empty_like(h);
    if (wanted[1]) dweight = torch::stable::empty_like(weight);
    if (wanted[2]) dscale = torch::stable::empty_like(scale);
    if (wanted[3]) dbias = torch::stable::empty({weight.size(0)}, compute_dtype(h));
  }

  template <class Stored>
  dgi::cpu::CosineGradients<Stored> pointers() const {
    using Real = dgi::Compute<Stored>;
    return {result<Stored>(dh), result<Stored>(dweight), result<Real>(dscale), result<Real>(dbias)};
  }

  Tensor or_empty(const std::optional<Tensor>& x) const {
    return x ? *x : torch::stable::empty({0}, ScalarType::Float);
  }
};

Tensor cosine_logits_cpu(const Tensor& h, const Tensor& weight, const Tensor& scale, double eps) {
  return for_dtype(h, [&](auto stored) {
    using Stored = decltype(stored);
    const auto inputs = cosine_inputs<Stored>(h, weight, scale, eps);
    Tensor logits = torch::stable::empty({inputs.rows, inputs.codes}, h.scalar_type());
    dgi::cpu::cosine_logits(inputs, static_cast<Stored*>(logits.mutable_data_ptr()));
    return logits;
  });
}

std::tuple<Tensor, Tensor, Tensor> cosine_logits_backward_cpu(const Tensor& dlogits, const Tensor& h,
                                                              const Tensor& weight, const Tensor& scale, double eps,
                                                              bool wants_h, bool wants_weight, bool wants_scale) {
  return for_dtype(h, [&](auto stored) -> std::tuple<Tensor, Tensor, Tensor> {
    using Stored = decltype(stored);
    const auto inputs = cosine_inputs<Stored>(h, weight, scale, eps);
    STD_TORCH_CHECK(dlogits.is_contiguous() && dlogits.scalar_type() == h.scalar_type() && dlogits.dim() == 2
                        && dlogits.size(0) == inputs.rows && dlogits.size(1) == inputs.codes,
                    kCosine, "dlogits must be contiguous (N, K) of the dtype of h");
    const GradientTensors out(h, weight, scale, {wants_h, wants_weight, wants_scale, false});
    dgi::cpu::cosine_logits_backward(inputs, data_of<Stored>(dlogits), out.pointers<Stored>());
    return {out.or_empty(out.dh), out.or_empty(out.dweight), out.or_empty(out.dscale)};
  });
}

// The losses, the rows' log-normalisers where they are wanted, and the gradients that are. `upstream`, (N,) in the
// compute dtype, are the weights of the rows' losses under reduction 0 (none); 1 is mean, 2 sum.
// `upstream_log_normalizer`, (N,) too, are those of the log-normalisers under any.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cosine_cross_entropy_cpu(
    const Tensor& h, const Tensor& weight, const Tensor& target, const Tensor& scale, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& same_as, const std::optional<Tensor>& upstream,
    const std::optional<Tensor>& upstream_log_normalizer, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double eps, bool wants_log_normalizer, bool wants_h, bool wants_weight, bool wants_scale,
    bool wants_bias) {
  return for_dtype(h, [&](auto stored) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using Stored = decltype(stored);
    using Real = dgi::Compute<Stored>;
    const auto inputs = cosine_inputs<Stored>(h, weight, scale, eps, bias);
    check_vector("target", target, inputs.rows, ScalarType::Long);
    check_vector("same_as", same_as, inputs.codes, ScalarType::Long);
    check_vector("upstream", upstream, inputs.rows, compute_dtype(h));
    check_vector("upstream_log_normalizer", upstream_log_normalizer, inputs.rows, compute_dtype(h));
    STD_TORCH_CHECK(0 <= reduction && reduction <= 2, kCosine, "reduction must be 0, 1 or 2; got ", reduction);
    const dgi::cpu::CrossEntropy<Real> options{data_of<int64_t>(target),
                                               data_or_null<int64_t>(same_as),
                                               ignore_index,
                                               label_smoothing,
                                               static_cast<dgi::cpu::Reduction>(reduction),
                                               data_or_null<Real>(upstream),
                                               data_or_null<Real>(upstream_log_normalizer)};
    Tensor loss = reduction == 0 ? torch::stable::empty({inputs.rows}, compute_dtype(h))
                                 : torch::stable::empty({}, compute_dtype(h));
    Tensor log_normalizer = torch::stable::empty({wants_log_normalizer ? inputs.rows : 0}, compute_dtype(h));
    const GradientTensors out(h, weight, scale, {wants_h, wants_weight, wants_scale, wants_bias});
    const dgi::cpu::CosineLosses<Real> losses{
        static_cast<Real*>(loss.mutable_data_ptr()),
        wants_log_normalizer ? static_cast<Real*>(log_normalizer.mutable_data_ptr()) : nullptr};
    dgi::cpu::cosine_cross_entropy(inputs, options, losses, out.pointers<Stored>());
    return {loss,
            log_normalizer,
            out.or_empty(out.dh),
            out.or_empty(out.dweight),
            out.or_empty(out.dscale),
            out.or_empty(out.dbias)};
  });
}

// How many values are outside of [low, high) and not `also`: the check of indices in one pass and one call.
int64_t count_outside_cpu(const Tensor& values, int64_t low, int64_t high, std::optional<int64_t> also) {
  STD_TORCH_CHECK(values.is_contiguous() && values.scalar_type() == ScalarType::Long,
                  "count_outside: values must be contiguous int64");
  const int64_t *const data = data_of<int64_t>(values), count = values.numel();
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside += (data[i] < low || data[i] >= high) && !(also && data[i] == *also);
  return outside;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("cosine_logits(Tensor h, Tensor weight, Tensor scale, float eps) -> Tensor");
  m.def("cosine_logits_backward(Tensor dlogits, Tensor h, Tensor weight, Tensor scale, float eps, bool wants_h, "
        "bool wants_weight, bool wants_scale) -> (Tensor dh, Tensor dweight, Tensor dscale)");
  m.def("cosine_cross_entropy(Tensor h, Tensor weight, Tensor target, Tensor scale, Tensor? bias, Tensor? same_as, "
        "Tensor? upstream, Tensor? upstream_log_normalizer, int ignore_index, int reduction, float label_smoothing, "
        "float eps, bool wants_log_normalizer, bool wants_h, bool wants_weight, bool wants_scale, bool wants_bias) -> "
        "(Tensor loss, Tensor log_normalizer, Tensor dh, Tensor dweight, Tensor dscale, Tensor dbias)");
  m.def("count_outside(Tensor values, int low, int high, int? also) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("cosine_logits", TORCH_BOX(&cosine_logits_cpu));
  m.impl("cosine_logits_backward", TORCH_BOX(&cosine_logits_backward_cpu));
  m.impl("cosine_cross_entropy", TORCH_BOX(&cosine_cross_entropy_cpu));
  m.impl("count_outside", TORCH_BOX(&count_outside_cpu));
}

}  // namespace dgi::registration
