// Comparing many codes or children of a beam with a bound at once; the few that pass are visited.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/shared/isa.h"
#include "dgi/trie.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/shared/intrinsics.h"
#endif

namespace dgi::cpu {

constexpr int64_t kScanned = 32;  // codes or children that are compared at once, a bit of a word for each

// Calls visit(k) for each k, ascending, with row[k] >= cut, which may rise meanwhile, and with its bit in the mask, if
// there is one; false once that returns false.
template <class Real, class Visit>
DGI_ALWAYS_INLINE inline bool scan_row(const Real* row, int64_t count, const Real& cut, const uint32_t* mask,
                                       const Visit& visit) {
  int64_t k = 0;
  for (; k + kScanned <= count; k += kScanned) {
    const Real bound = cut;
    uint32_t passes = 0;
#pragma omp simd reduction(| : passes)
    for (int64_t j = 0; j < kScanned; ++j) passes |= row[k + j] >= bound ? uint32_t{1} << j : 0;
    if (mask != nullptr) passes &= mask[k / kScanned];
    for (; passes != 0; passes &= passes - 1) {
      if (!visit(k + std::countr_zero(passes))) return false;
    }
  }
  for (; k < count; ++k) {
    const bool counts = mask == nullptr || (mask[k / kScanned] >> k % kScanned & 1) != 0;
    if (counts && row[k] >= cut && !visit(k)) return false;
  }
  return true;
}

// Whether `Instructions` have what the scans below need.
template <class Instructions, class Real>
constexpr bool kScansScored = std::is_same_v<Real, float> && Instructions::kVectorBytes == 64;

#if defined(__x86_64__) && defined(__GNUC__)

#define DGI_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,bmi2")))

// Of 16 children, those in `exist`, whose logit plus strength times their own number reaches the bound.
DGI_AVX512 inline uint32_t reach(__mmask16 exist, __m512 own, __m512 logit, float strength, float bound) {
  const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(strength), own, logit);
  return _mm512_mask_cmp_ps_mask(exist, sum, _mm512_set1_ps(bound), _CMP_GE_OQ);
}

// A bit for each of 32 codes that is in `mask`, the code of a child, and whose logit, in `row`, plus `strength` times
// the child's number reaches the bound. `own` are the numbers of these children, one behind the other.
DGI_AVX512 inline uint32_t scored_codes(const float* row, const float* own, uint32_t mask, float strength,
                                        float bound) {
  const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  const __m512 own_low = _mm512_maskz_expandloadu_ps(low, own);
  const __m512 own_high = _mm512_maskz_expandloadu_ps(high, own + std::popcount(mask & 0xFFFF));
  return reach(low, own_low, _mm512_maskz_loadu_ps(low, row), strength, bound)
         | reach(high, own_high, _mm512_maskz_loadu_ps(high, row + 16), strength, bound) << 16;
}

// The same for all children by their tokens, 32 to a word of `passes`.
template <class Token>
DGI_AVX512 DGI_NEVER_INLINE void scored_children(const float* row, const float* own, const Token* tokens, int64_t count,
                                                 float strength, float bound, uint32_t* passes) {
  for (int64_t first = 0; first < count; first += 16) {
    const auto exist = static_cast<__mmask16>(count - first < 16 ? (1u << (count - first)) - 1 : 0xFFFF);
    __m512i codes;
    if constexpr (sizeof(Token) == 2) {
      codes = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(exist, tokens + first));
    } else {
      codes = _mm512_maskz_loadu_epi32(exist, tokens + first);
    }
    const __m512 logit = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), exist, codes, row, sizeof(float));
    const uint32_t found = reach(exist, _mm512_maskz_loadu_ps(exist, own + first), logit, strength, bound);
    passes[first / kScanned] = first % kScanned == 0 ? found : passes[first / kScanned] | found << 16;
  }
}

#undef DGI_AVX512

#else

inline uint32_t scored_codes(const float*, const float*, uint32_t, float, float) { return 0; }
template <class Token>
void scored_children(const float*, const float*, const Token*, int64_t, float, float, uint32_t*) {}

#endif

}  // namespace dgi::cpu
