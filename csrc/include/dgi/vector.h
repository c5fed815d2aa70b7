// Vectors of a cosine: norms, normalised rows, and the gradient through the normalisation. Loops over the elements of
// one row; the reductions say that they may be reordered, so that the compiler vectorises them.
#pragma once

#include <cmath>
#include <cstdint>

#include "dgi/convert.h"
#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

// 1 / max(||x||, eps)
template <bool kFused, class Stored>
DGI_HOST_DEVICE Compute<Stored> reciprocal_norm(const Stored* x, int64_t dim, Compute<Stored> eps) {
  Compute<Stored> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) {
    const Compute<Stored> value = load(x[d]);
    sum = multiply_add<kFused>(value, value, sum);
  }
  const Compute<Stored> norm = std::sqrt(sum);
  return 1 / (norm < eps ? eps : norm);
}

template <bool kFused, class Stored>
DGI_HOST_DEVICE Compute<Stored> dot(const Stored* x, const Compute<Stored>* y, int64_t dim) {
  Compute<Stored> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum = multiply_add<kFused>(load(x[d]), y[d], sum);
  return sum;
}

// out += sum_i factor[i] * rows[index[i]]: four rows at a time, so that `out` is read and written once for the four.
template <bool kFused, class Stored>
DGI_HOST_DEVICE void add_rows(const int32_t* index, const Compute<Stored>* factor, int64_t count, const Stored* rows,
                              int64_t dim, Compute<Stored>* out) {
  using Real = Compute<Stored>;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const Stored *r0 = rows + index[i] * dim, *r1 = rows + index[i + 1] * dim, *r2 = rows + index[i + 2] * dim,
                 *r3 = rows + index[i + 3] * dim;
    const Real f0 = factor[i], f1 = factor[i + 1], f2 = factor[i + 2], f3 = factor[i + 3];
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
      Real sum = multiply_add<kFused>(f0, load(r0[d]), out[d]);
      sum = multiply_add<kFused>(f1, load(r1[d]), sum);
      sum = multiply_add<kFused>(f2, load(r2[d]), sum);
      out[d] = multiply_add<kFused>(f3, load(r3[d]), sum);
    }
  }
  for (; i < count; ++i) {
    const Stored* const row = rows + index[i] * dim;
    const Real f = factor[i];
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] = multiply_add<kFused>(f, load(row[d]), out[d]);
  }
}

// The gradient of a stored vector x from the gradient g of x^ = rnorm x: out = factor (g - x (x . g) / (x . x)), factor
// = rnorm, or whatever of it is not in g yet. Where x is so short that eps took the place of its norm nothing is
// radial. In float64, so that x . out = 0 to the rounding of `out`, however much of g is radial. `out` may be `g`.
template <bool kFused, class Stored>
DGI_HOST_DEVICE void through_normalization(const Stored* x, const Compute<Stored>* g, int64_t dim,
                                           Compute<Stored> rnorm, Compute<Stored> eps, double factor, Stored* out) {
  using Real = Compute<Stored>;
  double along = 0, square = 0;
#pragma omp simd reduction(+ : along, square)
  for (int64_t d = 0; d < dim; ++d) {
    const double value = load(x[d]);
    along = multiply_add<kFused>(value, static_cast<double>(g[d]), along);
    square = multiply_add<kFused>(value, value, square);
  }
  const double radial = rnorm == 1 / eps ? 0.0 : -along / square;
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) {
    const double tangent = multiply_add<kFused>(radial, static_cast<double>(load(x[d])), static_cast<double>(g[d]));
    store(static_cast<Real>(factor * tangent), out[d]);
  }
}

}  // namespace dgi
