# Each target makes .venv by itself when it is missing or older than the files that define it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := MPLBACKEND=Agg
TORCH := torch==2.13.0

.PHONY: demo test test-slow mutants coverage lint docs links bench package install clean
.DEFAULT_GOAL := test

# torch is named first so that pip takes the wheel meant for this machine before anything else asks for torch.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt --editable '.[test,lint]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(RUN) $(BIN)/pyro-hvae demo

test: $(STAMP)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(STAMP)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

# Breaks a copy of the package line by line; every break must be seen by a test.
mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

coverage: $(STAMP)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" --cov --cov-report=term-missing

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/run.py

# Does every address in the pages answer?  Nothing is executed; links among the pages are checked by `make docs`.
links: $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH) --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -D nb_execution_mode=off -b linkcheck docs docs/_build/links

# Wheel and sdist, each installed into an environment of its own that has nothing else, and started there.
package: $(STAMP)
	$(BIN)/python -m pip install --quiet 'build>=1.2'
	rm -rf dist build/clean
	$(BIN)/python -m build --outdir dist
	for file in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear build/clean && \
		build/clean/bin/python -m pip install --quiet $(TORCH) --constraint constraints.txt && \
		build/clean/bin/python -m pip install --quiet $(TORCH) --constraint constraints.txt $$file && \
		build/clean/bin/pyro-hvae --help > /dev/null && \
		(cd build && clean/bin/python -c 'import pyro_hvae; print(pyro_hvae.__version__, pyro_hvae.__file__)') || exit 1; \
	done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
