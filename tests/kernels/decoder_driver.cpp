// Random steps of a decoder in C++, against the formula in float64; built with sanitizers by test_decoder.py. Every
// array has exactly its size, so that a read or write beyond it is seen.
#include <memory>

#include "cpu/decoder/decoder_cpu.h"
#include "transformer_driver.h"

namespace {

using dgi::cpu::DecoderLayer;
using dgi::cpu::DecoderStep;

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
    feed(layer.feed_norm, step.eps, layer.feed_in, layer.feed_out, x);
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
