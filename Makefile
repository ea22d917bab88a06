PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses=2 --dist=loadfile # what tests of a file share is made once
ARGS ?=
TESTS :=

.PHONY: help demo test lint types unit quick nightly docs package bench bench-quick gpu gpu-dry faults borders engines coverage recipes evidence clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: .venv/installed  ## train a small ViT three ways and ship the fused one; make demo ARGS="--help"
	$(BIN)/python examples/demo.py $(ARGS)

test: .venv/installed  ## lint, types and unit, each whatever the others say, and a summary
	@summary=; failed=; \
	for part in lint types unit; do \
		if $(MAKE) --no-print-directory $$part; then verdict=passed; else verdict=FAILED; failed=1; fi; \
		summary="$$summary$$(printf '%-6s %s' $$part $$verdict)\n"; \
	done; \
	printf "\n$$summary"; \
	test -z "$$failed"

lint: .venv/installed  ## the linter, the check of the format, spelling and wording
	@code=0; $(BIN)/ruff check || code=1; $(BIN)/ruff format --check || code=1; \
	$(BIN)/codespell || code=1; $(BIN)/python tools/words.py || code=1; exit $$code

types: .venv/installed  ## the type checker
	$(BIN)/mypy

unit: .venv/installed  ## the tests; make unit TESTS=tests/test_config.py
	HYPOTHESIS_PROFILE=ci $(PYTEST) $(TESTS)

quick: .venv/installed  ## the tests without processes, compiled code and examples, to run at every change
	HYPOTHESIS_PROFILE=dev $(PYTEST) -m "not processes and not compiled and not examples" $(TESTS)

nightly: .venv/installed  ## the tests with many more random cases
	HYPOTHESIS_PROFILE=nightly $(PYTEST) $(TESTS)

docs: .venv/installed  ## the site, in runs/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

package: .venv/installed  ## wheel and sdist in dist/, and the tests against the installed wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[release]'
	$(BIN)/python tools/package.py $(ARGS)

bench: .venv/installed  ## time, memory and precision against dense and peers; about 75 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/expert_adamw.py
	$(BIN)/python benchmarks/wrap_and_fuse.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/scaling.py
	PYTHONPATH=examples $(BIN)/python benchmarks/low_precision.py
	PYTHONPATH=examples $(BIN)/python benchmarks/meo.py

bench-quick: .venv/installed  ## the figures to check a change against; about four minutes
	$(BIN)/python benchmarks/quick.py

GPU := PYTHONPATH=src:tests:examples:benchmarks $(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

gpu:  ## tests, time, memory and evidence on a GPU, in nine minutes; needs torch and no environment
	@$(GPU) $(ARGS)

gpu-dry:  ## the same at toy size, without a GPU
	@$(GPU) --dry --out runs/gpu-dry $(ARGS)

faults: .venv/installed  ## kills, full disks, damaged and malformed files, a long run; about 30 minutes
	$(BIN)/python -W ignore tools/faults.py

borders: .venv/installed  ## what other people's code does to wrapped models; about 6 minutes
	$(BIN)/python tools/borders.py

engines: .venv/installed  ## every engine against one rank; about 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/engines.py

coverage: .venv/installed  ## count the FFNs found in all models of timm and transformers; about 20 minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tools/coverage.py

FASHION ?= examples/data/fashion-mnist
TEXT ?= examples/data/shakespeare

LONGER := runs/recipes
TO_PYRAMID := --backbone $(LONGER)/imagenet --data $(FASHION) --lr 2e-4 --warmup-steps 0 --workers 0
TO_PIXELS := $(TO_PYRAMID) --batch-size 16 --weight-decay 1e-4

recipes: $(foreach run,imagenet t5 glue segmentation upernet detection retinanet,$(LONGER)/$(run)/results.json)  ## one longer run of each recipe; "-j2" takes about 40 minutes

$(LONGER)/imagenet/results.json: .venv/installed
	$(BIN)/python examples/imagenet.py --data $(FASHION) --image-size 28 --no-augment --drop-path 0 --min-lr 0 --workers 0 \
		--epochs 2 --warmup-epochs 0.2 --batch-size 128 --lr 16e-3 \
		--model-kwargs patch_size 4 embed_dim 64 depth 4 num_heads 4 --out $(@D)

$(LONGER)/t5/results.json: .venv/installed
	$(BIN)/python examples/t5_pretrain.py --data $(TEXT) --vocabulary 4096 --inputs 128 --batch-size 32 --steps 400 \
		--evaluate-every 100 --save-every 200 --workers 0 \
		--model-kwargs d_model 128 d_ff 256 num_layers 3 num_heads 4 --out $(@D)

$(LONGER)/glue/results.json: .venv/installed
	$(BIN)/python examples/glue_finetune.py --method exfusion --limit 2000 --epochs 1 --out $(@D)

$(LONGER)/segmentation/results.json: $(LONGER)/imagenet/results.json
	$(BIN)/python examples/segmentation.py $(TO_PIXELS) --size 96 --steps 400 --evaluate-every 200 --out $(@D)

$(LONGER)/upernet/results.json: $(LONGER)/imagenet/results.json
	$(BIN)/python examples/segmentation.py $(TO_PIXELS) --size 96 --head upernet --steps 100 --evaluate-every 100 --out $(@D)

$(LONGER)/detection/results.json: $(LONGER)/imagenet/results.json
	$(BIN)/python examples/detection.py $(TO_PYRAMID) --size 128 --scenes 500 --batch-size 2 --steps 120 --evaluate-every 60 --out $(@D)

$(LONGER)/retinanet/results.json: $(LONGER)/imagenet/results.json
	$(BIN)/python examples/detection.py $(TO_PYRAMID) --size 128 --head retinanet --scenes 500 --batch-size 4 --steps 200 --evaluate-every 200 --out $(@D)

evidence: .venv/installed  ## the ablations, and ExFusion against its controls; hours on two cores
	$(BIN)/python examples/ablations.py --at-once 2
	$(BIN)/python examples/evidence.py --task images --data $(FASHION) --at-once 2
	$(BIN)/python examples/evidence.py --task images --scale few --data $(FASHION)
	$(BIN)/python examples/evidence.py --task text --data $(TEXT) --at-once 2

clean:  ## remove the environment and what the demo wrote
	rm -rf .venv runs

.venv/installed: pyproject.toml constraints.txt tests/pretrained.txt tools/set_up.py tools/torchvision_cpu.py
	@$(PYTHON) tools/set_up.py
