// The vendor's matrix product on pieces of memory.
#pragma once

#include "../stable_abi.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <type_traits>

#include "../tensors.h"

namespace fbkd {

template <typename A>
struct Matrix {
  A* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Matrix rows_to(int64_t end) const { return {data, end, cols, row_stride, col_stride}; }
  Matrix rows_from(int64_t first) const {
    return {data + first * row_stride, rows - first, cols, row_stride, col_stride};
  }
};

// A tensor over a matrix's memory, as the product's functions take it.
template <typename A>
struct MatrixBlock {
  explicit MatrixBlock(const Matrix<A>& m) {
    const int64_t size[2] = {m.rows, m.cols}, stride[2] = {m.row_stride, m.col_stride};
    const auto type = std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(m.data, 2, size, stride, 0, type, aoti_torch_device_type_cpu(), 0, &handle));
  }
  ~MatrixBlock() { aoti_torch_delete_tensor_object(handle); }
  MatrixBlock(const MatrixBlock&) = delete;

  AtenTensorHandle handle = nullptr;
};

// out = a b. Below the dispatcher: neither autocast nor autograd sees it. Inside a parallel region it runs on the
// calling thread alone.
template <typename A>
void matmul(const Matrix<A>& out, const Matrix<A>& a, const Matrix<A>& b) {
  const MatrixBlock<A> result(out), left(a), right(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.handle, left.handle, right.handle));
}

// out += factor a b
template <typename A>
void matmul_add(const Matrix<A>& out, const Matrix<A>& a, const Matrix<A>& b, double factor = 1) {
  const MatrixBlock<A> result(out), left(a), right(b);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.handle, result.handle, left.handle, right.handle, 1, factor));
}

}  // namespace fbkd
