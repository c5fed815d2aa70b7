// Runs the threads of a CUDA block on the CPU, so that the logic of a kernel can be tested without a GPU.
//
// Every thread is a fiber. A barrier or a warp collective switches to another one, chosen at random; so does now and
// then an access to shared memory. Blocks run one after the other, in random order. What a GPU would leave undefined
// is a Fault:
//   - a barrier that not every thread of the block reaches, or that threads reach at different places;
//   - a warp collective whose mask names a lane that does not exist, has returned, waits elsewhere for ever or has
//     another mask, or leaves out the caller; a shuffle that reads a lane outside the mask;
//   - an index outside a shared array, a shared element read before it is written, more shared memory than a block has;
//   - two threads that access one shared element, at least one of them writing, with no barrier between.
//
// Global memory is plain memory: run under AddressSanitizer, or with guard pages, to check its bounds.
#pragma once

#include "fibers/atomics.h"
#include "fibers/block.h"
#include "fibers/language.h"
#include "fibers/launch.h"
#include "fibers/shared.h"
#include "fibers/warp.h"
