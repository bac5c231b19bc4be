# Set-up happens once, into $(VENV); every target below brings it about. Another Python beside it:
#     make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard *.py) $(wildcard tools/*.py tools/wheel/*.py tools/wheel/package/*.py) $(wildcard bench/*.py) $(dir $(wildcard */__init__.py))

.PHONY: help $(VENV) demo demo-vqa test test-slow test-all torture bench bench-vqa bench-page bench-predict lint audit clean
.DEFAULT_GOAL := help

help:  ## one line
	@echo "make demo (train and report on real images) | demo-vqa (questions about drawn ones) | test (5 minutes) | test-all | torture (long versions) | bench | lint | audit | clean; PYTHON=$(PYTHON) VENV=$(VENV) ARGS=..."

$(VENV): $(STAMP)

# The stamp is written last: whatever fails before it is done again by the next make.
$(STAMP): requirements.txt requirements-extra.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON): Python 3.10, 3.11 or 3.12 is needed; name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
	    echo "$(PYTHON): newer than Python 3.12, the newest that constraints.txt was checked with; trying it" >&2
	@rm -f $@
	@echo "Installing into $(VENV) (once; about 6 GB on Linux, where PyTorch brings its CUDA libraries)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

ifneq ($(origin PYTHON),file)  # asked for by name: an environment of another version must not stand in for it
$(VENV) demo demo-vqa test test-slow torture bench bench-vqa bench-page bench-predict lint audit: same-python
.PHONY: same-python
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
same-python: $(STAMP)
	@want=$$($(PYTHON) $(VERSION)) || exit 1; have=$$($(BIN)/python $(VERSION)) || exit 1; \
	    [ "$$want" = "$$have" ] || \
	    { echo "$(VENV) holds Python $$have, PYTHON=$(PYTHON) is $$want: add VENV=.venv$$want" >&2; exit 1; }
endif

demo: $(STAMP)
	$(BIN)/python baseline.py --demo --overwrite --output_dir runs/demo $(ARGS)

demo-vqa: $(STAMP)
	$(BIN)/python main.py --demo --coarse clip --overwrite --output runs/demo-vqa $(ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal  # a process per core, each with one thread

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

torture: $(STAMP)
	$(PYTEST) -m torture --torture $(ARGS)  # long versions, hours

bench: $(STAMP)
	$(BIN)/python bench/speed.py $(ARGS)

bench-vqa: $(STAMP)
	$(BIN)/python bench/vqa_speed.py $(ARGS)

bench-page: $(STAMP)
	$(BIN)/python bench/page_speed.py $(ARGS)

bench-predict: $(STAMP)
	$(BIN)/python bench/predict_speed.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy $(SOURCES)

audit: $(STAMP)
	$(BIN)/python tools/audit.py

clean:
	rm -rf $(VENV) runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
