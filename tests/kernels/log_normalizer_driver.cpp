// Random rows through log_normalizer in C++, against sums in float64; built with sanitizers by test_log_normalizer.py.
// Every row has exactly its size, so that a read beyond it is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/normalizer/log_normalizer_cpu.h"
#include "driver.h"

namespace {

using driver::below;
using driver::Random;

// Rows that rise, fall or wander, by little or by much, with numbers that are none.
double logit(Random& random, int64_t kind, int64_t k) {
  if (below(random, 50) == 0) {
    constexpr double kOdd[] = {NAN, -INFINITY, INFINITY, 3e38, -3e38, 1e7};
    return kOdd[kind < 4 ? below(random, 2) : below(random, 6)];
  }
  const double wander = static_cast<double>(below(random, 2000)) / 100 - 10;
  constexpr double kSlope[] = {0, 0.01, -0.01, 1, 0};
  return wander + kSlope[kind] * static_cast<double>(k);
}

template <class Stored>
bool one_case(Random& random) {
  using Real = dgi::Compute<Stored>;
  constexpr int64_t kSizes[] = {0, 1, 63, 64, 65, 2047, 2048, 2049, 16384, 16385, 40000};
  const int64_t rows = below(random, 3), stride = 1 + below(random, 2), kind = below(random, 5);
  const int64_t codes = below(random, 2) == 0 ? kSizes[below(random, 11)] : below(random, 6000);
  const int64_t size = codes == 0 ? 0 : (codes - 1) * stride + 1;
  std::vector<Stored> logits(rows * size);
  for (int64_t i = 0; i < rows * size; ++i) {
    dgi::store(static_cast<Real>(logit(random, kind, size == 0 ? 0 : i % size)), logits[i]);
  }
  std::vector<Real> out(rows);
  dgi::cpu::log_normalizer<Stored>({logits.data(), {rows}, {size}, codes, stride}, out.data());
  for (int64_t row = 0; row < rows; ++row) {
    const auto value = [&](int64_t k) {
      const Real x = dgi::load(logits[row * size + k * stride]);
      return std::isnan(x) ? -INFINITY : static_cast<double>(std::min(x, std::numeric_limits<Real>::max()));
    };
    double largest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < codes; ++k) largest = std::max(largest, value(k));
    for (int64_t k = 0; largest > -INFINITY && k < codes; ++k) sum += std::exp(value(k) - largest);
    const double expected = largest > -INFINITY ? largest + std::log(sum) : largest;
    if (out[row] == expected || std::fabs(out[row] - expected) <= 1e-6 * (1 + std::fabs(expected))) continue;
    std::printf("codes %lld, stride %lld, kind %lld: %.9g, not %.9g\n", static_cast<long long>(codes),
                static_cast<long long>(stride), static_cast<long long>(kind), static_cast<double>(out[row]), expected);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return driver::run(argc, argv, [](Random& random) {
    return one_case<float>(random) && one_case<double>(random) && one_case<dgi::BFloat16>(random)
           && one_case<dgi::Float16>(random);
  });
}
