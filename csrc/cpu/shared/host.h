// What the C++ here borrows from torch without knowing it: matrix products and threads. Defined in register/host.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace dgi::cpu {

// A view of a matrix; element (i, j) lies at data[i * row_stride + j * column_stride].
template <class Real>
struct Matrix {
  Real* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix(Real* data, int64_t rows, int64_t columns)
      : data(data), rows(rows), columns(columns), row_stride(columns), column_stride(1) {}

  Matrix transposed() const {
    Matrix view = *this;
    view.rows = columns, view.columns = rows, view.row_stride = column_stride, view.column_stride = row_stride;
    return view;
  }

  Matrix rows_from(int64_t first, int64_t count) const {
    Matrix view = *this;
    view.data += first * row_stride, view.rows = count;
    return view;
  }
};

enum class Into { kOverwrite, kAdd };

// out = a b, or out += a b, on all of torch's threads.
void matrix_product(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out, Into into);
void matrix_product(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out, Into into);

void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t first, int64_t last, void* context),
                     void* context);

// Calls body(first, last) for ranges that cover [0, count), each of about `grain` or more, on torch's threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  parallel_ranges(
      count, grain < 1 ? 1 : grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<Plain*>(context))(first, last); },
      const_cast<std::remove_const_t<Plain>*>(&body));
}

// How many rows of so many elements each make a range worth a thread of its own, about 0.05 ms.
inline int64_t grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, elements_per_row));
}

// How many threads those loops and products have.
int64_t thread_count();

// Memory for a tile: aligned to a cache line and not initialised.
struct AlignedDelete {
  void operator()(void* data) const { ::operator delete[](data, std::align_val_t{64}); }
};
template <class Real>
using Buffer = std::unique_ptr<Real[], AlignedDelete>;
// Whether buffers begin as NaN (integers as -1), by DGI_POISON=1 in the environment: the tests find out what is read
// before it is written.
inline bool poisons_memory() {
  static const bool poisons = [] {
    const char* const value = std::getenv("DGI_POISON");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return poisons;
}

// Uninitialised memory for `count` numbers.
template <class Real>
Buffer<Real> make_buffer(int64_t count) {
  const size_t bytes = sizeof(Real) * static_cast<size_t>(count);
  void* const data = ::operator new[](bytes, std::align_val_t{64});
  if (poisons_memory()) std::memset(data, 0xff, bytes);
  return Buffer<Real>(static_cast<Real*>(data));
}

}  // namespace dgi::cpu
