// From tiles of gradients, and from the lists of peaked rows, to dh, dweight and dscale. cosine.cpp has the symbols.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/cosine/cosine_cpu.h"
#include "cpu/cosine/cosine_tile.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "dgi/softmax_row.h"
#include "dgi/vector.h"

namespace dgi::cpu::cosine {

// Entries of the lists of many rows, linked by code until there are enough for one pass over all codes.
template <class Real>
class EntriesByCode {
 public:
  EntriesByCode(int64_t codes, int64_t capacity)
      : capacity_(capacity), entries_(make_buffer<Entry>(capacity)), last_(capacity > 0 ? codes : 0, kNone) {}

  bool has_room(int64_t count) const { return size_ + count <= capacity_; }
  bool empty() const { return size_ == 0; }

  // The entries of row `row`, each times `factor`.
  void add(const SparseRow<Real>& list, int64_t row, Real factor) {
    for (int64_t j = 0; j < list.count; ++j) {
      int32_t& last = last_[list.index[j]];
      entries_[size_] = {last, static_cast<int32_t>(row), factor * list.value[j]};
      last = static_cast<int32_t>(size_++);
    }
  }

  // Calls visit(rows, values, count) for the entries of one code, last row first, some at a time.
  template <class Visit>
  DGI_ALWAYS_INLINE void for_each_run(int64_t code, const Visit& visit) const {
    constexpr int64_t kRun = 32;
    int32_t rows[kRun];
    Real values[kRun];
    for (int32_t at = last_[code]; at != kNone;) {
      int64_t count = 0;
      for (; at != kNone && count < kRun; ++count) {
        rows[count] = entries_[at].row;
        values[count] = entries_[at].value;
        at = entries_[at].before;
      }
      visit(rows, values, count);
    }
  }

  void clear() {
    size_ = 0;
    std::fill(last_.begin(), last_.end(), kNone);
  }

  static constexpr int64_t bytes(int64_t entries) { return entries * static_cast<int64_t>(sizeof(Entry)); }

 private:
  static constexpr int32_t kNone = -1;

  struct Entry {
    int32_t before, row;  // before: of the same code
    Real value;
  };

  const int64_t capacity_;
  int64_t size_ = 0;
  Buffer<Entry> entries_;
  std::vector<int32_t> last_;  // of each code
};

// Turns tiles T, and lists, into dh, and into what its rows give to dweight and dscale.
template <class Stored>
class Backward {
 public:
  using Real = Compute<Stored>;

  // `in_place`: V lies in place of dweight, where the dtypes agree.
  Backward(const Cosine<Stored>& in, const Codebook<Stored>& codebook, const CosineGradients<Stored>& out,
           const Sizes& sizes, bool in_place)
      : in_(in), scale_(in.scale), codebook_(codebook), out_(out), codes_at_once_(sizes.codes), along_(sizes.rows),
        by_code_(in.codes, out.dweight == nullptr ? 0 : sizes.entries) {
    if (out.dweight == nullptr) return;
    if constexpr (std::is_same_v<Stored, Real>) {
      if (in_place) v_ = out.dweight;
    }
    if (v_ == nullptr) {
      own_v_ = make_buffer<Real>(in.codes * in.dim);
      v_ = own_v_.get();
    }
  }

