// What a score has beside the product S_nk = r_n . e_k of two stored vectors. Every op makes its scores alike:
//
//   s_nk = a_n S_nk f_k + b_k
//
// A cosine has a_n = scale / ||r_n||, f_k = 1 / ||e_k|| and b_k = 0; a dot product a_n = scale, f_k = 1 and b_k = 0. A
// bias of the columns (a class prior, the logarithm of a sampling probability) is b.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dgi/exp.h"
#include "dgi/macros.h"

namespace dgi {

template <class Real>
struct CodeTerms {
  const Real* factor;          // (codes): f
  const Real* bias = nullptr;  // (codes): b; null where all are 0

  // Those of the codes from `code` on.
  DGI_HOST_DEVICE CodeTerms from(int64_t code) const {
    return {factor + code, bias == nullptr ? nullptr : bias + code};
  }

  // s_k, of a product that has its row's a_n already.
  template <bool kFused, bool kHasBias>
  DGI_HOST_DEVICE Real score(Real product, int64_t k) const {
    if constexpr (kHasBias) return multiply_add<kFused>(product, factor[k], bias[k]);
    return product * factor[k];
  }
};

// Calls f(has_bias) with a compile-time bool, so that scores without a bias cost nothing more.
template <class Real, class F>
DGI_HOST_DEVICE decltype(auto) with_bias(const CodeTerms<Real>& terms, const F& f) {
  return terms.bias != nullptr ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace dgi
