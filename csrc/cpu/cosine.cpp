// Scaled cosine logits and their cross-entropy on the CPU, with all gradients from one pass.
//
//   s_nk = scale h^_n . e^_k,   x^ = x / max(||x||, eps)
//
// Rows are taken in blocks: X = scale h^ of the block is the only copy that is normalised. With T_nk = g_nk rnorm_k, where
// g = dL/ds, one tile serves both products:
//   S = X E^T (then T in its place),   dL/dh^ = scale T E,   V += T^T X = dL/de^ / rnorm,
// and at the end dh and dE lose their radial part, and dscale = sum_n h^_n . (T E)_n comes free. Nothing is recomputed.
// Rows whose softmax is peaked leave the tile as short lists (dgi/softmax_row.h); the other rows stay, move up, and are
// multiplied once enough have gathered.
//
// 6 N K D operations, or 2 N K D and those of the lists for rows that are peaked; one V lies in place of dE, and tiles of
// at most 256 rows are all that is as wide as K. N = K = 4096 at D = 256, float32, two AVX2 cores, against the three
// products by torch.mm: 1.04 to 1.06 flat, 0.64 to 0.71 where nine rows in ten are at cosine 0.7 to their target (three
// runs of `python bench/bench_cosine.py --quick --rounds 11`, which has the peers beside it).
//
// Blocks and the rows within them are worked off in fixed order, so the same inputs give the same bits run after run.
#include "cosine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "host.h"
#include "isa.h"
#include "dgi/softmax_row.h"
#include "dgi/vector.h"

namespace dgi::cpu {
namespace {

// E in the compute dtype, and the reciprocal norms of its rows.
template <class Stored>
class Codebook {
 public:
  using Real = Compute<Stored>;

  explicit Codebook(const Cosine<Stored>& in)
      : codes(in.codes), dim(in.dim), stored_(in.weight), rnorm_(make_buffer<Real>(codes)) {
    if constexpr (!std::is_same_v<Stored, Real>) converted_ = make_buffer<Real>(codes * dim);
    parallel_for(codes, grain(dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = first; k < last; ++k) {
          rnorm_[k] = reciprocal_norm<fused.value>(stored_ + k * dim, dim, in.eps);
          if constexpr (!std::is_same_v<Stored, Real>) {
            for (int64_t d = 0; d < dim; ++d) converted_[k * dim + d] = load(stored_[k * dim + d]);
          }
        }
      });
    });
  }

  const Real* rnorm() const { return rnorm_.get(); }

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
          const Real *row = vectors() + k * dim, factor = rnorm_[k];
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
  Buffer<Real> rnorm_, converted_;
  mutable std::once_flag unit_sum_is_made_;
  mutable std::vector<Real> unit_sum_;
};

// Rows of h on their way through the tile. A slot holds one row: its number, 1 / norm, X = scale h^, and the tile's row.
template <class Stored>
class Tile {
 public:
  using Real = Compute<Stored>;

  Tile(const Cosine<Stored>& in, int64_t capacity)
      : capacity(capacity), in_(in), row_(capacity), rnorm_(make_buffer<Real>(capacity)),
        x_(make_buffer<Real>(capacity * in.dim)), values_(make_buffer<Real>(capacity * in.codes)) {}

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
          const Real factor = in_.scale, rnorm = rnorm_[slot];
          Real* const out = x_.get() + slot * in_.dim;
#pragma omp simd
          for (int64_t d = 0; d < in_.dim; ++d) out[d] = factor * (rnorm * load(h[d]));
        }
      });
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
  std::vector<int64_t> row_;
  Buffer<Real> rnorm_, x_, values_;
};

// What a block of rows with peaked softmaxes leaves behind: a list per row, and the same entries by code.
template <class Real>
class Lists {
 public:
  Lists(int64_t rows, int64_t codes, int64_t limit)
      : limit(limit), lists_(rows), index_(make_buffer<int32_t>(rows * list_capacity(limit))),
        value_(make_buffer<Real>(rows * list_capacity(limit))), ends_(rows > 0 ? codes + 1 : 0) {
    for (int64_t i = 0; i < rows; ++i) {
      lists_[i] = {index_.get() + i * list_capacity(limit), value_.get() + i * list_capacity(limit), 0, 0.0};
    }
  }

  SparseRow<Real>& operator[](int64_t i) { return lists_[i]; }
  const SparseRow<Real>& operator[](int64_t i) const { return lists_[i]; }

