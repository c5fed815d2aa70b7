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

// K-means++: rows (count) of the points, each drawn with a probability that grows as w times the squared distance to
// the nearest row drawn before; uniform (count) in (0, 1). -1 once no row is away from those drawn.
template <class Real>
void kmeans_seeds(const Points<Real>& points, const double* uniform, int64_t count, int64_t* rows);

}  // namespace dgi::cpu
