# make demo | make test | make check; each first creates what it needs in .venv, once per change of the requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test workers share the cores: one torch thread each, or they wait for one another.
WORKERS ?= 2
# Idle threads sleep: where other programs use the cores too, spinning ones make torch several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo test check

env: $(VENV)/.installed-dev

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@echo "Installing lora-svd[$*] into $(VENV); about a minute."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python recipes/quickstart/prepare.py
	$(BIN)/lora-svd compress recipes/quickstart/quickstart.yaml

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
