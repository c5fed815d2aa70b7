#pragma once

#include <cstdint>

#include "dgi/convert.h"

namespace dgi::cpu {

// logits (rows, codes) and all of its shape: row-major without gaps
template <class Stored>
struct GumbelSoftmax {
  const Stored* logits;
  int64_t rows, codes;
  Compute<Stored> tau;
  int64_t seed;
  bool hard;
};

template <class Stored>
void gumbel_softmax(const GumbelSoftmax<Stored>& in, Stored* out);

// dtau may be null.
template <class Stored>
void gumbel_softmax_backward(const GumbelSoftmax<Stored>& in, const Stored* dout, Stored* dlogits,
                             Compute<Stored>* dtau);

}  // namespace dgi::cpu
