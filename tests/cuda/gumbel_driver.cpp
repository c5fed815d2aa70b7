// The CUDA Gumbel-Softmax without torch, for copies of gumbel.cu with a fault planted into them.
#include <string>
#include <vector>

#include "cuda/gumbel.cu"

extern "C" const char* run(uint64_t seed, const float* logits, float* out, int64_t rows, int64_t codes) {
  static std::string fault;
  fault.clear();
  cuda_on_cpu::generator.seed(seed);
  const int64_t noise_seed = 7;
  const float tau = 1;
  float dtau;
  std::vector<float> row_dtau(rows);
  const dgi::cuda::GumbelSoftmax inputs{logits, dgi::cuda::Float::kFloat32, {0, 1, 0, rows, codes}, &noise_seed, &tau};
  try {
    dgi::cuda::gumbel_softmax(inputs, false, out, nullptr);
    dgi::cuda::gumbel_softmax_backward(inputs, logits, out, row_dtau.data(), &dtau, nullptr);
  } catch (const cuda_on_cpu::Fault& error) {
    fault = error.what();
  }
  return fault.c_str();
}
