# Two commands do everything, set-up included: `make demo` and `make test`.
# Which Python the virtual environment is made of; looked for when it is made.
PYTHON ?= $(shell tests/choose-python.sh)
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := vmm_shim/preload server/native client/native
PROTOS := $(wildcard proto/farfault/v1/*.proto)

.PHONY: machine demo test unit check observe bench bench-docs chaos soak proto native setup clean help

help:
	@echo "make demo   a real VM moves by post-copy on this machine"
	@echo "make test   all tests, with real VMs where the machine allows"
	@echo "make check  ruff, mypy --strict, import-linter, generated-code drift, C warnings"
	@echo "make bench  measurements, as ratios in one run"
	@echo "make observe  every query of deploy/ against Prometheus and a real move"
	@echo "make chaos  200 real migrations while everything breaks; CHAOS_FLAGS=\"--seed 17 --runs 1 --logs\""
	@echo "make soak   a VM moved there and back for 15 minutes; SOAK_FLAGS=\"--minutes 2\""
	@echo "make proto  generate farfault.v1 from proto/"

setup: $(VENV)/.installed native

demo: setup
	@$(BIN)/farfault demo $(DEMO_FLAGS)

test: setup check
	@tests/setup-machine.sh tests
	@$(BIN)/pytest $(PYTEST_FLAGS)

unit: setup
	@$(BIN)/pytest --ignore=tests/e2e $(PYTEST_FLAGS)

check: $(VENV)/.installed native
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy proto/farfault server/farfault_server client/farfault_client client/farfault_cli vmm_shim/farfault_shim vmm_shim/farfault_vmm
	@$(BIN)/lint-imports
	@$(BIN)/pytest -q -p no:cacheprovider tests/proto/test_generated.py

# Prometheus, a real move, and every query of deploy/ against it.
observe: setup
	@tests/setup-machine.sh tests
	@$(BIN)/python tests/deploy/observing.py

bench: setup
	@$(BIN)/farfault bench compare --quick $(BENCH_FLAGS)

# Everything that docs/benchmarks.md shows, anew. Leave the machine alone meanwhile.
bench-docs: setup
	@$(BIN)/farfault bench compare --markdown docs/benchmarks.md $(BENCH_FLAGS)
	@$(BIN)/farfault bench micro --markdown docs/benchmarks.md
	@$(BIN)/farfault bench vcpus --markdown docs/benchmarks.md
	@$(BIN)/farfault bench fleet --markdown docs/benchmarks.md

# The virtual environment follows pyproject.toml.
$(VENV)/.installed: pyproject.toml | machine
	@python="$(PYTHON)"; echo "==> virtual environment in $(VENV), of $$python"; \
	$$python -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

machine:
	@tests/setup-machine.sh

native: $(VENV)/.installed
	@for part in $(NATIVE); do $(MAKE) --no-print-directory -C $$part || exit 1; done

chaos: setup
	@$(BIN)/python tests/chaos/chaos.py $(CHAOS_FLAGS)

soak: setup
	@$(BIN)/python tests/chaos/soak.py $(SOAK_FLAGS)

proto: $(VENV)/.installed
	@$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto $(PROTOS)
	@echo "generated: $(PROTOS:.proto=_pb2.py)"

clean:
	@for part in $(NATIVE); do $(MAKE) --no-print-directory -C $$part clean; done
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
