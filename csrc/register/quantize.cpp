// Residual quantization, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include <algorithm>

#include "cpu/quantize/quantize_cpu.h"
#include "register/noise_arguments.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

constexpr const char* kQuantize = "dgi_kernels, residual_quantize: ";

// Calls f with the compute type of residual quantization.
template <class F>
auto for_compute_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, kQuantize, "z and codebooks must be float32 or float64");
  }
}

template <class Real>
const Real* optional_data(const char* name, const std::optional<Tensor>& x, const Tensor& like, int64_t elements) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == like.scalar_type() && x->numel() == elements, kQuantize,
                  name, " must be contiguous, of the dtype of the codebooks and of the shape of its result");
  return data_of<Real>(*x);
}

// `z` (N, D), or the residuals (N, m, D), whose first ones are z.
template <class Real>
dgi::cpu::Quantize<Real> quantize_inputs(const Tensor& z, const Tensor& codebooks, const std::vector<int64_t>& sizes,
                                         const Tensor& scale, const Tensor& tau, const std::optional<Tensor>& seed,
                                         const std::optional<Tensor>& noise_scale, const std::optional<Tensor>& values,
                                         const std::optional<Tensor>& padding, int64_t row_offset, int64_t mode,
                                         int64_t metric, double eps) {
  STD_TORCH_CHECK(codebooks.dim() == 2 && z.is_contiguous() && codebooks.is_contiguous()
                      && z.size(-1) == codebooks.size(1) && z.scalar_type() == codebooks.scalar_type(),
                  kQuantize, "z and codebooks must be contiguous, of one dtype and one length of vectors");
  int64_t total = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(0 < size && size <= INT32_MAX, kQuantize, "sizes must be positive and below 2**31; got ", size);
    total += size;
  }
  STD_TORCH_CHECK(!sizes.empty() && total == codebooks.size(0), kQuantize,
                  "sizes must add up to the rows of codebooks");
  for (const Tensor* scalar : {&scale, &tau}) {
    STD_TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == z.scalar_type(), kQuantize,
                    "scale and tau must hold one element of the dtype of z");
  }
  STD_TORCH_CHECK(0 <= mode && mode <= 2, kQuantize, "mode must be 0, 1 or 2; got ", mode);
  STD_TORCH_CHECK(0 <= metric && metric < dgi::cpu::kMetrics, kQuantize, "metric must be in [0, ", dgi::cpu::kMetrics,
                  "); got ", metric);
  const int64_t rows = z.size(0);
  STD_TORCH_CHECK(0 <= row_offset && row_offset <= kWords - rows, kQuantize, "row_offset must be in [0, 2**32 - rows]");
  const Real* const sigma = optional_data<Real>("noise_scale", noise_scale, codebooks, rows);
  dgi::cpu::NoiseSource<Real> noise;
  if (seed) noise = {true, seed_value(kQuantize, *seed), row_offset, sigma};
  if (values) {
    STD_TORCH_CHECK(values->dim() == 2 && values->size(0) == total && values->is_contiguous()
                        && values->scalar_type() == z.scalar_type(),
                    kQuantize, "values must be contiguous (sum of sizes, V), of the dtype of z");
  }
  if (padding) {
    STD_TORCH_CHECK(padding->is_contiguous() && padding->scalar_type() == ScalarType::Bool && padding->numel() == rows,
                    kQuantize, "padding must be contiguous bool (N,)");
  }
  return {data_of<Real>(z),
          data_of<Real>(codebooks),
          values ? data_of<Real>(*values) : nullptr,
          sizes,
          rows,
          z.size(-1),
          values ? values->size(1) : 0,
          *data_of<Real>(scale),
          *data_of<Real>(tau),
          static_cast<Real>(eps),
          static_cast<dgi::cpu::QuantizeMode>(mode),
          static_cast<dgi::cpu::Metric>(metric),
          noise,
          padding ? data_of<bool>(*padding) : nullptr};
}

using QuantizeResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

QuantizeResults residual_quantize_cpu(const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                                      const Tensor& scale, const Tensor& tau, const std::optional<Tensor>& seed,
                                      const std::optional<Tensor>& noise_scale, const std::optional<Tensor>& values,
                                      const std::optional<Tensor>& padding, int64_t row_offset, int64_t mode,
                                      int64_t metric, double eps, int64_t list_room) {
  STD_TORCH_CHECK(z.dim() == 2, kQuantize, "z must be (N, D)");
  STD_TORCH_CHECK(0 <= list_room && list_room <= 1024, kQuantize, "list_room must be in [0, 1024]; got ", list_room);
  return for_compute_dtype(z, [&](auto real) -> QuantizeResults {
    using Real = decltype(real);
    const auto inputs = quantize_inputs<Real>(z, codebooks, sizes, scale, tau, seed, noise_scale, values, padding,
                                              row_offset, mode, metric, eps);
    const int64_t rows = inputs.rows, levels = inputs.levels();
    const ScalarType dtype = z.scalar_type();
    Tensor quantized = torch::stable::empty({rows, levels, inputs.dim}, dtype);
    Tensor residuals = torch::stable::empty({rows, levels, inputs.dim}, dtype);
    Tensor codes = torch::stable::empty({rows, levels}, ScalarType::Long);
    Tensor sampled = torch::stable::empty({rows, levels}, ScalarType::Long);
    Tensor usage = torch::stable::empty({codebooks.size(0)}, dtype);
    Tensor log_normalizer = torch::stable::empty({rows, levels}, dtype);
    Tensor mixtures = torch::stable::empty({rows, levels, inputs.width}, dtype);
    Tensor list_range = torch::stable::empty({rows, levels, 2}, ScalarType::Long);
    Tensor list_code = torch::stable::empty({rows, levels, list_room}, ScalarType::Int);
    Tensor list_p = torch::stable::empty({rows, levels, list_room}, dtype);
    const auto of = [](Tensor& x) { return static_cast<Real*>(x.mutable_data_ptr()); };
    int64_t *const code = codes.mutable_data_ptr<int64_t>(), *const sample = sampled.mutable_data_ptr<int64_t>();
    if (inputs.mode == dgi::cpu::QuantizeMode::kHard) {
      STD_TORCH_CHECK(inputs.width == 0, kQuantize, "hard mode has no mixtures: they are rows of the values");
      std::fill_n(list_range.mutable_data_ptr<int64_t>(), list_range.numel(), int64_t{0});
      dgi::cpu::residual_quantize_hard<Real>(inputs, {of(quantized), of(residuals), of(usage), of(log_normalizer), code,
                                                      sample});
    } else {
      dgi::cpu::residual_quantize<Real>(inputs, {of(quantized),
                                                 of(residuals),
                                                 of(usage),
                                                 of(log_normalizer),
                                                 of(mixtures),
                                                 code,
                                                 sample,
                                                 {list_p.numel(), list_range.mutable_data_ptr<int64_t>(),
                                                  list_code.mutable_data_ptr<int32_t>(), of(list_p)}});
    }
    return {quantized, codes, sampled, usage, residuals, log_normalizer, mixtures, list_range, list_code, list_p};
  });
}

Tensor assign_codes_cpu(const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes, int64_t metric,
                        double eps) {
  STD_TORCH_CHECK(z.dim() == 2, kQuantize, "z must be (N, D)");
  return for_compute_dtype(z, [&](auto real) {
    using Real = decltype(real);
    constexpr int64_t kHard = static_cast<int64_t>(dgi::cpu::QuantizeMode::kHard);
    Tensor one = torch::stable::empty({}, z.scalar_type());  // scale and temperature, of which no code depends
    *static_cast<Real*>(one.mutable_data_ptr()) = 1;
    const auto inputs = quantize_inputs<Real>(z, codebooks, sizes, one, one, std::nullopt, std::nullopt, std::nullopt,
                                              std::nullopt, 0, kHard, metric, eps);
    Tensor codes = torch::stable::empty({inputs.rows, inputs.levels()}, ScalarType::Long);
    dgi::cpu::residual_quantize_hard<Real>(inputs, {nullptr, nullptr, nullptr, nullptr,
                                                    codes.mutable_data_ptr<int64_t>(), nullptr});
    return codes;
  });
}

