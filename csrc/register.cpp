// The ops as torch sees them: schemas, argument checks, and the calls into the code that knows no torch.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.10 on and every Python from 3.10 on.
// The public Python functions check their arguments and name them in their errors; the checks here only keep a direct
// caller of torch.ops.dgi_kernels from reading or writing memory that is not there.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cosine.h"
#include "cpu/gumbel.h"
#include "cpu/host.h"
#include "cpu/noise.h"
#include "cpu/trie.h"

#ifdef DGI_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/gumbel.h"
#include "cuda/noise.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Philox takes its counter in words of 32 bits.
constexpr int64_t kWords = int64_t{1} << 32;

dgi::NoiseShape noise_shape(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                            int64_t codes) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "gumbel_noise: seed must be an int64 tensor of one element");
  STD_TORCH_CHECK(0 <= level && level < kWords, "gumbel_noise: level must be in [0, 2**32); got ", level);
  STD_TORCH_CHECK(0 <= stream && stream < kWords, "gumbel_noise: stream must be in [0, 2**32); got ", stream);
  STD_TORCH_CHECK(0 <= rows && rows <= kWords, "gumbel_noise: rows must be in [0, 2**32]; got ", rows);
  STD_TORCH_CHECK(0 <= codes && codes <= kWords, "gumbel_noise: codes must be in [0, 2**32]; got ", codes);
  STD_TORCH_CHECK(0 <= row_offset && row_offset <= kWords - rows,
                  "gumbel_noise: row_offset must be in [0, 2**32 - rows]; got ", row_offset, " with rows = ", rows);
  return {static_cast<uint32_t>(level), static_cast<uint32_t>(stream), row_offset, rows, codes};
}

Tensor gumbel_noise_cpu(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                        int64_t codes) {
  const dgi::NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
  Tensor out = torch::stable::empty({rows, codes}, ScalarType::Float);
  float* const data = out.mutable_data_ptr<float>();
  const int64_t seed_value = *seed.const_data_ptr<int64_t>();
  const int64_t tiles = (shape.blocks() + dgi::cpu::kNoiseTile - 1) / dgi::cpu::kNoiseTile;
  constexpr int64_t kGrain = 128;  // 32768 elements, about 0.1 ms: below that a second thread does not pay
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t first, int64_t last) {
    dgi::cpu::gumbel_noise(shape, seed_value, first, last, data);
  });
  return out;
}

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

constexpr const char* kCosine = "dgi_kernels, cosine: ";

// Calls f with the C++ type of the elements of h.
template <class F>
auto for_dtype(const Tensor& h, const F& f) {
  switch (h.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(dgi::BFloat16{});
    case ScalarType::Half: return f(dgi::Float16{});
    default: STD_TORCH_CHECK(false, kCosine, "h must be float32, float64, bfloat16 or float16");
  }
}

template <class Stored>
const Stored* data_of(const Tensor& x) {
  return static_cast<const Stored*>(x.const_data_ptr());
}

template <class Stored>
Stored* result(const std::optional<Tensor>& x) {
  return x ? static_cast<Stored*>(x->mutable_data_ptr()) : nullptr;
}

ScalarType compute_dtype(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Stored>
dgi::cpu::Cosine<Stored> cosine_inputs(const Tensor& h, const Tensor& weight, const Tensor& scale, double eps) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2 && h.size(1) == weight.size(1), kCosine,
                  "h must be (N, D) and weight (K, D)");
  STD_TORCH_CHECK(h.is_contiguous() && weight.is_contiguous() && weight.scalar_type() == h.scalar_type(), kCosine,
                  "h and weight must be contiguous and of one dtype");
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == compute_dtype(h), kCosine,
                  "scale must hold one element of the compute dtype");
  STD_TORCH_CHECK(weight.size(0) <= INT32_MAX, kCosine, "weight must have less than 2**31 rows");
  using Real = dgi::Compute<Stored>;
  return {data_of<Stored>(h), data_of<Stored>(weight), h.size(0), weight.size(0), h.size(1), *data_of<Real>(scale),
          static_cast<Real>(eps)};
}

