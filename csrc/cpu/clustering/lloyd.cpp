// K-means on the CPU, all but the assignment, which is the hard quantizer's (quantize_hard.cpp).
//
//   sums_k = sum_{n: code_n = k} w_n x_n          cost_n = ||x_n - c||^2, 1 - cos(x_n, c), -x_n . c
//
// Bytes bound both: x is read once, N D. Sums are float64, and each cluster belongs to one thread, which adds its rows
// in their order: the bits do not depend on the number of threads. A thread reads the codes of all rows, N 8 bytes, and
// the x of its own. On two cores the sums take 4 % of the time of the assignment at N = 2e5, D = 64, K = 1024.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/clustering/clustering_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // rows whose costs are added up together, whatever the threads

// The sum over rows of f(row), in float64: chunk by chunk, the chunks in order.
template <class F>
double chunked_sum(int64_t rows, int64_t elements_per_row, std::vector<double>& partial, const F& f) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  partial.resize(chunks);
  parallel_for(chunks, grain(kChunk * elements_per_row), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t end = std::min(rows, (chunk + 1) * kChunk);
        double sum = 0;
        for (int64_t row = chunk * kChunk; row < end; ++row) sum += f(fused, row);
        partial[chunk] = sum;
      }
    });
  });
  double total = 0;
  for (double sum : partial) total += sum;
  return total;
}

template <class Stored>
DGI_HOST_DEVICE double square_distance(const Stored* x, const Compute<Stored>* c, int64_t dim) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(load(x[d])) - static_cast<double>(c[d]);
    sum += difference * difference;
  }
  return sum;
}

struct Products {
  double xc = 0, xx = 0, cc = 0;
};

template <class Stored>
DGI_HOST_DEVICE Products products(const Stored* x, const Compute<Stored>* c, int64_t dim) {
  double xc = 0, xx = 0, cc = 0;
#pragma omp simd reduction(+ : xc, xx, cc)
  for (int64_t d = 0; d < dim; ++d) {
    const double a = static_cast<double>(load(x[d])), b = static_cast<double>(c[d]);
    xc += a * b;
    xx += a * a;
    cc += b * b;
  }
  return {xc, xx, cc};
}

}  // namespace

template <class Stored>
void cluster_sums(const Points<Stored>& points, const int64_t* codes, int64_t clusters, double* sums, double* mass) {
  std::fill_n(sums, clusters * points.dim, 0.0);
  std::fill_n(mass, clusters, 0.0);
  parallel_for(clusters, grain(points.rows * points.dim / clusters), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
      const int64_t dim = points.dim;
      for (int64_t row = 0; row < points.rows; ++row) {
        const int64_t code = codes[row];
        if (code < first || code >= last) continue;
        const Stored* const x = points.x + row * dim;
        const double weight = points.weight(row);
        double* const sum = sums + code * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] += weight * static_cast<double>(load(x[d]));
        mass[code] += weight;
      }
    });
  });
}

template <class Stored>
double cluster_costs(const Points<Stored>& points, const int64_t* codes, const Compute<Stored>* centroids,
                     Metric metric, double eps, double* costs) {
  std::vector<double> partial;
  return chunked_sum(points.rows, 2 * points.dim, partial, [&](auto, int64_t row) DGI_ALWAYS_INLINE {
    const Stored* const x = points.x + row * points.dim;
    const Compute<Stored>* const c = centroids + codes[row] * points.dim;
    if (metric == Metric::kEuclidean) {
      costs[row] = square_distance(x, c, points.dim);
    } else {
      const auto [xc, xx, cc] = products(x, c, points.dim);
      const double norms = std::max(std::sqrt(xx), eps) * std::max(std::sqrt(cc), eps);
      costs[row] = metric == Metric::kDot ? -xc : std::max(0.0, 1 - xc / norms);
    }
    return points.weight(row) * costs[row];
  });
}

namespace {

// Draws rows in proportion to `nearest`, whose sums over chunks are `partial`, their sum `total`.
int64_t draw_row(const std::vector<double>& nearest, const std::vector<double>& partial, double total, double uniform) {
  const int64_t rows = static_cast<int64_t>(nearest.size()), chunks = static_cast<int64_t>(partial.size());
  double left = uniform * total;
  int64_t chunk = 0;
  while (chunk + 1 < chunks && left >= partial[chunk]) left -= partial[chunk++];
  int64_t drawn = -1;
  for (int64_t row = chunk * kChunk; row < std::min(rows, (chunk + 1) * kChunk); ++row) {
    if (!(nearest[row] > 0)) continue;
    drawn = row;  // the last one that may be drawn, where rounding leaves something over
    if (left < nearest[row]) break;
    left -= nearest[row];
  }
  for (int64_t row = 0; drawn < 0; ++row) drawn = nearest[row] > 0 ? row : -1;  // rounding chose a chunk of nothing
  return drawn;
}

}  // namespace

template <class Real>
void kmeans_seeds(const Points<Real>& points, const double* uniform, int64_t count, int64_t trials, int64_t* rows) {
  const int64_t dim = points.dim;
  std::vector<double> partial, nearest(points.rows);
  // The first row by its weight alone.
  double total = chunked_sum(points.rows, 1, partial,
                             [&](auto, int64_t row) DGI_ALWAYS_INLINE { return nearest[row] = points.weight(row); });
  std::vector<std::vector<double>> cost(trials, std::vector<double>(points.rows)), sums(trials);
  for (int64_t i = 0; i < count; ++i) {
    if (!(total > 0)) {
      rows[i] = -1;
      continue;
    }
    double lowest = std::numeric_limits<double>::infinity();
    int64_t best = 0;
    for (int64_t trial = 0; trial < (i == 0 ? 1 : trials); ++trial) {
      const int64_t drawn = draw_row(nearest, partial, total, uniform[i * trials + trial]);
      const Real* const chosen = points.x + drawn * dim;
      double* const found = cost[trial].data();
      const double left = chunked_sum(points.rows, dim, sums[trial], [&](auto, int64_t row) DGI_ALWAYS_INLINE {
        const Real* const x = points.x + row * dim;
        Real distance = 0;
#pragma omp simd reduction(+ : distance)
        for (int64_t d = 0; d < dim; ++d) distance += (x[d] - chosen[d]) * (x[d] - chosen[d]);
        const double weighted = points.weight(row) * static_cast<double>(distance);
        return found[row] = i == 0 ? weighted : std::min(nearest[row], weighted);
      });
      if (left < lowest) lowest = left, best = trial, rows[i] = drawn;
    }
    total = lowest;
    nearest.swap(cost[best]);
    partial.swap(sums[best]);
  }
}

#define DGI_FOR(Stored)                                                                         \
  template void cluster_sums(const Points<Stored>&, const int64_t*, int64_t, double*, double*); \
  template double cluster_costs(const Points<Stored>&, const int64_t*, const Compute<Stored>*, Metric, double, double*);
DGI_FOR(float)
DGI_FOR(double)
DGI_FOR(BFloat16)
DGI_FOR(Float16)
#undef DGI_FOR
template void kmeans_seeds(const Points<float>&, const double*, int64_t, int64_t, int64_t*);
template void kmeans_seeds(const Points<double>&, const double*, int64_t, int64_t, int64_t*);

}  // namespace dgi::cpu