template <class Real>
using SavedLists = dgi::cpu::ListedRows<const Real, const int32_t, const int64_t>;

// The saved lists, validated: every code must be inside its codebook.
template <class Real>
SavedLists<Real> saved_lists(const Tensor& range, const Tensor& code, const Tensor& p, const Tensor& like, int64_t rows,
                             const std::vector<int64_t>& sizes) {
  const int64_t room = code.numel(), levels = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(range.is_contiguous() && range.scalar_type() == ScalarType::Long && range.numel() == 2 * rows * levels
                      && code.is_contiguous() && code.scalar_type() == ScalarType::Int && p.is_contiguous()
                      && p.scalar_type() == like.scalar_type() && p.numel() == room,
                  kQuantize, "list_range, list_code and list_p must be as forward returned them");
  const SavedLists<Real> lists{room, data_of<int64_t>(range), data_of<int32_t>(code), data_of<Real>(p)};
  for (int64_t row = 0; room > 0 && row < rows * levels; ++row) {
    const int64_t first = lists.range[2 * row], last = lists.range[2 * row + 1];
    bool are_codes = 0 <= first && first <= last && last <= room;
    int64_t before = -1;
    for (int64_t j = first; are_codes && j < last; before = lists.code[j++]) are_codes = before < lists.code[j];
    STD_TORCH_CHECK(are_codes && before < sizes[row % levels], kQuantize,
                    "list_range and list_code must hold ranges of ascending codes");
  }
  return lists;
}

using QuantizeGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