  // Sorts the entries of `members` by code; each code has them in the order of the rows.
  void sort_by_code(const std::vector<int64_t>& members) {
    std::fill(ends_.begin(), ends_.end(), 0);
    for (int64_t i : members) {
      for (int64_t j = 0; j < lists_[i].count; ++j) ++ends_[lists_[i].index[j] + 1];
    }
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    row_.resize(ends_.back());
    row_value_.resize(ends_.back());
    for (int64_t i : members) {  // afterwards ends_[k] is where code k ends, which was where k + 1 began
      for (int64_t j = 0; j < lists_[i].count; ++j) {
        const int64_t at = ends_[lists_[i].index[j]]++;
        row_[at] = static_cast<int32_t>(i);
        row_value_[at] = lists_[i].value[j];
      }
    }
  }

  int64_t begin_of(int64_t code) const { return code == 0 ? 0 : ends_[code - 1]; }
  int64_t count_of(int64_t code) const { return ends_[code] - begin_of(code); }
  const int32_t* rows_of(int64_t code) const { return row_.data() + begin_of(code); }
  const Real* values_of(int64_t code) const { return row_value_.data() + begin_of(code); }

  const int64_t limit;  // entries of a list

 private:
  std::vector<SparseRow<Real>> lists_;
  Buffer<int32_t> index_;
  Buffer<Real> value_;
  std::vector<int64_t> ends_;
  std::vector<int32_t> row_;
  std::vector<Real> row_value_;
};

// Turns tiles T, and lists, into dh, and into what its rows give to dweight and dscale.
template <class Stored>
class Backward {
 public:
  using Real = Compute<Stored>;

  // `in_place`: V lies in place of dweight, where the dtypes agree.
  Backward(const Cosine<Stored>& in, const Codebook<Stored>& codebook, const CosineGradients<Stored>& out,
           int64_t capacity, bool in_place)
      : in_(in), codebook_(codebook), out_(out), along_(capacity) {
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
      matrix_product(tile.matrix(0, count).transposed(), tile.x_matrix(0, count), {v_, in_.codes, in_.dim},
                     v_is_set_ ? Into::kAdd : Into::kOverwrite);
      v_is_set_ = true;
    }
    if (out_.dh == nullptr && out_.dscale == nullptr) return;
    matrix_product(tile.matrix(0, count), codebook_.matrix(), tile.x_matrix(0, count), Into::kOverwrite);
    parallel_for(count, grain(in_.dim), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t slot = first; slot < last; ++slot) {
          const Real* const u = tile.x(slot);
          const int64_t row = tile.row_of(slot);
          along_[slot] = tile.rnorm(slot) * dot<fused.value>(in_.h + row * in_.dim, u, in_.dim);
          if (out_.dh != nullptr) finish_dh<fused.value>(tile, slot, u);
        }
      });
    });
    for (int64_t slot = 0; slot < count; ++slot) dscale_ += along_[slot];
  }

  // `members` of the rows from slot `first` on left lists instead of T.
  void add_lists(const Tile<Stored>& tile, Lists<Real>& lists, int64_t first, const std::vector<int64_t>& members) {
    if (members.empty()) return;
    if (out_.dh != nullptr) add_lists_to_rows(tile, lists, first, members);
    if (out_.dweight != nullptr) add_lists_to_codes(tile, lists, first, members);
  }

  // h^ . dL/dh^ / scale of a row that left a list.
  void add_to_dscale(double along) { dscale_ += along; }

  double dscale() const { return dscale_; }

  // This share of V = rnorm dL/de^ of code k, with what is even.
  template <bool kFused>
  DGI_ALWAYS_INLINE Real* share_of_code(int64_t k) {
    Real* const v = v_ + k * in_.dim;
    if (!v_is_set_) std::fill_n(v, in_.dim, Real{0});
    if (even_.empty()) return v;
    const Real rnorm = codebook_.rnorm()[k];
#pragma omp simd
    for (int64_t d = 0; d < in_.dim; ++d) v[d] = multiply_add<kFused>(rnorm, even_[d], v[d]);
    return v;
  }

 private:
  void add_lists_to_rows(const Tile<Stored>& tile, const Lists<Real>& lists, int64_t first,
                         const std::vector<int64_t>& members) {
    const std::vector<Real>& unit_sum = codebook_.sum_of_unit_vectors();
    parallel_for(members.size(), grain(16 * in_.dim), [&](int64_t begin, int64_t end) {
      const Buffer<Real> u = make_buffer<Real>(in_.dim);
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t m = begin; m < end; ++m) {
          const SparseRow<Real>& list = lists[members[m]];
          const Real even = static_cast<Real>(list.even);
          for (int64_t d = 0; d < in_.dim; ++d) u[d] = even * unit_sum[d];
          add_rows<fused.value>(list.index, list.value, list.count, codebook_.vectors(), in_.dim, u.get());
          finish_dh<fused.value>(tile, first + members[m], u.get());
        }
      });
    });
  }

  // Each thread has codes of its own, and each code takes the rows in order: X of the block stays in the cache.
  void add_lists_to_codes(const Tile<Stored>& tile, Lists<Real>& lists, int64_t first,
                          const std::vector<int64_t>& members) {
    if (!v_is_set_) std::fill_n(v_, in_.codes * in_.dim, Real{0});
    v_is_set_ = true;
    even_.resize(in_.dim, Real{0});
    for (int64_t i : members) {
      const Real even = static_cast<Real>(lists[i].even);
      const Real* const x = tile.x(first + i);
      for (int64_t d = 0; d < in_.dim; ++d) even_[d] += even * x[d];
    }
    lists.sort_by_code(members);
    parallel_for(in_.codes, grain(4 * in_.dim), [&](int64_t begin, int64_t end) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t k = begin; k < end; ++k) {
          add_rows<fused.value>(lists.rows_of(k), lists.values_of(k), lists.count_of(k), tile.x(first), in_.dim,
                                v_ + k * in_.dim);
        }
      });
    });
  }

  // u = dL/dh^ / scale of the row in a slot.
  template <bool kFused>
  DGI_ALWAYS_INLINE void finish_dh(const Tile<Stored>& tile, int64_t slot, const Real* u) {
    const int64_t row = tile.row_of(slot);
    through_normalization<kFused>(in_.h + row * in_.dim, u, in_.dim, tile.rnorm(slot), in_.eps,
                                  in_.scale * tile.rnorm(slot), out_.dh + row * in_.dim);
  }

  const Cosine<Stored>& in_;
  const Codebook<Stored>& codebook_;
  const CosineGradients<Stored>& out_;
  std::vector<double> along_;  // h^ . dL/dh^ / scale, by slot
  double dscale_ = 0;
  Buffer<Real> own_v_;
  Real* v_ = nullptr;
  bool v_is_set_ = false;
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
  parallel_for(in.codes, grain(in.dim), [&](int64_t first, int64_t last) {
    with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
      for (int64_t k = first; k < last; ++k) {
        Real* const v = shares[0]->template share_of_code<fused.value>(k);
        for (size_t i = 1; i < shares.size(); ++i) {
          const Real* const share = shares[i]->template share_of_code<fused.value>(k);
#pragma omp simd
          for (int64_t d = 0; d < in.dim; ++d) v[d] += share[d];
        }
        through_normalization<fused.value>(in.weight + k * in.dim, v, in.dim, codebook.rnorm()[k], in.eps, Real{1},
                                           out.dweight + k * in.dim);
      }
    });
  });
}

