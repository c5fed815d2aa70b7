// For drivers compiled with -march=native: code for this machine alone, in place of one copy for each instruction set.
#pragma once

#define with_best_instructions with_best_of_all
#include_next "cpu/shared/isa.h"
#undef with_best_instructions

namespace dgi::cpu {

template <class Body>
void with_best_instructions(const Body& body) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__FMA__)
  body(Instructions<true, 64, 32>{});
#elif defined(__AVX2__) && defined(__FMA__)
  body(Instructions<true, 32, 16>{});
#else
  body(Instructions<false, 16, 16>{});
#endif
}

}  // namespace dgi::cpu
