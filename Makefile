# `make help` explains every target. Each sets up what it needs in .venv; nothing else on the machine is touched.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests wait a third of their time, so three workers fill two cores.
WORKERS ?= 3
TESTS ?= tests
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Python compiles what it imports at its first import: pip's compiling of everything takes half of an installation.
# The tests' workers would compile the same files, each for itself, so what is large and imported is compiled before.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|torch/testing|transformers/models)/'
COMPILED := {accelerate,aiohttp,boto3,botocore,cryptography,datasets,huggingface_hub,hypothesis,kopf,matplotlib,mpmath,networkx,numpy,pandas,peft,pyarrow,pydantic,sympy,torch,transformers,triton,trl,wandb}
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
# pip's own words, less what tells a reader nothing
QUIETLY := 2>&1 | { grep --line-buffered -vE '^(Requirement already|  |WARNING: Location|Looking in|Obtaining|Collecting|Using cached|Processing)' || true; }

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.PHONY: quickstart
quickstart: $(VENV)/.run ## Train, publish and check a small adapter on this machine: no cluster, no GPU, four minutes
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/finetune run examples/quickstart/finetunejob.yaml

.PHONY: sweep
sweep: $(VENV)/.run ## Train six small adapters in one process and compare them: no cluster, no GPU, three minutes
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/finetune run --packed examples/quickstart/sweep.yaml

.PHONY: test
test: lint ## Run every check and every test but the nightly ones: ten minutes on two cores
	$(PYTEST) -m 'not nightly' $(TESTS)
	@tail -n 1 $(VENV)/audit.txt

.PHONY: test-fast
test-fast: $(VENV)/.dev ## Run the unit tests: no Kubernetes API, no trainer run, three minutes
	$(PYTEST) -m 'unit and not nightly' $(TESTS)

.PHONY: test-nightly
test-nightly: lint ## Run every test with its full promise: the whole quickstart, 100 kills, 800 broken API calls
	FINETUNE_TEST_KILLS=100 $(PYTEST) --ignore tests/chaos --timeout 3600 $(TESTS)
	$(MAKE) chaos
	@tail -n 1 $(VENV)/audit.txt

.PHONY: lint
lint: $(VENV)/.dev ## Check style, types, imports, images, known vulnerabilities, and that generated files are up to date
	$(MAKE) --no-print-directory --jobs 2 lint-types lint-files

.PHONY: lint-types
lint-types: $(VENV)/.dev
	$(BIN)/mypy crds operator cli trainer vllm-plugin

.PHONY: lint-files
lint-files: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint images/*/Containerfile
	$(BIN)/python -m finetune_api.crd | diff -q crds/finetunejobs.yaml - || { echo 'crds/finetunejobs.yaml is stale: run make crds'; exit 1; }
	$(BIN)/python -m finetune_api.crd_sweep | diff -q crds/finetunesweeps.yaml - || { echo 'crds/finetunesweeps.yaml is stale: run make crds'; exit 1; }
	for file in crds/*.yaml; do diff -q $$file charts/finetune-operator/files/ || { echo "The chart's copy is stale: run make crds"; exit 1; }; done
	$(BIN)/python scripts/generate_docs.py --check
	$(BIN)/python scripts/dashboards.py --check
	$(BIN)/python scripts/audit.py | tee $(VENV)/audit.txt

.PHONY: format
format: $(VENV)/.dev ## Put the code into the agreed form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: crds
crds: $(VENV)/.dev ## Generate the CRDs from the models
	$(BIN)/python -m finetune_api.crd > crds/finetunejobs.yaml
	$(BIN)/python -m finetune_api.crd_sweep > crds/finetunesweeps.yaml
	cp crds/*.yaml charts/finetune-operator/files/

.PHONY: docs
docs: $(VENV)/.dev ## Generate the reference pages and the dashboards
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/python scripts/dashboards.py

.PHONY: envtest
envtest: $(VENV)/.dev ## Fetch a real etcd and kube-apiserver for the tests (needs the internet)
	$(BIN)/python scripts/envtest.py

.PHONY: bench-operator
bench-operator: $(VENV)/.dev ## Measure the operator with 1,000 and 5,000 jobs on a real API server, against benchmarks/rangespec.yaml
	$(BIN)/python benchmarks/operator_scale.py --jobs 1000 --jobs 5000 --runs $(or $(RUNS),1)

.PHONY: chaos
chaos: $(VENV)/.dev ## Break the operator's API 800 times and more: five minutes, for every night
	FINETUNE_CHAOS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s --timeout 3600 tests/chaos

.PHONY: images
images: ## Build both images with docker, podman or buildah, and list what is in them (REGISTRY=, TAG=, PUSH=1, BASE=)
	scripts/build-images.sh

.PHONY: constraints
constraints: $(VENV)/.dev ## Record the installed versions in constraints.txt, and the hashes of what the images install
	{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable 2>/dev/null | sed 's/+cpu//'; } > $(VENV)/frozen
	mv $(VENV)/frozen constraints.txt
	$(BIN)/python scripts/lock.py

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf $(VENV) examples/quickstart/build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: name one with 'make PYTHON=/path/to/python3.12 …'"; exit 1; }
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { echo 'Python has no venv module: on Debian and Ubuntu, apt install python3-venv'; rm -rf $(VENV); exit 1; }

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing PyTorch, transformers, the trainer and the CLI into $(VENV): a few minutes, once'
	@$(PIP_INSTALL) --editable '.[trainer,cli]' $(QUIETLY)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing the trainer, the operator and the development tools into $(VENV): a few minutes, once'
	@$(PIP_INSTALL) --editable '.[dev]' $(QUIETLY)
	@$(COMPILE) $(CURDIR)/$(VENV)/lib/python*/site-packages/$(COMPILED) || true
	@touch $@ $(VENV)/.run
