#!/usr/bin/env bash
# Builds, tests, measures and profiles the package on this machine's GPU. Variables: PYTHON, OUT, STAGES, DEADLINE, CACHE
# (of make gpu-cache), WHEELS (a folder of packages), and FBKD_OPS_REVISION for a copy without git: what
# `python -m benchmarks.environment` prints where git is.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m scripts.gpu "$@"
