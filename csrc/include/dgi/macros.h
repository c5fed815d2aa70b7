// What lets one header serve C++ and CUDA.
#pragma once

#if defined(__CUDACC__)
#define DGI_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined, so that the code takes the instruction set of the function that it ends up in.
#define DGI_HOST_DEVICE inline __attribute__((always_inline))
#else
#define DGI_HOST_DEVICE inline
#endif

namespace dgi {

// Starts to load a cache line into the first-level cache of a CPU.
DGI_HOST_DEVICE void prefetch_line([[maybe_unused]] const void* address) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
  __builtin_prefetch(address);
#endif
}

}  // namespace dgi
