// One piece of code for several instruction sets, chosen when it runs: the binary must not need more than the machine
// has.
#pragma once

#include <type_traits>

#if defined(__GNUC__)
#define DGI_ALWAYS_INLINE __attribute__((always_inline))
#define DGI_NEVER_INLINE __attribute__((noinline))
#else
#define DGI_ALWAYS_INLINE
#define DGI_NEVER_INLINE
#endif

namespace dgi::cpu {

// What a piece of code may know of its instruction set at compile time: whether multiply-adds are fused, and the vector
// registers.
template <bool kFused, int kBytes, int kCount>
struct Instructions : std::bool_constant<kFused> {
  static constexpr int kVectorBytes = kBytes, kVectorRegisters = kCount;
};

// Calls body(fused), where the type of `fused` is one of Instructions. `body` must be a lambda marked
// DGI_ALWAYS_INLINE, and so must all that it calls: then it takes the instruction set of the function that it ends up
// in. Not `target_clones`, whose ifuncs some C libraries lack.
#if defined(__x86_64__) && defined(__GNUC__)

template <class Body>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,bmi2"))) void on_avx512(const Body& body) {
  body(Instructions<true, 64, 32>{});
}

template <class Body>
__attribute__((target("avx2,fma"))) void on_avx2(const Body& body) {
  body(Instructions<true, 32, 16>{});
}

template <class Body>
void with_best_instructions(const Body& body) {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
      && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    on_avx512(body);
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    on_avx2(body);
  } else {
    body(Instructions<false, 16, 16>{});
  }
}

#else

template <class Body>
void with_best_instructions(const Body& body) {
#if defined(__aarch64__) || defined(__FMA__)
  body(Instructions<true, 16, 32>{});
#else
  body(Instructions<false, 16, 16>{});
#endif
}

#endif

}  // namespace dgi::cpu
