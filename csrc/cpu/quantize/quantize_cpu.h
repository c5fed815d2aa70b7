#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dgi::cpu {

// Where the noise of an op comes from; none at all without a seed.
template <class Real>
struct NoiseSource {
  bool present = false;
  int64_t seed = 0, row_offset = 0;
  const Real* scale = nullptr;  // (rows): sigma of s + sigma g; null: 1
};

enum class QuantizeMode { kSoft, kStraightThrough, kHard };

// s_k = scale r^ . e^_k, scale r . e_k, or -scale ||r - e_k||^2
enum class Metric { kCosine, kDot, kEuclidean };
constexpr int64_t kMetrics = 3;

// z (rows, dim); codebooks (sum of sizes, dim), level after level; values (sum of sizes, width), or null
template <class Real>
struct Quantize {
  const Real *z, *codebooks, *values;
  std::vector<int64_t> sizes;
  int64_t rows, dim, width;
  Real scale, tau, eps;
  QuantizeMode mode;
  Metric metric;
  NoiseSource<Real> noise;
  const bool* padding;  // (rows): rows that usage does not count; null: none

  bool is_counted(int64_t row) const { return padding == nullptr || !padding[row]; }
  // Rows that usage is the mean of.
  double counted() const {
    const int64_t padded = padding == nullptr ? 0 : std::count(padding, padding + rows, true);
    return static_cast<double>(std::max<int64_t>(1, rows - padded));
  }
  int64_t levels() const { return static_cast<int64_t>(sizes.size()); }
  int64_t widest() const { return *std::max_element(sizes.begin(), sizes.end()); }
  int64_t at(int64_t row, int64_t level) const { return row * levels() + level; }  // in results of shape (rows, levels)
};

// What forward remembers for backward of rows of which few entries count: codes, ascending, and p there. A row without
// an entry is dense, or there was no room left for it.
template <class Real, class Code = int32_t, class Position = int64_t>
struct ListedRows {
  int64_t room;  // entries that fit
  Position* range;  // (rows, levels, 2): where a row's entries begin and end
  Code* code;  // (room)
  Real* p;  // (room)
};

// quantized, residuals (rows, levels, dim); codes, sampled, log_normalizer (rows, levels); usage (sum of sizes);
// mixtures (rows, levels, width)
template <class Real>
struct Quantized {
  Real *quantized, *residuals, *usage, *log_normalizer, *mixtures;
  int64_t *codes, *sampled;
  ListedRows<Real> lists;
};

// What backward takes of the results.
template <class Real>
struct QuantizeSaved {
  const Real *residuals, *log_normalizer;
  const int64_t* sampled;
  ListedRows<const Real, const int32_t, const int64_t> lists;
};

// Of the results' gradients each may be null, which is zero.
template <class Real>
struct QuantizeUpstream {
  const Real *quantized, *residuals, *usage, *log_normalizer, *mixtures;
};

// Null where not wanted.
template <class Real>
struct QuantizeGradients {
  Real *z, *codebooks, *scale, *tau, *noise_scale, *values;
};

// Soft and straight-through; hard is a function of its own.
template <class Real>
void residual_quantize(const Quantize<Real>& in, const Quantized<Real>& out);

// As Quantized, whose mixtures are rows of the values; all but `codes` may be null where it is not wanted.
template <class Real>
struct HardQuantized {
  Real *quantized, *residuals, *usage, *log_normalizer;
  int64_t *codes, *sampled;
};

template <class Real>
void residual_quantize_hard(const Quantize<Real>& in, const HardQuantized<Real>& out);

template <class Real>
void residual_quantize_backward(const Quantize<Real>& in, const QuantizeSaved<Real>& saved,
                                const QuantizeUpstream<Real>& upstream, const QuantizeGradients<Real>& out);

}  // namespace dgi::cpu