// Tensors for the gradients that are wanted; an empty one where one is not.
struct GradientTensors {
  std::optional<Tensor> dh, dweight, dscale;

  GradientTensors(const Tensor& h, const Tensor& weight, const Tensor& scale, const std::array<bool, 3>& wanted) {
    if (wanted[0]) dh = torch::stable::empty_like(h);
    if (wanted[1]) dweight = torch::stable::empty_like(weight);
    if (wanted[2]) dscale = torch::stable::empty_like(scale);
  }

  template <class Stored>
  dgi::cpu::CosineGradients<Stored> pointers() const {
    return {result<Stored>(dh), result<Stored>(dweight), result<dgi::Compute<Stored>>(dscale)};
  }

  Tensor or_empty(const std::optional<Tensor>& x) const { return x ? *x : torch::stable::empty({0}, ScalarType::Float); }
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
    const GradientTensors out(h, weight, scale, {wants_h, wants_weight, wants_scale});
    dgi::cpu::cosine_logits_backward(inputs, data_of<Stored>(dlogits), out.pointers<Stored>());
    return {out.or_empty(out.dh), out.or_empty(out.dweight), out.or_empty(out.dscale)};
  });
}

// The loss, and the gradients that are wanted. `upstream`, (N,) in the compute dtype, are the weights of the rows' losses
// under reduction 0 (none); 1 is mean, 2 sum.
std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_cross_entropy_cpu(
    const Tensor& h, const Tensor& weight, const Tensor& target, const Tensor& scale,
    const std::optional<Tensor>& upstream, int64_t ignore_index, int64_t reduction, double label_smoothing, double eps,
    bool wants_h, bool wants_weight, bool wants_scale) {
  return for_dtype(h, [&](auto stored) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using Stored = decltype(stored);
    using Real = dgi::Compute<Stored>;
    const auto inputs = cosine_inputs<Stored>(h, weight, scale, eps);
    STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == inputs.rows && target.is_contiguous()
                        && target.scalar_type() == ScalarType::Long,
                    kCosine, "target must be contiguous int64 (N,)");
    STD_TORCH_CHECK(0 <= reduction && reduction <= 2, kCosine, "reduction must be 0, 1 or 2; got ", reduction);
    STD_TORCH_CHECK(!upstream || (upstream->numel() == inputs.rows && upstream->is_contiguous()
                                  && upstream->scalar_type() == compute_dtype(h)),
                    kCosine, "upstream must be contiguous (N,) of the compute dtype");
    const dgi::cpu::CrossEntropy<Real> options{data_of<int64_t>(target), ignore_index, label_smoothing,
                                               static_cast<dgi::cpu::Reduction>(reduction),
                                               upstream ? data_of<Real>(*upstream) : nullptr};
    Tensor loss = reduction == 0 ? torch::stable::empty({inputs.rows}, compute_dtype(h))
                                 : torch::stable::empty({}, compute_dtype(h));
    const GradientTensors out(h, weight, scale, {wants_h, wants_weight, wants_scale});
    dgi::cpu::cosine_cross_entropy(inputs, options, static_cast<Real*>(loss.mutable_data_ptr()), out.pointers<Stored>());
    return {loss, out.or_empty(out.dh), out.or_empty(out.dweight), out.or_empty(out.dscale)};
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

constexpr const char* kGumbel = "dgi_kernels, gumbel: ";

int64_t seed_value(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, kGumbel,
                  "seed must be an int64 tensor of one element");
  return *data_of<int64_t>(seed);
}

template <class Stored>
dgi::cpu::GumbelSoftmax<Stored> softmax_inputs(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) <= kWords && logits.size(1) > 0, kGumbel,
                  "logits must be contiguous (N, K) with K > 0");
  STD_TORCH_CHECK(tau.numel() == 1 && tau.scalar_type() == compute_dtype(logits), kGumbel,
                  "tau must hold one element of the compute dtype");
  return {data_of<Stored>(logits), logits.size(0), logits.size(1), *data_of<dgi::Compute<Stored>>(tau), seed_value(seed),
          hard};
}

