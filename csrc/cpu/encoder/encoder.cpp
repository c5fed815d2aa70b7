// A transformer encoder on the CPU, all layers for a few requests at a time, so that between two maps nothing leaves
// the cache.
//
//   x += A_o attention(A_i norm(x))     x += F_o gelu(F_i norm(x))
//
// The places of all sequences stand side by side in panels, one to a lane (cpu/shared/transformer_panel.h). A layer
// goes over the panels of its requests twice: for the keys and values, which all places of a request attend to, and for
// the rest. With D the dimension and S the length, a place costs 4 D^2 + 8 D^2 multiply-adds for each layer and 2 S D.
#include "cpu/encoder/encoder_cpu.h"

#include <algorithm>

#include "cpu/shared/host.h"
#include "cpu/shared/isa.h"
#include "cpu/shared/transformer_panel.h"

namespace dgi::cpu {
namespace {

constexpr int64_t kAtOnce = 16;  // requests whose panels a thread fills together; a request alone leaves lanes empty

// What a thread needs for its requests: `rows` places in panels of `lanes`.
struct Scratch {
  Buffer<float> x, queries, keys_values, normed, wide, scores, mixed;

  Scratch(const Sequences& all, const std::vector<EncoderLayer>& layers, int64_t rows, int64_t lanes)
      : x(make_buffer<float>(padded(rows, lanes) * all.dim)),
        queries(make_buffer<float>(padded(rows, lanes) * all.dim)), keys_values(make_buffer<float>(rows * 2 * all.dim)),
        normed(make_buffer<float>(all.dim * lanes)), wide(make_buffer<float>(widest(all, layers) * lanes)),
        scores(make_buffer<float>(all.length * lanes)), mixed(make_buffer<float>(all.dim * lanes)) {}

  static int64_t padded(int64_t rows, int64_t lanes) { return (rows + lanes - 1) / lanes * lanes; }

  static int64_t widest(const Sequences& all, const std::vector<EncoderLayer>& layers) {
    int64_t most = 2 * all.dim;
    for (const EncoderLayer& layer : layers) most = std::max(most, layer.feed_in.out);
    return most;
  }
};

// The rows [first, first + count) of a thread's requests, in one panel.
template <class Isa, int kOut, int kWidth, int kLanes>
class Panel {
  static constexpr bool kFused = Isa::value;

 public:
  Panel(const Sequences& own, int64_t first, int64_t count, Scratch& scratch)
      : own_(own), first_(first), count_(count), dim_(own.dim), scratch_(scratch), x_(scratch.x.get() + first * dim_),
        queries_(scratch.queries.get() + first * dim_) {}

  DGI_ALWAYS_INLINE inline void read() {
    const float* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)  // a lane without a row repeats the last one's
      rows[lane] = own_.states + (first_ + std::min<int64_t>(lane, count_ - 1)) * dim_;
    read_rows<kLanes>(rows, dim_, x_);
  }

  DGI_ALWAYS_INLINE inline void make_queries_keys_values(const EncoderLayer& layer) {
    float *const normed = scratch_.normed.get(), *const wide = scratch_.wide.get();
    normalise<kFused, kLanes>(layer.self_norm, own_.eps, dim_, x_, normed);
    apply<Isa, Emit::kStore, kOut, kLanes>(layer.query, normed, queries_);
    apply<Isa, Emit::kStore, kOut, kLanes>(layer.key_value, normed, wide);
    write_rows<kLanes>(wide, 2 * dim_, count_, scratch_.keys_values.get() + first_ * 2 * dim_, 2 * dim_);
  }

  DGI_ALWAYS_INLINE inline void attend_and_feed(const EncoderLayer& layer) {
    float *const normed = scratch_.normed.get(), *const wide = scratch_.wide.get();
    const Attended places{scratch_.keys_values.get(), own_.mask, own_.length, own_.length, dim_, own_.heads};
    attend<Isa, kOut, kWidth, kLanes>(places, first_, count_, queries_, scratch_.scores.get(), scratch_.mixed.get(),
                                      normed);
    apply<Isa, Emit::kAdd, kOut, kLanes>(layer.self_out, normed, x_);
    normalise<kFused, kLanes>(layer.feed_norm, own_.eps, dim_, x_, normed);
    apply<Isa, Emit::kGelu, kOut, kLanes>(layer.feed_in, normed, wide);
    apply<Isa, Emit::kAdd, kOut, kLanes>(layer.feed_out, wide, x_);
  }

  DGI_ALWAYS_INLINE inline void write(float* out) { write_rows<kLanes>(x_, dim_, count_, out + first_ * dim_, dim_); }

 private:
  const Sequences& own_;
  const int64_t first_, count_, dim_;
  Scratch& scratch_;
  float *const x_, *const queries_;  // (dim, kLanes), where those of `first_` rows before end
};

// Calls `visit` with every panel of a thread's requests.
template <class Fused, class Visit>
DGI_ALWAYS_INLINE inline void for_each_panel(Fused, const Sequences& own, Scratch& scratch, Visit visit) {
  constexpr int kWidth = Fused::kVectorBytes / static_cast<int>(sizeof(float));
  constexpr int kOut = Fused::kVectorRegisters / 4;  // sums of two registers each: half of all
  const int64_t rows = own.requests * own.length;
  for (int64_t first = 0; first < rows; first += 2 * kWidth) {
    const int64_t count = std::min<int64_t>(2 * kWidth, rows - first);
    if (count <= kWidth) {
      visit(Panel<Fused, 2 * kOut, kWidth, kWidth>(own, first, count, scratch));
    } else {
      visit(Panel<Fused, kOut, kWidth, 2 * kWidth>(own, first, count, scratch));
    }
  }
}

}  // namespace

void encoder_layers(const Sequences& sequences, const std::vector<EncoderLayer>& layers, float* out) {
  const int64_t length = sequences.length, dim = sequences.dim;
  if (length == 0) return;
  int64_t lanes = 0;
  with_best_instructions([&](auto fused)
                             DGI_ALWAYS_INLINE { lanes = 2 * fused.kVectorBytes / static_cast<int>(sizeof(float)); });
  parallel_for(sequences.requests, 1, [&](int64_t begin, int64_t end) {
    const int64_t at_once = std::min(kAtOnce, end - begin);
    Scratch scratch(sequences, layers, at_once * length, lanes);
    for (int64_t request = begin; request < end; request += at_once) {
      Sequences own = sequences;
      own.requests = std::min(at_once, end - request);
      own.states += request * length * dim, own.mask += request * length;
      with_best_instructions([&](auto fused) DGI_ALWAYS_INLINE {
        const auto each = [&](auto visit) DGI_ALWAYS_INLINE { for_each_panel(fused, own, scratch, visit); };
        each([](auto panel) DGI_ALWAYS_INLINE { panel.read(); });
        for (const EncoderLayer& layer : layers) {
          each([&](auto panel) DGI_ALWAYS_INLINE { panel.make_queries_keys_values(layer); });
          each([&](auto panel) DGI_ALWAYS_INLINE { panel.attend_and_feed(layer); });
        }
        each([&](auto panel) DGI_ALWAYS_INLINE { panel.write(out + request * length * dim); });
      });
    }
  });
}

}  // namespace dgi::cpu
