// A decoder's step, as torch sees it: its schema, argument checks, and the call into the code that knows no torch.
#include "cpu/decoder/decoder_cpu.h"

#include <cmath>

#include "register/tensors.h"
#include "register/transformer_arguments.h"

namespace dgi::registration {
namespace {

constexpr const char* kDecoder = "dgi_kernels, decoder_step: ";
constexpr size_t kPerLayer = 18;  // parameters: those of dgi_kernels.DecoderLayer, in its order

dgi::cpu::DecoderLayer layer_of(const std::vector<Tensor>& parameters, size_t layer, int64_t dim, const float* memory) {
  Parameters next(kDecoder, parameters, layer * kPerLayer);
  dgi::cpu::DecoderLayer out{};
  out.self_norm = next.norm(dim);
  out.self_in = next.map(3 * dim, dim);
  out.self_out = next.map(dim, dim);
  out.cross_norm = next.norm(dim);
  out.query = next.map(dim, dim);
  out.cross_out = next.map(dim, dim);
  out.feed_norm = next.norm(dim);
  const int64_t hidden = next.rows_of_weight(0);
  out.feed_in = next.map(hidden, dim);
  out.feed_out = next.map(dim, hidden);
  out.memory = memory;
  return out;
}

std::tuple<Tensor, Tensor> decoder_step_cpu(const Tensor& states, const std::vector<Tensor>& parameters,
                                            const std::vector<Tensor>& memory, const Tensor& mask,
                                            const std::vector<Tensor>& past, const std::vector<Tensor>& ancestors,
                                            int64_t heads, double eps) {
  STD_TORCH_CHECK(states.dim() == 3 && mask.dim() == 2, kDecoder, "states must be (B, M, D) and mask (B, S)");
  dgi::cpu::DecoderStep step{};
  step.requests = states.size(0), step.beams = states.size(1), step.dim = states.size(2);
  step.heads = heads, step.slots = mask.size(1), step.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(heads >= 1 && step.dim >= heads && step.dim % heads == 0, kDecoder, "heads must divide D");
  step.states = floats(kDecoder, "states", states, {step.requests, step.beams, step.dim});
  STD_TORCH_CHECK(mask.size(0) == step.requests && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  kDecoder, "mask must be contiguous bool (B, S)");
  step.mask = data_of<bool>(mask);
  const size_t layers = memory.size();
  STD_TORCH_CHECK(layers >= 1 && parameters.size() == layers * kPerLayer, kDecoder, "a layer has ", kPerLayer,
                  " parameters and one memory");
  for (size_t l = 0; l < layers; ++l) {
    const float* const kept = floats(kDecoder, "memory", memory[l], {step.requests, step.slots, 2 * step.dim});
    step.layers.push_back(layer_of(parameters, l, step.dim, kept));
  }
  STD_TORCH_CHECK(past.size() == ancestors.size(), kDecoder, "each position before has its ancestors");
  for (size_t p = 0; p < past.size(); ++p) {
    if (past[p].dim() == 1 && past[p].numel() == 0) continue;  // stands for none: see dgi_kernels/decoder/native.py
    STD_TORCH_CHECK(past[p].dim() == 4, kDecoder, "past must be (layers, B, M, 2 D)");
    const int64_t beams = past[p].size(2);
    const Tensor& of = ancestors[p];
    STD_TORCH_CHECK(of.dim() == 2 && of.size(0) == step.requests && of.size(1) == step.beams && of.is_contiguous()
                        && of.scalar_type() == ScalarType::Long,
                    kDecoder, "ancestors must be contiguous int64 (B, M)");
    const int64_t* const index = data_of<int64_t>(of);
    for (int64_t i = 0; i < of.numel(); ++i) {
      STD_TORCH_CHECK(0 <= index[i] && index[i] < beams, kDecoder, "ancestors must be in [0, ", beams, "); got ",
                      index[i]);
    }
    step.past.push_back(
        {floats(kDecoder, "past", past[p], {static_cast<int64_t>(layers), step.requests, beams, 2 * step.dim}), beams,
         index});
  }
  Tensor out = torch::stable::empty_like(states);
  Tensor keys_values = torch::stable::empty({static_cast<int64_t>(layers), step.requests, step.beams, 2 * step.dim},
                                            ScalarType::Float);
  dgi::cpu::decoder_step(step, static_cast<float*>(out.mutable_data_ptr()),
                         static_cast<float*>(keys_values.mutable_data_ptr()));
  return {out, keys_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("decoder_step(Tensor states, Tensor[] parameters, Tensor[] memory, Tensor mask, Tensor[] past, "
        "Tensor[] ancestors, int heads, float eps) -> (Tensor states, Tensor keys_values)");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step_cpu)); }

}  // namespace dgi::registration
