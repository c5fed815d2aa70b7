// By what items are ranked: the beam's score, then the cosine, then the lower id, or by a sum in place of the score,
//
//   score + weight cosine - log(items below the node that the request may find), the last if they share its probability
#pragma once

#include <cmath>
#include <cstdint>

#include "dgi/macros.h"

namespace dgi {

template <class Real>
struct RankOrder {
  bool by_sum = false, shares = false;
  Real weight = 0;

  // `logs` is log(items), or 0 where they do not share.
  DGI_HOST_DEVICE Real sum(float score, Real cosine, Real logs) const {
    return static_cast<Real>(score) + weight * cosine - logs;
  }
};

}  // namespace dgi
