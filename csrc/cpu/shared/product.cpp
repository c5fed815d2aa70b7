// A float32 matrix product for processors with AVX-512 on which torch's library does not take it.
//
//   out_ij = sum_d a_id b_dj
//
// b is packed into panels of 32 columns, 256 rows at a time; a tile of 12 x 32 sums stays in registers, in which each
// element of a is multiplied by two vectors of a panel. Rows of a are read where they are; a transposed a is packed in
// groups of 12. Each sum is taken in the order of d, 256 at a time: the bits depend neither on the number of threads
// nor on how rows and columns are divided.
//
// bench/bench_assign.py has torch's product as its floor: on an AMD EPYC (Zen 5) a whole assignment by 3 x 4,096 codes
// of D = 768 takes less than that.
#include "cpu/shared/product.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "cpu/shared/isa.h"

#define DGI_AVX512 __attribute__((target("avx512f,fma")))

namespace dgi::cpu {
namespace {

constexpr int64_t kColumns = 32;  // of a panel
constexpr int64_t kGroup = 12;    // rows of a tile in registers
constexpr int64_t kDepth = 256;   // rows of b that are packed at once
constexpr int64_t kWidth = 2048;  // columns of b that are packed at once
constexpr int64_t kLeastRows = 16, kLeastColumns = 16, kLeastDepth = 4;

struct Tile {
  const float* a;
  int64_t a_stride;    // from row to row, or, packed, from d to d
  const float* panel;  // (depth, kColumns)
  int64_t depth;
  float* out;
  int64_t out_stride, columns;
  bool adds;
};

template <int kRows, bool kIsPacked>
DGI_AVX512 DGI_NEVER_INLINE void multiply(const Tile& tile) {
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  const float *a = tile.a, *b = tile.panel;
  const int64_t stride = tile.a_stride, step = kIsPacked ? stride : 1, row = kIsPacked ? 1 : stride;
  for (int64_t d = 0; d < tile.depth; ++d, a += step, b += kColumns) {
    const __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * row]);
      sum[i][0] = _mm512_fmadd_ps(x, left, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(x, right, sum[i][1]);
    }
  }
  const auto bits = (uint64_t{1} << tile.columns) - 1;  // columns <= 32
  const auto low = static_cast<__mmask16>(bits), high = static_cast<__mmask16>(bits >> 16);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* const to = tile.out + i * tile.out_stride;
    if (tile.adds) {
      sum[i][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), sum[i][0]);
      sum[i][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + 16), sum[i][1]);
    }
    _mm512_mask_storeu_ps(to, low, sum[i][0]);
    _mm512_mask_storeu_ps(to + 16, high, sum[i][1]);
  }
}

template <bool kIsPacked>
void multiply_rows(int64_t rows, const Tile& tile) {
  switch (rows) {
    case 12: return multiply<12, kIsPacked>(tile);
    case 11: return multiply<11, kIsPacked>(tile);
    case 10: return multiply<10, kIsPacked>(tile);
    case 9: return multiply<9, kIsPacked>(tile);
    case 8: return multiply<8, kIsPacked>(tile);
    case 7: return multiply<7, kIsPacked>(tile);
    case 6: return multiply<6, kIsPacked>(tile);
    case 5: return multiply<5, kIsPacked>(tile);
    case 4: return multiply<4, kIsPacked>(tile);
    case 3: return multiply<3, kIsPacked>(tile);
    case 2: return multiply<2, kIsPacked>(tile);
    default: return multiply<1, kIsPacked>(tile);
  }
}

// to[d * kColumns + j] = from[j * stride + d] for 16 j and 16 d.
DGI_AVX512 void transpose(const float* from, int64_t stride, float* to) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d low = _mm512_castps_pd(t[i]), high = _mm512_castps_pd(t[i + 1]);
    const __m512d next_low = _mm512_castps_pd(t[i + 2]), next_high = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = half; i < half + 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to + i * kColumns, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * kColumns, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}

// Columns first ... first + kColumns - 1 of rows begin ... begin + depth - 1 of b, 0 beyond its last column.
DGI_AVX512 void pack_panel(const Matrix<float>& b, int64_t begin, int64_t depth, int64_t first, float* panel) {
  const int64_t columns = std::min(kColumns, b.columns - first);
  const float* const from = b.data + begin * b.row_stride + first * b.column_stride;
  if (b.column_stride == 1) {
    const auto bits = (uint64_t{1} << columns) - 1;
    const auto low = static_cast<__mmask16>(bits), high = static_cast<__mmask16>(bits >> 16);
    for (int64_t d = 0; d < depth; ++d) {
      const float* const row = from + d * b.row_stride;
      _mm512_storeu_ps(panel + d * kColumns, _mm512_maskz_loadu_ps(low, row));
      _mm512_storeu_ps(panel + d * kColumns + 16, _mm512_maskz_loadu_ps(high, row + 16));
    }
    return;
  }
  for (int64_t j = 0; j < kColumns; j += 16) {
    const int64_t whole = b.row_stride == 1 && j + 16 <= columns ? depth / 16 * 16 : 0;
    for (int64_t d = 0; d < whole; d += 16) {
      transpose(from + j * b.column_stride + d, b.column_stride, panel + d * kColumns + j);
    }
    for (int64_t d = whole; d < depth; ++d) {
      for (int64_t i = j; i < j + 16; ++i) {
        panel[d * kColumns + i] = i < columns ? from[i * b.column_stride + d * b.row_stride] : 0.0f;
      }
    }
  }
}

