# The two commands of a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
# For instance PIP_FLAGS="--index-url ..." to choose where torch comes from.
PIP_FLAGS ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
DOCS_READY := $(VENV)/.installed-docs
# What the documentation site holds: pages, and what they link to.
DOCS   := README.md README.zh-CN.md CONTRIBUTING.md CHANGELOG.md LICENSE docs tests
# The packages' own tests and the walls, without files that draw hundreds of inputs or import transformers.
QUICK  := tests/pangu tests/megatron_ext tests/test_walls.py tests/test_mirror.py --ignore-glob=*fuzz* --ignore=tests/pangu/conversion/remote_code

.PHONY: demo test quick test-slow soak coverage check format docs install constraints clean

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

# A file's tests stay on one of the two workers, so that they share what they prepare.
quick: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --quick -r fE --durations 5 $(QUICK)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

soak: $(READY)
	$(BIN)/python tests/faults/soak.py

coverage: $(READY)
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term --cov-report=html:build/coverage

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/architecture.py check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY)
	rm -rf build/pages && mkdir -p build/pages
	ln -s $(addprefix $(CURDIR)/,$(DOCS)) build/pages
	$(BIN)/mkdocs build --strict

install: $(READY)

# The versions that are installed now, without the local part of torch's (+cpu), as those that `make` installs from now on.
constraints: $(DOCS_READY)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//; s/$$/; python_version >= "3.11"/' > constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python %d.%d found, 3.10 or newer expected: set PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
