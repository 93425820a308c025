# Each target sets up .venv by itself. Python 3.11.5 or newer and make are all it needs.
SIZE ?= digits
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup reproduce test docs archive constraints clean help

help:
	@echo "make setup                               only .venv, with adm-repro in .venv/bin"
	@echo "make reproduce [SIZE=smoke|digits|...]  run everything of a size and write reports/SIZE/index.html"
	@echo "make test                            the lessons, then the tests"
	@echo "make docs                            the site, in _docs/index.html"
	@echo "make archive                         all records and reports with a manifest, in dist/"
	@echo "make constraints                     requirements-ci.txt anew from constraints.txt (needs uv)"

$(READY): pyproject.toml constraints.txt requirements-ci.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11, 5) else "the pinned packages need Python 3.11.5 or newer, this is %d.%d.%d; try make PYTHON=python3.12" % v[:3])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet $(PIP_ARGS) --require-hashes --no-deps --requirement requirements-ci.txt
	$(BIN)/python -m pip install --quiet --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[reproduce,dev]'
	@touch $(READY)

setup: $(READY)

reproduce: $(READY)
	$(BIN)/adm-repro reproduce --size $(SIZE)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 $(if $(shell command -v c++),--flags compiler)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

$(VENV)/docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs-ready
	rm -rf _docs
	$(BIN)/python docs/gather.py build/site-source
	$(BIN)/python -m sphinx -W --keep-going -q -c docs build/site-source _docs

archive: $(READY)
	$(BIN)/python reports/archive.py dist

constraints:
	$(PYTHON) reliability/constraints.py

clean:
	rm -rf $(VENV) runs build dist _docs
