// Shared arrays as a kernel sees them: every access to an element is noted and checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

namespace cuda_on_cpu {

template <class T>
class SharedPointer;

// One element of a shared array; converts to its value.
template <class T>
class Element {
 public:
  Element(SharedArray* array, int64_t index) : array_(array), index_(index) {}
  Element(const Element&) = default;

  operator T() const {
    T value;
    std::memcpy(&value, Block::current()->access(*array_, index_, Block::Access::kRead), sizeof value);
    return value;
  }

  const Element& operator=(const T& value) const {
    std::memcpy(Block::current()->access(*array_, index_, Block::Access::kWrite), &value, sizeof value);
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
  const Element& operator+=(const T& value) const { return *this = static_cast<T>(static_cast<T>(*this) + value); }

  SharedPointer<T> operator&() const { return SharedPointer<T>(array_, index_); }

 private:
  SharedArray* array_;
  int64_t index_;
};

template <class T>
class SharedPointer {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  SharedPointer(SharedArray* array, int64_t index) : array_(array), index_(index) {}

  Element<T> operator[](int64_t i) const { return {array_, index_ + i}; }
  Element<T> operator*() const { return {array_, index_}; }
  SharedPointer operator+(int64_t i) const { return {array_, index_ + i}; }

  T* atomic() const { return reinterpret_cast<T*>(Block::current()->access(*array_, index_, Block::Access::kAtomic)); }

 private:
  SharedArray* array_;
  int64_t index_;
};

template <class T>
SharedPointer<T> static_shared(const void* declaration, const char* name, size_t count) {
  return {&Block::current()->static_array(declaration, name, sizeof(T), count), 0};
}

template <class T>
SharedPointer<T> dynamic_shared(size_t offset, size_t count) {
  return {&Block::current()->dynamic_array(offset, sizeof(T), count), 0};
}

}  // namespace cuda_on_cpu
