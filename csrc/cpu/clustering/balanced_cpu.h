#pragma once

#include <cstdint>

#include "cpu/quantize/quantize_cpu.h"

namespace dgi::cpu {

// codes (rows): balanced over the one codebook of `in`, whose scale is 1; see balanced.cpp.
template <class Real>
void balanced_codes(const Quantize<Real>& in, double epsilon, int64_t iterations, int64_t* codes);

}  // namespace dgi::cpu
