// The codes of K-means by the Euclidean metric, round after round, without the products whose result bounds foretell.
//
// Each row keeps its few nearest codes of an earlier round, and a distance that no other code was below. In a round the
// centroids move by shift_k = ||c'_k - c_k||, so no other code can have come nearer than that distance less the largest
// shift (Drake and Hamerly 2012). A row whose best of the few lies below that has its code; the others go through the
// product with all codes, compacted. A few codes move much further than the rest (they lost or won a cluster of
// points): these are measured for all rows, as a product of their own, and the largest shift is that of the others.
//
// Codes are those of the quantizer (quantize_hard.cpp) to the last tie: rows of which two codes are within rounding of
// each other go through its check in float64. How many codes are fast is chosen from a sample of the rows by what the
// round would cost; it changes no code. Memory: 36 bytes a row.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/clustering/clustering_cpu.h"
#include "cpu/quantize/quantize_metric.h"
#include "cpu/quantize/quantize_panels.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kBlock = 480;  // rows that are compacted together
constexpr int64_t kSampled = 2048;  // rows that a round's cost is estimated from
constexpr double kWorthBounds = 0.85;  // of the products of a round: what it may cost by bounds
constexpr double kCheck = 64;  // codes whose products take as long as the check of a row's nearest ones
constexpr float kUp = 1 + 1e-6f, kDown = 1 - 1e-6f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Stored>
class Bounded {
 public:
  Bounded(const Points<Stored>& points, const float* centroids, int64_t clusters, const NearCodes& near, int64_t* codes)
      : points_(points), dim_(points.dim), near_(near), codes_(codes), in_(quantizer(points, centroids, clusters)),
        codebooks_(in_), level_(codebooks_[0]), panels_(level_, dim_),
        margin_(std::numeric_limits<float>::epsilon() * (8 + static_cast<float>(dim_))) {}

  // False where products may overflow: then there are neither codes nor bounds.
  bool run(const float* before) {
    std::atomic<bool> is_finite = true;
    const bool has_bounds = before != nullptr && set_fast(before);
    parallel_for((points_.rows + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      const Buffer<float> rows = make_buffer<float>(kBlock * dim_), x = make_buffer<float>(kBlock * dim_);
      const int64_t width = std::max(panels_.width(), fast_.empty() ? 0 : fast_panels_->width());
      const Buffer<float> scores = make_buffer<float>(panels_.rows_at_once() * width);
      std::vector<int64_t> left(kBlock);
      std::vector<double> own(kBlock);
      for (int64_t begin = first * kBlock; begin < std::min(points_.rows, last * kBlock); begin += kBlock) {
        Block block{begin,      std::min(kBlock, points_.rows - begin), rows.get(), x.get(), scores.get(), own.data(),
                    left.data()};
        with_best_instructions([&](auto isa) DGI_ALWAYS_INLINE {
          if (!start(isa, block)) {
            is_finite = false;
            return;
          }
          int64_t count = block.count;
          if (has_bounds) {
            count = check(isa, block);
          } else {
            std::iota(left.begin(), left.begin() + count, 0);
          }
          measure(isa, block, count);
        });
      }
    });
    return is_finite;
  }

 private:
  struct Block {
    int64_t begin, count;
    float *rows, *x, *scores;  // as stored; 2 (row - centre); a tile
    double* own;  // -||row - centre||^2
    int64_t* left;  // rows that bounds leave open
  };

  static Quantize<float> quantizer(const Points<Stored>& points, const float* centroids, int64_t clusters) {
    Quantize<float> in{};
    in.codebooks = centroids, in.sizes = {clusters}, in.rows = points.rows, in.dim = points.dim;
    in.scale = 1, in.tau = 1, in.mode = QuantizeMode::kHard, in.metric = Metric::kEuclidean;
    return in;
  }

  const float* row(int64_t i, float* room) const {
    for (int64_t d = 0; d < dim_; ++d) room[d] = load(points_.x[i * dim_ + d]);
    return room;
  }

  template <class Isa>
  DGI_ALWAYS_INLINE bool start(Isa, const Block& block) const {
    double longest = 0;
    for (int64_t i = 0; i < block.count; ++i) {
      const float* const r = row(block.begin + i, block.rows + i * dim_);
      block.own[i] = start_row<Isa::value>(in_, level_, r, block.x + i * dim_).own;
      longest = std::max(longest, -block.own[i]);
    }
    return panels_.scores_are_finite(in_.scale, longest);
  }

