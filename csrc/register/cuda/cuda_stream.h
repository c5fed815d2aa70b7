// What the files of this folder share: they are compiled only where CUDA is, with USE_CUDA, which shows the stable
// ABI's CUDA functions.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "register/tensors.h"

namespace dgi::registration {

using torch::stable::accelerator::DeviceGuard;

// The stream of `like`'s device that torch's operators go to now.
inline void* current_stream(const Tensor& like) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return stream;
}

// A kernel's launch returns why it failed, or null.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, "dgi_kernels, ", op,
                  ": the CUDA kernel, or an earlier one whose error nobody read, could not be launched: ", error);
}

}  // namespace dgi::registration
