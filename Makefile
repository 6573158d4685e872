# Everything starts here: each target makes the virtual environment that it needs, and says what is missing if it can't.
# Variables: STACK=axolotl|newest|vllm, PYTHON=python3 (which also chooses axolotl: 0.21 on Python 3.12 or newer, 0.19 before),
# PYTEST_ARGS="-k positions", TESTS=all|stack, CANARY_PRE=1.

STACK ?= axolotl
PYTHON ?= python3
PYTEST_ARGS ?=
TESTS ?= all
# What can differ between stacks: what needs axolotl or has parts that do, and what stands on private or moving parts of PEFT,
# transformers and TRL. The rest is about ReFT's own arithmetic and files, and is shown once, on the newest stack.
tests_named = $(wildcard $(addprefix tests/*/test_,$(addsuffix .py,$(1))))
STACK_TESTS = $(call tests_named,axolotl axolotl_examples axolotl_versions recipes packing evaluation switching \
	positions prompts auto_template templates properties generation reused_caches transformers_api trainer trl peft loading \
	checkpointing mixed_batches quantized transformers)
# vLLM pins libraries of its own: there, what it serves is tested alone.
VLLM_TESTS = $(call tests_named,vllm vllm_families vllm_compiled vllm_settings vllm_gpu vllm_http vllm_refusals vllm_worker vllm_examples serving)
CANARY_TESTS = $(call tests_named,positions properties generation trainer *_api)
BENCH_ARGS ?=
# A folder for each stack and each Python, so that another interpreter leaves an environment alone.
SERIES := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV = .venv-$(STACK)-$(SERIES)
BIN = $(CURDIR)/$(VENV)/bin
# More than eight threads or test workers cost memory and gain little with models of this size.
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

# Nothing here needs a model hub, and nothing that runs here should report to anyone.
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1
export PYTHON

.PHONY: help env quickstart test site canary bench dist lint format clean
.DEFAULT_GOAL := help

help:  ## say what there is
	@echo "make TARGET [STACK=axolotl|newest|vllm] [PYTHON=python3] [PYTEST_ARGS=...]"
	@echo "  STACK=axolotl is axolotl 0.21 on Python 3.12 or newer, and 0.19 on 3.10 and 3.11; STACK=newest has no axolotl"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

env:  ## make the virtual environment of STACK, unless it is up to date
	@scripts/make_env $(STACK) $(VENV)

# Training one small model on twelve examples: one GPU is enough, and two would change the batch.
quickstart: override STACK = axolotl
quickstart: export PATH := $(CURDIR)/.venv-axolotl-$(SERIES)/bin:$(PATH)
quickstart: export OMP_NUM_THREADS = $(CORES)
# On a machine that does something else too, threads that wait by spinning make a step several times slower.
quickstart: export OMP_WAIT_POLICY = passive
quickstart: export CUDA_VISIBLE_DEVICES ?= 0
# What is left of the libraries' output is the loss, as it comes, and errors.
quickstart: export PYTHONUNBUFFERED = 1
quickstart: export AXOLOTL_LOG_LEVEL = WARNING
quickstart: export LOG_LEVEL = ERROR
quickstart: export TRANSFORMERS_VERBOSITY = error
quickstart: export TORCH_LOGS = -all
quickstart: export TQDM_DISABLE = 1
# The imports warn of GPU kernels that nothing here uses; an error still has its full output.
quickstart: NOISE_ASIDE = 2>outputs/quickstart.log || { cat outputs/quickstart.log >&2; exit 1; }
quickstart: env  ## train LoReFT on a dozen examples, and show answers before and after
	@mkdir -p outputs; rm -rf outputs/quickstart
	@echo; echo "== Quickstart 1/3: unpack SmolLM2-135M-Instruct into outputs/"
	@python examples/prepare_smollm2.py $(NOISE_ASIDE)
	@echo; echo "== Quickstart 2/3: axolotl train examples/quickstart.yaml (30 steps, the loss of every third)"
	@axolotl train examples/quickstart.yaml
	@echo; echo "== Quickstart 3/3: answers to prompts that were not in training"
	@python examples/compare.py $(NOISE_ASIDE)

test: lint  ## check the code, then run the tests on STACK (TESTS=stack: those that can differ between stacks)
	@echo "== pytest, stack $(STACK) on Python $(SERIES), $(TESTS) tests"
	@OMP_NUM_THREADS=1 PATH="$(BIN):$$PATH" pytest -n $(CORES) --dist $(if $(filter vllm,$(STACK)),loadfile,worksteal) $(if $(filter vllm,$(STACK)),$(VLLM_TESTS),$(if $(filter stack,$(TESTS)),$(STACK_TESTS))) $(PYTEST_ARGS)

site:  ## build the site of docs/ into outputs/site/html, with every warning and every broken link an error
	@[ -x .venv-site/bin/python ] || $(PYTHON) -m venv .venv-site
	@.venv-site/bin/python -m pip install -qq --disable-pip-version-check -r requirements/site.txt
	@.venv-site/bin/python scripts/stage_site.py
	@.venv-site/bin/zensical build --strict --clean

canary:  ## run the central tests on the newest release of everything, unpinned, and say which one breaks them (CANARY_PRE=1: pre-releases)
	@$(PYTHON) scripts/canary.py --workers $(CORES) $(if $(CANARY_PRE),--pre) $(CANARY_TESTS)

dist: override STACK = newest
dist: env  ## build the source distribution and the wheel into dist/, and check them as an index does
	@rm -rf dist; $(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*

lint: env  ## ruff and mypy
	@echo "== ruff and mypy, stack $(STACK)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# BENCH_ARGS="--pyreft .../bin/python --adapters .../bin/python" measures those too. On a GPU: "python -m benchmarks gpu".
bench: override STACK = newest
bench: env  ## measure training steps, memory, inference and scaling, into outputs/benchmarks
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python -e ".[bench]"
	@$(VENV)/bin/python -m benchmarks step $(BENCH_ARGS)
	@$(VENV)/bin/python -m benchmarks inference
	@$(VENV)/bin/python -m benchmarks scaling

format: env  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environments, outputs and caches
	rm -rf .venv-axolotl* .venv-newest* .venv-vllm* .venv-canary .venv-site outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
