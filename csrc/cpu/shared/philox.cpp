// Philox for many counters, with AVX-512, AVX2 or what the compiler makes of a loop.
//
// A register of 32-bit counter words is read twice as 64-bit lanes: as it is for the even blocks, shifted down for the
// odd ones. The product instruction reads the low half of a lane only, so that the halves of a product never have to be
// parted: a round is two products, two shifts and two three-operand XORs for each of the two chains. By hand because a
// compiler parts and joins them: three times slower.
#include "cpu/shared/philox_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/shared/intrinsics.h"
#endif

namespace dgi::cpu {
namespace {

void plain(PhiloxKey key, const PhiloxBlock& counter, uint32_t* words) {
  const PhiloxBlock random = philox4x32_10(counter, key);
  for (int w = 0; w < 4; ++w) words[w] = random.word[w];
}

void tile_plain(PhiloxKey key, const uint32_t* block, const uint32_t* row, int64_t count, uint32_t level,
                uint32_t stream, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) plain(key, {{block[i], row[i], level, stream}}, words + 4 * i);
}

void run_plain(PhiloxKey key, uint32_t block, uint32_t row, int64_t count, uint32_t level, uint32_t stream,
               uint32_t* words) {
  for (int64_t i = 0; i < count; ++i, ++block) plain(key, {{block, row, level, stream}}, words + 4 * i);
}

#if defined(__x86_64__) && defined(__GNUC__)

#define DGI_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"), always_inline)) inline
#define DGI_AVX2 __attribute__((target("avx2"), always_inline)) inline

// Of the four words of a chain only the low half of each 64-bit lane counts. Both chains in turns: a round of one fills
// the time in which the products of the other are on their way.
DGI_AVX512 void rounds(__m512i (&c)[2][4], PhiloxKey key) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key.low)), k1 = _mm512_set1_epi32(static_cast<int>(key.high));
#pragma GCC unroll 2
    for (auto& chain : c) {
      const __m512i p0 = _mm512_mul_epu32(chain[0], m0), p1 = _mm512_mul_epu32(chain[2], m1);
      chain[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1, 32), chain[1], k0, 0x96);
      chain[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), chain[3], k1, 0x96);
      chain[1] = p1;
      chain[3] = p0;
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// Words 0 and 1, or 2 and 3, side by side in each lane.
DGI_AVX512 __m512i pair(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}

// The words of 16 counters.
DGI_AVX512 void sixteen_blocks(PhiloxKey key, __m512i block, __m512i row, __m512i level, __m512i stream,
                               uint32_t* words) {
  __m512i chains[2][4] = {{block, row, level, stream},
                          {_mm512_srli_epi64(block, 32), _mm512_srli_epi64(row, 32), level, stream}};
  rounds(chains, key);
  const auto &even = chains[0], &odd = chains[1];
  const __m512i even01 = pair(even[0], even[1]), even23 = pair(even[2], even[3]);
  const __m512i odd01 = pair(odd[0], odd[1]), odd23 = pair(odd[2], odd[3]);
  // 128-bit lane j of these is block 4 j, 4 j + 1, 4 j + 2, 4 j + 3: a transposition puts them in order.
  const __m512i b0 = _mm512_unpacklo_epi64(even01, even23), b1 = _mm512_unpacklo_epi64(odd01, odd23);
  const __m512i b2 = _mm512_unpackhi_epi64(even01, even23), b3 = _mm512_unpackhi_epi64(odd01, odd23);
  const __m512i t0 = _mm512_shuffle_i32x4(b0, b1, 0x44), t1 = _mm512_shuffle_i32x4(b2, b3, 0x44);
  const __m512i t2 = _mm512_shuffle_i32x4(b0, b1, 0xEE), t3 = _mm512_shuffle_i32x4(b2, b3, 0xEE);
  _mm512_storeu_si512(words, _mm512_shuffle_i32x4(t0, t1, 0x88));
  _mm512_storeu_si512(words + 16, _mm512_shuffle_i32x4(t0, t1, 0xDD));
  _mm512_storeu_si512(words + 32, _mm512_shuffle_i32x4(t2, t3, 0x88));
  _mm512_storeu_si512(words + 48, _mm512_shuffle_i32x4(t2, t3, 0xDD));
}

