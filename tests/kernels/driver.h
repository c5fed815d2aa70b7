// What the drivers that run kernels under sanitizers share: random cases, and what torch provides otherwise.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/shared/host.h"

namespace dgi::cpu {

int64_t thread_count() { return 3; }

// In several parts, as on several threads, however few elements a part has.
void parallel_ranges(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t part = 0; part < thread_count(); ++part) {
    const int64_t first = count * part / thread_count(), last = count * (part + 1) / thread_count();
    if (first < last) body(first, last, context);
  }
}

}  // namespace dgi::cpu

namespace driver {

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

// main() of a driver, `driver SEED CASES`: each case draws what it needs, and tells whether the results are right.
template <class Case>
int run(int argc, char** argv, const Case& one_case) {
  if (argc != 3) return 2;
  Random random(std::strtoull(argv[1], nullptr, 10));
  const int64_t cases = std::atoll(argv[2]);
  for (int64_t i = 0; i < cases; ++i) {
    if (one_case(random)) continue;
    std::printf("case %lld differs\n", static_cast<long long>(i));
    return 1;
  }
  return 0;
}

}  // namespace driver
