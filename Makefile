# make demo | make test | make test-benchmarks | make check; each first creates what it needs in .venv, once per change of the requirements.
# make test-extended: more than ten thousand generated cases | make test-oldest: on the oldest supported versions |
# make audit: known vulnerabilities in the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
AUDIT := .venv-audit
# Test workers share the cores: one torch thread each, or they wait for one another.
WORKERS ?= 2
# Idle threads sleep: where other programs use the cores too, spinning ones make torch several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo test test-benchmarks test-extended test-oldest check audit

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

# The scripts in benchmarks, on tiny models.
test-benchmarks: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/tests -n $(WORKERS) --dist loadgroup

test-extended: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile extended \
		--hypothesis-show-statistics --durations 0 --timeout 0

# constraints.txt, but for the packages that constraints-oldest.txt names.
$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep '==' constraints-oldest.txt > $(OLDEST)/constraints.txt
	grep -v $$(sed 's/==.*/==/; s/^/-e ^/' $(OLDEST)/constraints.txt) constraints.txt >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

# What belongs to the newest versions stays out: PEFT's own tests and the notebooks.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not real_model' \
		--ignore tests/contract --ignore tests/test_notebooks.py

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'
	$(AUDIT)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip
