# For scripts that test another build of the C++ part, in a copy of the source tree: source it, in the tree's root.
# PYTHON has the package's requirements.
readonly python=$(realpath -s "${PYTHON:-.venv/bin/python}")
readonly compiler=${CXX:-c++}
ops=(tests/test_{attention_pool,attention_masks,masked_l2,adapted_masked_l2,spatial_l2,channel_ops,channel_correlation,channel_divergence}.py)
ops+=(tests/test_{non_local_statistics,relation_residual,cell_relation,collapsed_relation}.py)

say() { echo "$(basename "$0" .sh): $* ($((SECONDS / 60)) min)"; }

build_variant() { # FOLDER CFLAGS LDFLAGS: go to a copy of the tree, built with these flags besides its own
    rm -rf "$1"
    mkdir -p "$1"
    tar -c --exclude='*.so' --exclude=__pycache__ csrc src tests benchmarks scripts setup.py pyproject.toml README.md |
        tar -x -C "$1"
    cd "$1"
    export PYTHONPATH=$PWD/src
    say "build with $2"
    CFLAGS=$2 LDFLAGS=$3 FBKD_OPS_CUDA=0 "$python" setup.py build_ext --inplace > build.log 2>&1 ||
        (tail -n 40 build.log && exit 1)
}