QuantizeGradientTensors residual_quantize_backward_cpu(
    const std::optional<Tensor>& dquantized, const std::optional<Tensor>& dusage,
    const std::optional<Tensor>& dresiduals, const std::optional<Tensor>& dlog_normalizer,
    const std::optional<Tensor>& dmixtures, const Tensor& residuals, const Tensor& sampled,
    const Tensor& log_normalizer, const Tensor& list_range, const Tensor& list_code, const Tensor& list_p,
    const Tensor& codebooks, std::vector<int64_t> sizes, const Tensor& scale, const Tensor& tau,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& noise_scale, const std::optional<Tensor>& values,
    const std::optional<Tensor>& padding, int64_t row_offset, int64_t mode, int64_t metric, double eps, bool wants_z,
    bool wants_codebooks, bool wants_scale, bool wants_tau, bool wants_noise_scale, bool wants_values) {
  STD_TORCH_CHECK(residuals.dim() == 3 && residuals.size(1) == static_cast<int64_t>(sizes.size()), kQuantize,
                  "residuals must be (N, m, D)");
  STD_TORCH_CHECK(sampled.is_contiguous() && sampled.scalar_type() == ScalarType::Long
                      && sampled.numel() == residuals.size(0) * residuals.size(1),
                  kQuantize, "sampled must be contiguous int64 (N, m)");
  STD_TORCH_CHECK(log_normalizer.is_contiguous() && log_normalizer.scalar_type() == residuals.scalar_type()
                      && log_normalizer.numel() == sampled.numel(),
                  kQuantize, "log_normalizer must be contiguous (N, m), of the dtype of residuals");
  return for_compute_dtype(residuals, [&](auto real) -> QuantizeGradientTensors {
    using Real = decltype(real);
    const auto inputs = quantize_inputs<Real>(residuals, codebooks, sizes, scale, tau, seed, noise_scale, values,
                                              padding, row_offset, mode, metric, eps);
    STD_TORCH_CHECK(!wants_noise_scale || list_code.numel() == 0, kQuantize,
                    "the gradient of noise_scale needs a forward without lists");
    const dgi::cpu::QuantizeUpstream<Real> upstream{
        optional_data<Real>("dquantized", dquantized, codebooks, residuals.numel()),
        optional_data<Real>("dresiduals", dresiduals, codebooks, residuals.numel()),
        optional_data<Real>("dusage", dusage, codebooks, codebooks.size(0)),
        optional_data<Real>("dlog_normalizer", dlog_normalizer, codebooks, sampled.numel()),
        optional_data<Real>("dmixtures", dmixtures, codebooks, sampled.numel() * inputs.width)};
    const auto make = [&](bool wanted, std::initializer_list<int64_t> shape) -> std::optional<Tensor> {
      if (!wanted) return std::nullopt;
      return torch::stable::empty(shape, codebooks.scalar_type());
    };
    const std::optional<Tensor> dz = make(wants_z, {inputs.rows, inputs.dim});
    const std::optional<Tensor> dcodebooks = make(wants_codebooks, {codebooks.size(0), inputs.dim});
    const std::optional<Tensor> dscale = make(wants_scale, {}), dtau = make(wants_tau, {});
    const std::optional<Tensor> dnoise_scale = make(wants_noise_scale, {inputs.rows});
    const std::optional<Tensor> dvalues = make(wants_values, {codebooks.size(0), inputs.width});
    const int64_t* const chosen = data_of<int64_t>(sampled);
    for (int64_t i = 0; i < sampled.numel(); ++i) {
      const int64_t size = sizes[i % inputs.levels()];
      STD_TORCH_CHECK(0 <= chosen[i] && chosen[i] < size, kQuantize, "sampled must hold codes; got ", chosen[i]);
    }
    const dgi::cpu::QuantizeSaved<Real> saved{
        data_of<Real>(residuals), data_of<Real>(log_normalizer), chosen,
        saved_lists<Real>(list_range, list_code, list_p, codebooks, inputs.rows, sizes)};
    dgi::cpu::residual_quantize_backward<Real>(inputs, saved, upstream,
                                               {result<Real>(dz), result<Real>(dcodebooks), result<Real>(dscale),
                                                result<Real>(dtau), result<Real>(dnoise_scale), result<Real>(dvalues)});
    const auto or_empty = [&](const std::optional<Tensor>& x) {
      return x ? *x : torch::stable::empty({0}, codebooks.scalar_type());
    };
    return {or_empty(dz),   or_empty(dcodebooks),   or_empty(dscale),
            or_empty(dtau), or_empty(dnoise_scale), or_empty(dvalues)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("residual_quantize(Tensor z, Tensor codebooks, int[] sizes, Tensor scale, Tensor tau, Tensor? seed, "
        "Tensor? noise_scale, Tensor? values, Tensor? padding, SymInt row_offset, int mode, int metric, float eps, "
        "int list_room) -> (Tensor quantized, Tensor codes, Tensor sampled, Tensor usage, Tensor residuals, "
        "Tensor log_normalizer, Tensor mixtures, Tensor list_range, Tensor list_code, Tensor list_p)");
  m.def("assign_codes(Tensor z, Tensor codebooks, int[] sizes, int metric, float eps) -> Tensor");
  m.def("residual_quantize_backward(Tensor? dquantized, Tensor? dusage, Tensor? dresiduals, Tensor? dlog_normalizer, "
        "Tensor? dmixtures, Tensor residuals, Tensor sampled, Tensor log_normalizer, Tensor list_range, Tensor "
        "list_code, Tensor list_p, "
        "Tensor codebooks, int[] sizes, Tensor scale, Tensor tau, Tensor? seed, Tensor? noise_scale, Tensor? values, "
        "Tensor? padding, SymInt row_offset, int mode, int metric, float eps, bool wants_z, bool wants_codebooks, "
        "bool wants_scale, bool wants_tau, bool wants_noise_scale, bool wants_values) "
        "-> (Tensor dz, Tensor dcodebooks, Tensor dscale, Tensor dtau, Tensor dnoise_scale, Tensor dvalues)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize_cpu));
  m.impl("assign_codes", TORCH_BOX(&assign_codes_cpu));
  m.impl("residual_quantize_backward", TORCH_BOX(&residual_quantize_backward_cpu));
}

}  // namespace dgi::registration
