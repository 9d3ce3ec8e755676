# Every target works from a bare checkout: it makes .venv and installs what it needs.
# Two stamp files in .venv record what is installed; a change of pyproject.toml makes them outdated.

PYTHON ?= python3
TORCH ?=
MARK ?= not slow and not gpu
ARGS ?=
# A process that crashes ends the run, which names its test: xdist may wait forever after it has replaced
# one. So does a test that hangs, which shows its stacks.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0
HANG := $(if $(findstring not slow,$(MARK)),-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true)

PY := .venv/bin/python
RUNTIME := .venv/.runtime
DEV := .venv/.dev

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format bench docs clean interpreter force

help: ## list the targets (this text)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   interpreter of a new .venv (3.11 or newer)"
	@echo "  TORCH=cpu | cuda | 'torch==...'   build of torch; default: what this machine can use"
	@echo "  MARK='gpu'   tests to select; default: '$(MARK)'"
	@echo "  ARGS='...'   further arguments of demo, test and bench"

demo: $(RUNTIME) ## install the runtime, then train, export and serve a tiny model
	$(PY) -m scripts.demo $(ARGS)

# Bytecode is written even where the environment forbids it: many processes import the same modules.
test: $(DEV) ## run all tests except slow and gpu
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -m "$(MARK)" $(WORKERS) $(HANG) $(ARGS)

check: $(DEV) ## ruff, its formatter, mypy, and the test of the import layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layers.py

format: $(DEV) ## format the code
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

bench: $(RUNTIME) ## run the training benchmark on this machine
	$(PY) -m scripts.bench_train $(ARGS)

docs: $(DEV) ## write the API pages, one per module, to build/api
	$(PY) -m pdoc --no-search --output-directory build/api configs kernels models parallel train serve launch

clean: ## delete .venv and the tools' caches; runs/ and cache/ are kept
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . \( -path ./runs -o -path ./cache \) -prune -o -name __pycache__ -exec rm -rf {} +

# A TORCH given on the command line is always installed again.
$(RUNTIME): pyproject.toml .venv/bin/pip $(if $(TORCH),force)
	$(PY) -m scripts.install --torch "$(TORCH)"
	@touch $@

$(DEV): pyproject.toml .venv/bin/pip $(if $(TORCH),force)
	$(PY) -m scripts.install --dev --torch "$(TORCH)"
	@touch $(RUNTIME) $@

# bin/pip is the last file that venv writes: a broken .venv is made again.
.venv/bin/pip: | interpreter
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "Phalanx needs Python 3.11 or newer; '$(PYTHON)' is older or missing: give PYTHON=<path>"; exit 1; }
	$(PYTHON) -m venv .venv

# A PYTHON on the command line that differs from .venv's is an error, not silently ignored.
interpreter:
ifneq ($(origin PYTHON),file)
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	if [ -x $(PY) ] && [ "$$($(PY) -c "$$version")" != "$$($(PYTHON) -c "$$version")" ]; then \
	  echo "'$(PYTHON)' is not the Python of .venv: 'make clean' first, or leave PYTHON out"; exit 1; fi
endif

force:
