// Dropout on the CPU: words of Philox for a few rows, which stay in the first-level cache, then one pass that reads and
// writes each element once. Nothing is saved: backward makes the words again. torch's `dropout` draws a mask with one
// thread and one word of a serial generator at a time, writes it, and reads it twice more.
#include <algorithm>

#include "cpu/dropout/dropout_cpu.h"
#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/noise_words.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kWordsAtOnce = 2048;  // 8 KB

template <bool kAdds>
DGI_ALWAYS_INLINE inline void drop_row(const uint32_t* words, uint32_t threshold, float factor, int64_t count,
                                       const float* x, const float* residual, float* out) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float kept = words[k] >= threshold ? factor * x[k] : 0.0f;
    out[k] = kAdds ? residual[k] + kept : kept;
  }
}

}  // namespace

void dropout(const Dropped& mask, const float* x, const float* residual, float* out) {
  const NoiseShape& shape = mask.shape;
  const int64_t columns = shape.codes, stride = words_per_row(shape);
  const int64_t at_once = std::clamp<int64_t>(kWordsAtOnce / std::max<int64_t>(1, stride), 1, 256);
  parallel_for(shape.rows, grain(columns), [&](int64_t first, int64_t last) {
    const Buffer<uint32_t> words = make_buffer<uint32_t>(room_for_words(shape, at_once));
    with_best_instructions([&](auto) DGI_ALWAYS_INLINE {
      for (int64_t row = first; row < last; row += at_once) {
        const int64_t count = std::min(at_once, last - row);
        fill_words(shape, philox_key(mask.seed), row, count, words.get());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = (row + i) * columns;
          const uint32_t* const own = words.get() + i * stride;
          if (residual == nullptr) {
            drop_row<false>(own, mask.threshold, mask.factor, columns, x + at, nullptr, out + at);
          } else {
            drop_row<true>(own, mask.threshold, mask.factor, columns, x + at, residual + at, out + at);
          }
        }
      }
    });
  });
}

}  // namespace dgi::cpu
