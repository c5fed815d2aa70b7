// Lexicographic ranking on CUDA, in one launch: a block a request.
//
// The block sorts the beams by score, drops a node that has come before, and lists how many items each leads to, and
// how many of those are allowed: after the beam with the k-th, and those that tie with it, no item can count. Of the
// others a warp takes one at a time, makes its cosine (D multiply-adds, twice: the norm comes with the product) and
// adds its key to a buffer, unless k better ones are known; a full buffer is sorted and cut to the best k.
// By a sum every item below the beams may count.
//
// Bytes: D elements for each item that may count, about k of them whatever the number of beams.
//
// Not yet run on a GPU. Its logic runs on the CPU in the tests, thread by thread.
#include "cuda/ranking_cuda.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cuda/block.h"
#include "cuda/device.h"
#include "cuda/select.h"
#include "cuda/warp_products.h"
#include "dgi/beam.h"

namespace dgi::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr uint32_t kEach = 4;  // items that a warp takes between two looks at the buffer
constexpr int64_t kSharedWidth = 512, kSharedK = 512;
constexpr uint32_t kSharedRoom = 2 * kSharedK;
constexpr float kDead = -std::numeric_limits<float>::infinity();

using Descending = CandidateKey<float>;

// Less is better: score (or sum) and cosine descending, then the id.
struct RankKey {
  uint64_t score_and_cosine;
  int64_t id;

  __device__ bool operator<(const RankKey& other) const {
    return score_and_cosine != other.score_and_cosine ? score_and_cosine < other.score_and_cosine : id < other.id;
  }
};

__device__ uint32_t descending_bits(float x) { return static_cast<uint32_t>(Descending::of(x, 0) >> 32); }

// What the requests of one launch may find, and the levels below the beams, from the host's tables.
struct RankedSets : RequestSets {
  static constexpr int kLevels = 64;

  Offsets base_below[kLevels], delta_below[kLevels];
  int16_t base_levels, delta_levels;

  RankedSets(const LowerLevels& base, const LowerLevels& delta)
      : base_levels(static_cast<int16_t>(base.count)), delta_levels(static_cast<int16_t>(delta.count)) {
    std::copy_n(base.starts, base.count, base_below);
    std::copy_n(delta.starts, delta.count, delta_below);
  }

  __device__ LowerLevels base() const { return {base_below, base_levels}; }
  __device__ LowerLevels delta() const { return {delta_below, delta_levels}; }
};

struct RankingView {
  ItemLevels base, delta;
  Anchors anchors;
  int64_t first, width, k, dim, rows;
  View<int64_t> nodes;
  View<float> scores;
  int64_t query_stride, item_stride;
  float eps;
  RankOrder<float> order;
  RankingOutput out;
};

// The places of the items below a node in both parts.
struct Below {
  Range base, delta;

  __device__ uint32_t size() const { return static_cast<uint32_t>(base.size() + delta.size()); }
};

__device__ Below below(const RankingView& in, const RankedSets& sets, int64_t node) {
  Below found;
  int64_t delta_node = node - in.base.nodes;
  if (delta_node < 0) {
    found.base = sets.base().items(node);
    delta_node = in.anchors.twin_of(node);
  }
  if (delta_node >= 0) found.delta = sets.delta().items(delta_node);
  return found;
}

__device__ uint32_t count_allowed(const ItemSet& set, const Range& range) {
  if (set.words == nullptr || range.size() == 0) return static_cast<uint32_t>(range.size());
  return static_cast<uint32_t>(set.rank(range.end) - set.rank(range.first));
}

// The live beams by score, then number, each as a key; returns how many.
template <class Keys>
__device__ uint32_t list_beams(const RankingView& in, int64_t request, Keys keys) {
  DGI_SHARED(uint32_t, live, 1);
  if (threadIdx.x == 0) live[0] = 0;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < in.width; m += kThreads) {
    const int64_t node = in.nodes.at(request, m);
    const float score = in.scores.at(request, m);
    if (node < 0 || node >= in.base.nodes + in.delta.nodes || !(score > kDead)) continue;
    keys[atomicAdd(live + 0, 1u)] = Descending::of(score, static_cast<uint32_t>(m));
  }
  __syncthreads();
  const uint32_t count = live[0];
  sort_keys(count, keys);
  return count;
}

