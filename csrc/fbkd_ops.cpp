// The module through which Python asks what was built. Importing it registers the CPU kernels.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#ifndef FBKD_OPS_ARCHS
#define FBKD_OPS_ARCHS ""
#endif

namespace {

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
  info["stable_abi"] = FBKD_OPS_STABLE_ABI;
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
