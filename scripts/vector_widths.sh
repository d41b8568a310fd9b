#!/usr/bin/env bash
# Runs the ops' CPU tests on C++ without clones for several vector widths, as clang and GCC before 12 compile it, and for
# each width that this CPU has: no bound may depend on the machine. Variable: PYTHON; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/variant.sh

readonly root=$PWD
archs=(x86-64)
grep -q avx2 /proc/cpuinfo && archs+=(x86-64-v3)
grep -q avx512vl /proc/cpuinfo && archs+=(x86-64-v4)
for arch in "${archs[@]}"; do
    cd "$root"
    build_variant "build/width-$arch" "-DFBKD_CLONES= -march=$arch" ""
    say "tests for $arch"
    "$python" -m pytest -p no:cacheprovider -q "${ops[@]}" -k "not (interpreter or triton or compile or inductor)" "$@"
done
say "done"
