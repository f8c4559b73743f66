# make setup | demo | test | test-faults | soak | lint        Each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
# Two ranks share the cores.
THREADS := $(shell echo $$(( $(CORES) > 1 ? $(CORES) / 2 : 1 )))

.PHONY: setup demo test test-faults soak lint

setup: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "$(PYTHON) is older than 3.11; run make PYTHON=python3.11 (or newer)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# On the CPU, so that two ranks can be seen at work on any machine.
demo: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node=2 \
		train_distillation.py --config config/tiny.toml --overwrite_output_dir
	@echo "How many captions teacher and student draw right (docs/quality.md has the whole table):"
	@CUDA_VISIBLE_DEVICES= $(BIN)/python benchmarks/quality.py --student outputs/tiny/student --guidance_scale_2 2 \
		--count 128 --no_features

test: setup .venv/quantised/torchao
	@sh tests/install_chromium.sh
	$(BIN)/python -m pytest
	PYTHONPATH=.venv/quantised $(BIN)/python -m pytest tests/test_quantised.py

# Where those tests alone find it: it talks at every start of a program that could use it.
.venv/quantised/torchao: .venv/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/quantised torchao==0.18.0

# Every fault of docs/reliability.md, also those that `make test` has no time for.
test-faults: setup
	$(BIN)/python -m pytest tests/faults tests/test_checkpoint.py tests/test_nonfinite.py -m "long or not long"

# Random kills and signals, 30 restarts: make soak SOAK="--restarts 50 --seed 7"
SOAK ?=
soak: setup
	$(BIN)/python -m tests.faults.soak $(SOAK)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