__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))) void tile_avx512(PhiloxKey key, const uint32_t* block,
                                                                               const uint32_t* row, int64_t count,
                                                                               uint32_t level, uint32_t stream,
                                                                               uint32_t* words) {
  const __m512i c2 = _mm512_set1_epi32(static_cast<int>(level)), c3 = _mm512_set1_epi32(static_cast<int>(stream));
  for (int64_t i = 0; i < count; i += 16) {
    sixteen_blocks(key, _mm512_loadu_si512(block + i), _mm512_loadu_si512(row + i), c2, c3, words + 4 * i);
  }
}

__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))) void run_avx512(
    PhiloxKey key, uint32_t block, uint32_t row, int64_t count, uint32_t level, uint32_t stream, uint32_t* words) {
  const __m512i c1 = _mm512_set1_epi32(static_cast<int>(row)), c2 = _mm512_set1_epi32(static_cast<int>(level));
  const __m512i c3 = _mm512_set1_epi32(static_cast<int>(stream));
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block)),
                                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t i = 0; i < count; i += 16) {
    sixteen_blocks(key, c0, c1, c2, c3, words + 4 * i);
    c0 = _mm512_add_epi32(c0, _mm512_set1_epi32(16));
  }
}

DGI_AVX2 void rounds(__m256i (&c)[2][4], PhiloxKey key) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i k0 = _mm256_set1_epi32(static_cast<int>(key.low)), k1 = _mm256_set1_epi32(static_cast<int>(key.high));
#pragma GCC unroll 2
    for (auto& chain : c) {
      const __m256i p0 = _mm256_mul_epu32(chain[0], m0), p1 = _mm256_mul_epu32(chain[2], m1);
      chain[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(chain[1], k0));
      chain[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(chain[3], k1));
      chain[1] = p1;
      chain[3] = p0;
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

DGI_AVX2 __m256i pair(__m256i low, __m256i high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }

// The words of 8 counters.
DGI_AVX2 void eight_blocks(PhiloxKey key, __m256i block, __m256i row, __m256i level, __m256i stream, uint32_t* words) {
  __m256i chains[2][4] = {{block, row, level, stream},
                          {_mm256_srli_epi64(block, 32), _mm256_srli_epi64(row, 32), level, stream}};
  rounds(chains, key);
  const auto &even = chains[0], &odd = chains[1];
  const __m256i even01 = pair(even[0], even[1]), even23 = pair(even[2], even[3]);
  const __m256i odd01 = pair(odd[0], odd[1]), odd23 = pair(odd[2], odd[3]);
  // 128-bit lane j of these is block 4 j, 4 j + 1, 4 j + 2, 4 j + 3.
  const __m256i b0 = _mm256_unpacklo_epi64(even01, even23), b1 = _mm256_unpacklo_epi64(odd01, odd23);
  const __m256i b2 = _mm256_unpackhi_epi64(even01, even23), b3 = _mm256_unpackhi_epi64(odd01, odd23);
  __m256i* const out = reinterpret_cast<__m256i*>(words);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(b0, b1, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(b2, b3, 0x20));
  _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(b0, b1, 0x31));
  _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(b2, b3, 0x31));
}

__attribute__((target("avx2"))) void tile_avx2(PhiloxKey key, const uint32_t* block, const uint32_t* row, int64_t count,
                                               uint32_t level, uint32_t stream, uint32_t* words) {
  const __m256i c2 = _mm256_set1_epi32(static_cast<int>(level)), c3 = _mm256_set1_epi32(static_cast<int>(stream));
  for (int64_t i = 0; i < count; i += 8) {
    eight_blocks(key, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + i)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)), c2, c3, words + 4 * i);
  }
}

__attribute__((target("avx2"))) void run_avx2(PhiloxKey key, uint32_t block, uint32_t row, int64_t count,
                                              uint32_t level, uint32_t stream, uint32_t* words) {
  const __m256i c1 = _mm256_set1_epi32(static_cast<int>(row)), c2 = _mm256_set1_epi32(static_cast<int>(level));
  const __m256i c3 = _mm256_set1_epi32(static_cast<int>(stream));
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (int64_t i = 0; i < count; i += 8) {
    eight_blocks(key, c0, c1, c2, c3, words + 4 * i);
    c0 = _mm256_add_epi32(c0, _mm256_set1_epi32(8));
  }
}

#endif

Philox fastest() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
      && __builtin_cpu_supports("avx512vl")) {
    return {tile_avx512, run_avx512};
  }
  if (__builtin_cpu_supports("avx2")) return {tile_avx2, run_avx2};
#endif
  return {tile_plain, run_plain};
}

}  // namespace

const Philox philox = fastest();

}  // namespace dgi::cpu
