// Random sequences through an encoder in C++, against the formula in float64; built with sanitizers by test_encoder.py.
// Every array has exactly its size, so that a read or write beyond it is seen.
#include <memory>

#include "cpu/encoder/encoder_cpu.h"
#include "transformer_driver.h"

namespace {

using dgi::cpu::EncoderLayer;
using dgi::cpu::Sequences;

// The places of one request through a layer by the formula.
void through(const EncoderLayer& layer, const Sequences& all, const bool* mask, std::vector<Row>& places) {
  std::vector<std::vector<float>> kept;  // keys and values, rounded as the kernel rounds them
  std::vector<Row> queries;
  for (const Row& x : places) {
    const Row normed = normalise(layer.self_norm, all.eps, x), both = mapped(layer.key_value, normed);
    queries.push_back(mapped(layer.query, normed));
    kept.emplace_back(both.begin(), both.end());
  }
  std::vector<const float*> slots;
  for (int64_t s = 0; s < all.length; ++s) {
    if (mask[s]) slots.push_back(kept[s].data());
  }
  for (int64_t s = 0; s < all.length; ++s) {
    add(places[s], mapped(layer.self_out, attend(queries[s].data(), slots, all.dim, all.heads)));
    feed(layer.feed_norm, all.eps, layer.feed_in, layer.feed_out, places[s]);
  }
}

bool one_case(Random& random) {
  Arrays arrays{random, {}};
  Sequences all{};
  all.heads = 1 + below(random, 3);
  all.dim = all.heads * (1 + below(random, 8));
  all.requests = below(random, 60), all.length = below(random, 2) == 0 ? 1 + below(random, 5) : below(random, 50);
  if (all.length > 20) all.requests = below(random, 4);
  all.eps = 0.1f;  // a norm over few numbers would otherwise multiply their rounding
  const int64_t rows = all.requests * all.length, dim = all.dim;
  all.states = arrays.uniform(rows * dim, 2);
  const auto mask = std::make_unique<bool[]>(rows);
  for (int64_t i = 0; i < rows; ++i) mask[i] = below(random, 3) != 0;
  all.mask = mask.get();
  std::vector<EncoderLayer> layers(1 + below(random, 2));
  for (EncoderLayer& layer : layers) {
    const int64_t hidden = 1 + below(random, 3 * dim);
    layer.self_norm = arrays.norm(dim), layer.feed_norm = arrays.norm(dim);
    layer.query = arrays.map(dim, dim), layer.key_value = arrays.map(2 * dim, dim);
    layer.self_out = arrays.map(dim, dim);
    layer.feed_in = arrays.map(hidden, dim), layer.feed_out = arrays.map(dim, hidden);
  }
  std::vector<float> out(rows * dim);
  dgi::cpu::encoder_layers(all, layers, out.data());
  for (int64_t request = 0; request < all.requests; ++request) {
    std::vector<Row> places;
    for (int64_t s = 0; s < all.length; ++s) {
      const float* const first = all.states + (request * all.length + s) * dim;
      places.emplace_back(first, first + dim);
    }
    for (const EncoderLayer& layer : layers) through(layer, all, all.mask + request * all.length, places);
    for (int64_t s = 0; s < all.length; ++s) {
      for (int64_t d = 0; d < dim; ++d) {
        if (!near("states", out[(request * all.length + s) * dim + d], places[s][d])) return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, one_case); }