Tensor gumbel_softmax_cpu(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  return for_dtype(logits, [&](auto stored) {
    using Stored = decltype(stored);
    const auto inputs = softmax_inputs<Stored>(logits, tau, seed, hard);
    Tensor out = torch::stable::empty_like(logits);
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
    Tensor dtau = wants_tau ? torch::stable::empty_like(tau) : torch::stable::empty({0}, compute_dtype(logits));
    dgi::cpu::gumbel_softmax_backward(
        inputs, data_of<Stored>(dout), static_cast<Stored*>(dlogits.mutable_data_ptr()),
        wants_tau ? static_cast<dgi::Compute<Stored>*>(dtau.mutable_data_ptr()) : nullptr);
    return {dlogits, dtau};
  });
}

// Calls f with the compute type of residual quantization.
template <class F>
auto for_compute_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, kGumbel, "z and codebooks must be float32 or float64");
  }
}

template <class Real>
const Real* optional_data(const char* name, const std::optional<Tensor>& x, const Tensor& like, int64_t elements) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == like.scalar_type() && x->numel() == elements, kGumbel, name,
                  " must be contiguous, of the dtype of the codebooks and of the shape of its result");
  return data_of<Real>(*x);
}

// `z` (N, D), or the residuals (N, m, D), whose first ones are z.
template <class Real>
dgi::cpu::Quantize<Real> quantize_inputs(const Tensor& z, const Tensor& codebooks, const std::vector<int64_t>& sizes,
                                         const Tensor& scale, const Tensor& tau, const std::optional<Tensor>& seed,
                                         int64_t row_offset, int64_t mode, double eps) {
  STD_TORCH_CHECK(codebooks.dim() == 2 && z.is_contiguous() && codebooks.is_contiguous()
                      && z.size(-1) == codebooks.size(1) && z.scalar_type() == codebooks.scalar_type(),
                  kGumbel, "z and codebooks must be contiguous, of one dtype and one length of vectors");
  int64_t total = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(0 < size && size <= INT32_MAX, kGumbel, "sizes must be positive and below 2**31; got ", size);
    total += size;
  }
  STD_TORCH_CHECK(!sizes.empty() && total == codebooks.size(0), kGumbel, "sizes must add up to the rows of codebooks");
  for (const Tensor* scalar : {&scale, &tau}) {
    STD_TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == z.scalar_type(), kGumbel,
                    "scale and tau must hold one element of the dtype of z");
  }
  STD_TORCH_CHECK(0 <= mode && mode <= 2, kGumbel, "mode must be 0, 1 or 2; got ", mode);
  const int64_t rows = z.size(0);
  STD_TORCH_CHECK(0 <= row_offset && row_offset <= kWords - rows, kGumbel, "row_offset must be in [0, 2**32 - rows]");
  dgi::cpu::NoiseSource noise;
  if (seed) noise = {true, seed_value(*seed), row_offset};
  return {data_of<Real>(z), data_of<Real>(codebooks), sizes, rows, z.size(-1), *data_of<Real>(scale),
          *data_of<Real>(tau), static_cast<Real>(eps), static_cast<dgi::cpu::QuantizeMode>(mode), noise};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(
    const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes, const Tensor& scale, const Tensor& tau,
    const std::optional<Tensor>& seed, int64_t row_offset, int64_t mode, double eps) {
  STD_TORCH_CHECK(z.dim() == 2, kGumbel, "z must be (N, D)");
  return for_compute_dtype(z, [&](auto real) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using Real = decltype(real);
    const auto inputs = quantize_inputs<Real>(z, codebooks, sizes, scale, tau, seed, row_offset, mode, eps);
    const int64_t rows = inputs.rows, levels = inputs.levels();
    const ScalarType dtype = z.scalar_type();
    Tensor quantized = torch::stable::empty({rows, levels, inputs.dim}, dtype);
    Tensor residuals = torch::stable::empty({rows, levels, inputs.dim}, dtype);
    Tensor codes = torch::stable::empty({rows, levels}, ScalarType::Long);
    Tensor sampled = torch::stable::empty({rows, levels}, ScalarType::Long);
    Tensor usage = torch::stable::empty({codebooks.size(0)}, dtype);
    Tensor log_normalizer = torch::stable::empty({rows, levels}, dtype);
    Tensor is_peaked = torch::stable::empty({rows, levels}, ScalarType::Bool);
    const auto of = [](Tensor& x) { return static_cast<Real*>(x.mutable_data_ptr()); };
    dgi::cpu::residual_quantize<Real>(inputs, {of(quantized), of(residuals), of(usage), of(log_normalizer),
                                               codes.mutable_data_ptr<int64_t>(), sampled.mutable_data_ptr<int64_t>(),
                                               is_peaked.mutable_data_ptr<bool>()});
    return {quantized, codes, sampled, usage, residuals, log_normalizer, is_peaked};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize_backward_cpu(
    const std::optional<Tensor>& dquantized, const std::optional<Tensor>& dusage,
    const std::optional<Tensor>& dresiduals, const std::optional<Tensor>& dlog_normalizer, const Tensor& residuals,
    const Tensor& sampled, const Tensor& is_peaked, const Tensor& codebooks, std::vector<int64_t> sizes, const Tensor& scale, const Tensor& tau,
    const std::optional<Tensor>& seed, int64_t row_offset, int64_t mode, double eps, bool wants_z, bool wants_codebooks,
    bool wants_scale, bool wants_tau) {
  STD_TORCH_CHECK(residuals.dim() == 3 && residuals.size(1) == static_cast<int64_t>(sizes.size()), kGumbel,
                  "residuals must be (N, m, D)");
  STD_TORCH_CHECK(sampled.is_contiguous() && sampled.scalar_type() == ScalarType::Long
                      && sampled.numel() == residuals.size(0) * residuals.size(1),
                  kGumbel, "sampled must be contiguous int64 (N, m)");
  STD_TORCH_CHECK(is_peaked.is_contiguous() && is_peaked.scalar_type() == ScalarType::Bool
                      && is_peaked.numel() == sampled.numel(),
                  kGumbel, "is_peaked must be contiguous bool (N, m)");
  return for_compute_dtype(residuals, [&](auto real) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using Real = decltype(real);
    const auto inputs = quantize_inputs<Real>(residuals, codebooks, sizes, scale, tau, seed, row_offset, mode, eps);
    const dgi::cpu::QuantizeUpstream<Real> upstream{
        optional_data<Real>("dquantized", dquantized, codebooks, residuals.numel()),
        optional_data<Real>("dresiduals", dresiduals, codebooks, residuals.numel()),
        optional_data<Real>("dusage", dusage, codebooks, codebooks.size(0)),
        optional_data<Real>("dlog_normalizer", dlog_normalizer, codebooks, sampled.numel())};
    const auto make = [&](bool wanted, std::initializer_list<int64_t> shape) -> std::optional<Tensor> {
      if (!wanted) return std::nullopt;
      return torch::stable::empty(shape, codebooks.scalar_type());
    };
    const std::optional<Tensor> dz = make(wants_z, {inputs.rows, inputs.dim});
    const std::optional<Tensor> dcodebooks = make(wants_codebooks, {codebooks.size(0), inputs.dim});
    const std::optional<Tensor> dscale = make(wants_scale, {}), dtau = make(wants_tau, {});
    const int64_t* const chosen = data_of<int64_t>(sampled);
    for (int64_t i = 0; i < sampled.numel(); ++i) {
      const int64_t size = sizes[i % inputs.levels()];
      STD_TORCH_CHECK(0 <= chosen[i] && chosen[i] < size, kGumbel, "sampled must hold codes; got ", chosen[i]);
    }
    dgi::cpu::residual_quantize_backward<Real>(inputs, {data_of<Real>(residuals), chosen, data_of<bool>(is_peaked)},
                                               upstream,
                                               {result<Real>(dz), result<Real>(dcodebooks), result<Real>(dscale),
                                                result<Real>(dtau)});
    const auto or_empty = [&](const std::optional<Tensor>& x) {
      return x ? *x : torch::stable::empty({0}, codebooks.scalar_type());
    };
    return {or_empty(dz), or_empty(dcodebooks), or_empty(dscale), or_empty(dtau)};
  });
}

#ifdef DGI_WITH_CUDA
// The stream of `like`'s device that torch's operators go to now.
void* current_stream(const Tensor& like) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return stream;
}