// starts[r], of the beams in order: the number of the first item below. Returns how many items there are before no
// more can count.
template <class Keys, class Starts>
__device__ uint32_t list_items(const RankingView& in, const RankedSets& sets, const AllowedItems& allowed,
                               int64_t request, Keys keys, uint32_t beams, Starts starts) {
  DGI_SHARED(uint32_t, last, 1);  // the beam with the k-th item
  const uint32_t wanted = static_cast<uint32_t>(in.k);
  if (threadIdx.x == 0) last[0] = beams == 0 ? 0 : beams - 1;
  uint32_t items = 0, allowed_items = 0;
  for (uint32_t first = 0; first < beams; first += kThreads) {
    const uint32_t r = first + threadIdx.x;
    uint32_t own = 0, own_allowed = 0;
    if (r < beams) {
      const int64_t node = in.nodes.at(request, Descending::slot(keys[r]));
      bool is_new = true;
      for (uint32_t earlier = 0; earlier < r && is_new; ++earlier) {
        is_new = in.nodes.at(request, Descending::slot(keys[earlier])) != node;
      }
      if (is_new) {
        const Below found = below(in, sets, node);
        own = found.size();
        own_allowed = count_allowed(allowed.base, found.base) + count_allowed(allowed.delta, found.delta);
      }
    }
    const Scan scan = scan_block(own), allowed_scan = scan_block(own_allowed);
    const uint32_t through = allowed_items + allowed_scan.before;
    if (r < beams) starts[r] = items + scan.before;
    if (through < wanted && wanted <= through + own_allowed) last[0] = r;  // one thread at most
    items += scan.whole, allowed_items += allowed_scan.whole;
  }
  if (threadIdx.x == 0) starts[beams] = items;
  __syncthreads();
  if (beams == 0) return 0;
  if (in.order.by_sum) return items;  // any may be the best
  uint32_t end = last[0];
  const uint32_t score = static_cast<uint32_t>(uint64_t{keys[end]} >> 32);
  while (end < beams && static_cast<uint32_t>(uint64_t{keys[end]} >> 32) == score) ++end;
  return starts[end];
}

template <class Stored, class Keys, class Starts, class Buffer>
__device__ void rank(const RankingView& in, const RankedSets& sets, const Stored* all_queries, const Stored* vectors,
                     Keys keys, Starts starts, Buffer buffer, uint32_t room) {
  DGI_SHARED(uint32_t, held, 1);
  const int64_t request = in.first + blockIdx.x;
  const AllowedItems* const given = sets.of(blockIdx.x);
  const AllowedItems allowed = given == nullptr ? AllowedItems{} : *given;
  const uint32_t beams = list_beams(in, request, keys);
  const uint32_t total = list_items(in, sets, allowed, request, keys, beams, starts);
  const Stored* const query = all_queries + request * in.query_stride;
  const float query_factor = reciprocal_norm(warp_products(query, query, in.dim).square, in.eps);
  const uint32_t warp = threadIdx.x / kWarp, wanted = static_cast<uint32_t>(in.k);

  // The buffer holds `count` keys; of those that it has held, the best `wanted` are there.
  uint32_t count = 0;
  RankKey worst{kNoKey, 0};  // that counts, once `wanted` are known
  const auto sort = [&] {
    const uint32_t whole = count == 0 ? 0 : std::bit_ceil(count);
    for (uint32_t i = count + threadIdx.x; i < whole; i += kThreads) buffer[i] = RankKey{kNoKey, 0};
    sort_block(
        whole,
        [&](uint32_t i, uint32_t j) { return static_cast<RankKey>(buffer[i]) < static_cast<RankKey>(buffer[j]); },
        [&](uint32_t i, uint32_t j) {
          const RankKey first = buffer[i], second = buffer[j];
          buffer[i] = second, buffer[j] = first;
        });
    count = count < wanted ? count : wanted;
  };
  const auto add = [&](uint32_t i) {  // the whole warp, one item
    uint32_t r = 0, high = beams;  // the last beam that starts at or before i: those without items are passed over
    while (high - r > 1) {
      const uint32_t middle = r + (high - r) / 2, start = starts[middle];
      if (start <= i) {
        r = middle;
      } else {
        high = middle;
      }
    }
    const uint64_t beam = keys[r];
    const Below found = below(in, sets, in.nodes.at(request, Descending::slot(beam)));
    const uint32_t start = starts[r];
    int64_t place = i - start;
    const bool in_delta = place >= found.base.size();
    place += in_delta ? found.delta.first - found.base.size() : found.base.first;
    if (!(in_delta ? allowed.delta : allowed.base).contains(place)) return;
    const int64_t id = (in_delta ? in.delta : in.base).id(place);
    if (id < 0 || id >= in.rows) return;
    const Products products = warp_products(query, vectors + id * in.item_stride, in.dim);
    const float cosine = products.cross * query_factor * reciprocal_norm(products.square, in.eps);
    const float known = cosine == cosine ? cosine : -1;
    uint64_t rank = beam & ~uint64_t{0xFFFFFFFF};
    if (in.order.by_sum) {
      float logs = 0;
      if (in.order.shares) {
        logs = logf(
            static_cast<float>(count_allowed(allowed.base, found.base) + count_allowed(allowed.delta, found.delta)));
      }
      rank = uint64_t{descending_bits(in.order.sum(Descending::score(beam), known, logs))} << 32;
    }
    const RankKey key{rank | descending_bits(known), id};
    if (threadIdx.x % kWarp == 0 && key < worst) buffer[atomicAdd(held + 0, 1u)] = key;
  };

  for (uint32_t first = 0; first < total; first += kEach * kWarps) {
    if (count + kEach * kWarps > room) {
      sort();
      if (count == wanted) worst = buffer[wanted - 1];
    }
    __syncthreads();  // all have read `held`, and the buffer
    if (threadIdx.x == 0) held[0] = count;
    __syncthreads();
    for (uint32_t j = 0; j < kEach; ++j) {
      const uint32_t i = first + j * kWarps + warp;
      if (i < total) add(i);
    }
    __syncthreads();
    count = held[0];
  }
  sort();
  for (uint32_t i = threadIdx.x; i < wanted; i += kThreads) {
    const int64_t at = request * in.k + i;
    const bool is_there = i < count;
    RankKey key{0, -1};
    if (is_there) key = buffer[i];
    in.out.items[at] = key.id;
    in.out.scores[at] = is_there ? Descending::score(key.score_and_cosine) : kDead;
    in.out.cosines[at] = is_there ? Descending::score(key.score_and_cosine << 32) : -1;
  }
}