// kGroup rows from `first` on, columns begin ... begin + depth - 1: packed[d * kGroup + i].
void pack_group(const Matrix<float>& a, int64_t first, int64_t begin, int64_t depth, float* packed) {
  const int64_t rows = std::min(kGroup, a.rows - first);
  const float* const from = a.data + first * a.row_stride + begin * a.column_stride;
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t i = 0; i < rows; ++i) packed[d * kGroup + i] = from[i * a.row_stride + d * a.column_stride];
  }
}

// Memory that a thread keeps: that of a new buffer would have to be mapped again for each product.
float* kept_memory(std::vector<float>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// Rows first ... last - 1 of a by the packed panels.
void multiply_panels(const Matrix<float>& a, int64_t first, int64_t last, int64_t begin, Tile tile, int64_t columns) {
  static thread_local std::vector<float> memory;
  const bool is_packed = a.column_stride != 1;
  const float* const panels = tile.panel;
  float* const out = tile.out;
  constexpr int64_t kBlock = 8 * kGroup;  // packed at once: 96 KB, in the second-level cache
  const int64_t block = is_packed ? kBlock : last - first, group_size = kGroup * tile.depth;
  float* const packed = is_packed ? kept_memory(memory, 8 * group_size) : nullptr;
  for (int64_t row = first; row < last; row += block) {
    const int64_t end = std::min(last, row + block);
    for (int64_t i = row; is_packed && i < end; i += kGroup) {
      pack_group(a, i, begin, tile.depth, packed + (i - row) / kGroup * group_size);
    }
    for (int64_t column = 0; column < columns; column += kColumns) {
      tile.panel = panels + column * tile.depth;
      tile.columns = std::min(kColumns, columns - column);
      for (int64_t i = row; i < end; i += kGroup) {
        tile.out = out + i * tile.out_stride + column;
        if (is_packed) {
          tile.a = packed + (i - row) / kGroup * group_size, tile.a_stride = kGroup;
          multiply_rows<true>(std::min(kGroup, end - i), tile);
        } else {
          tile.a = a.data + i * a.row_stride + begin, tile.a_stride = a.row_stride;
          multiply_rows<false>(std::min(kGroup, end - i), tile);
        }
      }
    }
  }
}

}  // namespace

bool has_own_product(const Matrix<float>& a, const Matrix<float>& out) {
  static const bool is_faster = __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
  return is_faster && out.column_stride == 1 && out.rows >= kLeastRows && out.columns >= kLeastColumns
         && a.columns >= kLeastDepth;
}

void own_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into) {
  static thread_local std::vector<float> memory;
  const int64_t panels_at_once = (std::min(kWidth, out.columns) + kColumns - 1) / kColumns;
  float* const packed = kept_memory(memory, panels_at_once * kColumns * std::min(kDepth, a.columns));
  for (int64_t begin = 0; begin < a.columns; begin += kDepth) {
    const int64_t depth = std::min(kDepth, a.columns - begin);
    for (int64_t first = 0; first < out.columns; first += kWidth) {
      const int64_t columns = std::min(kWidth, out.columns - first), panels = (columns + kColumns - 1) / kColumns;
      parallel_for(panels, grain(depth * kColumns / 4), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          pack_panel(b, begin, depth, first + i * kColumns, packed + i * kColumns * depth);
        }
      });
      const Tile tile{nullptr, 0, packed, depth, out.data + first, out.row_stride, 0, into == Into::kAdd || begin > 0};
      const int64_t groups = (out.rows + kGroup - 1) / kGroup;
      // A loop over rows needs several groups for each thread; where there are fewer, columns are divided.
      const bool by_rows = groups >= 4 * thread_count() || groups >= panels;
      parallel_for(by_rows ? groups : panels, grain(depth * (by_rows ? kGroup * columns : kColumns * out.rows) / 16),
                   [&](int64_t from, int64_t to) {
                     if (by_rows) {
                       multiply_panels(a, from * kGroup, std::min(out.rows, to * kGroup), begin, tile, columns);
                     } else {
                       Tile own = tile;
                       own.panel += from * kColumns * depth, own.out += from * kColumns;
                       multiply_panels(a, 0, out.rows, begin, own, std::min(columns, to * kColumns) - from * kColumns);
                     }
                   });
    }
  }
}

}  // namespace dgi::cpu

#else

namespace dgi::cpu {

bool has_own_product(const Matrix<float>&, const Matrix<float>&) { return false; }

void own_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into) {
  matrix_product(a, b, out, into);
}

}  // namespace dgi::cpu

#endif
