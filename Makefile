# Everything runs in .venv, which `make` creates; nothing is installed elsewhere.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
# Test processes; tests use one thread each. A file stays in one of them: what its tests compile they share.
WORKERS ?= 2

.PHONY: demo test check slow versions examples bench bench-gpu results format clean

demo: .venv/train
	@echo "Training a small model: a few minutes, and half a minute more where kernels are compiled for the first time."
	$(BIN)/gateloop train --preset tiny --out $(OUT) --overwrite
	@echo
	@echo "Python from the model, after the prompt 'class Reader':"
	$(BIN)/gateloop generate $(OUT) --prompt "class Reader" --tokens 500 --temperature 0.9 --top-p 0.95 --seed 1

test: check
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: .venv/dev
	@echo "Installing lm-eval into .venv, where it is not there yet: a minute."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[harness]'
	$(BIN)/pytest -m slow

# The tests on the lowest, the locked and the newest versions: Python 3.10, 3.11 and 3.13 must be on the path. Hours, and
# several GB below .nox for each. Others: .venv/bin/nox --list.
versions: .venv/dev
	$(BIN)/nox

# The examples that train for minutes, in full; the tests run them with few steps.
examples: .venv/dev
	$(BIN)/python -u examples/filter_a_signal.py
	$(BIN)/python -u examples/classify_digits.py
	$(BIN)/python -u examples/classify_digits.py --model gru

# Figures of this machine: docs/results/cpu.{json,md,png}. Peers run in an environment of their own.
bench: .venv/dev .venv-peers/ready
	$(BIN)/gateloop bench --peers .venv-peers/bin/python --out docs/results > /dev/null

# Figures of this machine's GPU: docs/results/gpu.{json,md}; beside fla, accelerated-scan and mamba-ssm where installed.
bench-gpu: .venv/dev
	$(BIN)/python benchmarks/gpu.py

# Pages of docs/results from the rows beside them, to which benchmarks/language/plan.py and benchmarks/tasks.py add,
# from the kernels' block sizes and from the table of backends.
results: .venv/dev
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/gpu_roofline.py
	$(BIN)/python benchmarks/backends.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-peers runs build dist *.egg-info

$(BIN)/python:
	@echo "Making a virtual environment in .venv."
	$(PYTHON) -m venv .venv

.venv/train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch and what training needs into .venv: minutes the first time, a few GB on disk."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	@touch $@

# Modules are compiled when they are first imported: most never are.
.venv/dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch, JAX and what the tests need into .venv: minutes the first time, several GB on disk."
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[train,data,watch,jax,hf,export,examples,dev,trl]'
	@touch $@

.venv-peers/ready: constraints.txt Makefile
	@echo "Installing what is measured beside this library into .venv-peers: minutes the first time."
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt \
		gateloop-transformer==0.2.5 mambapy==1.2.0 transformers==5.23.0 torch numpy
	.venv-peers/bin/python -m pip install --quiet --no-deps minGRU-pytorch==0.2.1
	@touch $@