  DGI_ALWAYS_INLINE float square_distance(const float* r, int64_t code) const {
    const float* const e = level_.vectors.data + code * dim_;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim_; ++d) sum += (r[d] - e[d]) * (r[d] - e[d]);
    return sum;
  }

  struct Best {
    int64_t code;
    float distance;  // squared
    bool is_certain;
  };

  // The best of a row's near codes.
  DGI_ALWAYS_INLINE Best best_near(const float* r, const int32_t* near) const {
    Best best{near[0], square_distance(r, near[0]), true};
    float next = kInfinity;
    for (int64_t j = 1; j < kNear && near[j] >= 0; ++j) {
      const float distance = square_distance(r, near[j]);
      if (distance < best.distance) {
        next = best.distance, best.code = near[j], best.distance = distance;
      } else {
        next = std::min(next, distance);
      }
    }
    best.is_certain = best.distance * (1 + margin_) < next * (1 - margin_);
    return best;
  }

  // A distance that is surely no larger than that of a code of this score.
  DGI_ALWAYS_INLINE float below(double own, float score) const {
    const double length = std::sqrt(-own) + static_cast<double>(level_.longest);
    const double square = -own - static_cast<double>(score) - static_cast<double>(margin_) * length * length;
    return static_cast<float>(std::sqrt(std::max(0.0, square))) * kDown;
  }

  // Chooses the fast codes; false where a round by bounds would cost more than one without them.
  bool set_fast(const float* before) {
    const int64_t codes = level_.codes;
    std::vector<float> shift(codes);
    for (int64_t k = 0; k < codes; ++k) {
      double square = 0;
      for (int64_t d = 0; d < dim_; ++d) {
        const double difference = static_cast<double>(level_.vectors.data[k * dim_ + d]) - before[k * dim_ + d];
        square += difference * difference;
      }
      shift[k] = static_cast<float>(std::sqrt(square)) * kUp;
    }
    std::vector<int64_t> order(codes);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return shift[a] != shift[b] ? shift[a] > shift[b] : a < b; });
    const std::vector<float> slacks = sampled_slacks();
    double lowest = kWorthBounds * static_cast<double>(codes);
    int64_t fast = -1;
    for (int64_t count = 0; count <= codes / 2; count = count == 0 ? 16 : count * 2) {
      const float largest = count < codes ? shift[order[count]] : 0;
      const auto passed = std::lower_bound(slacks.begin(), slacks.end(), largest);
      const double left = static_cast<double>(passed - slacks.begin()) / static_cast<double>(slacks.size());
      const double cost = kCheck + static_cast<double>(count) + left * static_cast<double>(codes);
      if (cost < lowest) lowest = cost, fast = count, shift_ = largest;
    }
    if (fast < 0) return false;
    fast_.assign(order.begin(), order.begin() + fast);
    place_.assign(codes, -1);
    for (int64_t i = 0; i < fast; ++i) place_[fast_[i]] = static_cast<int32_t>(i);
    if (fast > 0) pack_fast();
    return true;
  }

  // By how much the shift may go up before a row of the sample needs all products, in ascending order.
  std::vector<float> sampled_slacks() const {
    const int64_t step = std::max<int64_t>(1, points_.rows / kSampled);
    std::vector<float> slacks;
    std::vector<float> room(dim_);
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
      for (int64_t i = 0; i < points_.rows; i += step) {
        const Best best = best_near(row(i, room.data()), near_.code + i * kNear);
        slacks.push_back(near_.rest[i] - std::sqrt(best.distance));
      }
    });
    std::sort(slacks.begin(), slacks.end());
    return slacks;
  }

  void pack_fast() {
    const int64_t count = static_cast<int64_t>(fast_.size());
    fast_keys_ = make_buffer<float>(count * dim_), fast_bias_ = make_buffer<float>(count);
    for (int64_t j = 0; j < count; ++j) {
      std::copy_n(level_.keys.data + fast_[j] * dim_, dim_, fast_keys_.get() + j * dim_);
      fast_bias_[j] = level_.terms.bias[fast_[j]];
    }
    Level<float> level = level_;
    level.codes = count, level.keys = {fast_keys_.get(), count, dim_}, level.terms = {nullptr, fast_bias_.get()};
    fast_panels_ = std::make_unique<Panels>(level, dim_);
  }

  // Sets the codes that bounds decide; returns how many rows are left.
  template <class Isa>
  DGI_ALWAYS_INLINE int64_t check(Isa isa, const Block& block) const {
    const int64_t at_once = panels_.rows_at_once(), width = fast_.empty() ? 0 : fast_panels_->width();
    int64_t left = 0;
    for (int64_t first = 0; first < block.count; first += at_once) {
      const int64_t rows = std::min(at_once, block.count - first);
      if (width > 0) fast_panels_->scores(isa, block.x + first * dim_, rows, block.scores);
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t i = first + j, n = block.begin + i;
        const int32_t* const near = near_.code + n * kNear;
        const float* const r = block.rows + i * dim_;
        const Best best = best_near(r, near);
        float rest = near_.rest[n] * kDown - shift_ * kUp;
        if (width > 0) {
          float* const scores = block.scores + j * width;
          for (int64_t c = 0; c < kNear && near[c] >= 0; ++c) {
            if (place_[near[c]] >= 0) scores[place_[near[c]]] = -kInfinity;
          }
          rest = std::min(rest, below(block.own[i], two_largest(scores, width).first));
        }
        if (!best.is_certain || !(std::sqrt(best.distance) * (1 + margin_) < rest)) {
          block.left[left++] = i;
          continue;
        }
        near_.rest[n] = rest, codes_[n] = best.code;
      }
    }
    return left;
  }

  // Codes and bounds of the first `count` rows of block.left, from products with all codes.
  template <class Isa>
  DGI_ALWAYS_INLINE void measure(Isa isa, const Block& block, int64_t count) const {
    for (int64_t j = 0; j < count; ++j) {  // ascending, so that no row is overwritten before it is moved
      const int64_t i = block.left[j];
      if (i != j) std::copy_n(block.x + i * dim_, dim_, block.x + j * dim_);
    }
    const int64_t at_once = panels_.rows_at_once(), width = panels_.width();
    for (int64_t first = 0; first < count; first += at_once) {
      const int64_t rows = std::min(at_once, count - first);
      panels_.scores(isa, block.x + first * dim_, rows, block.scores);
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t i = block.left[first + j], n = block.begin + i;
        const float* const scores = block.scores + j * width;
        const auto [most, second, cut] = two_largest(scores, width);
        codes_[n] = keep_near(scores, cut, n, block.own[i]);
        Nearest<float> nearest(in_, level_, block.rows + i * dim_, block.own[i]);
        if (codes_[n] >= 0 && nearest.is_certain(most, second)) continue;
        nearest.take(scores, 0, level_.codes, most, std::find(scores, scores + width, most) - scores);
        codes_[n] = nearest.code();
        if (near_.code[n * kNear] < 0) near_.code[n * kNear] = static_cast<int32_t>(nearest.code());
      }
    }
  }

  // Keeps the codes above `cut`, at most kNear, and the distance that the others are not below; returns the best.
  DGI_ALWAYS_INLINE int64_t keep_near(const float* scores, float cut, int64_t n, double own) const {
    constexpr int64_t kCompared = 16;
    int32_t* const near = near_.code + n * kNear;
    std::fill_n(near, kNear, -1);
    float value[kNear];
    int64_t count = 0;
    for (int64_t begin = 0; begin < level_.codes; begin += kCompared) {
      int any = 0;
      const int64_t end = std::min(level_.codes, begin + kCompared);
#pragma omp simd reduction(| : any)
      for (int64_t k = begin; k < end; ++k) any |= scores[k] > cut;
      for (int64_t k = begin; any && k < end; ++k) {
        if (!(scores[k] > cut)) continue;
        // in descending order; the last one falls out where there are too many
        int64_t at = count;
        if (count == kNear) {
          cut = std::max(cut, std::min(scores[k], value[kNear - 1]));
          if (!(scores[k] > value[kNear - 1])) continue;
          at = kNear - 1;
        } else {
          ++count;
        }
        for (; at > 0 && scores[k] > value[at - 1]; --at) value[at] = value[at - 1], near[at] = near[at - 1];
        value[at] = scores[k], near[at] = static_cast<int32_t>(k);
      }
    }
    near_.rest[n] = below(own, cut);
    return near[0];
  }

  const Points<Stored>& points_;
  const int64_t dim_;
  const NearCodes near_;
  int64_t* const codes_;
  const Quantize<float> in_;
  const Codebooks<float> codebooks_;
  const Level<float>& level_;
  const Panels panels_;
  const float margin_;  // relative rounding of a squared distance, of differences
  std::vector<int64_t> fast_;
  std::vector<int32_t> place_;  // of a code among the fast ones, else -1
  Buffer<float> fast_keys_, fast_bias_;
  std::unique_ptr<Panels> fast_panels_;
  float shift_ = 0;  // the largest of the codes that are not fast
};

}  // namespace

template <class Stored>
bool bounded_codes(const Points<Stored>& points, const float* centroids, int64_t clusters, const float* before,
                   const NearCodes& near, int64_t* codes) {
  if (points.dim > kMostPanelDim) return false;
  return Bounded<Stored>(points, centroids, clusters, near, codes).run(before);
}

template bool bounded_codes(const Points<float>&, const float*, int64_t, const float*, const NearCodes&, int64_t*);
template bool bounded_codes(const Points<BFloat16>&, const float*, int64_t, const float*, const NearCodes&, int64_t*);
template bool bounded_codes(const Points<Float16>&, const float*, int64_t, const float*, const NearCodes&, int64_t*);

}  // namespace dgi::cpu
