# `make demo` and `make test` need nothing but Python 3.11 and a package index; each makes its own environment.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check lint faults test-readers clean

demo: $(VENV)/ready
	$(BIN)/fp8-convert demo

test: $(VENV)/ready-test check

# What `make test` runs, in the environment at hand.
check: lint
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hundreds of random kills, full disks and read errors: some twenty minutes.
faults: $(VENV)/ready-test
	FP8_CONVERT_FAULTS=300 FP8_CONVERT_FUZZ=2000 $(BIN)/python -m pytest tests/converter/output/test_faults.py tests/converter/test_hostile.py tests/converter/test_memory.py -s

# Other programs read what this one writes, with their own code: an environment of some 2 GB for each, ten minutes in all.
# `make test-readers READERS=vllm_omni` is one of them; READERS_HOME says where the environments are.
test-readers: $(VENV)/ready-test
	$(BIN)/python tests/readers/run.py $(READERS)

clean:
	rm -rf $(VENV) converter/stream/*.so build dist demo-out demo-out.png .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(VENV)/ready: pyproject.toml constraints.txt converter/stream/_e4m3.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
