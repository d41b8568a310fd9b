// Schemas of every op, and the module through which Python asks what was built.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#ifndef FBKD_OPS_ARCHS
#define FBKD_OPS_ARCHS ""
#endif

STABLE_TORCH_LIBRARY(fbkd_ops, m) {
  m.def("attention_pool_forward(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_pool_backward(Tensor x, Tensor? grad_spatial_attention, Tensor? grad_channel_attention, "
      "Tensor? grad_spatial_mean, Tensor? grad_channel_mean) -> Tensor");
}

namespace {

std::string stable_abi_version() {
  const uint64_t version = TORCH_FEATURE_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["stable_abi"] = stable_abi_version();
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus / 100 % 100);
#ifdef FBKD_OPS_CUDA_VERSION
  info["cuda"] = FBKD_OPS_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  info["cuda_archs"] = FBKD_OPS_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of fbkd_ops: importing it registers the CPU kernels with torch.";
  m.def("build_info", &build_info, "Facts of the build: torch, stable ABI, compiler, C++ standard, CUDA, archs.");
}
