// Dropout and attention, as torch sees them: schemas, argument checks, calls into the code that knows no torch.
#include "cpu/dropout/dropout_cpu.h"

#include <algorithm>
#include <cmath>

#include "register/noise_arguments.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

constexpr const char* kDropout = "dgi_kernels, dropout: ";

void check_floats(const char* name, const Tensor& x, int64_t dimensions) {
  STD_TORCH_CHECK(x.dim() == dimensions && x.is_contiguous() && x.scalar_type() == ScalarType::Float, kDropout, name,
                  " must be contiguous float32 of ", dimensions, " dimensions");
}

dgi::cpu::Dropped dropped(const Tensor& seed, int64_t stream, int64_t rows, int64_t columns, double p) {
  STD_TORCH_CHECK(0 <= p && p < 1, kDropout, "p must be in [0, 1); got ", p);
  const double threshold = std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1);
  return {noise_shape(seed, 0, stream, 0, rows, columns), seed_value(kDropout, seed), static_cast<uint32_t>(threshold),
          static_cast<float>(1 / (1 - p))};
}

Tensor dropout_cpu(const Tensor& x, const std::optional<Tensor>& residual, double p, const Tensor& seed) {
  check_floats("x", x, 2);
  if (residual) {
    check_floats("residual", *residual, 2);
    STD_TORCH_CHECK(residual->size(0) == x.size(0) && residual->size(1) == x.size(1), kDropout,
                    "residual must have the shape of x");
  }
  const auto mask = dropped(seed, dgi::cpu::kStreamDropout, x.size(0), x.size(1), p);
  Tensor out = torch::stable::empty_like(x);
  dgi::cpu::dropout(mask, data_of<float>(x), residual ? data_of<float>(*residual) : nullptr,
                    static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// queries (B, T, D) and keys_values (B, S, 2 D), or queries (B, T, 3 D) of all three.
struct AttentionArguments {
  dgi::cpu::Attention in{};
  int64_t dim = 0;

  AttentionArguments(const Tensor& queries, const std::optional<Tensor>& keys_values, const std::optional<Tensor>& mask,
                     int64_t heads, bool causal, double p, const Tensor& seed) {
    check_floats("queries", queries, 3);
    const int64_t parts = keys_values ? 1 : 3;
    STD_TORCH_CHECK(heads >= 1 && queries.size(2) % (parts * heads) == 0 && queries.size(2) > 0, kDropout,
                    "heads must divide the width");
    dim = queries.size(2) / parts;
    in.batch = queries.size(0), in.heads = heads, in.queries = queries.size(1), in.head_dim = dim / heads;
    in.q = data_of<float>(queries), in.q_stride = parts * dim;
    in.slots = in.queries, in.kv_stride = in.q_stride, in.k = in.q + dim;
    if (keys_values) {
      check_floats("keys_values", *keys_values, 3);
      STD_TORCH_CHECK(keys_values->size(0) == in.batch && keys_values->size(2) == 2 * dim, kDropout,
                      "keys_values must be (B, S, 2 D)");
      in.slots = keys_values->size(1), in.kv_stride = 2 * dim, in.k = data_of<float>(*keys_values);
    }
    in.v = in.k + dim;
    if (mask) {
      STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == in.batch && mask->size(1) == in.slots
                          && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool,
                      kDropout, "mask must be contiguous bool (B, S)");
      in.mask = data_of<bool>(*mask);
    }
    in.causal = causal;
    in.dropped = dropped(seed, dgi::cpu::kStreamAttention, in.batch * heads * in.queries, in.slots, p);
  }
};

Tensor attention_cpu(const Tensor& queries, const std::optional<Tensor>& keys_values, const std::optional<Tensor>& mask,
                     int64_t heads, bool causal, double p, const Tensor& seed) {
  const AttentionArguments arguments(queries, keys_values, mask, heads, causal, p, seed);
  Tensor out = torch::stable::empty({queries.size(0), queries.size(1), arguments.dim}, ScalarType::Float);
  dgi::cpu::attention(arguments.in, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> attention_backward_cpu(const Tensor& dout, const Tensor& queries,
                                                  const std::optional<Tensor>& keys_values,
                                                  const std::optional<Tensor>& mask, int64_t heads, bool causal,
                                                  double p, const Tensor& seed) {
  const AttentionArguments arguments(queries, keys_values, mask, heads, causal, p, seed);
  check_floats("dout", dout, 3);
  STD_TORCH_CHECK(dout.size(0) == queries.size(0) && dout.size(1) == queries.size(1) && dout.size(2) == arguments.dim,
                  kDropout, "dout must be (B, T, D)");
  Tensor dqueries = torch::stable::empty_like(queries);
  Tensor dkeys_values = keys_values ? torch::stable::empty_like(*keys_values)
                                    : torch::stable::empty({0}, ScalarType::Float);
  float* const dq = static_cast<float*>(dqueries.mutable_data_ptr());
  float* const dk = keys_values ? static_cast<float*>(dkeys_values.mutable_data_ptr()) : dq + arguments.dim;
  dgi::cpu::attention_backward(arguments.in, data_of<float>(dout), dq, dk, dk + arguments.dim);
  return {dqueries, dkeys_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("dropout(Tensor x, Tensor? residual, float p, Tensor seed) -> Tensor");
  m.def("attention(Tensor queries, Tensor? keys_values, Tensor? mask, int heads, bool causal, float p, Tensor seed) -> "
        "Tensor");
  m.def("attention_backward(Tensor dout, Tensor queries, Tensor? keys_values, Tensor? mask, int heads, bool causal, "
        "float p, Tensor seed) -> (Tensor dqueries, Tensor dkeys_values)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout_cpu));
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace dgi::registration
