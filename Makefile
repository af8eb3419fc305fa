# Everything below works from a bare Python 3.11+ on Linux: the first target that needs it makes .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/dense-lab

.PHONY: quickstart test test-all lint gpu-test bench clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

quickstart: .venv/installed  ## set up, search over cores and dense connections, print the leaderboard
	$(RUN) search studies/quickstart.yaml --workers 2
	$(RUN) report quickstart

test: .venv/installed-dev  ## what CI runs
	bash tests/run.sh

test-all: .venv/installed-dev  ## every combination of components, not only every pair (about half an hour)
	$(BIN)/python -m pytest -q -m "not gpu" tests/combinations --full-product

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check dense_lab kernels plugins tests benchmarks
	$(BIN)/mypy

gpu-test:  ## on the GPU host, with that host's own Python
	bash tests/gpu.sh

bench:  ## on the GPU host: every table, beside other libraries; ARGS=--quick for two minutes of it
	bash benchmarks/run.sh $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info
