// Atomics, on shared and on global memory: on both another thread may come in between two of them.
#pragma once

#include "shared.h"

// Atomics return what was there before.
template <class T>
T* atomic_target(cuda_on_cpu::SharedPointer<T> target) {
  return target.atomic();
}
template <class T>
T* atomic_target(T* target) {
  cuda_on_cpu::Block::current()->give_way();
  return target;
}

template <class Pointer, class Next>
auto atomic_update(Pointer pointer, const Next& next) {
  auto* const target = atomic_target(pointer);
  const auto before = *target;
  *target = next(before);
  return before;
}

template <class Pointer, class T>
auto atomicAdd(Pointer pointer, T value) {
  return atomic_update(pointer, [=](auto before) { return before + value; });
}
template <class Pointer, class T>
auto atomicMax(Pointer pointer, T value) {
  return atomic_update(pointer, [=](auto before) { return value > before ? value : before; });
}
template <class Pointer, class T>
auto atomicMin(Pointer pointer, T value) {
  return atomic_update(pointer, [=](auto before) { return value < before ? value : before; });
}
template <class Pointer, class T>
auto atomicOr(Pointer pointer, T value) {
  return atomic_update(pointer, [=](auto before) { return before | value; });
}
template <class Pointer, class T>
auto atomicExch(Pointer pointer, T value) {
  return atomic_update(pointer, [=](auto) { return value; });
}
template <class Pointer, class T>
auto atomicCAS(Pointer pointer, T expected, T value) {
  return atomic_update(pointer, [=](auto before) { return before == expected ? value : before; });
}
