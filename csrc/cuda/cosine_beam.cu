// Beam steps on CUDA for a head's cosine logits, scale h^ . e^, which are never formed as a tensor.
//
// Where the log-sum-exp over all codes is wanted, cuBLAS makes the raw products h . e in float32, of as many requests
// at a time as stay in the second-level cache, and the kernels of a beam step take them with a factor for each row and
// each code (factors_kernel): one multiplication more a logit, no pass of its own. Where it is not, children_kernel
// makes the children's logits alone, a warp a child: D elements of a code and of h, twice D multiply-adds, for the
// norm comes with the product.
//
// Not yet run on a GPU. Its logic runs on the CPU in the tests, thread by thread.
#include "cuda/beam_step.h"
#include "cuda/warp_products.h"

namespace dgi::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

template <class Stored>
__global__ void __launch_bounds__(kWarps* kWarp)
    factors_kernel(const Stored* h, const Stored* codebook, int64_t codes, int64_t rows, int64_t dim,
                   const float* scale, float eps, float* factors) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (i >= codes + rows) return;
  const Stored* const x = i < codes ? codebook + i * dim : h + (i - codes) * dim;
  const float factor = reciprocal_norm(warp_products(x, x, dim).square, eps);
  if (threadIdx.x % kWarp == 0) factors[i] = i < codes ? factor : *scale * factor;
}

template <class Stored, class Token, class Sets>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    children_kernel(const __grid_constant__ StepView<Token> step, const Stored* h, const Stored* codebook,
                    int64_t codes, int64_t dim, const float* scale, float eps, const __grid_constant__ Sets sets,
                    float* logits) {
  const int64_t in_launch = blockIdx.x / step.width, request = step.first + in_launch, beam = blockIdx.x % step.width;
  const int64_t row = request * step.width + beam;
  Parent parent = step.parent(request, beam);
  if (parent.count() > 0) {  // one decision for the block
    const Stored* const x = h + row * dim;
    const float factor = *scale * reciprocal_norm(warp_products(x, x, dim).square, eps);
    RunningSum own;
    for_children(step.trie, parent, sets, in_launch, threadIdx.x / kWarp, kWarps, [&](int32_t token) {
      if (token >= codes) return;
      const Products products = warp_products(x, codebook + token * dim, dim);
      if (threadIdx.x % kWarp != 0) return;
      const float logit[1] = {finite_or_dead(products.cross * factor * reciprocal_norm(products.square, eps))};
      logits[row * codes + token] = logit[0];
      own.add(logit);
    });
    if (step.is_given()) {
      parent.normalizer = step.given(request, beam);
    } else if (step.normalize == Normalize::kChildren) {
      parent.normalizer = normalizer_of(own);
    }
  }
  if (threadIdx.x == 0) step.parents[row] = parent;
}

template <class Stored, class Token>
void launch_children(const BeamStep<Token>& step, const CosineHead& head, float* logits, const BeamOutput& out,
                     void* scratch, void* stream) {
  StepView<Token> view = view_of(step, scratch);
  const LogitRows<float> rows{logits, step.width, head.codes, step.width * head.codes, head.codes, 1, nullptr, nullptr};
  for_requests(step.allowed, step.requests, [&](const auto& sets, int64_t first, int64_t count) {
    using Sets = std::decay_t<decltype(sets)>;
    view.first = first;
    if (step.width > 0) {
      launch(children_kernel<Stored, Token, Sets>, static_cast<unsigned>(count * step.width), kWarps * kWarp, 0, stream,
             view, static_cast<const Stored*>(head.h), static_cast<const Stored*>(head.codebook), head.codes, head.dim,
             head.scale, head.eps, sets, logits);
    }
    launch_select(view, rows, sets, count, step, out, stream);
  });
}

// Calls f with a number of the type that `dtype` stands for.
template <class F>
void for_float(Float dtype, const F& f) {
  switch (dtype) {
    case Float::kFloat32: return f(float{});
    case Float::kBFloat16: return f(BFloat16{});
    case Float::kFloat16: return f(Float16{});
  }
}

}  // namespace

const char* cosine_factors(const CosineHead& head, int64_t rows, float* factors, void* stream) {
  const int64_t blocks = (head.codes + rows + kWarps - 1) / kWarps;
  if (blocks == 0) return nullptr;
  for_float(head.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    launch(factors_kernel<Stored>, static_cast<unsigned>(blocks), kWarps * kWarp, 0, stream,
           static_cast<const Stored*>(head.h), static_cast<const Stored*>(head.codebook), head.codes, rows, head.dim,
           head.scale, head.eps, factors);
  });
  return launch_error();
}

template <class Token>
const char* product_beam_step(const BeamStep<Token>& step, const float* products, int64_t codes,
                              const float* row_factors, const float* code_factors, const BeamOutput& out, void* scratch,
                              void* stream) {
  if (const char* reason = why_not(step, codes)) return reason;
  if (step.requests == 0) return nullptr;
  const LogitRows<float, true> rows{products, step.width, codes,       step.width * codes,
                                    codes,    1,          row_factors, code_factors};
  return launch_step(step, rows, out, scratch, stream);
}

template <class Token>
const char* children_beam_step(const BeamStep<Token>& step, const CosineHead& head, float* logits,
                               const BeamOutput& out, void* scratch, void* stream) {
  if (const char* reason = why_not(step, head.codes)) return reason;
  if (step.requests == 0) return nullptr;
  for_float(head.dtype,
            [&](auto stored) { launch_children<decltype(stored)>(step, head, logits, out, scratch, stream); });
  return launch_error();
}

#define DGI_INSTANTIATE(Token)                                                                                         \
  template const char* product_beam_step(const BeamStep<Token>&, const float*, int64_t, const float*, const float*,    \
                                         const BeamOutput&, void*, void*);                                             \
  template const char* children_beam_step(const BeamStep<Token>&, const CosineHead&, float*, const BeamOutput&, void*, \
                                          void*);
DGI_INSTANTIATE(int16_t)
DGI_INSTANTIATE(int32_t)
#undef DGI_INSTANTIATE

}  // namespace dgi::cuda
