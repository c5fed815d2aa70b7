// Random steps of a decoder in C++, against the formula in float64; built with sanitizers by test_decoder.py. Every
// array has exactly its size, so that a read or write beyond it is seen.
#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <vector>

#include "cpu/decoder/decoder_cpu.h"
#include "driver.h"

namespace {

using dgi::cpu::DecoderLayer;
using dgi::cpu::DecoderStep;
using dgi::cpu::LayerNorm;
using dgi::cpu::LinearMap;
using driver::below;
using driver::Random;
using Row = std::vector<double>;

struct Arrays {
  Random& random;
  std::deque<std::vector<float>> kept;

  const float* uniform(int64_t count, double size) {
    std::vector<float>& made = kept.emplace_back(count);
    for (float& value : made) value = static_cast<float>(size * (static_cast<double>(below(random, 2001)) / 1000 - 1));
    return made.data();
  }

  LinearMap map(int64_t out, int64_t in) {
    return {uniform(out * in, 1.5 / std::sqrt(static_cast<double>(in))), uniform(out, 0.5), out, in};
  }
  LayerNorm norm(int64_t dim) { return {uniform(dim, 1.5), uniform(dim, 0.5)}; }
};

Row mapped(const LinearMap& map, const Row& x) {
  Row out(map.out);
  for (int64_t i = 0; i < map.out; ++i) {
    out[i] = map.bias[i];
    for (int64_t j = 0; j < map.in; ++j) out[i] += static_cast<double>(map.weight[i * map.in + j]) * x[j];
  }
  return out;
}

Row normalise(const LayerNorm& norm, double eps, const Row& x) {
  const double size = static_cast<double>(x.size());
  double mean = 0, square = 0;
  for (const double value : x) mean += value / size;
  for (const double value : x) square += (value - mean) * (value - mean) / size;
  Row out(x.size());
  for (size_t d = 0; d < x.size(); ++d)
    out[d] = (x[d] - mean) / std::sqrt(square + eps) * norm.weight[d] + norm.bias[d];
  return out;
}

// Of one query to slots, each 2 dim numbers, keys before values; 0 where there is none.
Row attend(const double* query, const std::vector<const float*>& slots, int64_t dim, int64_t heads) {
  const int64_t head_dim = dim / heads;
  Row out(dim);
  for (int64_t head = 0; head < heads; ++head) {
    Row weights;
    double sum = 0;
    for (const float* slot : slots) {
      double score = 0;
      for (int64_t d = head * head_dim; d < (head + 1) * head_dim; ++d) score += query[d] * slot[d];
      sum += weights.emplace_back(std::exp(score / std::sqrt(static_cast<double>(head_dim))));
    }
    for (size_t s = 0; s < slots.size(); ++s) {
      for (int64_t d = head * head_dim; d < (head + 1) * head_dim; ++d) out[d] += weights[s] / sum * slots[s][dim + d];
    }
  }
  return out;
}

void add(Row& x, const Row& more) {
  for (size_t d = 0; d < x.size(); ++d) x[d] += more[d];
}

bool near(const char* what, double found, double expected) {
  if (std::fabs(found - expected) <= 1e-3 * (1 + std::fabs(expected))) return true;
  std::printf("%s: %.9g, not %.9g\n", what, found, expected);
  return false;
}

// One beam through all layers by the formula.
bool is_right(const DecoderStep& step, int64_t request, int64_t beam, const float* out, const float* left) {
  const int64_t dim = step.dim, row = request * step.beams + beam;
  Row x(step.states + row * dim, step.states + (row + 1) * dim);
  for (size_t l = 0; l < step.layers.size(); ++l) {
    const DecoderLayer& layer = step.layers[l];
    const int64_t number = static_cast<int64_t>(l);
    const Row packed = mapped(layer.self_in, normalise(layer.self_norm, step.eps, x));
    const float* const own = left + (number * step.requests * step.beams + row) * 2 * dim;
    std::vector<const float*> prefix, memory;
    for (int64_t d = 0; d < 2 * dim; ++d) {
      if (!near("keys and values", own[d], packed[dim + d])) return false;
    }
    for (const auto& position : step.past) {
      const int64_t at = (number * step.requests + request) * position.beams + position.ancestors[row];
      prefix.push_back(position.keys_values + at * 2 * dim);
    }
    prefix.push_back(own);
    add(x, mapped(layer.self_out, attend(packed.data(), prefix, dim, step.heads)));
    for (int64_t s = 0; s < step.slots; ++s) {
      if (step.mask[request * step.slots + s]) memory.push_back(layer.memory + (request * step.slots + s) * 2 * dim);
    }
    const Row query = mapped(layer.query, normalise(layer.cross_norm, step.eps, x));
    add(x, mapped(layer.cross_out, attend(query.data(), memory, dim, step.heads)));
    Row hidden = mapped(layer.feed_in, normalise(layer.feed_norm, step.eps, x));
    for (double& value : hidden) value *= 0.5 * (1 + std::erf(value / std::sqrt(2.0)));
    add(x, mapped(layer.feed_out, hidden));
  }
  for (int64_t d = 0; d < dim; ++d) {
    if (!near("states", out[row * dim + d], x[d])) return false;
  }
  return true;
}

bool one_case(Random& random) {
  Arrays arrays{random, {}};
  DecoderStep step{};
  step.heads = 1 + below(random, 3);
  step.dim = step.heads * (1 + below(random, 8));
  step.requests = below(random, 4), step.beams = 1 + below(random, below(random, 2) == 0 ? 4 : 70);
  step.slots = 1 + below(random, 9);
  step.eps = 0.1f;  // a norm over few numbers would otherwise multiply their rounding
  const int64_t layers = 1 + below(random, 2), rows = step.requests * step.beams, dim = step.dim;
  step.states = arrays.uniform(rows * dim, 2);
  const auto mask = std::make_unique<bool[]>(step.requests * step.slots);
  for (int64_t i = 0; i < step.requests * step.slots; ++i) mask[i] = below(random, 3) != 0;
  step.mask = mask.get();
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t hidden = 1 + below(random, 3 * dim);
    DecoderLayer layer{};
    layer.self_norm = arrays.norm(dim), layer.cross_norm = arrays.norm(dim), layer.feed_norm = arrays.norm(dim);
    layer.self_in = arrays.map(3 * dim, dim), layer.self_out = arrays.map(dim, dim);
    layer.query = arrays.map(dim, dim), layer.cross_out = arrays.map(dim, dim);
    layer.feed_in = arrays.map(hidden, dim), layer.feed_out = arrays.map(dim, hidden);
    layer.memory = arrays.uniform(step.requests * step.slots * 2 * dim, 1);
    step.layers.push_back(layer);
  }
  std::deque<std::vector<int64_t>> ancestors;
  for (int64_t p = below(random, 4); p > 0; --p) {
    const int64_t beams = 1 + below(random, 40);
    for (int64_t& of : ancestors.emplace_back(rows)) of = below(random, beams);
    step.past.push_back({arrays.uniform(layers * step.requests * beams * 2 * dim, 1), beams, ancestors.back().data()});
  }
  std::vector<float> out(rows * dim), left(layers * rows * 2 * dim);
  dgi::cpu::decoder_step(step, out.data(), left.data());
  for (int64_t request = 0; request < step.requests; ++request) {
    for (int64_t beam = 0; beam < step.beams; ++beam) {
      if (!is_right(step, request, beam, out.data(), left.data())) return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, one_case); }
