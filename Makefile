# What a contributor runs. Every target makes what it needs: on a fresh clone `make demo` and
# `make test` need only a Python (3.10 or newer) and a C++17 compiler.
#
#   make demo          compile a small model end to end and print what it gained
#   make test          all tests, less than 20 minutes  make test ARGS="-k wanda -x"
#   make test-long     those that take minutes each
#   make lint          ruff: rules and formatting     make format   applies both
#   make types         mypy, strict, over the three packages
#   make docs          write the pages that are made from the code
#   make site          the documentation as a site, in build/site; every link checked
#   make wheel-check   build a wheel and import it from a fresh environment
#   make wheels        wheels for CPython 3.10 to 3.13, x86-64 and Arm, in dist/
#   make venv          only the environment, with the package and its C++ part up to date
#   make clean         remove everything that make made
#
# Another Python: make PYTHON=python3.12 test; wheels of some: make wheels PYTHONS="python3.11 python3.12"

PYTHON ?= python3
VENV ?= .venv
# Test processes. Each holds a PyTorch and its models in memory, so not one for every core.
JOBS ?= 2
ARGS ?=
# Interpreters to build wheels with; none: all that are found.
PYTHONS ?=

PY := $(VENV)/bin/python
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-long lint format types docs site wheel-check wheels clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# --- environment -------------------------------------------------------------------------------------

# The stamps' names hold what they stand for, so that a changed answer is a missing file:
# the interpreter's version, and the list of Python files. (An editable install finds new files by
# itself, but a module that became a folder, or was removed, is still looked for at its old place.)
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
FILE_LIST := $(shell find sqcompile passes backends -name '*.py' 2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
CPP_SOURCES := $(shell find backends/native/cpp -type f 2>/dev/null)
INTERPRETER := $(VENV)/.python-$(PYTHON_VERSION)
TOOLS := $(VENV)/.tools
PACKAGE := $(VENV)/.package-$(FILE_LIST)

venv: $(PACKAGE)

$(INTERPRETER):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sqcompile needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@# Cleared only where another version's stamp shows that this Makefile made it.
	if compgen -G '$(VENV)/.python-*' >/dev/null; then rm -rf '$(VENV)'; fi
	$(PYTHON) -m venv '$(VENV)'
	touch '$@'

# -qq: pip's warnings about each index that lacks a package are not about us; its errors still show.
$(TOOLS): pyproject.toml $(INTERPRETER)
	$(PY) -m pip install -qq --upgrade pip
	$(PY) -m pip install -qq --group build
	touch '$@'

# Without isolation: the build uses the tools above and keeps its folder, so a change in one C++ file
# compiles that file; and no second PyTorch can be drawn in while building.
$(PACKAGE): $(TOOLS) $(CPP_SOURCES)
	@echo 'Building sqcompile; the first time also installing PyTorch and the tools, a minute or two'
	$(PY) -m pip install -qq --no-build-isolation --editable '.[dev]'
	rm -f '$(VENV)'/.package-*
	touch '$@'

# --- running -----------------------------------------------------------------------------------------

# By default glibc returns every large tensor's memory to the kernel when it is freed, so that each new
# temporary is page-faulted in again: an elementwise chain on 64 MB tensors took 67 ms, with these
# thresholds 37 ms. Other C libraries ignore the variables.
test demo: export MALLOC_MMAP_THRESHOLD_ = 4000000000
test demo: export MALLOC_TRIM_THRESHOLD_ = 100000000000

demo: $(PACKAGE)
	$(PY) examples/demo.py

# One thread a process: JOBS processes keep the cores busy, and two thread pools on one core only wait
# for each other. A file's tests stay in one process, which makes its trained models once.
test: export OMP_NUM_THREADS = 1
test: $(PACKAGE)
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not long" $(ARGS)

test-long: export OMP_NUM_THREADS = 1
test-long: $(PACKAGE)
	$(PY) -m pytest -m long $(ARGS)

lint: $(PACKAGE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(PACKAGE)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

types: $(PACKAGE)
	$(PY) tools/check_types.py

docs: $(PACKAGE)
	$(PY) tools/make_docs.py

# Its tools are in a group of their own: nothing else needs them. (Material prints an advertisement
# for its successor at each build, unless it is told not to.)
SITE_TOOLS := $(VENV)/.site
$(SITE_TOOLS): pyproject.toml $(INTERPRETER)
	$(PY) -m pip install -qq --group docs
	touch '$@'

site: $(SITE_TOOLS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	$(PY) tools/check_site.py build/site

# As a user gets it: an isolated build, then a normal install whose only source is the wheel. Run from
# another folder, because in this one Python would find ./sqcompile first.
WHEEL_CHECK := $(CURDIR)/build/wheel-check
wheel-check: $(TOOLS)
	rm -rf '$(WHEEL_CHECK)'
	mkdir -p '$(WHEEL_CHECK)/elsewhere'
	$(PY) -m pip wheel -qq --no-deps --config-settings=build-dir='$(WHEEL_CHECK)/cmake' \
		--config-settings=cmake.define.SQC_WERROR=ON --wheel-dir '$(WHEEL_CHECK)/dist' .
	$(PYTHON) -m venv '$(WHEEL_CHECK)/venv'
	'$(WHEEL_CHECK)/venv/bin/python' -m pip install -qq '$(WHEEL_CHECK)'/dist/*.whl
	cd '$(WHEEL_CHECK)/elsewhere' && ../venv/bin/python '$(CURDIR)/tools/check_install.py'
	rm -rf '$(WHEEL_CHECK)'/{venv,cmake}

# Tools, compilers and their caches in build/wheels; the first time some 10 minutes, then only what changed.
wheels:
	$(PYTHON) tools/make_wheels.py $(PYTHONS)

clean:
	rm -rf '$(VENV)' build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
