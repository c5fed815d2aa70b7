#pragma once

#include <cstdint>

#include "dgi/convert.h"

namespace dgi::cpu {

// h (rows, dim) and weight (codes, dim), row-major without gaps; scores s = scale h^ . e^ + bias.
template <class Stored>
struct Cosine {
  const Stored *h, *weight;
  int64_t rows, codes, dim;
  Compute<Stored> scale, eps;
  const Compute<Stored>* bias = nullptr;  // (codes); null where all are 0
};

// Where gradients go; null where one is not wanted. They have the shapes of what they are gradients of.
template <class Stored>
struct CosineGradients {
  Stored *dh = nullptr, *dweight = nullptr;
  Compute<Stored>*dscale = nullptr, *dbias = nullptr;

  bool any() const { return dh != nullptr || dweight != nullptr || dscale != nullptr || dbias != nullptr; }
};

// out (rows, codes); without a bias
template <class Stored>
void cosine_logits(const Cosine<Stored>& in, Stored* out);

// dlogits (rows, codes); without a bias
template <class Stored>
void cosine_logits_backward(const Cosine<Stored>& in, const Stored* dlogits, const CosineGradients<Stored>& out);

enum class Reduction { kNone, kMean, kSum };

template <class Real>
struct CrossEntropy {
  const int64_t* target;   // (rows): a code, or ignore_index; anything else gives NaN for its row
  const int64_t* same_as;  // (codes): codes with the id of a row's target leave its softmax; null where all differ
  int64_t ignore_index;
  double smoothing;
  Reduction reduction;
  const Real* upstream;                 // (rows): the gradient of each row's loss under kNone; unused otherwise
  const Real* upstream_log_normalizer;  // (rows): the gradient of each row's log-normaliser; null where all are 0
};

// Losses (rows) under kNone, one number otherwise; log-sum-exps of the rows' scores, 0 for ignored rows, or null.
template <class Real>
struct CosineLosses {
  Real *loss, *log_normalizer;
};

// The gradients under kMean and kSum are those of that one number.
template <class Stored>
void cosine_cross_entropy(const Cosine<Stored>& in, const CrossEntropy<Compute<Stored>>& options,
                          const CosineLosses<Compute<Stored>>& out, const CosineGradients<Stored>& gradients);

}  // namespace dgi::cpu
