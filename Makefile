# `make demo`: see it work on embedded images. `make test`: run every test.
# Both make .venv and install what they need; python3 (3.10 or newer) is all that must be there.

PYTHON ?= python3
VENV := .venv
OUTPUT ?= output/demo

.PHONY: demo test lint clean

$(VENV)/.run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

demo: $(VENV)/.run
	$(VENV)/bin/python main_pretrain.py --demo --output_dir $(OUTPUT)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) output/demo
