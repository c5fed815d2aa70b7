// Scaled cosine logits and their cross-entropy on the CPU, with all gradients from one pass.
//
//   s_nk = scale h^_n . e^_k + b_k = X_n . e_k f_k + b_k,   x^ = x / max(||x||, eps)
//
// Rows are taken in blocks: X = scale h^ of the block is the only copy that is normalised. With T_nk = g_nk f_k, where
// g = dL/ds, one tile serves both products:
//   S = X E^T (then T in its place),   dL/dh^ = scale T E,   V += T^T X = dL/de^ / f,   db = sum_n g_n,
// and at the end dh and dE lose their radial part, and dscale = sum_n h^_n . (T E)_n comes free. Nothing is recomputed.
// Rows whose softmax is peaked leave short lists in their own place in the tile (dgi/softmax_row.h), if vectors are not
// short; the entries wait, linked by code, for a pass over V. The other rows stay, move up, and are multiplied once
// enough have gathered.
//
// 6 N K D operations, or 2 N K D and those of the lists for rows that are peaked; one V lies in place of dE, and tiles
// of at most 256 rows are all that is as wide as K. N = K = 4096 at D = 256, float32, two AVX2 cores, against the three
// products by torch.mm: 1.09 flat, 0.61 where nine rows in ten are at cosine 0.7 to their target (one run of
// `python bench/bench_cosine.py --rounds 5`, which has the peers beside it).
//
// Blocks and the rows within them are worked off in fixed order, so the same inputs give the same bits run after run.
#include "cpu/cosine/cosine_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/cosine/cosine_backward.h"
#include "cpu/cosine/cosine_columns.h"
#include "cpu/cosine/cosine_tile.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/shares.h"
#include "dgi/softmax_row.h"

namespace dgi::cpu {
namespace {

using namespace cosine;

// Of few dimensions no list saves anything: two products cost less than to look for it. Entries hold rows as 32-bit
// numbers.
template <class Real>
int64_t list_limit_of(int64_t rows, int64_t codes, int64_t dim) {
  constexpr int64_t kLeastDim = 112;
  return dim >= kLeastDim && rows <= INT32_MAX ? list_limit<Real>(codes) : 0;
}

// Enough rows for an efficient product, few enough that all of them and what else the shares need, a V more, a codebook
// in another dtype and the entries, stay within 10 MB (with more than two threads 40 MB at most).
template <class Stored>
Sizes sizes_of_share(const Cosine<Stored>& in, int64_t rows, int64_t shares) {
  using Real = Compute<Stored>;
  constexpr int64_t kBytes = int64_t{38} << 18, kEntries = int64_t{20} << 10, kCodes = 1024;
  const int64_t bytes = kBytes * thread_pairs();
  constexpr bool kConverts = !std::is_same_v<Stored, Real>;
  rows = (rows + shares - 1) / shares;
  const int64_t entries = std::min(rows * list_limit_of<Real>(in.rows, in.codes, in.dim), kEntries);
  const int64_t copies = kConverts ? shares + 1 : shares - 1, element = sizeof(Real);
  const int64_t free = (bytes - copies * in.codes * in.dim * element) / shares - EntriesByCode<Real>::bytes(entries);
  const int64_t fit = free / std::max<int64_t>(1, (in.codes + in.dim) * element);
  const int64_t least = kConverts ? 64 : 128 / shares, most = shares == 1 ? 256 * thread_pairs() : 160;
  return {std::max<int64_t>(1, std::min(rows, std::clamp<int64_t>(fit / 16 * 16, least, most))), entries,
          shares == 1 ? kCodes * thread_count() : kCodes};
}

// Whether a row has a target. Not so where it is to be ignored, or is no code, which gives NaN.
template <class Real>
bool is_active(const CrossEntropy<Real>& options, int64_t row, int64_t codes) {
  const int64_t target = options.target[row];
  return target != options.ignore_index && target >= 0 && target < codes;
}

template <class Real>
RowWeights weights_of(const CrossEntropy<Real>& options, int64_t row, double uniform) {
  const bool is_given = options.reduction == Reduction::kNone && options.upstream != nullptr;
  return {is_given ? static_cast<double>(options.upstream[row]) : uniform,
          options.upstream_log_normalizer != nullptr ? static_cast<double>(options.upstream_log_normalizer[row]) : 0.0};
}

// A listed row's part of dscale is divided by the scale.
constexpr double kLeastScaleOfLists = 0x1p-40;

// The loss and the gradients of a share of the rows, block by block.
template <class Stored>
class Share {
 public:
  using Real = Compute<Stored>;

