// bfloat16 and float16 in memory, float32 in registers. Bit operations without branches, so that a loop over them
// vectorises on any machine; rounding is to nearest, ties to even, as torch's.
#pragma once

#include <bit>
#include <cstdint>

#include "dgi/macros.h"

namespace dgi {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The dtype that an op computes in, by the dtype of its input.
template <class Stored>
struct ComputeType {
  using type = Stored;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};
template <class Stored>
using Compute = typename ComputeType<Stored>::type;

DGI_HOST_DEVICE float load(float x) { return x; }
DGI_HOST_DEVICE double load(double x) { return x; }

DGI_HOST_DEVICE float load(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Both readings of the bits are made and one is chosen: normal numbers by a shift and a new exponent bias, subnormal
// ones as the mantissa of a number near 0.5.
DGI_HOST_DEVICE float load(Float16 x) {
#ifdef __CUDA_ARCH__
  float value;  // one instruction
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t top = uint32_t{x.bits} << 16, sign = top & 0x80000000u, magnitude = top + top;
  const float normal = std::bit_cast<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude < (1u << 27) ? subnormal : normal));
#endif
}

DGI_HOST_DEVICE void store(float x, float& out) { out = x; }
DGI_HOST_DEVICE void store(double x, double& out) { out = x; }

DGI_HOST_DEVICE void store(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

// Two products overflow what is too large into infinity; adding a number with the exponent of the result rounds.
DGI_HOST_DEVICE void store(float x, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits + bits;
  const float base = (std::bit_cast<float>(bits & 0x7FFFFFFFu) * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = magnitude & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + base);
  const uint32_t rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  out.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude > 0xFF000000u ? 0x7E00u : rounded));
}

}  // namespace dgi
