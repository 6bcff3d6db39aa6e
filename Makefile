# Every target sets up what it needs. `make` alone prints this help.
.DEFAULT_GOAL := help
.PHONY: help demo up test test-slow test-fault test-compose test-k8s test-minio minio images sbom bench-credits bench-gateway bench-storage bench-generator check format proto requirements clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IMAGE ?= examples/rocket.jpg
PROMPT ?= The camera rises slowly along the rocket while the exhaust cloud grows.
MODEL ?= sora-2
OUT ?= out/demo.mp4
MINIO_VERSION ?= latest
CYCLONEDX_VERSION := 7.5.0
SERVICES := gateway credits generator storage simulator
# What the command line alone needs of what `framewire` requires: 13 MB that no service's image has.
CLI_ONLY := annotated-doc colorama markdown-it-py mdurl pygments rich shellingham typer
TAG ?= local
export IMAGE PROMPT MODEL OUT

help: ## prints this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/local ## makes one real video on this machine: IMAGE=, PROMPT=, MODEL=, OUT= change it
	@$(BIN)/python -m services.local.demo

up: $(VENV)/local ## runs the whole system in the foreground, until Ctrl-C
	@$(BIN)/framewire local up

test: $(VENV)/dev ## passes all tests but the slow and the long ones
	@$(BIN)/python -m pytest -n 2 -m "not slow and not long" $(PYTEST_ARGS)

test-slow: $(VENV)/dev ## passes the slow tests, as CI does after make test: storage killed and on bad days, any message, commands
	@$(BIN)/python -m pytest -n 2 -m "slow and not long" $(PYTEST_ARGS)

test-fault: $(VENV)/dev ## passes the crash and fault tests, the long ones too
	@$(BIN)/python -m pytest -n 2 -m "fault or long" $(PYTEST_ARGS)

test-compose: $(VENV)/dev ## builds the images, runs several replicas of each service, kills one of each, checks the books, restarts all under load
	@$(BIN)/python -m tests.deploy.compose_run

test-k8s: $(VENV)/dev .framewire/k8s/built ## applies deploy/k8s to a real API server, built here with the Go toolchain; no nodes, no Docker
	@$(BIN)/python -m tests.deploy.k8s_run

.framewire/k8s/built: tests/deploy/kubernetes/build.sh tests/deploy/kubernetes/go.mod
	@tests/deploy/kubernetes/build.sh $(@D)

images: ## builds the image of each service with Docker, and prints their sizes; TAG=
	@for service in $(SERVICES); do \
	  docker build -q --build-arg SERVICE=$$service $(if $(PYTHON_IMAGE),--build-arg PYTHON_IMAGE=$(PYTHON_IMAGE)) \
	    -t framewire-$$service:$(TAG) . >/dev/null || exit 1; \
	  docker image inspect --format "framewire-$$service:$(TAG) {{.Size}}" framewire-$$service:$(TAG) || exit 1; \
	done

sbom: $(VENV)/dev ## writes what is in each image as CycloneDX, from the hashed requirements, into out/sbom
	@mkdir -p out/sbom
	@for service in $(SERVICES); do \
	  $(BIN)/uvx -q --from cyclonedx-bom==$(CYCLONEDX_VERSION) cyclonedx-py requirements --output-reproducible \
	    --pyproject pyproject.toml --output-file out/sbom/$$service.cdx.json requirements/$$service.txt || exit 1; \
	  echo out/sbom/$$service.cdx.json; done

minio: .framewire/bin/minio ## builds a real minio with the Go toolchain, where there is one: about 5 minutes, once

.framewire/bin/minio:
	@mkdir -p $(@D) && GOBIN=$(abspath $(@D)) go install github.com/minio/minio@$(MINIO_VERSION)

test-minio: $(VENV)/dev minio ## passes the tests of storage on a real minio
	@PATH=$(abspath .framewire/bin):$$PATH $(BIN)/python -m pytest -n 2 tests/integration/test_storage*.py $(PYTEST_ARGS)

bench-credits: $(VENV)/dev ## measures the ledger against echo and pgbench; FULL=1: with ten million entries, too
	@$(BIN)/python -m bench.credits

bench-storage: $(VENV)/dev ## measures bytes through storage against the minio client straight to the same server
	@$(BIN)/python -m bench.storage

bench-gateway: $(VENV)/dev ## measures CreateVideo against LiteLLM, reads against echo, and 2,000 watchers: about 4 minutes
	@$(BIN)/python -m bench.gateway

bench-generator: $(VENV)/dev ## measures the generator against its provider's limits and the seeds' loops: about 15 minutes
	@$(BIN)/python -m bench.generator

check: $(VENV)/dev ## format, lint, types, import walls, contracts, drift of the stubs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@BUF=$(BIN)/buf proto/breaking.sh
	@PYTHON=$(BIN)/python proto/generate.sh
	@git diff --exit-code --stat -- framewire docs/api.md || (echo "stubs or docs/api.md differ from proto/: run make proto and commit" && exit 1)

format: $(VENV)/dev ## formats code and contracts
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/buf format -w

proto: $(VENV)/dev ## regenerates the stubs in framewire/*/v1 and docs/api.md
	@PYTHON=$(BIN)/python proto/generate.sh

requirements: $(VENV)/dev ## recompiles requirements/*.txt from pyproject.toml
	@for extra in $(SERVICES) local dev; do \
	  case " $(SERVICES) " in *" $$extra "*) left="$(CLI_ONLY:%=--no-emit-package %)";; *) left=;; esac; \
	  $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url $$left --extra $$extra -o requirements/$$extra.txt pyproject.toml || exit 1; done

clean: ## removes what the other targets made
	rm -rf $(VENV) .framewire out .pytest_cache .ruff_cache

$(VENV)/local $(VENV)/dev: $(VENV)/%: requirements/%.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11 ..." && exit 1)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements/$*.txt into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/$*.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
