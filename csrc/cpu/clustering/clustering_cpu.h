#pragma once

#include <cstdint>

#include "cpu/quantize/quantize_cpu.h"
#include "dgi/convert.h"

namespace dgi::cpu {

// x (rows, dim); weights (rows), null: all 1
template <class Stored>
struct Points {
  const Stored* x;
  const double* weights;
  int64_t rows, dim;

  double weight(int64_t row) const { return weights == nullptr ? 1.0 : weights[row]; }
};

// sums (clusters, dim) = sum of w x over the rows of each cluster, mass (clusters) = sum of w; codes (rows).
template <class Stored>
void cluster_sums(const Points<Stored>& points, const int64_t* codes, int64_t clusters, double* sums, double* mass);

// costs (rows): ||x - c||^2, 1 - cos(x, c) or -x . c of each row and the centroid of its code; returns sum of w cost.
template <class Stored>
double cluster_costs(const Points<Stored>& points, const int64_t* codes, const Compute<Stored>* centroids,
                     Metric metric, double eps, double* costs);

// What bounded_codes() keeps of each row from round to round.
constexpr int64_t kNear = 8;
struct NearCodes {
  int32_t* code;  // (rows, kNear): the nearest codes of an earlier round, then -1
  float* rest;    // (rows): no other code is nearer than this distance
};

// codes (rows): the nearest of the centroids (clusters, dim); the lowest of equal ones. `before`: the centroids of the
// call before, whose `near` is given; null: `near` holds nothing yet. False where rows are too long for it, or squares
// may overflow: then nothing of it holds. See bounded.cpp.
template <class Stored>
bool bounded_codes(const Points<Stored>& points, const float* centroids, int64_t clusters, const float* before,
                   const NearCodes& near, int64_t* codes);

// K-means++, greedy: rows (count) of the points. Of as many draws as `trials`, with a probability in proportion to w
// times the squared distance to the nearest row chosen before, the one that leaves the smallest sum of these; uniform
// (count, trials) in (0, 1). -1 once no row is away from those chosen.
template <class Real>
void kmeans_seeds(const Points<Real>& points, const double* uniform, int64_t count, int64_t trials, int64_t* rows);

}  // namespace dgi::cpu
