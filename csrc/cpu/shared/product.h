#pragma once

#include "cpu/shared/host.h"

namespace dgi::cpu {

// Whether own_product() is the faster one here: torch's library (MKL) takes AVX-512 on Intel's processors alone.
bool has_own_product(const Matrix<float>& a, const Matrix<float>& out);

// out = a b, or out += a b, on all of torch's threads; see product.cpp.
void own_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into);

}  // namespace dgi::cpu