Tensor gumbel_noise_cuda(const Tensor& seed, int64_t level, int64_t stream, int64_t row_offset, int64_t rows,
                         int64_t codes) {
  const dgi::NoiseShape shape = noise_shape(seed, level, stream, row_offset, rows, codes);
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor out = torch::stable::empty({rows, codes}, ScalarType::Float, std::nullopt, seed.device());
  if (shape.blocks() == 0) return out;
  const char* error = dgi::cuda::gumbel_noise(shape, seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(),
                                              current_stream(seed));
  STD_TORCH_CHECK(error == nullptr, "gumbel_noise: the CUDA kernel could not be launched: ", error);
  return out;
}

dgi::cuda::GumbelSoftmax softmax_inputs_cuda(const Tensor& logits, const Tensor& tau, const Tensor& seed) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) <= kWords && logits.size(1) > 0, kGumbel,
                  "logits must be contiguous (N, K) with K > 0");
  STD_TORCH_CHECK(tau.numel() == 1 && tau.scalar_type() == ScalarType::Float && tau.device() == logits.device(), kGumbel,
                  "tau must hold one float32 on the device of logits");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && seed.device() == logits.device(), kGumbel,
                  "seed must hold one int64 on the device of logits");
  const auto dtype = [&] {
    switch (logits.scalar_type()) {
      case ScalarType::Float: return dgi::cuda::Float::kFloat32;
      case ScalarType::BFloat16: return dgi::cuda::Float::kBFloat16;
      case ScalarType::Half: return dgi::cuda::Float::kFloat16;
      default: STD_TORCH_CHECK(false, kGumbel, "logits must be float32, bfloat16 or float16");
    }
  }();
  constexpr uint32_t kStream = 1;  // of gumbel_softmax's noise
  return {logits.const_data_ptr(), dtype, {0, kStream, 0, logits.size(0), logits.size(1)},
          seed.const_data_ptr<int64_t>(), tau.const_data_ptr<float>()};
}

