// What cosine.cpp works on: the codebook with its norms, and tiles of rows. cosine.cpp has the symbols.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/cosine/cosine_columns.h"
#include "cpu/cosine/cosine_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/scale.h"
#include "dgi/softmax_row.h"
#include "dgi/terms.h"
#include "dgi/vector.h"

namespace dgi::cpu::cosine {

// Sizes that depend on how many shares of the rows are worked off side by side.
struct Sizes {
  int64_t rows;     // of a tile
  int64_t entries;  // of lists that a share keeps
  int64_t codes;    // that are multiplied at once
};

// Calls body(first, count) for runs of `at_once` codes. A matrix product packs all of an operand before it starts, into
// buffers that it keeps: with 1,024 codes at D = 256 they are a third of those for 4,096, and it is no slower.
template <class Body>
void for_each_run_of_codes(int64_t codes, int64_t at_once, const Body& body) {
  for (int64_t first = 0; first < codes; first += at_once) body(first, std::min(at_once, codes - first));
}

// E in the compute dtype, and the terms of its rows: reciprocal norms, and what else columns have.
template <class Stored>
class Codebook {
 public:
  using Real = Compute<Stored>;

  explicit Codebook(const Cosine<Stored>& in)
      : codes(in.codes), dim(in.dim), stored_(in.weight), factor_(make_buffer<Real>(codes)),
        columns_(in, SplitScale<Real>(in.scale).gain) {
    if constexpr (!std::is_same_v<Stored, Real>) converted_ = make_buffer<Real>(codes * dim);
    parallel_for(codes, grain(dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          factor_[k] = reciprocal_norm<fused.value>(stored_ + k * dim, dim, in.eps);
          if constexpr (!std::is_same_v<Stored, Real>) {
            for (int64_t d = 0; d < dim; ++d) converted_[k * dim + d] = load(stored_[k * dim + d]);
          }
        }
      });
    });
  }

  const Real* factor() const { return factor_.get(); }

  // Of scores that `gain` is still to be multiplied with.
  CodeTerms<Real> terms() const { return columns_.terms(factor()); }

  // A bound of all |s| that are finite.
  double largest_score() const { return columns_.largest_score(); }

  const Real* vectors() const {
    if constexpr (std::is_same_v<Stored, Real>) {
      return stored_;
    } else {
      return converted_.get();
    }
  }

  Matrix<Real> matrix() const { return {const_cast<Real*>(vectors()), codes, dim}; }

  // sum_k e^_k, made when first asked for.
  const std::vector<Real>& sum_of_unit_vectors() const {
    std::call_once(unit_sum_is_made_, [&] { unit_sum_ = make_sum_of_unit_vectors(); });
    return unit_sum_;
  }

  const int64_t codes, dim;

 private:
  // Whatever the number of threads in the same order.
  std::vector<Real> make_sum_of_unit_vectors() const {
    constexpr int64_t kRun = 64;
    const int64_t runs = (codes + kRun - 1) / kRun;
    std::vector<Real> partial(runs * dim, 0), sum(dim, 0);
    parallel_for(runs, grain(kRun * dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first * kRun; k < std::min(last * kRun, codes); ++k) {
          Real* const out = partial.data() + k / kRun * dim;
          const Real *row = vectors() + k * dim, factor = factor_[k];
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) out[d] = multiply_add<fused.value>(factor, row[d], out[d]);
        }
      });
    });
    for (int64_t run = 0; run < runs; ++run) {
      for (int64_t d = 0; d < dim; ++d) sum[d] += partial[run * dim + d];
    }
    return sum;
  }

  const Stored* stored_;
  Buffer<Real> factor_, converted_;
  const ColumnTerms<Stored> columns_;
  mutable std::once_flag unit_sum_is_made_;
  mutable std::vector<Real> unit_sum_;
};

// Rows of h on their way through the tile. A slot holds one row: its number, 1 / norm, X = scale h^, and the tile's
// row.
template <class Stored>
class Tile {
 public:
  using Real = Compute<Stored>;

  Tile(const Cosine<Stored>& in, int64_t capacity)
      : capacity(capacity), in_(in), scale_(SplitScale<Real>(in.scale).scale), row_(capacity),
        rnorm_(make_buffer<Real>(capacity)), x_(make_buffer<Real>(capacity * in.dim)),
        values_(make_buffer<Real>(capacity * in.codes)) {}

  int64_t row_of(int64_t slot) const { return row_[slot]; }
  Real rnorm(int64_t slot) const { return rnorm_[slot]; }
  const Real* x(int64_t slot) const { return x_.get() + slot * in_.dim; }
  Real* values(int64_t slot) const { return values_.get() + slot * in_.codes; }
  Matrix<Real> x_matrix(int64_t first, int64_t count) const { return {x_.get() + first * in_.dim, count, in_.dim}; }
  Matrix<Real> matrix(int64_t first, int64_t count) const { return {values(first), count, in_.codes}; }

  // Fills slots from `first` with the given rows of h, scaled and normalised.
  void load_rows(int64_t first, const int64_t* rows, int64_t count) {
    parallel_for(count, grain(in_.dim), [&](int64_t begin, int64_t end) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t slot = first + i;
          const Stored* const h = in_.h + rows[i] * in_.dim;
          row_[slot] = rows[i];
          rnorm_[slot] = reciprocal_norm<fused.value>(h, in_.dim, in_.eps);
          const Real factor = scale_, rnorm = rnorm_[slot];
          Real* const out = x_.get() + slot * in_.dim;
#pragma omp simd
          for (int64_t d = 0; d < in_.dim; ++d) out[d] = factor * (rnorm * load(h[d]));
        }
      });
    });
  }

  // S = X E^T
  void multiply(int64_t first, int64_t count, const Codebook<Stored>& codebook, int64_t codes_at_once) {
    const Matrix<Real> by_code = matrix(first, count).transposed();
    for_each_run_of_codes(in_.codes, codes_at_once, [&](int64_t k, int64_t codes) {
      matrix_product(x_matrix(first, count), codebook.matrix().rows_from(k, codes).transposed(),
                     by_code.rows_from(k, codes).transposed(), Into::kOverwrite);
    });
  }

  void move(int64_t from, int64_t to) {
    if (from == to) return;
    row_[to] = row_[from];
    rnorm_[to] = rnorm_[from];
    std::copy_n(x(from), in_.dim, x_.get() + to * in_.dim);
    std::copy_n(values(from), in_.codes, values(to));
  }

  const int64_t capacity;

 private:
  const Cosine<Stored>& in_;
  const Real scale_;
  std::vector<int64_t> row_;
  Buffer<Real> rnorm_, x_, values_;
};

}  // namespace dgi::cpu::cosine
