// Random shapes through dropout and through attention with dropout in C++, against masks made of one word of Philox at
// a time and the formula in float64; built with sanitizers by test_dropout.py. Every array has exactly its size, so
// that a read or write beyond it is seen.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/dropout/dropout_cpu.h"
#include "driver.h"

namespace {

using dgi::cpu::Attention;
using dgi::cpu::Dropped;
using driver::below;
using driver::Random;
using Row = std::vector<double>;

std::vector<float> uniform(Random& random, int64_t count) {
  std::vector<float> made(count);
  for (float& value : made) value = static_cast<float>(below(random, 2001)) / 1000 - 1;
  return made;
}

// What element (row, column) is multiplied with.
double factor_of(const Dropped& dropped, int64_t row, int64_t column) {
  const dgi::PhiloxBlock block = dgi::philox4x32_10(dropped.shape.counter(row, column / 4),
                                                    dgi::philox_key(dropped.seed));
  return block.word[column % 4] >= dropped.threshold ? dropped.factor : 0;
}

Dropped random_mask(Random& random, int64_t rows, int64_t columns, uint32_t stream) {
  const auto threshold = static_cast<uint32_t>(below(random, 4) == 0 ? 0 : random());
  const auto level = static_cast<uint32_t>(below(random, 5));
  return {{level, stream, below(random, 1000), rows, columns}, static_cast<int64_t>(random() >> 1), threshold, 1.25f};
}

bool near(const char* what, double found, double expected) {
  if (std::fabs(found - expected) <= 1e-4 * (1 + std::fabs(expected))) return true;
  std::printf("%s: %.9g, not %.9g\n", what, found, expected);
  return false;
}

bool near(const char* what, const std::vector<float>& found, const Row& expected) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (!near(what, found[i], expected[i])) return false;
  }
  return true;
}

bool one_dropout(Random& random) {
  const int64_t columns = 1 + below(random, below(random, 4) == 0 ? 3000 : 40), rows = below(random, 30);
  const Dropped mask = random_mask(random, rows, columns, dgi::cpu::kStreamDropout);
  const std::vector<float> x = uniform(random, rows * columns), residual = uniform(random, rows * columns);
  const bool adds = below(random, 2) == 0;
  std::vector<float> out(rows * columns);
  dgi::cpu::dropout(mask, x.data(), adds ? residual.data() : nullptr, out.data());
  Row expected(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    expected[i] = factor_of(mask, i / columns, i % columns) * x[i] + (adds ? residual[i] : 0);
  }
  return near("dropout", out, expected);
}

// All of forward and backward by the formula.
struct Expected {
  Row out, dq, dk, dv;

  Expected(const Attention& in, const float* dout)
      : out(in.batch * in.queries * in.heads * in.head_dim), dq(size(in, in.queries, in.q_stride)),
        dk(size(in, in.slots, in.kv_stride)), dv(dk.size()) {
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t h = 0; h < in.heads; ++h) {
        for (int64_t t = 0; t < in.queries; ++t) one_query(in, dout, b, h, t);
      }
    }
  }

  // Rows are `stride` apart, but for what lies behind the last one's heads.
  static int64_t size(const Attention& in, int64_t rows, int64_t stride) {
    return in.batch * rows == 0 ? 0 : (in.batch * rows - 1) * stride + in.heads * in.head_dim;
  }

  void one_query(const Attention& in, const float* dout, int64_t b, int64_t h, int64_t t) {
    const int64_t at = h * in.head_dim, query = (b * in.queries + t) * in.q_stride + at;
    const int64_t to = (b * in.queries + t) * in.heads * in.head_dim + at;
    const double scale = 1 / std::sqrt(static_cast<double>(in.head_dim));
    Row p(in.slots), d_p(in.slots), kept(in.slots);
    double sum = 0, mean = 0;
    const auto slot = [&](int64_t s) { return (b * in.slots + s) * in.kv_stride + at; };
    for (int64_t s = 0; s < in.slots; ++s) {
      if ((in.causal && s > t) || (in.mask != nullptr && !in.mask[b * in.slots + s])) continue;
      double score = 0;
      for (int64_t d = 0; d < in.head_dim; ++d) score += static_cast<double>(in.q[query + d]) * in.k[slot(s) + d];
      sum += p[s] = std::exp(scale * score);
    }
    for (int64_t s = 0; s < in.slots; ++s) {
      kept[s] = factor_of(in.dropped, (b * in.heads + h) * in.queries + t, s);
      p[s] = sum == 0 ? 0 : p[s] / sum;
      for (int64_t d = 0; d < in.head_dim; ++d) {
        out[to + d] += p[s] * kept[s] * in.v[slot(s) + d];
        dv[slot(s) + d] += p[s] * kept[s] * dout[to + d];
        d_p[s] += kept[s] * dout[to + d] * in.v[slot(s) + d];
      }
      mean += p[s] * d_p[s];
    }
    for (int64_t s = 0; s < in.slots; ++s) {
      const double d_score = scale * p[s] * (d_p[s] - mean);
      for (int64_t d = 0; d < in.head_dim; ++d) {
        dq[query + d] += d_score * in.k[slot(s) + d];
        dk[slot(s) + d] += d_score * in.q[query + d];
      }
    }
  }
};

bool one_attention(Random& random) {
  Attention in{};
  in.batch = below(random, 4), in.heads = 1 + below(random, 3), in.head_dim = 1 + below(random, 20);
  in.queries = 1 + below(random, 20), in.slots = 1 + below(random, 40), in.causal = below(random, 2) == 0;
  in.q_stride = in.heads * in.head_dim + below(random, 5), in.kv_stride = in.heads * in.head_dim + below(random, 5);
  const int64_t queries = Expected::size(in, in.queries, in.q_stride),
                slots = Expected::size(in, in.slots, in.kv_stride);
  const std::vector<float> q = uniform(random, queries), k = uniform(random, slots), v = uniform(random, slots);
  const std::vector<float> dout = uniform(random, in.batch * in.queries * in.heads * in.head_dim);
  in.q = q.data(), in.k = k.data(), in.v = v.data();
  const auto mask = std::make_unique<bool[]>(in.batch * in.slots);
  for (int64_t i = 0; i < in.batch * in.slots; ++i) mask[i] = below(random, 3) != 0;
  in.mask = below(random, 3) == 0 ? nullptr : mask.get();
  in.dropped = random_mask(random, in.batch * in.heads * in.queries, in.slots, dgi::cpu::kStreamAttention);
  std::vector<float> out(dout.size()), dq(queries), dk(slots), dv(slots);
  dgi::cpu::attention(in, out.data());
  dgi::cpu::attention_backward(in, dout.data(), dq.data(), dk.data(), dv.data());
  const Expected expected(in, dout.data());
  return near("attention", out, expected.out) && near("dq", dq, expected.dq) && near("dk", dk, expected.dk)
         && near("dv", dv, expected.dv);
}

}  // namespace

int main(int argc, char** argv) {
  return driver::run(argc, argv, [](Random& random) { return one_dropout(random) && one_attention(random); });
}