  Share(const Cosine<Stored>& in, const CrossEntropy<Real>& options, double uniform, const Codebook<Stored>& codebook,
        const ItemColumns& items, const CosineGradients<Stored>& out, const Sizes& sizes, bool in_place)
      : in_(in), options_(options), uniform_(uniform), scale_(in.scale),
        softmax_{options.smoothing, codebook.largest_score() > kMaxScoreWithoutMaximum, scale_.gain},
        codebook_(codebook), items_(items), wants_gradients_(out.any()), sizes_(sizes),
        limit_(out.any() && std::abs(static_cast<double>(in.scale)) > kLeastScaleOfLists
                   ? list_limit_of<Real>(in.rows, in.codes, in.dim)
                   : 0),
        tile_(in, sizes.rows), backward_(in, codebook, out, sizes, in_place), columns_(out, in.codes, sizes.rows),
        rows_(sizes.rows), numbers_(sizes.rows) {}

  // Takes `count` rows that are active, from row `n` on. Their losses are added up, and go to `out` by row where there
  // is room for them.
  void run(int64_t n, int64_t count, const CosineLosses<Real>& out) {
    while (count > 0) {
      const int64_t block = std::min(sizes_.rows - filled_, count);
      for (int64_t i = 0; i < block; ++n) {
        if (is_active(options_, n, in_.codes)) numbers_[i++] = n;
      }
      tile_.load_rows(filled_, numbers_.data(), block);
      tile_.multiply(filled_, block, codebook_, sizes_.codes);
      differentiate(block);
      for (int64_t i = 0; i < block; ++i) {
        if (out.loss != nullptr) out.loss[numbers_[i]] = static_cast<Real>(rows_[i].loss);
        if (out.log_normalizer != nullptr) out.log_normalizer[numbers_[i]] = static_cast<Real>(rows_[i].log_normalizer);
        total_ += rows_[i].loss;
      }
      count -= block;
      if (wants_gradients_) take_gradients(block, count == 0);
    }
    backward_.finish_lists();
  }

  double total() const { return total_; }
  Backward<Stored>* backward() { return &backward_; }
  const ColumnSums<Real>& columns() const { return columns_; }

 private:
  struct Row {
    double loss, log_normalizer, along;  // along: h^ . dL/dh^ / scale, of a listed row
    bool is_listed;
    SparseRow<Real> list;  // in the row's own place in the tile
  };

  // The rows from slot `filled_` on become T, or leave lists.
  void differentiate(int64_t count) {
    const int64_t together = columns_.is_wanted() ? ColumnSums<Real>::kRows : 1,
                  groups = (count + together - 1) / together;
    parallel_for(groups, grain(4 * in_.codes * together), [&](int64_t first, int64_t last) {
      std::vector<int32_t> index(limit_ > 0 ? list_capacity(limit_) : 0);
      std::vector<Real> value(index.size());
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        for (int64_t group = first; group < last; ++group) {
          Real* const sums = columns_.start(group);
          for (int64_t i = group * together; i < std::min(count, (group + 1) * together); ++i) {
            differentiate_row<fused.value>(i, index.data(), value.data(), sums);
          }
        }
      });
    });
    if (!columns_.is_wanted()) return;
    for (int64_t i = 0; i < count; ++i) columns_.add_to_all(rows_[i].is_listed ? rows_[i].list.even : 0.0);
    columns_.add_groups(groups);
  }

  template <bool kFused>
  DGI_ALWAYS_INLINE void differentiate_row(int64_t i, int32_t* index, Real* value, Real* column_sums) {
    const int64_t n = tile_.row_of(filled_ + i), target = options_.target[n];
    const SoftmaxRow<Real> row{tile_.values(filled_ + i), codebook_.terms(),   in_.codes, target,
                               items_.same_as(target),    items_.count(target)};
    const SoftmaxSums sums = with_bias(row.terms, [&](auto has_bias) DGI_ALWAYS_INLINE {
      return softmax_row<kFused, has_bias.value>(row, softmax_, &rows_[i].loss);
    });
    rows_[i].log_normalizer = sums.log_normalizer;
    if (!wants_gradients_) return;
    const RowWeights weights = weights_of(options_, n, uniform_);
    SparseRow<Real> list{index, value, 0, 0.0};
    rows_[i].is_listed = limit_ > 0
                         && sparse_gradient_row<kFused>(row, softmax_, sums, weights, limit_, list, column_sums);
    if (rows_[i].is_listed) {
      double along = weights.loss * sums.tilt;
      if (weights.log_normalizer != 0) along += weights.log_normalizer * sums.mean;
      rows_[i].along = along / static_cast<double>(scale_.scale);
      rows_[i].list = moved_to(row.products, list);
    } else {
      dense_gradient_row<kFused>(row, softmax_, sums, weights, column_sums);
    }
  }

  // A list is at most a quarter as long as the row that it takes the place of.
  static SparseRow<Real> moved_to(Real* place, const SparseRow<Real>& list) {
    Real* const value = place + list.count;
    std::memcpy(place, list.index, sizeof(int32_t) * list.count);
    std::memcpy(value, list.value, sizeof(Real) * list.count);
    return {reinterpret_cast<int32_t*>(place), value, list.count, list.even};
  }

  void take_gradients(int64_t count, bool is_last) {
    listed_.clear();
    for (int64_t i = 0; i < count; ++i) {
      if (!rows_[i].is_listed) continue;
      listed_.push_back(filled_ + i);
      backward_.add_to_dscale(rows_[i].along);
    }
    const int64_t first = filled_;
    backward_.add_lists(tile_, listed_, [&](int64_t slot) -> const auto& { return rows_[slot - first].list; });
    for (int64_t i = 0; i < count; ++i) {
      if (!rows_[i].is_listed) tile_.move(first + i, filled_++);
    }
    if (2 * filled_ <= sizes_.rows && !is_last) return;  // too few for an efficient product
    backward_.add_tile(tile_, filled_);
    filled_ = 0;
  }

  const Cosine<Stored>& in_;
  const CrossEntropy<Real>& options_;
  const double uniform_;
  const SplitScale<Real> scale_;
  const SoftmaxOptions softmax_;
  const Codebook<Stored>& codebook_;
  const ItemColumns& items_;
  const bool wants_gradients_;
  const Sizes sizes_;
  const int64_t limit_;
  Tile<Stored> tile_;
  Backward<Stored> backward_;
  ColumnSums<Real> columns_;
  std::vector<Row> rows_;
  std::vector<int64_t> numbers_;  // of the rows of this block
  std::vector<int64_t> listed_;
  int64_t filled_ = 0;  // slots that hold T of rows before this block
  double total_ = 0;
};

}  // namespace

template <class Stored>
void cosine_logits(const Cosine<Stored>& in, Stored* out) {
  using Real = Compute<Stored>;
  const Codebook<Stored> codebook(in);
  const Sizes sizes = sizes_of_share(in, in.rows, 1);
  const int64_t block = sizes.rows;
  const Real gain = static_cast<Real>(SplitScale<Real>(in.scale).gain);
  Tile<Stored> tile(in, block);
  std::vector<int64_t> rows(block);
  for (int64_t begin = 0; begin < in.rows; begin += block) {
    const int64_t count = std::min(block, in.rows - begin);
    std::iota(rows.begin(), rows.begin() + count, begin);
    tile.load_rows(0, rows.data(), count);
    tile.multiply(0, count, codebook, sizes.codes);
    parallel_for(count, grain(in.codes), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const Real *const s = tile.values(i), *const factor = codebook.factor();
          Stored* const logits = out + (begin + i) * in.codes;
#pragma omp simd
          for (int64_t k = 0; k < in.codes; ++k) store(s[k] * factor[k] * gain, logits[k]);
        }
      });
    });
  }
}

template <class Stored>
void cosine_logits_backward(const Cosine<Stored>& in, const Stored* dlogits, const CosineGradients<Stored>& out) {
  using Real = Compute<Stored>;
  const Codebook<Stored> codebook(in);
  const Sizes sizes = sizes_of_share(in, in.rows, 1);
  const int64_t block = sizes.rows;
  Tile<Stored> tile(in, block);
  Backward<Stored> backward(in, codebook, out, sizes, true);
  std::vector<int64_t> rows(block);
  for (int64_t begin = 0; begin < in.rows; begin += block) {
    const int64_t count = std::min(block, in.rows - begin);
    std::iota(rows.begin(), rows.begin() + count, begin);
    tile.load_rows(0, rows.data(), count);
    parallel_for(count, grain(in.codes), [&](int64_t first, int64_t last) {
      with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
        for (int64_t i = first; i < last; ++i) {
          const Stored* const g = dlogits + (begin + i) * in.codes;
          const Real* const factor = codebook.factor();
          Real* const t = tile.values(i);
#pragma omp simd
          for (int64_t k = 0; k < in.codes; ++k) t[k] = load(g[k]) * factor[k];
        }
      });
    });
    backward.add_tile(tile, count);
  }
  finish<Stored>(in, codebook, out, {&backward});
}

template <class Stored>
void cosine_cross_entropy(const Cosine<Stored>& in, const CrossEntropy<Compute<Stored>>& options,
                          const CosineLosses<Compute<Stored>>& out, const CosineGradients<Stored>& gradients) {
  using Real = Compute<Stored>;
  const bool reduces = options.reduction != Reduction::kNone;
  const CosineLosses<Real> by_row{reduces ? nullptr : out.loss, out.log_normalizer};
  for (Real* const numbers : {by_row.loss, by_row.log_normalizer}) {
    if (numbers != nullptr) std::fill_n(numbers, in.rows, Real{0});
  }
  if (gradients.dh != nullptr) std::fill_n(gradients.dh, in.rows * in.dim, Stored{});

  double total = 0;
  int64_t counted = 0, rows = 0;  // rows: those with work to do
  for (int64_t n = 0; n < in.rows; ++n) {
    if (options.target[n] == options.ignore_index) continue;
    ++counted;
    if (is_active(options, n, in.codes)) {
      ++rows;
    } else {
      total = std::numeric_limits<double>::quiet_NaN();
      for (Real* const numbers : {by_row.loss, by_row.log_normalizer}) {
        if (numbers != nullptr) numbers[n] = std::numeric_limits<Real>::quiet_NaN();
      }
    }
  }
  const double uniform = options.reduction == Reduction::kMean ? 1.0 / static_cast<double>(counted) : 1.0;
  // Beside dweight in another dtype one V is enough.
  const int64_t bytes_of_v = in.codes * in.dim * static_cast<int64_t>(sizeof(Real));
  const int64_t count = std::is_same_v<Stored, Real> ? shares_of(rows, 1024, bytes_of_v) : 1;
  const Sizes sizes = sizes_of_share(in, rows, count);
  const Codebook<Stored> codebook(in);
  const ItemColumns items(options.same_as, in.codes);
  std::vector<std::unique_ptr<Share<Stored>>> shares;
  std::vector<Backward<Stored>*> backwards;
  for (int64_t i = 0; i < count; ++i) {
    shares.push_back(std::make_unique<Share<Stored>>(in, options, uniform, codebook, items, gradients, sizes, i == 0));
    backwards.push_back(shares[i]->backward());
  }
  const auto run = [&](int64_t i) {
    const int64_t before = i * rows / count;
    int64_t first = 0;
    for (int64_t passed = 0; passed < before; ++first) passed += is_active(options, first, in.codes);
    shares[i]->run(first, (i + 1) * rows / count - before, by_row);
  };
  if (count == 1) {
    run(0);  // not within parallel_for, where products and loops have one thread
  } else {
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(i);
    });
  }
  for (const auto& share : shares) total += share->total();
  if (reduces) {
    *out.loss = static_cast<Real>(options.reduction == Reduction::kMean ? total / static_cast<double>(counted) : total);
  }
  if (gradients.any()) finish<Stored>(in, codebook, gradients, backwards);
  std::vector<const ColumnSums<Real>*> columns;
  for (const auto& share : shares) columns.push_back(&share->columns());
  ColumnSums<Real>::finish(columns, gradients);
}

#define DGI_INSTANTIATE(Stored)                                                                               \
  template void cosine_logits(const Cosine<Stored>&, Stored*);                                                \
  template void cosine_logits_backward(const Cosine<Stored>&, const Stored*, const CosineGradients<Stored>&); \
  template void cosine_cross_entropy(const Cosine<Stored>&, const CrossEntropy<Compute<Stored>>&,             \
                                     const CosineLosses<Compute<Stored>>&, const CosineGradients<Stored>&);
DGI_INSTANTIATE(float)
DGI_INSTANTIATE(double)
DGI_INSTANTIATE(BFloat16)
DGI_INSTANTIATE(Float16)
#undef DGI_INSTANTIATE

}  // namespace dgi::cpu
