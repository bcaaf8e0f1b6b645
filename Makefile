# `make test` on a fresh clone sets up .venv and tests. `make test PY=python3` uses that interpreter and installs nothing.
.PHONY: help install test test-oldest test-newest parity perf bench soak aot tune decide lint dist
.DEFAULT_GOAL := test

GPU := $(shell nvidia-smi -L 2>/dev/null | sed -n 's/^GPU 0: //p' | sed 's/ .UUID.*//')
ifeq ($(origin PY),undefined)
PY := .venv/bin/python
INSTALLED := .venv/.installed
endif
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
# Tests start Python dozens of times: what it has compiled once is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

# Without a GPU: the versions of constraints.txt. With one they would force another torch than the driver's: pip chooses.
.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing torch and the rest into .venv: some minutes'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile $(if $(GPU),,-c constraints.txt) -e '.[bench,dev]'
	.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # on all cores, which pip does on one
	touch $@

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## .venv with all that the targets below need; each makes it by itself

# On all cores where pytest-xdist is installed; a file stays together. Tests of the timer need a GPU for themselves.
PARALLEL = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '-n auto --dist loadfile --benchmark-disable')
OF_THE_TIMER = $(if $(GPU),tests/unit/test_instrument.py)

test: $(INSTALLED) ## correctness, and that the perf suite runs; no figure of it is kept
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(PARALLEL) tests/unit tests/parity tests/modes $(OF_THE_TIMER:%=--ignore=%)
	$(OF_THE_TIMER:%=$(PY) -m pytest -q %)
	$(PY) -m pytest -q tests/perf --sel-matrix smoke

parity: $(INSTALLED) ## is the kernel right here? the parity suite alone, in several processes where it can
	$(PY) -m nsa_sel parity -q

# The CPU suite with the oldest torch and Triton supported, gigabytes of CUDA libraries included; for others
# `make test-oldest OLDEST='torch==2.6.0 triton==3.2.0 numpy==2.2.6'`. Before Triton 3.7 its NumPy must be older than 2.4, and
# warns; before 3.4 there are no TMA descriptors to test.
OLDEST ?= torch==2.4.0 triton==3.0.0 numpy==1.26.4
OLD := .venv/oldest-$(shell echo '$(OLDEST)' | tr -c 'A-Za-z0-9.\n' '-')
test-oldest: ## the CPU suite with the oldest torch and Triton supported
	test -e $(OLD)/.installed || { python3 -m venv $(OLD) && \
	  $(OLD)/bin/python -m pip install --quiet $(OLDEST) setuptools -e '.[bench]' && touch $(OLD)/.installed; }
	PYTEST_ADDOPTS="-W 'ignore:Conversion of an array:DeprecationWarning'" $(OLD)/bin/python -m pytest -q tests/unit tests/parity tests/modes

# The same with the newest versions that the index has today; NEWEST names others.
NEWEST ?= torch triton
NEW := .venv/newest-$(shell echo '$(NEWEST)' | tr -c 'A-Za-z0-9.\n' '-')
test-newest: ## the CPU suite with the newest versions there are
	test -e $(NEW)/bin/python || python3 -m venv $(NEW)
	$(NEW)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(NEWEST) setuptools -e '.[bench]'
	$(NEW)/bin/python -m pytest -q tests/unit tests/parity tests/modes

perf: $(INSTALLED) ## how fast is it here? the perf suite alone, saved in .benchmarks
	@echo '$(if $(GPU),Timing the full matrix on $(GPU),No NVIDIA GPU: the kernel is not timed. Smoke matrix, references only)'
	$(PY) -m pytest tests/perf --benchmark-autosave

# On an NVIDIA GPU, under 10 minutes: memory safety, races, numerics, load, faults; figures at the end. Skipped without one.
soak: $(INSTALLED) ## on a GPU, ten minutes at most: memory safety, races, load, faults
	timeout --signal=INT --kill-after=30 600 $(PY) -m pytest -q -rs tests/soak tests/modes tests/parity/test_numerics.py

bench: $(INSTALLED) ## parity, perf and the report, in bench/results/latest
	@marker=$$(mktemp); \
	$(MAKE) --no-print-directory parity perf; status=$$?; \
	run=$$(find .benchmarks -name '*.json' -newer $$marker 2>/dev/null | sort | tail -n 1); \
	test -z "$$run" || $(PY) -m nsa_sel report "$$run" --out bench/results/latest >/dev/null || status=1; \
	echo 'Files written:'; find .benchmarks bench/results -type f -newer $$marker 2>/dev/null; \
	rm $$marker; exit $$status

aot: $(INSTALLED) ## compiles every kernel for sm_80 to sm_120 without a GPU: an hour or more on two cores
	$(PY) -m nsa_sel.bench.checks.aot

tune: $(INSTALLED) ## make tune TUNE='--matrix hot' tunes more than the hot shape; see nsa-sel tune --help
	$(PY) -m nsa_sel tune $(TUNE)

# What the owner of a GPU runs first. Interrupted, the same command goes on. Without a GPU: its smoke form.
decide: $(INSTALLED) ## for a new card: parity, tiles, two full runs, threshold, report; see nsa-sel decide --help
	$(PY) -m nsa_sel decide $(DECIDE)

lint: $(INSTALLED) ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

dist: $(INSTALLED) ## the source distribution and the wheel, in dist/
	$(PY) -m build --no-isolation
