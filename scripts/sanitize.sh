#!/usr/bin/env bash
# Runs the ops' CPU tests on C++ that the compiler's sanitizers check. A report of theirs ends the run. Variables: PYTHON;
# SANITIZERS, for instance "thread"; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/variant.sh

readonly sanitizers=${SANITIZERS:-address,undefined}
# Sizes that take minutes under a sanitizer, and what runs no C++ of this package.
readonly left_out="interpreter or triton or compile or inductor or large or threads or memory or opcheck"

# The libraries that a program which was not built with the sanitizers has to start with.
runtimes() {
    local name
    for name in ${sanitizers//,/ }; do
        "$compiler" -print-file-name="lib$(sed 's/address/a/; s/undefined/ub/; s/thread/t/' <<< "$name")san.so"
    done
    "$compiler" -print-file-name=libstdc++.so
}

build_variant "build/sanitize-${sanitizers//,/-}" \
    "-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g1" "-fsanitize=$sanitizers"
say "tests"
export LD_PRELOAD
LD_PRELOAD=$(runtimes | paste -sd ' ')
# Python and PyTorch keep memory until they end. Into files: pytest would keep the report of a process that ends with it.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:log_path=$PWD/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$PWD/report TSAN_OPTIONS=log_path=$PWD/report
status=0
"$python" -m pytest -p no:cacheprovider -q "${ops[@]}" -k "not ($left_out)" "$@" || status=$?
unset LD_PRELOAD
cat report.* 2> /dev/null || say "no report of a sanitizer"
say "done"
exit $status