Tensor gumbel_softmax_cuda(const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard) {
  const auto inputs = softmax_inputs_cuda(logits, tau, seed);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::empty_like(logits);
  if (logits.size(0) == 0) return out;
  const char* error = dgi::cuda::gumbel_softmax(inputs, hard, out.mutable_data_ptr(), current_stream(logits));
  STD_TORCH_CHECK(error == nullptr, kGumbel, "the CUDA kernel could not be launched: ", error);
  return out;
}

std::tuple<Tensor, Tensor> gumbel_softmax_backward_cuda(const Tensor& dout, const Tensor& logits, const Tensor& tau,
                                                        const Tensor& seed, bool wants_tau) {
  const auto inputs = softmax_inputs_cuda(logits, tau, seed);
  STD_TORCH_CHECK(dout.is_contiguous() && dout.scalar_type() == logits.scalar_type() && dout.device() == logits.device()
                      && dout.dim() == 2 && dout.size(0) == logits.size(0) && dout.size(1) == logits.size(1),
                  kGumbel, "dout must be contiguous (N, K) of the dtype and device of logits");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = torch::stable::empty_like(logits), dtau = torch::stable::empty_like(tau);
  Tensor row_dtau = torch::stable::empty({logits.size(0)}, ScalarType::Float, std::nullopt, logits.device());
  const char* error = dgi::cuda::gumbel_softmax_backward(
      inputs, dout.const_data_ptr(), dlogits.mutable_data_ptr(), row_dtau.mutable_data_ptr<float>(),
      dtau.mutable_data_ptr<float>(), current_stream(logits));
  STD_TORCH_CHECK(error == nullptr, kGumbel, "the CUDA kernel could not be launched: ", error);
  if (wants_tau) return {dlogits, dtau};
  return {dlogits, torch::stable::empty({0}, ScalarType::Float, std::nullopt, logits.device())};
}
#endif

// A tensor over memory that stays its owner's.
template <class Real>
Tensor view(const dgi::cpu::Matrix<Real>& x) {
  const int64_t sizes[] = {x.rows, x.columns}, strides[] = {x.row_stride, x.column_stride};
  const int32_t dtype = std::is_same_v<Real, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(x.data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class Real>
void product(const dgi::cpu::Matrix<Real>& a, const dgi::cpu::Matrix<Real>& b, const dgi::cpu::Matrix<Real>& out,
             dgi::cpu::Into into) {
  if (out.rows == 0 || out.columns == 0) return;
  const Tensor left = view(a), right = view(b), target = view(out);
  if (into == dgi::cpu::Into::kAdd) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(target.get(), target.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), left.get(), right.get()));
  }
}

}  // namespace

namespace dgi::cpu {

void matrix_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into) {
  product(a, b, out, into);
}

void matrix_product(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out, Into into) {
  product(a, b, out, into);
}

void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace dgi::cpu

STABLE_TORCH_LIBRARY(dgi_kernels, m) {
  m.def("gumbel_noise(Tensor seed, int level, int stream, int row_offset, int rows, int codes) -> Tensor");
  m.def("trie_sort(Tensor codes) -> (Tensor order, Tensor first_diff)");
  m.def("cosine_logits(Tensor h, Tensor weight, Tensor scale, float eps) -> Tensor");
  m.def("cosine_logits_backward(Tensor dlogits, Tensor h, Tensor weight, Tensor scale, float eps, bool wants_h, "
        "bool wants_weight, bool wants_scale) -> (Tensor dh, Tensor dweight, Tensor dscale)");
  m.def("cosine_cross_entropy(Tensor h, Tensor weight, Tensor target, Tensor scale, Tensor? upstream, "
        "int ignore_index, int reduction, float label_smoothing, float eps, bool wants_h, bool wants_weight, "
        "bool wants_scale) -> (Tensor loss, Tensor dh, Tensor dweight, Tensor dscale)");
  m.def("gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor dout, Tensor logits, Tensor tau, Tensor seed, bool wants_tau) -> "
        "(Tensor dlogits, Tensor dtau)");
  m.def("residual_quantize(Tensor z, Tensor codebooks, int[] sizes, Tensor scale, Tensor tau, Tensor? seed, "
        "int row_offset, int mode, float eps) -> (Tensor quantized, Tensor codes, Tensor sampled, Tensor usage, "
        "Tensor residuals, Tensor log_normalizer, Tensor is_peaked)");
  m.def("residual_quantize_backward(Tensor? dquantized, Tensor? dusage, Tensor? dresiduals, Tensor? dlog_normalizer, "
        "Tensor residuals, Tensor sampled, Tensor is_peaked, Tensor codebooks, int[] sizes, Tensor scale, Tensor tau, Tensor? seed, "
        "int row_offset, int mode, float eps, bool wants_z, bool wants_codebooks, bool wants_scale, bool wants_tau) "
        "-> (Tensor dz, Tensor dcodebooks, Tensor dscale, Tensor dtau)");
  m.def("count_outside(Tensor values, int low, int high, int? also) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cpu));
  m.impl("trie_sort", TORCH_BOX(&trie_sort_cpu));
  m.impl("cosine_logits", TORCH_BOX(&cosine_logits_cpu));
  m.impl("cosine_logits_backward", TORCH_BOX(&cosine_logits_backward_cpu));
  m.impl("cosine_cross_entropy", TORCH_BOX(&cosine_cross_entropy_cpu));
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax_cpu));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&gumbel_softmax_backward_cpu));
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize_cpu));
  m.impl("residual_quantize_backward", TORCH_BOX(&residual_quantize_backward_cpu));
  m.impl("count_outside", TORCH_BOX(&count_outside_cpu));
}

#ifdef DGI_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CUDA, m) {
  m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise_cuda));
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax_cuda));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&gumbel_softmax_backward_cuda));
}
#endif
