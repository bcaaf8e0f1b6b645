# `make test` on a fresh clone sets up .venv and tests. `make test PY=python3` uses that interpreter and installs nothing.
.PHONY: test parity perf bench lint
.DEFAULT_GOAL := test

GPU := $(shell nvidia-smi -L 2>/dev/null | sed -n 's/^GPU 0: //p' | sed 's/ .UUID.*//')
ifeq ($(origin PY),undefined)
PY := .venv/bin/python
INSTALLED := .venv/.installed
endif
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))

# Without a GPU: the versions of constraints.txt. With one they would force another torch than the driver's: pip chooses.
.venv/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(if $(GPU),,-c constraints.txt) -e '.[bench,dev]'
	touch $@

test: $(INSTALLED) ## correctness, and that the perf suite runs; no figure of it is kept
	$(PY) -m pytest -q tests/unit tests/parity
	$(PY) -m pytest -q tests/perf --sel-matrix smoke

parity: $(INSTALLED)
	$(PY) -m pytest -q tests/parity

perf: $(INSTALLED)
	@echo '$(if $(GPU),Timing the full matrix on $(GPU),No NVIDIA GPU: the kernel is not timed. Smoke matrix, references only)'
	$(PY) -m pytest tests/perf --benchmark-autosave

bench: $(INSTALLED)
	@marker=$$(mktemp); \
	$(MAKE) --no-print-directory parity perf; status=$$?; \
	echo 'Files written:'; find .benchmarks bench/results -type f -newer $$marker 2>/dev/null; \
	rm $$marker; exit $$status

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