  // The first `count` slots of the tile hold T. Their X is gone afterwards: T E takes its place.
  void add_tile(Tile<Stored>& tile, int64_t count) {
    if (count == 0) return;
    if (out_.dweight != nullptr) {
      const Matrix<Real> by_code = tile.matrix(0, count).transposed(), v(v_, in_.codes, in_.dim);
      for_each_run_of_codes(in_.codes, codes_at_once_, [&](int64_t k, int64_t codes) {
        matrix_product(by_code.rows_from(k, codes), tile.x_matrix(0, count), v.rows_from(k, codes),
                       v_is_set_ ? Into::kAdd : Into::kOverwrite);
      });
      v_is_set_ = true;
    }
    if (out_.dh == nullptr && out_.dscale == nullptr) return;
    matrix_product(tile.matrix(0, count), codebook_.matrix(), tile.x_matrix(0, count), Into::kOverwrite);
    parallel_for(count, grain(in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t slot = first; slot < last; ++slot) {
          const Real* const u = tile.x(slot);
          along_[slot] = tile.rnorm(slot) * dot<fused.value>(in_.h + tile.row_of(slot) * in_.dim, u, in_.dim);
          if (out_.dh != nullptr) finish_dh<fused.value>(tile, slot, u);
        }
      });
    });
    for (int64_t slot = 0; slot < count; ++slot) dscale_ += along_[slot];
  }

  // Rows `slots` of the tile left lists instead of T; list_of(slot) is one.
  template <class ListOf>
  void add_lists(const Tile<Stored>& tile, const std::vector<int64_t>& slots, const ListOf& list_of) {
    if (slots.empty()) return;
    if (out_.dh != nullptr) add_lists_to_rows(tile, slots, list_of);
    if (out_.dweight == nullptr) return;
    even_.resize(in_.dim, Real{0});
    for (int64_t slot : slots) {
      const SparseRow<Real>& list = list_of(slot);
      const Real even = static_cast<Real>(list.even);
      const Real* const x = tile.x(slot);
      for (int64_t d = 0; d < in_.dim; ++d) even_[d] += even * x[d];
      if (!by_code_.has_room(list.count)) add_entries_to_codes();
      by_code_.add(list, tile.row_of(slot), scale_.scale * tile.rnorm(slot));
    }
  }

  // h^ . dL/dh^ / scale of a row that left a list.
  void add_to_dscale(double along) { dscale_ += along; }

  // After the last row.
  void finish_lists() {
    if (!by_code_.empty()) add_entries_to_codes();
  }

  double dscale() const { return dscale_; }

  // This share of V = rnorm dL/de^ of code k, with what is even.
  template <bool kFused>
  DGI_ALWAYS_INLINE Real* share_of_code(int64_t k) {
    Real* const v = v_ + k * in_.dim;
    if (!v_is_set_) std::fill_n(v, in_.dim, Real{0});
    if (even_.empty()) return v;
    const Real rnorm = codebook_.factor()[k];
#pragma omp simd
    for (int64_t d = 0; d < in_.dim; ++d) v[d] = multiply_add<kFused>(rnorm, even_[d], v[d]);
    return v;
  }

 private:
  template <class ListOf>
  void add_lists_to_rows(const Tile<Stored>& tile, const std::vector<int64_t>& slots, const ListOf& list_of) {
    const std::vector<Real>& unit_sum = codebook_.sum_of_unit_vectors();
    parallel_for(slots.size(), grain(16 * in_.dim), [&](int64_t begin, int64_t end) {
      const Buffer<Real> u = make_buffer<Real>(in_.dim);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) {
          const SparseRow<Real>& list = list_of(slots[i]);
          const Real even = static_cast<Real>(list.even);
          for (int64_t d = 0; d < in_.dim; ++d) u[d] = even * unit_sum[d];
          add_rows<fused.value>(list.index, list.value, list.count, codebook_.vectors(), in_.dim, u.get());
          finish_dh<fused.value>(tile, slots[i], u.get());
        }
      });
    });
  }

  // V takes the entries of all lists since the last time: once for several tiles, because V itself must pass by. Each
  // thread has codes of its own.
  void add_entries_to_codes() {
    if (!v_is_set_) std::fill_n(v_, in_.codes * in_.dim, Real{0});
    v_is_set_ = true;
    parallel_for(in_.codes, grain(4 * in_.dim), [&](int64_t begin, int64_t end) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = begin; k < end; ++k) {
          by_code_.for_each_run(k, [&](const int32_t* rows, const Real* values, int64_t count) DGI_ALWAYS_INLINE {
            add_rows<fused.value>(rows, values, count, in_.h, in_.dim, v_ + k * in_.dim);
          });
        }
      });
    });
    by_code_.clear();
  }

  // u = dL/dh^ / scale of the row in a slot.
  template <bool kFused>
  DGI_ALWAYS_INLINE void finish_dh(const Tile<Stored>& tile, int64_t slot, const Real* u) {
    const int64_t row = tile.row_of(slot);
    const double factor = scale_.gain * static_cast<double>(scale_.scale * tile.rnorm(slot));
    through_normalization<kFused>(in_.h + row * in_.dim, u, in_.dim, tile.rnorm(slot), in_.eps, factor,
                                  out_.dh + row * in_.dim);
  }

  const Cosine<Stored>& in_;
  const SplitScale<Real> scale_;
  const Codebook<Stored>& codebook_;
  const CosineGradients<Stored>& out_;
  const int64_t codes_at_once_;
  std::vector<double> along_;  // h^ . dL/dh^ / scale, by slot
  double dscale_ = 0;
  Buffer<Real> own_v_;
  Real* v_ = nullptr;
  bool v_is_set_ = false;
  EntriesByCode<Real> by_code_;
  std::vector<Real> even_;  // what every code gets alike of the lists: sum_n v_n X_n
};

// dweight, of all shares, loses its radial part and takes its dtype; dscale is summed up. The first share's V may be
// dweight itself.
template <class Stored>
void finish(const Cosine<Stored>& in, const Codebook<Stored>& codebook, const CosineGradients<Stored>& out,
            const std::vector<Backward<Stored>*>& shares) {
  using Real = Compute<Stored>;
  if (out.dscale != nullptr) {
    double sum = 0;
    for (const auto* share : shares) sum += share->dscale();
    *out.dscale = static_cast<Real>(sum);
  }
  if (out.dweight == nullptr) return;
  const double gain = SplitScale<Real>(in.scale).gain;
  parallel_for(in.codes, grain(in.dim), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t k = first; k < last; ++k) {
        Real* const v = shares[0]->template share_of_code<fused.value>(k);
        for (size_t i = 1; i < shares.size(); ++i) {
          const Real* const share = shares[i]->template share_of_code<fused.value>(k);
#pragma omp simd
          for (int64_t d = 0; d < in.dim; ++d) v[d] += share[d];
        }
        through_normalization<fused.value>(in.weight + k * in.dim, v, in.dim, codebook.factor()[k], in.eps, gain,
                                           out.dweight + k * in.dim);
      }
    });
  });
}

}  // namespace dgi::cpu::cosine
