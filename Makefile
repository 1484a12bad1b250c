# `make mnist` and `make test` set up all they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv

run := $(VENV)/bin/python
# One stamp a Python version: with another PYTHON the environment is made anew.
version := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
environment := $(VENV)/.made-with-$(version)
sources := pyproject.toml bn_jax/__init__.py

.PHONY: mnist test test-core test-slow lint types benchmarks docs package gpu

mnist: $(environment)/installed-experiments
	$(run) -m experiments.mnist

test: $(environment)/installed-test
	$(run) -m pytest --numprocesses=2

# The library alone, without the experiments.
test-core: $(environment)/installed-test
	$(run) -m pytest --numprocesses=2 tests/bn_jax

test-slow: $(environment)/installed-test
	$(run) -m pytest -m slow --numprocesses=2

# With another Python that has TensorFlow: make benchmarks TENSORFLOW_PYTHON=...
benchmarks: $(environment)/installed-benchmarks
	$(run) -m benchmarks.all $(TENSORFLOW_PYTHON:%=--tensorflow_python=%)

# All that only a GPU can show; the same command goes on where it was. With Tiny ImageNet:
# make gpu DATA=DIR. A rehearsal without a GPU: make gpu GPU_FLAGS=--tiny
gpu: $(environment)/installed-gpu
	$(run) -m benchmarks.gpu $(DATA:%=--data_dir=%) $(GPU_FLAGS)

lint: $(environment)/installed-dev
	$(run) -m ruff format --check
	$(run) -m ruff check
	$(VENV)/bin/shellcheck launch/*.sh launch/slurm.sbatch .ci/run
	$(VENV)/bin/kubernetes-validate --strict --quiet launch/gke.yaml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml

types: $(environment)/installed-dev
	$(run) -m mypy

# The site, in site/; nothing is fetched, and a warning is an error.
docs: $(environment)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict --quiet

# What a release uploads, in dist/: CONTRIBUTING.md has the steps around it.
package: $(environment)/installed-dev
	rm -rf dist
	$(run) -m build --outdir dist
	$(run) -m twine check --strict dist/*

$(environment):
	$(PYTHON) -m venv --clear $(VENV)
	$(run) -m pip install --quiet --upgrade pip
	mkdir $@

$(environment)/installed-%: $(sources) | $(environment)
	$(run) -m pip install --quiet --editable '.[$*]'
	touch $@