template <class Stored>
__global__ void __launch_bounds__(kThreads, 1)
    rank_kernel(const __grid_constant__ RankingView in, const __grid_constant__ RankedSets sets, const Stored* query,
                const Stored* vectors) {
  DGI_SHARED(uint64_t, keys, kSharedWidth);
  DGI_SHARED(uint32_t, starts, kSharedWidth + 1);
  DGI_SHARED(RankKey, buffer, kSharedRoom);
  rank(in, sets, query, vectors, keys, starts, buffer, kSharedRoom);
}

// The same with everything in global memory, for more beams or items.
template <class Stored>
__global__ void __launch_bounds__(kThreads, 1)
    rank_wide_kernel(const __grid_constant__ RankingView in, const __grid_constant__ RankedSets sets,
                     const Stored* query, const Stored* vectors, RankKey* buffers, uint32_t room, uint64_t* all_keys,
                     uint32_t width, uint32_t* all_starts) {
  const int64_t request = in.first + blockIdx.x;
  rank(in, sets, query, vectors, all_keys + request * width, all_starts + request * (width + 1),
       buffers + request * room, room);
}

bool is_wide(int64_t width, int64_t k) { return width > kSharedWidth || k > kSharedK; }

// Powers of two, as the sorts fill up to one.
uint32_t room_for(int64_t k) { return std::max<uint32_t>(kSharedRoom, std::bit_ceil(static_cast<uint32_t>(2 * k))); }
uint32_t width_for(int64_t width) { return std::bit_ceil(static_cast<uint32_t>(std::max<int64_t>(width, 1))); }

template <class Stored>
void launch_on(const Ranking& in, const RankingOutput& out, void* scratch, void* stream) {
  RankingView view{in.base,   in.delta,        in.anchors,     0,      in.width, in.k, in.dim, in.rows, in.nodes,
                   in.scores, in.query_stride, in.item_stride, in.eps, in.order, out};
  const auto* const query = static_cast<const Stored*>(in.query);
  const auto* const vectors = static_cast<const Stored*>(in.items);
  RankedSets ranked(in.base.below, in.delta.below);
  for_requests_with(ranked, in.allowed, in.requests, [&](const RankedSets& sets, int64_t first, int64_t count) {
    view.first = first;
    const unsigned grid = static_cast<unsigned>(count);
    if (!is_wide(in.width, in.k)) {
      launch(rank_kernel<Stored>, grid, kThreads, 0, stream, view, sets, query, vectors);
      return;
    }
    const uint32_t room = room_for(in.k), width = width_for(in.width);
    auto* const buffers = static_cast<RankKey*>(scratch);
    auto* const keys = reinterpret_cast<uint64_t*>(buffers + in.requests * room);
    auto* const starts = reinterpret_cast<uint32_t*>(keys + in.requests * width);
    launch(rank_wide_kernel<Stored>, grid, kThreads, 0, stream, view, sets, query, vectors, buffers, room, keys, width,
           starts);
  });
}

}  // namespace

size_t ranking_scratch_bytes(int64_t requests, int64_t width, int64_t k) {
  if (!is_wide(width, k)) return 0;
  const int64_t beams = width_for(width);
  return static_cast<size_t>(requests)
         * (room_for(k) * sizeof(RankKey) + static_cast<size_t>(beams) * sizeof(uint64_t)
            + static_cast<size_t>(beams + 1) * sizeof(uint32_t));
}

const char* rank_candidates(const Ranking& in, const RankingOutput& out, void* scratch, void* stream) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (in.requests == 0) return nullptr;
  if (in.width >= kMost / 4 || in.k >= kMost / 4) return "more than 2**29 beams or items of one request";
  if (in.requests >= kMost) return "more than 2**31 requests";
  if (std::max(in.base.below.count, in.delta.below.count) > RankedSets::kLevels) {
    return "tries are ranked down to 64 levels";
  }
  switch (in.dtype) {
    case Float::kFloat32: launch_on<float>(in, out, scratch, stream); break;
    case Float::kBFloat16: launch_on<BFloat16>(in, out, scratch, stream); break;
    case Float::kFloat16: launch_on<Float16>(in, out, scratch, stream); break;
  }
  return launch_error();
}

}  // namespace dgi::cuda
