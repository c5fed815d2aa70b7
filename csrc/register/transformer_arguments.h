// Parameters of a transformer's layers, as torch gives them to an op.
#pragma once

#include <initializer_list>
#include <vector>

#include "cpu/shared/transformer.h"
#include "register/tensors.h"

namespace dgi::registration {

inline const float* floats(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size()) && x.is_contiguous()
              && x.scalar_type() == ScalarType::Float;
  int64_t dimension = 0;
  for (const int64_t size : shape) fits = fits && x.size(dimension++) == size;
  STD_TORCH_CHECK(fits, op, name, " must be contiguous float32 of the right shape");
  return data_of<float>(x);
}

// In the order of the parameters of a layer.
class Parameters {
 public:
  Parameters(const char* op, const std::vector<Tensor>& all, size_t first) : op_(op), all_(all), next_(first) {}

  dgi::cpu::LayerNorm norm(int64_t dim) {
    const float* const weight = floats(op_, "a norm's weight", all_[next_++], {dim});
    return {weight, floats(op_, "a norm's bias", all_[next_++], {dim})};
  }

  dgi::cpu::LinearMap map(int64_t out, int64_t in) {
    const float* const weight = floats(op_, "a weight", all_[next_++], {out, in});
    return {weight, floats(op_, "a bias", all_[next_++], {out}), out, in};
  }

  int64_t rows_of_weight(size_t ahead) const { return all_[next_ + ahead].size(0); }

 private:
  const char* op_;
  const std::vector<Tensor>& all_;
  size_t next_;
};

}  // namespace dgi::registration