// With more entries than this a list saves nothing over its row of a matrix product.
template <class Real>
int64_t list_limit(int64_t codes) {
  return std::is_same_v<Real, float> ? std::min<int64_t>(codes / 8, 1024) : 0;
}

// Rows that each of `shares` multiplies at once: enough for an efficient product, few enough that all of them and what else
// the shares need, a V more and a codebook in another dtype, stay within 10 MB.
template <class Stored>
int64_t block_rows(const Cosine<Stored>& in, int64_t rows, int64_t shares) {
  constexpr int64_t kElements = int64_t{76} << 15;
  constexpr bool kConverts = !std::is_same_v<Stored, Compute<Stored>>;
  const int64_t copies = kConverts ? shares + 1 : shares - 1;
  const int64_t per_row = in.codes + in.dim + 2 * list_capacity(list_limit<Compute<Stored>>(in.codes));
  const int64_t fit = (kElements - copies * in.codes * in.dim) / (shares * std::max<int64_t>(1, per_row));
  const int64_t least = kConverts ? 64 : 128 / shares, most = shares == 1 ? 256 : 160;
  const int64_t block = std::clamp<int64_t>(fit / 16 * 16, least, most);
  return std::max<int64_t>(1, std::min((rows + shares - 1) / shares, block));
}

template <class Real>
double weight_of(const CrossEntropy<Real>& options, int64_t row, double uniform) {
  return options.reduction == Reduction::kNone && options.upstream ? static_cast<double>(options.upstream[row]) : uniform;
}

// Two threads wait for each other less if each takes half of the rows from end to end, with a V of its own, than if they
// share every product. With more threads V would be there too many times, and so it would beside a V in another dtype.
template <class Stored>
int64_t shares_of(int64_t rows) {
  constexpr int64_t kRowsWorthAShare = 1024;
  return std::is_same_v<Stored, Compute<Stored>> && thread_count() <= 2 && rows >= kRowsWorthAShare ? 2 : 1;
}

