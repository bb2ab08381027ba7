# Set-up happens once, in .venv; every target reuses it. Needs Python 3.11 (override: make PYTHON=python3.12 ...).
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test sweep costs lint clean

demo: $(READY)            ## plan a real-size model, then run such a plan on virtual GPUs
	@$(BIN)/plan-devices internlm-xcomposer2-vl-7b --gpus 2x24GiB
	@echo; echo "Now such a plan runs: a small random checkpoint of the same architecture, split over two virtual GPUs."
	@$(BIN)/python examples/split_on_virtual_gpus.py

test: $(READY) lint       ## everything that CI runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

sweep: $(READY)           ## all VLM types of the installed transformers; writes docs/sweep.md
	@$(BIN)/python benchmarks/sweep.py

costs: $(READY)           ## fresh traces of all catalogue models against the costs that ship; writes docs/costs.md
	@PYTHONPATH=. $(BIN)/python benchmarks/trace_catalogue.py --check

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# torch first and pinned: a bare `torch` may bring gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[torch,quantized,dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV)
