# Two commands: `make demo` and `make test`. Both make .venv when it is missing or older than the project file.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test quick mutants lint docs llama lock audit clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/khanhllm demo

test: .venv/ready
	$(BIN)/pytest -n 2

mutants: .venv/ready
	$(BIN)/python scripts/mutants.py

quick: .venv/ready
	$(BIN)/pytest -n 2 -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python scripts/config_page.py
	$(BIN)/sphinx-build -W -n -q docs docs/_build

# llama.cpp itself, for the tests of exported files, which are skipped without it. Needs the network.
llama: .venv/ready
	$(BIN)/python scripts/llama_cpp.py

# Both need the network. torch is chosen by the machine (CPU, CUDA), so it and its libraries stand outside the lock.
lock:
	dir=$$(mktemp -d) && $(PYTHON) -m venv $$dir && $$dir/bin/pip install --quiet uv && \
	$$dir/bin/uv pip compile pyproject.toml --extra all --quiet --generate-hashes -c constraints.txt --universal --python-version 3.11 \
	  --no-annotate --no-header -o $$dir/all && $$dir/bin/python scripts/lock.py $$dir/all > requirements.lock; \
	status=$$?; rm -rf $$dir; exit $$status

audit:
	dir=$$(mktemp -d) && $(PYTHON) -m venv $$dir && $$dir/bin/pip install --quiet pip-audit && \
	grep '^torch==' constraints.txt > $$dir/torch.txt && \
	$$dir/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock -r $$dir/torch.txt; \
	status=$$?; rm -rf $$dir; exit $$status

clean:
	rm -rf .venv
