#!/usr/bin/env bash
# Builds the C++ part with the compiler's sanitizers, in a copy of the source tree, and runs the ops' CPU tests on it with
# few examples. A report of a sanitizer ends the test that met it. Variables: PYTHON, which has the package's
# requirements; SANITIZERS, for instance "thread"; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly sanitizers=${SANITIZERS:-address,undefined}
readonly folder=$PWD/build/sanitize-${sanitizers//,/-}
readonly python=$(realpath -s "${PYTHON:-.venv/bin/python}")
readonly compiler=${CXX:-c++}
# Sizes that take minutes under a sanitizer, and what runs no C++ of this package.
readonly left_out="interpreter or triton or compile or inductor or large or threads or memory or opcheck"
files=(tests/test_{attention_pool,attention_masks,masked_l2,adapted_masked_l2,spatial_l2}.py)
files+=(tests/test_{non_local_statistics,relation_residual,cell_relation,collapsed_relation}.py)

say() { echo "sanitize: $* ($((SECONDS / 60)) min)"; }

# The libraries that a program which was not built with the sanitizers has to start with.
runtimes() {
    local name
    for name in ${sanitizers//,/ }; do
        "$compiler" -print-file-name="lib$(sed 's/address/a/; s/undefined/ub/; s/thread/t/' <<< "$name")san.so"
    done
    "$compiler" -print-file-name=libstdc++.so
}

say "source"
rm -rf "$folder"
mkdir -p "$folder"
tar -c --exclude='*.so' --exclude=__pycache__ csrc fbkd_ops tests benchmarks setup.py pyproject.toml README.md | tar -x -C "$folder"
cd "$folder"

say "build with -fsanitize=$sanitizers"
CFLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g1" LDFLAGS="-fsanitize=$sanitizers" \
    FBKD_OPS_CUDA=0 "$python" setup.py build_ext --inplace > build.log 2>&1 || (tail -n 40 build.log && exit 1)

say "tests"
export LD_PRELOAD
LD_PRELOAD=$(runtimes | paste -sd ' ')
# Python and PyTorch keep memory until they end; PyTorch's own C++ is not instrumented.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -m pytest -p no:cacheprovider -q "${files[@]}" -k "not ($left_out)" "$@"
say "done"
