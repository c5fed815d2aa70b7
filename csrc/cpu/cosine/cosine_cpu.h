#pragma once

#include <cstdint>

#include "dgi/convert.h"

namespace dgi::cpu {

// h (rows, dim) and weight (codes, dim), row-major without gaps.
template <class Stored>
struct Cosine {
  const Stored *h, *weight;
  int64_t rows, codes, dim;
  Compute<Stored> scale, eps;
};

// Where gradients go; null where one is not wanted. dh and dweight have the shapes of h and weight.
template <class Stored>
struct CosineGradients {
  Stored *dh = nullptr, *dweight = nullptr;
  Compute<Stored>* dscale = nullptr;

  bool any() const { return dh != nullptr || dweight != nullptr || dscale != nullptr; }
};

// out (rows, codes)
template <class Stored>
void cosine_logits(const Cosine<Stored>& in, Stored* out);

// dlogits (rows, codes)
template <class Stored>
void cosine_logits_backward(const Cosine<Stored>& in, const Stored* dlogits, const CosineGradients<Stored>& out);

enum class Reduction { kNone, kMean, kSum };

template <class Real>
struct CrossEntropy {
  const int64_t* target;  // (rows): a code, or ignore_index; anything else gives NaN for its row
  int64_t ignore_index;
  double smoothing;
  Reduction reduction;
  const Real* upstream;  // (rows): the gradient of each row's loss under kNone; unused otherwise
};

// loss (rows) under kNone, one number otherwise; the gradients under kMean and kSum are those of that number.
template <class Stored>
void cosine_cross_entropy(const Cosine<Stored>& in, const CrossEntropy<Compute<Stored>>& options, Compute<Stored>* loss,
                          const CosineGradients<Stored>& gradients);

}  // namespace dgi::cpu
