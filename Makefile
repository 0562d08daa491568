# make quickstart: environment, real small model, real domain data, train, merge, compare.
# make test: the test suite. Both build .venv themselves, with plain pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# Compiled modules are kept, whatever the environment says: the tests start a hundred interpreters.
export PYTHONDONTWRITEBYTECODE :=
# Most tests are Python rather than arithmetic: two processes of one thread take half the time of one of two.
# A file's tests stay together, as they share what its fixtures train.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: quickstart test test-slow test-gpu chaos mutants check fix clean

quickstart: $(VENV)/.ready
	$(BIN)/python data/addresses.py
	$(BIN)/accelerate launch -q --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train/sft.py configs/quickstart.yaml
	$(BIN)/python train/merge.py $(RUN)
	$(BIN)/python eval/compare.py $(RUN)

test: $(VENV)/.ready
	$(PYTEST)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m gpu

# The fault campaign; SCALE=0.1 tries a tenth. It needs a C compiler, and Linux.
SCALE ?= 1
chaos: $(VENV)/.ready
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m chaos --scale $(SCALE)

# Each guard is removed in turn, and the test that owns it must fail.
mutants: $(VENV)/.ready
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m mutants

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not gpu and not real"

fix: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
