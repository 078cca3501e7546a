# make demo    set up, train the demo model, evaluate it, draw its detections
# make test    set up, run the test suite
# make lint    set up, check style, imports, format and types
# make setup   make .venv and install everything; EXTRAS=all (or names in setup.cfg, with commas)
#              adds what optional tools need, DETECTRON2=<pip requirement> puts another build of
#              Detectron2 there
# make check-release   build wheel and sdist, and try the wheel away from the checkout
# constraints.txt says what is pinned and why.

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=
# What the test suite needs.
EXTRAS ?= dev,convert,export,publish,report,study,video
OUTPUT ?= output/demo
BIN := $(VENV)/bin
# One for each choice of extras: pip adds those that are not there yet.
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(strip $(EXTRAS)))

.PHONY: setup demo test lint check-release clean

setup: $(STAMP)
ifneq ($(strip $(DETECTRON2)),)
	$(BIN)/python dev/install_detectron2.py "$(DETECTRON2)"
endif

$(STAMP): setup.cfg constraints.txt dev/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "SMCA needs Python 3.10 to 3.13: run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'"; exit 1; }
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

check-release: setup
	$(BIN)/python tools/check_release.py

clean:
	rm -rf $(VENV) build *.egg-info projects/SMCA/*.egg-info
