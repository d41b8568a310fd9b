// Launches on torch's current stream.
#pragma once

#include "../stable_abi.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <iterator>

#include "../tensors.h"
#include "device.cuh"

namespace fbkd::cuda {

// The element types of dispatch.
struct Cuda {
  using Half = __half;
  using BFloat16 = __nv_bfloat16;
};

// Kernels go on from any number of blocks by themselves.
constexpr int64_t kMaxBlocks = int64_t(1) << 20;

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of `like` the current one as long as it lives. Nothing here waits for the device.
class Queue {
 public:
  explicit Queue(const Tensor& like) : guard_(like.get_device_index()), like_(like), stream_(current_stream(like)) {}

  // Freed with the queue, when the launches that use it are queued: the allocator keeps to the stream's order.
  template <typename A>
  A* scratch(int64_t count) {
    scratch_.push_back(Scratch<A>(like_, count).storage);
    return static_cast<A*>(scratch_.back().mutable_data_ptr());
  }

  template <typename Parameters>
  void launch(void (*kernel)(Parameters), int64_t blocks, const Parameters& parameters) {
    kernel<<<static_cast<unsigned>(min64(blocks, kMaxBlocks)), kThreads, 0, stream_>>>(parameters);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  cudaStream_t stream_;
  std::vector<Tensor> scratch_;
};

// Calls f(Type<T>, levels) for the levels of each element type; `type` is the member, of Level or its base, that says
// it.
template <typename Level, typename Owner, typename F>
void by_type(const std::vector<Level>& levels, ScalarType Owner::* type, F&& f) {
  for (const ScalarType each : {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16}) {
    std::vector<Level> same;
    std::copy_if(levels.begin(), levels.end(), std::back_inserter(same),
                 [&](const Level& level) { return level.*type == each; });
    if (!same.empty()) dispatch<Cuda>(each, [&](auto element) { f(element, same); });
  }
}

}  // namespace fbkd::cuda
