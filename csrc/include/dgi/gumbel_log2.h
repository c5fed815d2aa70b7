// The noise of dgi/gumbel.h where logarithms are one instruction: in base 2, G = g / ln 2 = -log2(-ln(1 - u)).
//
// lg2.approx errs by 2^-22, absolutely where its argument is within (1/2, 2) and relatively elsewhere (PTX ISA). Near
// u = 0, where log(1 - u) loses what 1 - u has rounded away, a parabola in x takes its place below u = 0.0137: the
// error of g is below 2e-5 for every word. One conversion serves both sides: it takes x for small u and ~x, which is 1
// - u, for the rest. dgi_kernels/gumbel/triton_noise.py has the same formula, and its test the worst case.
#pragma once

#include <cmath>
#include <cstdint>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

constexpr float kLogE2 = 0.6931471805599453f;

DGI_HOST_DEVICE float log2_of_modulus(float x) {
#ifdef __CUDA_ARCH__
  float log2;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(fabsf(x)));  // the modulus costs nothing, a minus would
  return log2;
#else
  return std::log2(std::fabs(x));
#endif
}

// The parabola is a fit of -log2(1 - u) that errs relatively by 7.9e-6; -log2(ln 2) brings E from base 2 to base e.
DGI_HOST_DEVICE float gumbel_in_base_2(uint32_t word) {
  const bool is_small = word < 0x03800000u;
  const float f = static_cast<float>(is_small ? word : ~word);
  const float parabola = f * (f * 3.946412786535432e-20f + 3.359009737025076e-10f) + 1.679504868512538e-10f;
  return 0.5287663729448977f - log2_of_modulus(is_small ? parabola : log2_of_modulus(f * 0x1p-32f + 0x1p-33f));
}

}  // namespace dgi
