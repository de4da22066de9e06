# Every target first brings .venv up to date: tools/make_venv.py, at once where setup.py, pyproject.toml, constraints.txt
# and the interpreter are what they were.
PYTHON ?= python3
IN_VENV := .venv/bin/python -m
MAKE_VENV = @$(PYTHON) tools/make_venv.py

# One worker a core, and no more than four: each holds torch, and on a GPU a context of its own. One thread a worker, or
# they would compete for the same cores. pytest-benchmark has nothing to time under tests/.
# A test that hangs shows where, in every thread, and fails after five minutes; the longest takes seconds.
PYTEST := OMP_NUM_THREADS=1 $(IN_VENV) pytest -p no:benchmark -n auto --maxprocesses=4 \
	-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help bench bench-full report compare publish-results audit studies test test-full bench-pytest lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s%s\n", $$1, $$2 }' Makefile
	@echo '  PYTHON=python3.12 chooses the interpreter; ARGS="..." goes to the benchmark, the audit or pytest.'

bench: ## compare the fused calls with torch and its peers on the device that is here
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.run $(ARGS)

bench-full: ## the same with every workload, model, size and type, all of them compiled too: hours on a CPU
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.run --full $(ARGS)

report: ## tables, plots and one HTML page of a run (RUN=file; the latest)
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.report $(RUN) $(ARGS)

compare: ## two runs side by side, and which rows became slower (A=file B=file)
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.compare $(A) $(B) $(ARGS)

publish-results: ## copy a run and its plots to where results are committed (RUN=file; the latest)
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.publish $(RUN) $(ARGS)

# Triton reads TRITON_INTERPRET as a kernel is defined, so interpreted and compiled kernels never share a process. pytest
# ends with 5 where it has no test to run.
define run-tests
	$(MAKE_VENV) test,bench
	@if [ -d tests/compiled ]; then \
		echo 'compiled kernels:'; \
		TRITON_INTERPRET=0 $(PYTEST) $(1) $(ARGS) tests/compiled || [ $$? -eq 5 ]; \
	fi
	$(PYTEST) --ignore=tests/compiled $(1) $(ARGS)
endef

test: ## run the tests
	$(call run-tests,)

test-full: ## run the tests and the long sweep
	$(call run-tests,-m 'full or not full')

audit: ## see performance without a GPU: compiled kernels, memory traffic (ARGS=--full: launch tables)
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.audit $(ARGS)

studies: ## what norms and identity paths do to gradients: experiments that judge themselves (ARGS="NAME --quick")
	$(MAKE_VENV) bench
	$(IN_VENV) benchmarks.studies $(ARGS)

bench-pytest: ## time the same calls as pytest-benchmark does
	$(MAKE_VENV) test,bench
	$(IN_VENV) pytest benchmarks/test_benchmark.py $(ARGS)

lint: ## ruff and mypy
	$(MAKE_VENV) test,bench,lint
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

clean: ## remove .venv, builds and caches; measured results stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
