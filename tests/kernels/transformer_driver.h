// What the drivers of decoder and encoder share: random parameters of layers, and the formulas in float64.
#pragma once

#include <cmath>
#include <cstdio>
#include <deque>
#include <vector>

#include "cpu/shared/transformer.h"
#include "driver.h"

namespace {

using dgi::cpu::LayerNorm;
using dgi::cpu::LinearMap;
using driver::below;
using driver::Random;
using Row = std::vector<double>;

struct Arrays {
  Random& random;
  std::deque<std::vector<float>> kept;

  const float* uniform(int64_t count, double size) {
    std::vector<float>& made = kept.emplace_back(count);
    for (float& value : made) value = static_cast<float>(size * (static_cast<double>(below(random, 2001)) / 1000 - 1));
    return made.data();
  }

  LinearMap map(int64_t out, int64_t in) {
    return {uniform(out * in, 1.5 / std::sqrt(static_cast<double>(in))), uniform(out, 0.5), out, in};
  }
  LayerNorm norm(int64_t dim) { return {uniform(dim, 1.5), uniform(dim, 0.5)}; }
};

Row mapped(const LinearMap& map, const Row& x) {
  Row out(map.out);
  for (int64_t i = 0; i < map.out; ++i) {
    out[i] = map.bias[i];
    for (int64_t j = 0; j < map.in; ++j) out[i] += static_cast<double>(map.weight[i * map.in + j]) * x[j];
  }
  return out;
}

Row normalise(const LayerNorm& norm, double eps, const Row& x) {
  const double size = static_cast<double>(x.size());
  double mean = 0, square = 0;
  for (const double value : x) mean += value / size;
  for (const double value : x) square += (value - mean) * (value - mean) / size;
  Row out(x.size());
  for (size_t d = 0; d < x.size(); ++d)
    out[d] = (x[d] - mean) / std::sqrt(square + eps) * norm.weight[d] + norm.bias[d];
  return out;
}

// Of one query to slots, each 2 dim numbers, keys before values; 0 where there is none.
Row attend(const double* query, const std::vector<const float*>& slots, int64_t dim, int64_t heads) {
  const int64_t head_dim = dim / heads;
  Row out(dim);
  for (int64_t head = 0; head < heads; ++head) {
    Row weights;
    double sum = 0;
    for (const float* slot : slots) {
      double score = 0;
      for (int64_t d = head * head_dim; d < (head + 1) * head_dim; ++d) score += query[d] * slot[d];
      sum += weights.emplace_back(std::exp(score / std::sqrt(static_cast<double>(head_dim))));
    }
    for (size_t s = 0; s < slots.size(); ++s) {
      for (int64_t d = head * head_dim; d < (head + 1) * head_dim; ++d) out[d] += weights[s] / sum * slots[s][dim + d];
    }
  }
  return out;
}

void add(Row& x, const Row& more) {
  for (size_t d = 0; d < x.size(); ++d) x[d] += more[d];
}

bool near(const char* what, double found, double expected) {
  if (std::fabs(found - expected) <= 1e-3 * (1 + std::fabs(expected))) return true;
  std::printf("%s: %.9g, not %.9g\n", what, found, expected);
  return false;
}

// The places or beams of a layer's last block, by the formula.
void feed(const LayerNorm& norm, double eps, const LinearMap& in, const LinearMap& out, Row& x) {
  Row hidden = mapped(in, normalise(norm, eps, x));
  for (double& value : hidden) value *= 0.5 * (1 + std::erf(value / std::sqrt(2.0)));
  add(x, mapped(out, hidden));
}

}  // namespace
