# make demo    set up, train the demo model, evaluate it, draw its detections
# make test    set up, run the test suite
# make lint    set up, check style, imports, format and types, and build the pages
# make docs    set up, build the pages into site/; open site/index.html
# make notebook  set up, run docs/tour.ipynb again, which takes some minutes
# make setup   make .venv and install what the tests and the pages need; EXTRAS=all (or names in
#              setup.cfg, with commas) adds what optional tools need, DETECTRON2=<pip requirement>
#              installs another build of Detectron2
# make release   set up, build sdist and wheel into dist/, and check them
# constraints.txt says what is pinned and why.

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=
# What the tests and the pages need.
EXTRAS ?= dev,docs,export,pretrained,publish,study
OUTPUT ?= output/demo
BIN := $(VENV)/bin
# One for each choice of extras: pip adds those that are not there yet.
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(strip $(EXTRAS)))

.PHONY: setup demo test lint docs notebook release clean

setup: $(STAMP)
ifneq ($(strip $(DETECTRON2)),)
	$(BIN)/python dev/install_detectron2.py "$(DETECTRON2)"
endif

$(STAMP): setup.cfg constraints.txt dev/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "SMCA needs Python 3.10 to 3.13: run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'"; exit 1; }
	@echo "Installing into $(VENV): this downloads some gigabytes and takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python dev/install_detectron2.py
	touch $(STAMP)

test: setup
	$(BIN)/python -m pytest -n auto

demo: setup
	$(BIN)/python tools/run_demo.py --output-dir $(OUTPUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(MAKE) docs

# Without the variable, Material advertises its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebook:
	$(MAKE) setup EXTRAS=$(EXTRAS),notebook
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 0 --nbmake --overwrite --timeout 3600 --nbmake-timeout 1800 docs/tour.ipynb

release: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site *.egg-info projects/SMCA/*.egg-info
