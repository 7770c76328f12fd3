# Builds and runs everything in .venv. Needs: Linux, make, Rust (cargo), Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
RUST := $(shell find crates -name '*.rs' -o -name 'Cargo.toml') Cargo.toml $(wildcard Cargo.lock)
NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
# A hang is in a system call: only a thread can tell where, and end it.
SUITE := -q --timeout 180 --timeout-method thread --durations 12
export VIRTUAL_ENV := $(CURDIR)/.venv
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Processes that the tests start would compile the package again, each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all quick demo bench test test-rust test-python test-unit test-faults test-system test-ordinary \
	test-seccomp test-old-kernels test-linux-6.1 test-linux-5.15 test-long \
	check check-rust check-python check-workflows kernels wheels docs clean

all: .venv/built

# The environment: what pyproject.toml lists for tests and development, maturin among it.
define REQUIREMENTS
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(r for r in extras["test"] + extras["dev"] if not r.startswith("fremap")), sep="\n")
endef
export REQUIREMENTS

# What one of pyproject.toml's dependency groups lists, for `make wheels` and `make docs`.
define GROUP
import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]], sep="\n")
endef
export GROUP

.venv/made-%: .venv/made pyproject.toml
	@$(BIN)/python -c "$$GROUP" $* >.venv/requirements-$*.txt
	$(BIN)/pip install --quiet -r .venv/requirements-$*.txt
	@touch $@

.venv/made: pyproject.toml
	@command -v cargo >/dev/null || { echo "fremap needs Rust: https://rustup.rs"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fremap needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@$(BIN)/python -c "$$REQUIREMENTS" >.venv/requirements.txt
	$(BIN)/pip install --quiet -r .venv/requirements.txt
	@touch $@

# The package, installed in place; Python sources need no rebuild, Rust sources do.
# pip would name each extra that was not asked for.
.venv/built: .venv/made pyproject.toml $(RUST)
	PIP_QUIET=1 $(BIN)/maturin develop --release --quiet
	@touch $@

# The shortest loop: what changed of Rust is compiled with little optimization, and the unit tests
# that do not take seconds run side by side. Such a build does not count as one for other targets.
# Python 3.12 and later warn of each fork in a process that has threads, as those of pytest-xdist do.
quick: $(if $(wildcard .venv/built),.venv/made,.venv/built)
	@$(MAKE) --no-print-directory --question .venv/built || \
		$(BIN)/maturin develop --profile quick --skip-install --quiet
	$(BIN)/pytest -q --numprocesses auto --timeout 60 -m 'not slow' \
		-W 'ignore:This process:DeprecationWarning' tests/unit

demo: .venv/built
	$(BIN)/fremap demo

bench: .venv/built
	$(BIN)/fremap bench remap nonblock protect read

# The suite three times: as whoever runs make, as an ordinary user (where that is not the same),
# and under a container's seccomp filter; and a part of it as two older kernels. The first has all
# tests. The others leave out what is the same for them (the markers "once" and "any_user" of
# tests/conftest.py) and try fewer of Hypothesis's examples.
AGAIN := $(SUITE) --examples 8 -m
RUNS := test-unit test-system test-faults test-ordinary test-seccomp test-rust test-old-kernels

# Side by side, unless make was told how many at once. Tests also wait for disks and for timers:
# two runs more than there are processors keep these busy.
test: .venv/built
	+@$(MAKE) --no-print-directory $(RUNS) $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,\
		--jobs=$(shell expr $$(nproc) + 2) --output-sync=target)

# Without optimization, as compiling takes longer than what it saves; arithmetic is checked.
test-rust:
ifdef NEXTEST
	+cargo nextest run -p fremap-core
	+cargo test -p fremap-core --doc --quiet
else
	+cargo test -p fremap-core --quiet
endif

# The first of these runs, in three parts of about the same length.
UNIT := python/fremap tests/cli tests/distributed tests/docs tests/provided tests/unit

test-python: test-system test-faults test-unit

test-unit: .venv/built
	$(BIN)/pytest $(SUITE) $(UNIT)

test-system: .venv/built
	$(BIN)/pytest $(SUITE) $(addprefix --ignore=,$(UNIT) tests/faults)

test-faults: .venv/built
	$(BIN)/pytest $(SUITE) tests/faults

test-ordinary: .venv/built
	$(BIN)/python tests/runners/as_ordinary_user.py $(AGAIN) 'not once and not any_user'

test-seccomp: .venv/built
	$(BIN)/python tests/runners/under_seccomp.py $(BIN)/pytest $(AGAIN) 'not once'

# What depends on the kernel, without the features that came after these two: not files of rows,
# nor the package's own locks. 6.1 differs from 5.15 in /dev/userfaultfd, and in dropping locked
# and collapsing small pages.
test-old-kernels: test-linux-5.15 test-linux-6.1

test-linux-5.15: DEPENDS := tests/origin tests/faults $(addprefix --ignore=tests/faults/test_,\
	fork_locks.py rows.py)
test-linux-6.1: DEPENDS := tests/origin $(addprefix tests/faults/test_,\
	forbidden.py fork.py limits.py locked_memory.py missing_features.py signal.py)
test-linux-6.1 test-linux-5.15: test-linux-%: .venv/built
	$(BIN)/python tests/runners/as_older_kernel.py $* $(BIN)/pytest $(AGAIN) 'not once' $(DEPENDS)

test-long: .venv/built
	$(BIN)/pytest $(SUITE) --long --examples 500 --timeout 1800
	$(MAKE) --no-print-directory test-old-kernels DEPENDS='tests/origin tests/faults'
	$(MAKE) --no-print-directory kernels

# The kernels of four Debians, in QEMU: hours where they are emulated. docs/kernels.md has the table.
kernels: .venv/built
	$(BIN)/python tests/kernels/boot.py --write

check: check-rust check-python check-workflows

check-rust: .venv/made
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

check-python: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict python/fremap tests/typing
	$(BIN)/stubtest fremap._core
	$(BIN)/python tests/docs/validate_docstrings.py

# GitHub's schema, and what is dangerous in a workflow.
check-workflows: .venv/made
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet .github

# The documentation as a site, in site/. A link that leads nowhere is an error.
docs: .venv/built .venv/made-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Everything that a release uploads, in dist/: the sdist, wheels of the stable ABI for Python 3.11
# and later, and wheels for free-threaded Python, on both processors. zig is the linker: it knows
# the symbols of the oldest glibc that a manylinux tag promises. The wheels are then checked,
# installed in bare environments, and run.
WHEEL_TARGETS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu
FREE_THREADED := python3.14t
MATURIN_WHEEL = $(BIN)/maturin build --release --zig --compatibility manylinux_2_17 --quiet --out dist

wheels: .venv/built .venv/made-wheels
	@! command -v rustup >/dev/null || rustup --quiet target add $(WHEEL_TARGETS)
	rm -rf dist
	$(BIN)/maturin sdist --out dist
	$(foreach target,$(WHEEL_TARGETS),PATH=$(CURDIR)/$(BIN):$$PATH $(MATURIN_WHEEL) --target $(target) \
		--interpreter $(BIN)/python && \
		PATH=$(CURDIR)/$(BIN):$$PATH $(MATURIN_WHEEL) --target $(target) \
		--interpreter $(FREE_THREADED) &&) true
	$(BIN)/python tests/runners/check_wheels.py dist

clean:
	rm -rf .venv target .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/fremap/*.so
