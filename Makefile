# make venv | test | demo | info | docs | clean. VENV, PYTHON, TORCH and ARGS can be given: make demo ARGS="--steps 50"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD_INPUTS := setup.py pyproject.toml Makefile $(shell find csrc -type f)

.PHONY: venv test demo info docs clean

venv: $(STAMP)

$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) ninja pybind11 "setuptools>=77"
	$(BIN)/python -m pip install --no-build-isolation --verbose -e ".[test,demo]" > $(VENV)/build.log 2>&1 \
		|| (tail -n 60 $(VENV)/build.log; exit 1)
	grep -oE "fbkd_ops: (building|leaving|nvcc) .*" $(VENV)/build.log
	touch $@

test: venv
	$(BIN)/python -m pytest $(ARGS)

demo: venv
	$(BIN)/python -m examples.demo $(ARGS)

info: venv
	$(BIN)/python -m fbkd_ops.info

docs: venv
	$(BIN)/python docs/render.py

clean:
	rm -rf build dist *.egg-info fbkd_ops/*.so fbkd_ops/_build_report.json $(STAMP)
