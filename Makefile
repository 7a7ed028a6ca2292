# Developer's commands; CI runs the same ones (.ci/run).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
PICTURES := $(VENV)/.bench
FUZZER := $(VENV)/.fuzz
APT := build-essential python3-dev python3-venv pkg-config libnghttp2-dev libxxhash-dev libcapstone-dev iproute2 nftables systemd

C_SOURCES := $(wildcard daemon/native/*.c daemon/libpostcopy/*.c)
C_CHECK := gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Idaemon/native -Idaemon/libpostcopy

# Where the devices are, a test that cannot use them is a failure and not a skip.
REQUIRE := $(if $(wildcard /dev/kvm),REQUIRE_KVM=1) $(if $(wildcard /dev/userfaultfd),REQUIRE_UFFD=1)

.DEFAULT_GOAL := help
.PHONY: help setup apt build check test fuzz chaos demo bench bench-quick bench-exits docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: apt $(STAMP) build ## Install system packages (as root), .venv, and build

apt:
	@command -v dpkg-query >/dev/null || { echo "no Debian packages here: see APT in the Makefile for what is needed"; exit 0; }; \
	missing=; for package in $(APT); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "missing packages; run: sudo apt-get install -y$$missing" >&2; exit 1; fi

$(STAMP): pyproject.toml constraints.txt daemon/build_hook.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make setup PYTHON=python3.12")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

build: ## Generate the protobuf code and compile the C, where stale
	$(BIN)/python daemon/build_hook.py

check: ## Lint and type-check Python and C
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo 'gcc $(words $(C_SOURCES)) files: $(filter -W%,$(C_CHECK))'; for source in $(C_SOURCES); do $(C_CHECK) $$source || exit 1; done

test: build ## Run the tests
	$(REQUIRE) $(BIN)/pytest

$(FUZZER): pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[fuzz]'
	touch $@

fuzz: build $(FUZZER) ## Fuzz frames, ring records, hand-offs and the resolver, FUZZ_SECONDS=60 each (needs clang)
	@command -v clang >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -q -y --no-install-recommends clang libclang-rt-14-dev; } || \
	{ echo 'clang is missing; run: sudo apt-get install -y clang libclang-rt-14-dev' >&2; exit 1; }
	FUZZ_SECONDS=$${FUZZ_SECONDS:-60} $(BIN)/pytest -o timeout=0 tests/fuzz

chaos: build ## Ten minutes of faults under guests that arrive (as root); the last line is the outcome as JSON
	PYTHONPATH=tests $(BIN)/python -m chaos

demo: build ## Migrate a guest on this host and show what happens
	$(BIN)/postcopyd demo

demo-qemu: build ## Migrate QEMU's guests by its own post-copy and by postcopyd, and compare
	$(BIN)/python bench/qemu_demo.py

$(PICTURES): pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	touch $@

bench: build $(PICTURES) ## Measure, at most 10 minutes; figures and pictures go into docs/
	$(BIN)/python bench/bench.py

bench-quick: build ## Measure in 90 s, with the same keys; docs/ stays as it is
	$(BIN)/python bench/bench.py --quick

bench-exits: build ## Measure exits against messages of a userfaultfd, at most 6 minutes; EXITS=--quick: 1 minute
	$(BIN)/python bench/exits.py $(EXITS)

docs: build ## Write the generated parts of docs/ and deploy/
	$(BIN)/python -m postcopyd.docs
	$(BIN)/python -c 'import postcopyd.config as c; print(c.render_example(), end="")' > deploy/postcopyd.toml

clean: ## Remove what was built, but not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f daemon/postcopyd/_native/*.so daemon/postcopyd/v1/*_pb2*.py daemon/postcopyd/v1/*.pyi
	find daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +
