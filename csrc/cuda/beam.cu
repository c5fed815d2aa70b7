// Beam steps on CUDA, given logits: two launches, or three, whose shapes follow from those of the tensors alone, so
// that a whole search is one graph. beam_parents.h and beam_children.h hold the kernels.
//
// Bytes: the logits once (B M K), and of each child 2 or 4 for its token and 2 or 4 for its logit from the second-level
// cache. Instructions of the machine code are listed by `make gpu-code`.
//
// Not yet run on a GPU. Its logic runs on the CPU in the tests, thread by thread.
#include "cuda/beam_cuda.h"

#include "cuda/beam_step.h"

namespace dgi::cuda {
namespace {

template <class Stored, class Token>
const char* step_on(const BeamStep<Token>& step, const Logits& logits, const BeamOutput& out, void* scratch,
                    void* stream) {
  const LogitRows<Stored> rows{static_cast<const Stored*>(logits.data),
                               step.width,
                               logits.codes,
                               logits.request_stride,
                               logits.beam_stride,
                               logits.code_stride,
                               nullptr,
                               nullptr};
  return launch_step(step, rows, out, scratch, stream);
}

}  // namespace

size_t beam_scratch_bytes(int64_t requests, int64_t width, int64_t num_beams, int64_t max_degree, int64_t codes) {
  constexpr int64_t kKey = sizeof(uint64_t);
  const int64_t parents = requests * width * static_cast<int64_t>(sizeof(Parent));
  const int64_t sliced = all_slices(requests, width, num_beams, most_children(max_degree, codes))
                         * slice_room(num_beams) * kKey;
  const int64_t wide = room_for(num_beams) * kKey + (width + 1) * static_cast<int64_t>(sizeof(uint32_t));
  return static_cast<size_t>(parents + (is_wide(width, num_beams) ? requests * wide : sliced));
}

template <class Token>
const char* beam_step(const BeamStep<Token>& step, const Logits& logits, const BeamOutput& out, void* scratch,
                      void* stream) {
  if (const char* reason = why_not(step, logits.codes)) return reason;
  if (step.requests == 0) return nullptr;
  switch (logits.dtype) {
    case Float::kFloat32: return step_on<float>(step, logits, out, scratch, stream);
    case Float::kBFloat16: return step_on<BFloat16>(step, logits, out, scratch, stream);
    case Float::kFloat16: return step_on<Float16>(step, logits, out, scratch, stream);
  }
  return "an unknown dtype";
}

template const char* beam_step(const BeamStep<int16_t>&, const Logits&, const BeamOutput&, void*, void*);
template const char* beam_step(const BeamStep<int32_t>&, const Logits&, const BeamOutput&, void*, void*);

}  // namespace dgi::cuda
