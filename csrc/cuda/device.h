// What the kernels of this folder are written in: CUDA, but that launches and shared memory are spelt so that a C++
// compiler takes the same files. tests/cuda/cuda_on_cpu.h then runs the threads of a block on a machine without a GPU.
//
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)  kernel<<<grid, block, shared_bytes, stream>>>(...)
//   DGI_SHARED(float, name, 32);                                      __shared__ float name[32];
//   Shared<float> rows = dynamic_shared<float>(offset, count);          at a byte offset into the launch's shared_bytes
//
// A Shared<T> is indexed, advanced by `+`, and its elements are read into values of type T (not `auto`).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

namespace dgi::cuda {

template <class T>
using Shared = T*;

#define DGI_SHARED(type, name, count) __shared__ type name[count]

template <class T>
__device__ __forceinline__ Shared<T> dynamic_shared(size_t offset, size_t) {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes + offset);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

// e^x by the hardware's 2^x: wrong by 2 + |x| / 2 units in the last place, 0 below e^-87.
__device__ __forceinline__ float fast_exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
}

// Why the launches since the last call failed; null where none did. CUDA tells of an earlier kernel's failure here too,
// if nobody has asked since.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dgi::cuda

#else

#include "cuda_on_cpu.h"

namespace dgi::cuda {

template <class T>
using Shared = cuda_on_cpu::SharedPointer<T>;

#define DGI_SHARED(type, name, count)           \
  static constexpr char name##_declaration = 0; \
  const auto name = ::cuda_on_cpu::static_shared<type>(&name##_declaration, #name, count)

using cuda_on_cpu::dynamic_shared;
using cuda_on_cpu::launch;

inline float fast_exp(float x) { return std::exp(x); }

inline const char* launch_error() { return nullptr; }  // faults are exceptions

}  // namespace dgi::cuda

#endif

namespace dgi::cuda {

constexpr int kWarp = 32, kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

}  // namespace dgi::cuda