// The loss and the gradients of a share of the rows, block by block.
template <class Stored>
class Share {
 public:
  using Real = Compute<Stored>;

  Share(const Cosine<Stored>& in, const CrossEntropy<Real>& options, double uniform, const Codebook<Stored>& codebook,
        const CosineGradients<Stored>& out, int64_t block, bool in_place)
      : in_(in), options_(options), uniform_(uniform),
        softmax_{options.smoothing, std::abs(static_cast<double>(in.scale)) > kMaxScaleWithoutMaximum},
        codebook_(codebook), wants_gradients_(out.any()), block_(block),
        limit_(out.any() ? list_limit<Real>(in.codes) : 0), tile_(in, block),
        lists_(limit_ > 0 ? block : 0, in.codes, limit_), backward_(in, codebook, out, block, in_place), rows_(block) {}

  // The losses of `rows` are added up, and go to `loss` by row where it is not null.
  void run(const int64_t* rows, int64_t count, Real* loss) {
    for (int64_t begin = 0; begin < count;) {
      const int64_t block = std::min(block_ - filled_, count - begin);
      tile_.load_rows(filled_, rows + begin, block);
      matrix_product(tile_.x_matrix(filled_, block), codebook_.matrix().transposed(), tile_.matrix(filled_, block),
                     Into::kOverwrite);
      differentiate(block);
      for (int64_t i = 0; i < block; ++i) {
        if (loss != nullptr) loss[rows[begin + i]] = static_cast<Real>(rows_[i].loss);
        total_ += rows_[i].loss;
      }
      begin += block;
      if (wants_gradients_) take_gradients(block, begin == count);
    }
  }

  double total() const { return total_; }
  Backward<Stored>* backward() { return &backward_; }

 private:
  struct Row {
    double loss, along;  // along: h^ . dL/dh^ / scale, of a listed row
    bool is_listed;
  };

  // The rows from slot `filled_` on become T, or leave lists.
  void differentiate(int64_t count) {
    parallel_for(count, grain(4 * in_.codes), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const int64_t n = tile_.row_of(filled_ + i);
          const SoftmaxRow<Real> row{tile_.values(filled_ + i), codebook_.rnorm(), in_.codes, options_.target[n]};
          const SoftmaxSums sums = softmax_row<fused.value>(row, softmax_, &rows_[i].loss);
          if (!wants_gradients_) continue;
          const double weight = weight_of(options_, n, uniform_);
          rows_[i].is_listed =
              limit_ > 0 && sparse_gradient_row<fused.value>(row, softmax_, sums, weight, limit_, lists_[i]);
          if (rows_[i].is_listed) {
            rows_[i].along = weight * sums.tilt / static_cast<double>(in_.scale);  // peaked: scale is not 0
          } else {
            dense_gradient_row<fused.value>(row, softmax_, sums, weight);
          }
        }
      });
    });
  }

  void take_gradients(int64_t count, bool is_last) {
    listed_.clear();
    for (int64_t i = 0; i < count; ++i) {
      if (!rows_[i].is_listed) continue;
      listed_.push_back(i);
      backward_.add_to_dscale(rows_[i].along);
    }
    backward_.add_lists(tile_, lists_, filled_, listed_);
    const int64_t first = filled_;
    for (int64_t i = 0; i < count; ++i) {
      if (!rows_[i].is_listed) tile_.move(first + i, filled_++);
    }
    if (2 * filled_ <= block_ && !is_last) return;  // too few for an efficient product
    backward_.add_tile(tile_, filled_);
    filled_ = 0;
  }

  const Cosine<Stored>& in_;
  const CrossEntropy<Real>& options_;
  const double uniform_;
  const SoftmaxOptions softmax_;
  const Codebook<Stored>& codebook_;
  const bool wants_gradients_;
  const int64_t block_, limit_;
  Tile<Stored> tile_;
  Lists<Real> lists_;
  Backward<Stored> backward_;
  std::vector<Row> rows_;
  std::vector<int64_t> listed_;
  int64_t filled_ = 0;  // slots that hold T of rows before this block
  double total_ = 0;
};

}  // namespace

