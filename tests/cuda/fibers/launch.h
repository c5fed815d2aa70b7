// A launch: blocks one after the other, in random order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "block.h"

namespace cuda_on_cpu {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            const Arguments&... arguments) {
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads) throw Fault("a block of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF) {
    throw Fault("a grid that cannot be launched");
  }
  if (shared_bytes > kMaxShared) throw Fault(std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  const std::function<void()> body = [&] { kernel(arguments...); };
  blockDim = block, gridDim = grid;
  for (size_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    Block(static_cast<unsigned>(threads), shared_bytes, body).run();
  }
}

}  // namespace cuda_on_cpu
