// Random rounds of K-means through codes by bounds in C++: each code and each bound that is kept, against all distances
// in float64; built with sanitizers by test_bounded_codes.py. Every array has exactly its size, so that a read or write
// beyond it is seen.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/clustering/clustering_cpu.h"
#include "driver.h"

namespace {

using dgi::cpu::kNear;
using driver::below;
using driver::Random;

int64_t rows_by_bounds = 0, rows_in_all = 0;

double uniform(Random& random) { return static_cast<double>(below(random, 2001)) / 1000 - 1; }

double distance(const float* x, const float* centroid, int64_t dim) {
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(centroid[d]);
    square += difference * difference;
  }
  return std::sqrt(square);
}

// What K-means may do and more: small steps of all centroids, a few that go elsewhere, two that change places.
void move(Random& random, int64_t dim, const std::vector<float>& x, std::vector<float>& centroids) {
  const auto clusters = static_cast<int64_t>(centroids.size()) / dim, rows = static_cast<int64_t>(x.size()) / dim;
  const double step = std::pow(10.0, -static_cast<double>(below(random, 5)));
  const int64_t kind = below(random, 5);
  if (kind == 0) return;
  for (float& value : centroids) value += static_cast<float>(0.1 * step * uniform(random));
  if (kind == 1) {
    for (int64_t i = 0; i < 3; ++i) {
      std::copy_n(x.begin() + below(random, rows) * dim, dim, centroids.begin() + below(random, clusters) * dim);
    }
  } else if (kind == 2) {
    const auto one = centroids.begin() + below(random, clusters) * dim;
    std::swap_ranges(one, one + dim, centroids.begin() + below(random, clusters) * dim);
  }
}

// Whether code and bound of each row hold for these centroids.
bool is_right(int64_t dim, const std::vector<float>& x, const std::vector<float>& centroids,
              const std::vector<int64_t>& codes, const std::vector<int32_t>& near, const std::vector<float>& rest) {
  const int64_t clusters = static_cast<int64_t>(centroids.size()) / dim;
  for (size_t n = 0; n < codes.size(); ++n) {
    const auto to = [&](int64_t k) { return distance(x.data() + n * dim, centroids.data() + k * dim, dim); };
    if (codes[n] < 0 || codes[n] >= clusters) return false;
    const double own = to(codes[n]);
    const auto first = near.begin() + n * kNear, last = first + kNear;
    for (int64_t k = 0; k < clusters; ++k) {
      const double other = to(k);
      if (other < own * (1 - 1e-12) || (other == own && k < codes[n])) {
        std::printf("row %zu: code %lld at %.17g, not %lld at %.17g\n", n, static_cast<long long>(codes[n]), own,
                    static_cast<long long>(k), other);
        return false;
      }
      if (other < static_cast<double>(rest[n]) && std::find(first, last, k) == last) {
        std::printf("row %zu: code %lld at %.17g, below the bound %.9g\n", n, static_cast<long long>(k), other,
                    static_cast<double>(rest[n]));
        return false;
      }
    }
  }
  return true;
}

template <class Stored>
bool one_case(Random& random) {
  const bool is_grid = below(random, 4) == 0;  // of small integers: nearly all rows have several nearest codes
  const int64_t clusters = 1 + below(random, below(random, 2) == 0 ? 40 : 250);
  const int64_t rows = 1 + below(random, below(random, 2) == 0 ? 30 : 700);
  const int64_t dim = below(random, 20) == 0 ? 255 + below(random, 3) : 1 + below(random, is_grid ? 3 : 12);
  const double spread = std::pow(10.0, -static_cast<double>(below(random, 3)));
  const double size = !is_grid && below(random, 20) == 0 ? 1e19 : 1, offset = below(random, 5) == 0 ? 300 : 0;
  std::vector<float> centroids(clusters * dim), x(rows * dim);
  for (float& value : centroids) {
    value = static_cast<float>(is_grid ? below(random, 7) - 3 : size * (offset + 4 * uniform(random)));
  }
  std::vector<Stored> stored(rows * dim);
  for (int64_t n = 0; n < rows; ++n) {
    const float* const centre = centroids.data() + below(random, clusters) * dim;
    for (int64_t d = 0; d < dim; ++d) {
      const double value = is_grid ? static_cast<double>(below(random, 7)) - 3 : centre[d] + spread * uniform(random);
      dgi::store(static_cast<float>(value), stored[n * dim + d]);
      x[n * dim + d] = dgi::load(stored[n * dim + d]);
    }
  }
  std::vector<int32_t> near(rows * kNear, std::numeric_limits<int32_t>::max());
  std::vector<float> rest(rows, NAN), before;
  for (int64_t round = 0; round < 6; ++round) {
    std::vector<int64_t> codes(rows, -1);
    // A row that is measured again has its near codes from the nearest on: those in descending order show the others.
    for (int64_t n = 0; n < rows && !before.empty(); ++n) {
      const auto first = near.begin() + n * kNear;
      std::reverse(first, std::find(first, first + kNear, -1));
    }
    const std::vector<int32_t> reversed = near;
    const bool holds = dgi::cpu::bounded_codes<Stored>({stored.data(), nullptr, rows, dim}, centroids.data(), clusters,
                                                       before.empty() ? nullptr : before.data(),
                                                       {near.data(), rest.data()}, codes.data());
    const bool overflows = size > 1;
    if (!holds) return dim > 256 || overflows;
    if (dim > 256 || !is_right(dim, x, centroids, codes, near, rest)) return false;
    for (int64_t n = 0; n < rows && !before.empty(); ++n) {
      const auto first = near.begin() + n * kNear;
      const bool is_kept = std::equal(first, first + kNear, reversed.begin() + n * kNear);
      rows_by_bounds += is_kept && first[2] >= 0, ++rows_in_all;
    }
    before = centroids;
    if (is_grid) {
      centroids[below(random, clusters * dim)] += static_cast<float>(below(random, 3) - 1);
    } else {
      move(random, dim, x, centroids);
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int wrong = driver::run(argc, argv, [](Random& random) {
    switch (below(random, 3)) {
      case 0: return one_case<float>(random);
      case 1: return one_case<dgi::BFloat16>(random);
      default: return one_case<dgi::Float16>(random);
    }
  });
  if (wrong != 0 || 20 * rows_by_bounds > rows_in_all) return wrong;
  std::printf("of %lld rows bounds decided only %lld\n", static_cast<long long>(rows_in_all),
              static_cast<long long>(rows_by_bounds));
  return 1;
}
