#!/usr/bin/env bash
# Builds and tests the package with the oldest releases of PyTorch that it supports, one after the other, each in an
# environment and a copy of the source tree of its own: what is built in this tree stays as it is. Both lie under
# build/oldest and are removed at the end, also of a run that fails. Variable: PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly root=$PWD
readonly folder=$root/build/oldest
readonly python=$folder/venv/bin/python
# Both releases bring Triton 3.6, whose interpreter fails with later versions of NumPy.
readonly packages=("numpy<2.4" "pytest>=8" "hypothesis>=6" ninja pybind11 "setuptools>=77")
readonly arch=9.0
cuda=$(command -v nvcc > /dev/null && echo 1 || echo 0) # without nvcc nothing of CUDA is compiled
readonly cuda
files=(tests/test_{channel_l2,weighted_roots,cell_relation,collapsed_relation,loss,compile,oldest}.py) together=()
files+=(tests/test_channel_{correlation,divergence}.py tests/test_feature_norm.py)
ops=(attention_pool attention_masks masked_l2 adapted_masked_l2 spatial_l2 channel_ops non_local_statistics)
for op in "${ops[@]}" relation_residual; do
    part=$([[ $op == attention_masks ]] && echo masks || echo levels)
    files+=("tests/test_$op.py")
    together+=("tests/test_$op.py::test_${part}_together_equal_${part}_alone")
done
trap 'rm -rf "$folder"' EXIT

say() { echo "oldest: $* ($((SECONDS / 60)) min)"; }

environment() { # RELEASE
    say "torch $1: environment and source"
    cd "$root"
    rm -rf "$folder"
    mkdir -p "$folder/source"
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$python" -m pip install --quiet --no-cache-dir "torch==$1" "${packages[@]}"
    tar -c --exclude='*.so' --exclude=__pycache__ --exclude=_build_report.json \
        benchmarks csrc examples scripts src tests setup.py pyproject.toml MANIFEST.in README.md Makefile .ci |
        tar -x -C "$folder/source"
    cd "$folder/source"
}

build() {
    say "build"
    FBKD_OPS_CUDA=$cuda TORCH_CUDA_ARCH_LIST=$arch "$python" -m pip install --no-build-isolation --no-deps --verbose -e . \
        > build.log 2>&1 || (tail -n 60 build.log && exit 1)
    "$python" -m fbkd_ops
}

pytest() { "$python" -m pytest -p no:cacheprovider -m "not gpu" "$@"; }

# What a release can change: how ops are registered, called, differentiated and compiled. The arithmetic on every size and
# layout, for any number of threads, is the package's own, and `make test` has it.
test_on_the_cpu() {
    local left_out="interpreter or inductor or layouts or sizes or offsets or large or threads or one_graph_for_every"
    say "tests on the CPU"
    pytest "${files[@]}" -k "not ($left_out)"
}

# One test of each op in Triton's interpreter; then every instance of its kernels, compiled.
test_triton() {
    say "tests in Triton's interpreter"
    pytest "${together[@]}" -k interpreter
    say "compiled kernels"
    pytest tests/test_triton_compile.py -k "sm_${arch/./} or cuda"
}

environment 2.10.0 # CUDA 12
build
test_on_the_cpu

environment 2.11.0 # CUDA 13
build
test_on_the_cpu
test_triton
say "done"
