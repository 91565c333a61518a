# Every target sets up what it needs first (tools/setup.py), which is quick when nothing has changed.
# ARGS passes arguments on: make demo ARGS=--consul, make test ARGS="tests/core -k breaker".

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
ARGS ?=

# Settings of the caller's shell that would lead Python or pip out of .venv.
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_TARGET PIP_USER

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-kong check format bench lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: python ## virtual environment, packages, stubs, Consul, RabbitMQ, PostgreSQL, Chromium
	@$(PYTHON) -m tools.setup

demo: python ## start the whole system, break it on purpose, show what happens
	@$(PYTHON) -m tools.setup --servers-optional
	@exec $(BIN)/mesh demo $(ARGS)

up: python ## start the whole system and keep it running until Ctrl-C
	@$(PYTHON) -m tools.setup --servers-optional
	@exec $(BIN)/mesh up $(ARGS)

# One process more than there are cores, for many tests wait: for leases to end, for brokers to start.
WORKERS := $(shell cores=$$(nproc); echo $$((cores < 7 ? cores + 1 : 8)))
MEASURED := $(BIN)/pytest --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 --cov --cov-report=
# The demo runs with nothing beside it but a test that waits, and tests of whole systems under load two at a time: in both,
# what takes a second on a machine that is too busy for it counts as a fault.
ALONE := tests/chaos/test_demo.py tests/chaos/test_deregistration.py
UNDER_LOAD := tests/chaos $(addprefix --ignore=,$(ALONE))

test: setup ## all tests, with coverage and its gates; parts of them with ARGS
	@rm -f .coverage .coverage.*
ifeq ($(ARGS),)
	$(MEASURED) -n 2 --timeout=180 $(ALONE)
	$(MEASURED) -n 2 --timeout=180 --cov-append $(UNDER_LOAD)
	$(MEASURED) -n $(WORKERS) --cov-append --ignore=tests/chaos
	$(BIN)/coverage report
	@$(BIN)/python -m tools.coverage_gates
else
	$(BIN)/pytest $(ARGS)
endif

# As the tests see it: the host's name for itself, if Kong has another one, is KONG_UPSTREAM_HOST.
export KONG_PROXY KONG_ADMIN KONG_PROTOS KONG_PROTO_DIRECTORY KONG_UPSTREAM_HOST

test-kong: python ## the REST contract against a running Kong, named by KONG_PROXY, KONG_ADMIN and KONG_PROTOS
	@test -n "$(KONG_PROXY)" -a -n "$(KONG_ADMIN)" -a -n "$(KONG_PROTOS)" || { echo "make test-kong needs KONG_PROXY=http://HOST:PORT KONG_ADMIN=http://HOST:PORT KONG_PROTOS=DIRECTORY (which that Kong has as /usr/local/kong/protos, or as KONG_PROTO_DIRECTORY); see docs/edge.md" >&2; exit 2; }
	@$(PYTHON) -m tools.setup
	$(BIN)/pytest tests/edge/test_contract_kong.py $(ARGS)

check: setup ## formatting, lint, types, protos, import rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	@tools/protos.sh
	$(BIN)/pytest -q tests/test_imports.py

format: setup ## format the code and the protos
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	BUF_CACHE_DIR=.tools/buf-cache $(BIN)/buf format protos --write

bench: setup ## measure, print a table, write benchmarks/out/results.json
	@exec $(BIN)/python -m benchmarks $(ARGS)

lock: setup ## renew requirements.lock from pyproject.toml; ARGS=--upgrade for newer versions
	$(BIN)/pip-compile --quiet --no-config --all-extras --allow-unsafe --generate-hashes --no-strip-extras --no-header \
		--no-annotate --no-emit-find-links --no-emit-index-url --no-emit-options --no-emit-trusted-host \
		--output-file=requirements.lock $(ARGS) pyproject.toml

clean: ## remove everything that set-up and the tools made
	rm -rf .venv .tools generated .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov dist

.PHONY: python
python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is not on PATH. As root: apt-get install python3" >&2; exit 1; }
