# Everything here sets itself up: a virtual environment in .venv, PyTorch first, then the package with its extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process a core, one thread a process: small models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: setup demo test test-slow test-oldest lint bench gpu-check clean

setup: $(STAMP)

# PyTorch is installed first and by itself, so that no other package chooses a build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,report,datasets,test]'
	touch $@

demo: setup
	$(BIN)/nmsparse demo --output demo

test: setup
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup
	$(PYTEST) -m "not gpu"

# The same tests with the oldest versions that pyproject.toml allows, in an environment of their own. torch is not the oldest: other
# versions pull gigabytes. `make gpu-check` runs with whatever torch and triton a machine with a GPU has.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto -m "not slow and not gpu"

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[demo,report,datasets,test]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/linear.py --tune
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/packing.py

# On a machine with a GPU: the tests marked `gpu` and the benchmarks, with whatever python is called PYTHON, which must have
# what they import; installs nothing. All results go to RESULTS.
RESULTS ?= benchmarks/results
gpu-check:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest -m gpu -p no:cacheprovider
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/masks.py --device cuda --output $(RESULTS)/masks-cuda.json
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/training_gpu.py --output $(RESULTS)/training-cuda.json
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/packing.py --device cuda --output $(RESULTS)/packing-cuda.json
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/linear.py --device cuda --tune --rounds 20 --output $(RESULTS)/linear-cuda.json
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/generate.py --device cuda --random-llama 8b --memory low --values dense int4 --rounds 3 --agreement-tokens 0 --output $(RESULTS)/generate-cuda.json

clean:
	rm -rf $(VENV) .venv-oldest demo build dist .pytest_cache .ruff_cache
