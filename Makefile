# Everything that is done with this project, each with one command on a machine that has Python and make:
#   make quickstart   train on QM9 with plain summing and with BiLB, compare the two (minutes, on a CPU)
#   make test         the tests, in two processes
#   make test-fast    the part for daily work: losses, engine, methods, recipes, the Trainer's basics (90 seconds)
#   make lint         ruff and mypy
#   make bench        what balancing costs per step
#   make campaign     long fault and backend campaigns (campaigns/README.md)
#   make clean        remove .venv, caches and the quickstart's runs
PYTHON ?= python3
VENV ?= .venv
# The tests of a file, or of a folder that shares a launch, stay on one worker (tests/conftest.py).
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?= -q --durations=15
# Where products of parameters are thinned (tests/products.py).
ALL_CASES := tests/contract tests/engine tests/distributed/test_data_parallel.py tests/task_sampling/test_kill_and_resume.py
FAST := tests/contract tests/engine tests/balancers tests/config tests/recipe tests/trainer tests/test_products.py \
	-m "not slow and not distributed"
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart

# Flags that keep `accelerate launch` from asking for a configuration. One process and one thread: the batches are small,
# a second thread gains little on idle cores and loses much on busy ones.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint format bench campaign clean

help:
	@sed -n '2,8s/^# *//p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call instant; a change of the dependencies makes them stale. [dev] contains [qm9].
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hf-bilb[dev] into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $(VENV)/installed-qm9 $@

$(VENV)/installed-qm9: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hf-bilb[qm9] into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[qm9]"
	@touch $@

# The folder $(QUICKSTART) belongs to this target: it is written anew each time. Runs of your own go elsewhere.
quickstart: $(VENV)/installed-qm9
	rm -rf $(QUICKSTART)
	$(LAUNCH) -m hf_bilb train recipes/qm9/ls_small.yaml trainer.output_dir=$(QUICKSTART)/qm9_ls_small
	$(LAUNCH) -m hf_bilb train recipes/qm9/bilb_small.yaml trainer.output_dir=$(QUICKSTART)/qm9_bilb_small
	$(BIN)/hf-bilb report $(QUICKSTART)/qm9_ls_small $(QUICKSTART)/qm9_bilb_small --output $(QUICKSTART)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(FAST) $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/balancing_overhead.py
	$(BIN)/python benchmarks/method_costs.py
	$(BIN)/python benchmarks/gradient_costs.py
	$(BIN)/python benchmarks/exactness_cost.py
	$(BIN)/python benchmarks/import_costs.py
	$(BIN)/python benchmarks/step_tour.py
	$(BIN)/python benchmarks/mpnn.py
	$(BIN)/python benchmarks/molecule_preparation.py
	$(BIN)/python benchmarks/image_loading.py
	$(BIN)/python benchmarks/dense_loading.py
	$(BIN)/python benchmarks/dense_models.py
	$(BIN)/python benchmarks/task_heads.py

campaign: $(VENV)/installed-dev
	$(BIN)/python -m pytest campaigns -q --durations=5
	HF_BILB_ALL_CASES=1 $(BIN)/python -m pytest $(PARALLEL) $(ALL_CASES) -q --durations=5
	$(BIN)/python campaigns/mutations.py

clean:
	rm -rf $(VENV) $(QUICKSTART) .pytest_cache .mypy_cache .ruff_cache build dist hf_bilb.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
