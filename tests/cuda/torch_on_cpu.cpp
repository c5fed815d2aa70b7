// Stand-ins for what the CUDA ops ask of torch: there is one device, the CPU, and one stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "cuda_on_cpu.h"

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

// The order in which threads and blocks run from here on.
extern "C" void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::generator.seed(seed); }
