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
