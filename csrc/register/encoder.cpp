// An encoder's layers, as torch sees them: schema, argument checks, and the call into the code that knows no torch.
#include "cpu/encoder/encoder_cpu.h"

#include "register/tensors.h"
#include "register/transformer_arguments.h"

namespace dgi::registration {
namespace {

constexpr const char* kEncoder = "dgi_kernels, encoder_layers: ";
constexpr size_t kPerLayer = 12;  // parameters: those of dgi_kernels.EncoderLayer, in its order

dgi::cpu::EncoderLayer layer_of(const std::vector<Tensor>& parameters, size_t layer, int64_t dim) {
  Parameters next(kEncoder, parameters, layer * kPerLayer);
  dgi::cpu::EncoderLayer out{};
  out.self_norm = next.norm(dim);
  const dgi::cpu::LinearMap all = next.map(3 * dim, dim);
  out.query = {all.weight, all.bias, dim, dim};
  out.key_value = {all.weight + dim * dim, all.bias + dim, 2 * dim, dim};
  out.self_out = next.map(dim, dim);
  out.feed_norm = next.norm(dim);
  const int64_t hidden = next.rows_of_weight(0);
  out.feed_in = next.map(hidden, dim);
  out.feed_out = next.map(dim, hidden);
  return out;
}

Tensor encoder_layers_cpu(const Tensor& states, const std::vector<Tensor>& parameters, const Tensor& mask,
                          int64_t heads, double eps) {
  STD_TORCH_CHECK(states.dim() == 3 && mask.dim() == 2, kEncoder, "states must be (B, S, D) and mask (B, S)");
  dgi::cpu::Sequences own{};
  own.requests = states.size(0), own.length = states.size(1), own.dim = states.size(2), own.heads = heads;
  own.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(heads >= 1 && own.dim >= heads && own.dim % heads == 0, kEncoder, "heads must divide D");
  own.states = floats(kEncoder, "states", states, {own.requests, own.length, own.dim});
  STD_TORCH_CHECK(mask.size(0) == own.requests && mask.size(1) == own.length && mask.is_contiguous()
                      && mask.scalar_type() == ScalarType::Bool,
                  kEncoder, "mask must be contiguous bool (B, S)");
  own.mask = data_of<bool>(mask);
  STD_TORCH_CHECK(!parameters.empty() && parameters.size() % kPerLayer == 0, kEncoder, "a layer has ", kPerLayer,
                  " parameters");
  std::vector<dgi::cpu::EncoderLayer> layers;
  for (size_t l = 0; l < parameters.size() / kPerLayer; ++l) layers.push_back(layer_of(parameters, l, own.dim));
  Tensor out = torch::stable::empty_like(states);
  dgi::cpu::encoder_layers(own, layers, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("encoder_layers(Tensor states, Tensor[] parameters, Tensor mask, int heads, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) { m.impl("encoder_layers", TORCH_BOX(&encoder_layers_cpu)); }

}  // namespace dgi::registration
