#pragma once

namespace dgi::cuda {

// The dtypes of tensors that kernels take.
enum class Float { kFloat32, kBFloat16, kFloat16 };

}  // namespace dgi::cuda
