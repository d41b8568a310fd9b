// The module through which Python asks how the package was built from source. A wheel for every Python goes without it.
#include <pybind11/pybind11.h>

#include "cpu/simd.h"

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

// The clone that the loader takes of each vectorised function on this CPU.
const char* clone() {
#ifdef FBKD_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

pybind11::dict facts() {
  pybind11::dict facts;
  facts["compiler"] = compiler();
  facts["flags"] = FBKD_OPS_FLAGS;
  facts["archs"] = FBKD_OPS_ARCHS;
  facts["clone"] = clone();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "Facts of a build from source.";
  m.def(
      "facts", &facts,
      "The compiler, its flags, the GPU architectures, and the clone of each vectorised function that this CPU runs.");
}
