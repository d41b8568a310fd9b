# make venv | lint | test | test-all | fuzz | sanitize | mutants | oldest | wheel | bench | study | gpu | gpu-cache | gpu-tune | demo | info | docs |
# site | hub | clean. VENV, PYTHON, TORCH and ARGS can be given: make demo ARGS="--steps 50"
# make lint checks style, format and types.
# make test runs the tests in JOBS processes; make test-all adds those that take longer, the ops' tests on C++ that is
# compiled for each vector width, and the web pages.
# make fuzz compares random calls with the literal formula.
# make mutants checks that the tests notice small faults, and goes on where it was interrupted.
# make sanitize runs the ops' CPU tests on C++ that the compiler's sanitizers check.
# make oldest builds and tests with the oldest releases of PyTorch that are supported, in environments that it removes.
# make wheel builds the sdist and one wheel for every Python and PyTorch into build/wheel/dist, and tries them in empty environments.
# make bench measures on DEVICE, cpu or cuda, and writes its CSV and plots to BENCH_OUT.
# make study trains what is missing of the part STUDY of docs/study.md: quick, digits, retinanet or bccd.
# make site builds the web pages of README.md and docs/ into SITE; a warning is an error. It needs no PyTorch.
# make hub lays out in HUB, a new folder, what kernel-builder of Hugging Face builds from (build.toml).
# make gpu builds, tests, measures and profiles on this machine's GPU: make gpu ARGS="--stages test bench".
# make gpu-cache compiles its Triton kernels for GPU_ARCH into CACHE.
# make gpu-tune measures the fastest tiles of the Triton kernels on this machine's GPU.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
ARGS ?=
DEVICE ?= cpu
BENCH_OUT ?= build/bench
STUDY ?= digits
SITE ?= build/site
HUB ?= build/hub

GPU_ARCH ?= 90

BIN := $(VENV)/bin
# PYTHON of the command line, else that of .venv.
GPU_PYTHON = $(if $(filter command,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
STAMP := $(VENV)/.installed
LINT_STAMP := $(VENV)/.lint
SITE_VENV := build/site-venv
# JOBS processes, each with whole files. Threads that wait do not spin: the processes share the cores.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := setup.py pyproject.toml Makefile $(shell find csrc -type f)

.PHONY: venv lint test test-all fuzz sanitize mutants oldest wheel bench study gpu gpu-cache gpu-tune demo info docs site hub clean

venv: $(STAMP)

$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) ninja pybind11 "setuptools>=77"
	$(BIN)/python -m pip install --no-build-isolation --verbose -e ".[test]" > $(VENV)/build.log 2>&1 \
		|| (tail -n 60 $(VENV)/build.log; exit 1)
	grep -oE "fbkd_ops: (building|leaving|nvcc) .*" $(VENV)/build.log
	touch $@

lint: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent --untyped-calls-exclude=torch tests/typed_idioms.py
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

$(LINT_STAMP): scripts/lint.txt $(STAMP)
	$(BIN)/python -m pip install --quiet -r scripts/lint.txt
	touch $@

test: venv
	$(PYTEST) $(ARGS)

test-all: venv
	FBKD_OPS_TEST_ALL=1 $(PYTEST) $(ARGS)
	PYTHON="$(BIN)/python" scripts/vector_widths.sh
	$(MAKE) site

fuzz: venv
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

sanitize: venv
	PYTHON="$(BIN)/python" scripts/sanitize.sh $(ARGS)

mutants: venv
	$(BIN)/python -m scripts.mutants $(ARGS)

oldest:
	PYTHON="$(PYTHON)" scripts/oldest.sh

wheel:
	PYTHON="$(PYTHON)" scripts/wheel.sh

bench: venv
	$(BIN)/python benchmarks/microbench.py --device $(DEVICE) --brief \
		--csv $(BENCH_OUT)/$(DEVICE)-microbench.csv --plot $(BENCH_OUT) $(ARGS)

# Installs nothing but the package, beside the torch that is there.
gpu:
	$(GPU_PYTHON) -m scripts.gpu $(ARGS)

# Needs no GPU, but the Triton and the Python version of the machine that has one, and any PyTorch.
gpu-cache:
	$(GPU_PYTHON) -m scripts.gpu.triton_cache $(or $(CACHE),build/triton-cache) --arch $(GPU_ARCH) $(ARGS)

# Writes src/fbkd_ops/kernels/tiles.json.
gpu-tune:
	$(GPU_PYTHON) -m scripts.gpu.tune $(ARGS)

study: venv
	$(BIN)/python -m benchmarks.study $(STUDY) $(ARGS)

demo: venv
	$(BIN)/python -m examples.demo $(ARGS)

info: venv
	$(BIN)/python -m fbkd_ops

docs: venv
	$(BIN)/python docs/render.py

site: $(SITE_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict --site-dir "$(abspath $(SITE))"

$(SITE_VENV)/.installed: scripts/docs.txt
	test -x $(SITE_VENV)/bin/python || $(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/python -m pip install --quiet -r scripts/docs.txt
	touch $@

# The folder has a copy of src/fbkd_ops in place of the link to it: kernel-builder follows none. Its setup.py is another.
hub:
	mkdir -p "$(dir $(abspath $(HUB)))" && mkdir "$(HUB)" "$(HUB)/benchmarks"
	cp -r build.toml flake.nix CARD.md csrc torch-ext "$(HUB)"
	cp -r src/fbkd_ops "$(HUB)/torch-ext"
	cp benchmarks/benchmark.py "$(HUB)/benchmarks"
	find "$(HUB)" \( -name '*.so' -o -name '*.pyc' -o -name _build_report.json \) -delete

clean:
	rm -rf build dist *.egg-info src/fbkd_ops/*.so src/fbkd_ops/_build_report.json $(STAMP)