template <class Stored>
void cosine_logits(const Cosine<Stored>& in, Stored* out) {
  using Real = Compute<Stored>;
  const Codebook<Stored> codebook(in);
  const int64_t block = block_rows(in, in.rows, 1);
  Tile<Stored> tile(in, block);
  std::vector<int64_t> rows(block);
  for (int64_t begin = 0; begin < in.rows; begin += block) {
    const int64_t count = std::min(block, in.rows - begin);
    std::iota(rows.begin(), rows.begin() + count, begin);
    tile.load_rows(0, rows.data(), count);
    matrix_product(tile.x_matrix(0, count), codebook.matrix().transposed(), tile.matrix(0, count), Into::kOverwrite);
    parallel_for(count, grain(in.codes), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const Real *const s = tile.values(i), *const rnorm = codebook.rnorm();
          Stored* const logits = out + (begin + i) * in.codes;
#pragma omp simd
          for (int64_t k = 0; k < in.codes; ++k) store(s[k] * rnorm[k], logits[k]);
        }
      });
    });
  }
}

template <class Stored>
void cosine_logits_backward(const Cosine<Stored>& in, const Stored* dlogits, const CosineGradients<Stored>& out) {
  using Real = Compute<Stored>;
  const Codebook<Stored> codebook(in);
  const int64_t block = block_rows(in, in.rows, 1);
  Tile<Stored> tile(in, block);
  Backward<Stored> backward(in, codebook, out, block, true);
  std::vector<int64_t> rows(block);
  for (int64_t begin = 0; begin < in.rows; begin += block) {
    const int64_t count = std::min(block, in.rows - begin);
    std::iota(rows.begin(), rows.begin() + count, begin);
    tile.load_rows(0, rows.data(), count);
    parallel_for(count, grain(in.codes), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const Stored* const g = dlogits + (begin + i) * in.codes;
          const Real* const rnorm = codebook.rnorm();
          Real* const t = tile.values(i);
#pragma omp simd
          for (int64_t k = 0; k < in.codes; ++k) t[k] = load(g[k]) * rnorm[k];
        }
      });
    });
    backward.add_tile(tile, count);
  }
  finish<Stored>(in, codebook, out, {&backward});
}

template <class Stored>
void cosine_cross_entropy(const Cosine<Stored>& in, const CrossEntropy<Compute<Stored>>& options, Compute<Stored>* loss,
                          const CosineGradients<Stored>& gradients) {
  using Real = Compute<Stored>;
  const bool per_row = options.reduction == Reduction::kNone;
  if (per_row) std::fill_n(loss, in.rows, Real{0});
  if (gradients.dh != nullptr) std::fill_n(gradients.dh, in.rows * in.dim, Stored{});

  double total = 0;
  std::vector<int64_t> active;  // rows with work to do
  int64_t counted = 0;
  for (int64_t n = 0; n < in.rows; ++n) {
    const int64_t target = options.target[n];
    if (target == options.ignore_index) continue;
    ++counted;
    if (target < 0 || target >= in.codes) {
      total = std::numeric_limits<double>::quiet_NaN();
      if (per_row) loss[n] = std::numeric_limits<Real>::quiet_NaN();
    } else {
      active.push_back(n);
    }
  }
  const double uniform = options.reduction == Reduction::kMean ? 1.0 / static_cast<double>(counted) : 1.0;
  const int64_t rows = static_cast<int64_t>(active.size()), count = shares_of<Stored>(rows);
  const int64_t block = block_rows(in, rows, count);
  const Codebook<Stored> codebook(in);
  std::vector<std::unique_ptr<Share<Stored>>> shares;
  std::vector<Backward<Stored>*> backwards;
  for (int64_t i = 0; i < count; ++i) {
    shares.push_back(std::make_unique<Share<Stored>>(in, options, uniform, codebook, gradients, block, i == 0));
    backwards.push_back(shares[i]->backward());
  }
  const auto run = [&](int64_t i) {
    const int64_t first = i * rows / count;
    shares[i]->run(active.data() + first, (i + 1) * rows / count - first, per_row ? loss : nullptr);
  };
  if (count == 1) {
    run(0);  // not within parallel_for, where products and loops have one thread
  } else {
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(i);
    });
  }
  for (const auto& share : shares) total += share->total();
  if (!per_row) *loss = static_cast<Real>(options.reduction == Reduction::kMean ? total / static_cast<double>(counted) : total);
  if (gradients.any()) finish<Stored>(in, codebook, gradients, backwards);
}

#define DGI_INSTANTIATE(Stored)                                                                                      \
  template void cosine_logits(const Cosine<Stored>&, Stored*);                                                       \
  template void cosine_logits_backward(const Cosine<Stored>&, const Stored*, const CosineGradients<Stored>&);        \
  template void cosine_cross_entropy(const Cosine<Stored>&, const CrossEntropy<Compute<Stored>>&, Compute<Stored>*,  \
                                     const CosineGradients<Stored>&);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
DGI_INSTANTIATE(BFloat16)
DGI_INSTANTIATE(Float16)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
