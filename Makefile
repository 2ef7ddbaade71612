# Two commands do everything on a fresh machine: `make demo` and `make test`. Both call `make setup` first.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What an installation depends on: when any of it changes, setup runs again.
DRIVER := $(if $(wildcard /proc/driver/nvidia/version),driver,no-driver)
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$(DRIVER)
TEST_THREADS := OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo

.PHONY: help setup demo test test-all smoke-tables lint format wheel bench constraints clean

help:
	@echo "make demo      set up if need be, then train the headline recipe on embedded data (about a minute)"
	@echo "make test      set up if need be, then run the tests (make test-all: the slow ones too)"
	@echo "make smoke-tables    two optimizer steps of every kind of recipe in the papers' tables (minutes)"
	@echo "make test-kill kill a run 20 times: what it trains is what it would have trained"
	@echo "make setup     create $(VENV) and install everything; does nothing the second time"
	@echo "make lint      ruff and mypy        make format   let ruff rewrite"
	@echo "make wheel     build dist/*.whl     make bench    benchmarks into benchmarks/results"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
	    f"lbzoo needs Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	@echo "setup: installing into $(VENV), some 8 GB; this takes a few minutes once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@# fbgemm-gpu does not import without an NVIDIA driver; its CPU build has the same modules, in the same folder, so
	@# that taking one away takes files of the other: hence --force-reinstall.
	@if [ $(DRIVER) = no-driver ]; then \
	    $(BIN)/python -m pip uninstall --quiet --yes fbgemm-gpu && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall fbgemm-gpu-cpu==1.7.0; \
	else \
	    $(BIN)/python -m pip uninstall --quiet --yes fbgemm-gpu-cpu 2>/dev/null; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall -c constraints.txt fbgemm-gpu; \
	fi
	@rm -f $(VENV)/.installed-* && touch $@
	@echo "setup: done; the command is $(BIN)/lbzoo"

demo: setup
	$(BIN)/lbzoo fit recipes/resnet50_novograd_32k.yaml --scale mini

test: setup
	$(TEST_THREADS) $(BIN)/python -m pytest -n 2 --dist loadgroup -q

test-all: setup
	$(TEST_THREADS) $(BIN)/python -m pytest -n 2 --dist loadgroup -q -m ''

smoke-tables: setup
	rm -rf build/smoke-tables
	$(TEST_THREADS) $(BIN)/lbzoo table --run --scale smoke --runs build/smoke-tables

# One small run on each engine, killed 20 times at random: nothing is lost and nothing done twice.
test-kill: setup
	LBZOO_KILLS=20 $(TEST_THREADS) $(BIN)/python -m pytest -q --timeout 3000 tests/engines/test_kill.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup
	$(BIN)/python -m build --wheel

bench: setup
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/monitoring.py
	$(BIN)/python benchmarks/optimizer_step.py

# Run after a change of the requirements, in an environment whose tests pass.
constraints: setup
	@{ echo "# Every version that was tried together (make constraints). torch and its companions only load as a set."; \
	   $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton|fbgemm)' ; \
	   echo "fbgemm-gpu==1.7.0"; } > constraints.txt

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
